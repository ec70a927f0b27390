"""A data set in, COCO metrics out: pycocotools' COCOeval over all images of the file, in training as in evaluation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from data.annotation import as_id, is_crowd, normalise_segmentation, stated_box, to_rle
from data.coco import CocoDataset
from data.errors import UserError
from engine.distributed import Ranks
from engine.predictor import Predictor

ALONE = Ranks(torch.device("cpu"))
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def predict_dataset(
    predictor: Predictor,
    dataset: CocoDataset,
    max_images: int | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
    unreadable: Callable[[str], Any] | None = None,
) -> list[dict[str, Any]]:
    """COCO results of the whole data set, or of its first `max_images` pictures, with the ids of its file.

    Several processes take turns; the main one gets the results of all, the others none.

    Raises UserError when the file's classes are not the model's, or a photo cannot be used; with `unreadable`, that is
    told what is wrong with the photo, which then has no detections.
    """
    if dataset.class_names != predictor.config.class_names:
        raise UserError(
            f"{dataset.path}: its classes are not those of the weights\n{compare_classes(dataset, predictor.config)}"
        )
    results: list[dict[str, Any]] = []
    indices = range(len(dataset))[:max_images][ranks.rank :: ranks.size]
    for index in tqdm(indices, desc="evaluating", disable=None if progress and ranks.main else True):
        try:
            image = dataset.read_image(index)
        except UserError as error:
            if unreadable is None:
                raise
            unreadable(str(error))
            continue
        results += predictor(image).to_coco(dataset.image_ids[index])
    # The weights may know the same classes by other ids.
    to_file = dict(zip(predictor.config.category_ids, dataset.category_ids, strict=True))
    for result in results:
        result["category_id"] = to_file[result["category_id"]]
    return ranks.gather(results)


def evaluate(
    predictor: Any,
    dataset: CocoDataset,
    max_images: int | None = None,
    per_class: bool = False,
    progress: bool = True,
    ranks: Ranks = ALONE,
    unreadable: Callable[[str], Any] | None = None,
) -> dict[str, Any] | None:
    """{"bbox": {"AP": ..., ...}, "segm": ..., "table": text, "results": COCO results}, and "per_class" if asked for.

    Values are 0..1, and -1 where there is nothing to measure, as COCOeval has it. Raises UserError when the data set's
    classes are not the model's; see predict_dataset for `unreadable`. Of several processes the main one alone gets the
    metrics, the others None.
    """
    results = predict_dataset(predictor, dataset, max_images, progress, ranks, unreadable)
    if not ranks.main:
        return None
    return {"results": results, **coco_metrics(dataset, results, max_images, per_class)}


def compare_classes(dataset: CocoDataset, config: Any) -> str:
    """The classes of a file and those of a model side by side, those that differ marked."""
    rows = [f"{'label':>5}  {'in the file':<24}  in the weights"]
    for label in range(max(len(dataset.class_names), config.num_classes)):
        left = dataset.class_names[label] if label < len(dataset.class_names) else "-"
        right = config.class_names[label] if label < config.num_classes else "-"
        rows.append(f"{label:>5}  {left:<24}  {right}{'  <' * (left != right)}")
    return "\n".join(rows)


def coco_metrics(
    dataset: CocoDataset, results: list[dict[str, Any]], max_images: int | None = None, per_class: bool = False
) -> dict[str, Any]:
    """COCOeval's numbers for COCO results: masks are ranked by their "mask_score" where there is one."""
    truth = ground_truth(dataset)
    metrics: dict[str, Any] = {"table": ""}
    for kind in ("bbox", "segm"):
        scored = [
            {k: v for k, v in r.items() if k != ("segmentation" if kind == "bbox" else "bbox")}
            | {"score": r["score"] if kind == "bbox" else r.get("mask_score", r["score"])}
            for r in results
        ]
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            found = truth.loadRes(scored) if scored else _nothing(truth)
            evaluation = COCOeval(truth, found, kind)
            evaluation.params.imgIds = dataset.image_ids[:max_images]
            evaluation.evaluate()
            evaluation.accumulate()
            log.truncate(0)
            log.seek(0)
            evaluation.summarize()
        metrics[kind] = dict(zip(METRICS, map(float, evaluation.stats), strict=True))
        metrics["table"] += f"{'boxes' if kind == 'bbox' else 'masks'}\n{log.getvalue()}"
        if per_class:
            metrics.setdefault("per_class", {})[kind] = _per_class(evaluation, dataset)
    return metrics


def ground_truth(dataset: CocoDataset) -> COCO:
    """The annotation file as pycocotools wants it: numbers for ids, areas, and masks that decode."""
    images, annotations = [], []
    for index in range(len(dataset)):
        height, width = dataset.stated_size(index) or dataset.read_image(index).shape[:2]
        images.append({"id": dataset.image_ids[index], "height": height, "width": width})
        for annotation in dataset.annotations(index):
            segmentation = normalise_segmentation(annotation.get("segmentation"), height, width)
            entry = {
                "id": len(annotations) + 1,
                "image_id": dataset.image_ids[index],
                "category_id": as_id(annotation["category_id"], dataset.path),
                "iscrowd": int(is_crowd(annotation)),
                "segmentation": segmentation or [[0.0] * 6],
            }
            entry["bbox"] = stated_box(annotation) or rle.toBbox(to_rle(entry["segmentation"], height, width)).tolist()
            entry["area"] = float(annotation.get("area") or entry["bbox"][2] * entry["bbox"][3])
            annotations.append(entry)
    categories = [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.class_names, strict=True)]
    truth = COCO()
    truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _nothing(truth: COCO) -> COCO:
    """No detections at all, which pycocotools' loadRes does not take."""
    found = COCO()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found


def _per_class(evaluation: COCOeval, dataset: CocoDataset) -> dict[str, dict[str, float]]:
    """AP, AP50, and at IoU 0.5 the best F1 with its precision and recall, for every class with ground truth."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class
    recall_steps = evaluation.params.recThrs
    table = {}
    for k, name in enumerate(dataset.class_names):
        values = precision[:, :, dataset_class(evaluation, dataset, k)]
        if (values < 0).all():
            continue
        at_half = values[0]
        f1 = 2 * at_half * recall_steps / np.maximum(at_half + recall_steps, 1e-9)
        best = int(f1.argmax())
        table[name] = {
            "AP": float(values.mean()),
            "AP50": float(at_half.mean()),
            "precision": float(at_half[best]),
            "recall": float(recall_steps[best]),
        }
    return table


def dataset_class(evaluation: COCOeval, dataset: CocoDataset, label: int) -> int:
    """Where COCOeval, which sorts the ids, has the class with this label."""
    return list(evaluation.params.catIds).index(dataset.category_ids[label])


def per_class_table(metrics: dict[str, Any]) -> str:
    """The "per_class" metrics as lines of text."""
    lines = [f"{'class':<24}{'box AP':>8}{'mask AP':>9}{'AP50':>8}{'precision':>11}{'recall':>8}"]
    boxes = metrics["per_class"]["bbox"]
    for name, row in metrics["per_class"]["segm"].items():
        values = [boxes.get(name, {}).get("AP", -1), row["AP"], row["AP50"], row["precision"], row["recall"]]
        lines.append(f"{name:<24}" + "".join(f"{v:>{w}.3f}" for v, w in zip(values, (8, 9, 8, 11, 8), strict=True)))
    return "\n".join(lines)
