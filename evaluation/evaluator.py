"""Evaluate a predictor on a data set with pycocotools' COCOeval. Both train.py and eval.py use this."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from config import Config
from data.annotation import Annotation, to_rle
from data.coco import CocoDataset, valid_size
from utils.distributed import ALONE, Ranks
from utils.errors import UserError, join_names
from utils.files import write_json

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
IOU_TYPES = {"bbox": "boxes", "segm": "masks"}
# Beside a GPU: threads that read images and encode masks, and images in a batch and read in advance; not yet measured.
THREADS, BATCH = 4, 8
LONGEST = 2**16  # pixels of an image of unknown size
Sizes = dict[int, tuple[int, int]]


class Segmenter(Protocol):
    """What can be evaluated: a `Predictor`, or anything that works like one, such as the tiles of tools.tiles."""

    config: Config

    def published(self) -> Segmenter:
        """Return a predictor with the configuration's own detection setting."""
        ...

    def __call__(self, images: Any, /) -> Any:
        """Return the `Detections` of an image, uint8 BGR [H, W, 3], and on a GPU those of a list of images."""
        ...


@dataclass
class CocoResults:
    """COCO results for a data set; image and category ids are those of its annotation file."""

    results: list[dict[str, Any]] = field(default_factory=list)
    sizes: Sizes = field(default_factory=dict)  # height and width of every image that was read, by its id
    problems: list[str] = field(default_factory=list)  # messages about images that could not be read


def predict_dataset(
    predictor: Segmenter,
    dataset: CocoDataset,
    max_images: int | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> CocoResults:
    """Run the predictor, with its configuration's own detection setting, on the first `max_images`, or on all.

    An image that cannot be read counts as one without detections. With several processes the images are distributed
    among them; the main process returns all results, the others an empty `CocoResults`.

    Raises:
        UserError: if the classes of the data set and the model differ.
    """
    check_classes(dataset, predictor.config)
    predictor = predictor.published()
    found, encoded = CocoResults(), list[Future[list[dict[str, Any]]]]()
    indices = range(len(dataset))[:max_images][ranks.rank :: ranks.size]
    # The model may have been trained on a file with other category ids for the same classes.
    to_file = dict(zip(predictor.config.category_ids, dataset.category_ids, strict=True))
    shown = tqdm(total=len(indices), desc="evaluating", disable=None if progress and ranks.is_main else True)
    backend: Any = getattr(predictor, "backend", None)  # tiles have none
    on_gpu = backend is not None and backend.device.type == "cuda"  # on a CPU, threads would compete with the network
    batch_size = BATCH if on_gpu and not backend.compile_seconds else 1  # compiled networks are so for one image
    # Images wait in one queue with the masks of earlier ones, so that few detections are in memory.
    with ThreadPoolExecutor(THREADS) if on_gpu else InThisThread() as pool, shown:
        images = zip((dataset.image_ids[index] for index in indices), _read_ahead(pool, dataset, indices), strict=True)
        while batch := list(itertools.islice(images, batch_size)):
            found.problems += [str(image) for _, image in batch if isinstance(image, UserError)]
            read = {image_id: image for image_id, image in batch if not isinstance(image, UserError)}
            found.sizes |= {image_id: image.shape[:2] for image_id, image in read.items()}
            detected = predictor(list(read.values())) if batch_size > 1 else map(predictor, read.values())
            for image_id, detections in zip(read, detected, strict=True):
                encoded.append(pool.submit(detections.to_coco, image_id))
            shown.update(len(batch))
    for future in encoded:
        found.results += [result | {"category_id": to_file[result["category_id"]]} for result in future.result()]
    sizes = dict(ranks.gather(list(found.sizes.items())))
    return CocoResults(ranks.gather(found.results), sizes, ranks.gather(found.problems))


class InThisThread(Executor):
    """Runs what it is given at once."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def _read_ahead(pool: Executor, dataset: CocoDataset, indices: Sequence[int]) -> Iterator[np.ndarray | UserError]:
    """Yield the images in order, or the error of one that cannot be read, and read the next BATCH meanwhile."""

    def read(index: int) -> np.ndarray | UserError:
        try:
            return dataset.read_image(index)
        except UserError as error:
            return error

    reading = deque[Future[np.ndarray | UserError]]()
    for index in indices:
        reading.append(pool.submit(read, index))
        if len(reading) > BATCH:
            yield reading.popleft().result()
    yield from (future.result() for future in reading)


def evaluate(
    predictor: Segmenter,
    dataset: CocoDataset,
    max_images: int | None = None,
    per_class: bool = False,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Compute the COCO metrics of a predictor on a data set.

    Args:
        max_images: evaluate only the first images of the file.
        per_class: also compute AP, AP50, precision and recall for each class.

    Returns:
        A dictionary in the main process, and None in the others. "bbox" and "segm" map METRICS to values in 0..1, or
        to -1 if there is no ground truth, as in COCOeval. "table" is COCOeval's text, "results" the COCO results,
        "problems" messages about unreadable images, "sizes" maps the id of each image that was read to its size, and
        "notes" are messages about the annotations. "per_class" is present on request, and "without_copies" (metrics
        without repeated annotations) if there are any.

    Raises:
        UserError: if the classes of the data set and the model differ.
    """
    prediction = predict_dataset(predictor, dataset, max_images, progress, ranks)
    if not ranks.is_main:
        return None
    metrics = coco_metrics(dataset, prediction.results, max_images, per_class, prediction.sizes)
    found = {"results": prediction.results, "problems": prediction.problems, "sizes": prediction.sizes}
    return {**found, **metrics}


def check_classes(dataset: CocoDataset, config: Config, where: str = "in the weights") -> str:
    """Give the classes of a data set the labels that they have in `config`; return a note if that changes something.

    Raises UserError, which shows both lists of classes, if the file has a class that `config` does not have.
    """
    names = dataset.class_names
    if names == config.class_names:
        return ""
    if set(names) <= set(config.class_names) and len(set(names)) == len(names):
        dataset.adopt_classes(config.class_names)
        matched = f"matched by name with the {config.num_classes} {where}"
        return f"{dataset.path}: its classes ({join_names(names)}) are {matched}"
    rows = [f"{'label':>5}  {'in the file':<24}  {where}"]
    for label, (left, right) in enumerate(itertools.zip_longest(names, config.class_names, fillvalue="-")):
        rows.append(f"{label:>5}  {left:<24}  {right}{'  <' if left != right else ''}")
    advice = "the names of all of its categories have to be there"
    raise UserError("\n".join([f"{dataset.path}: its classes differ from those {where}; {advice}", *rows]))


def coco_metrics(
    dataset: CocoDataset,
    results: list[dict[str, Any]],
    max_images: int | None = None,
    per_class: bool = False,
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """Return COCOeval's metrics for COCO results. Masks are ranked by their "mask_score" if they have one.

    Args:
        sizes: (height, width) of images by image id, for images whose size the file does not give.

    Returns:
        The dictionary of `evaluate` without "results", "problems" and "sizes".
    """
    metrics: dict[str, Any] = {"table": ""}
    image_ids = list(dataset.image_ids[:max_images])
    for drop_duplicates in (False, True) if dataset.num_copies else (False,):
        truth = GroundTruth(dataset, sizes or {}, drop_duplicates)
        metrics.setdefault("notes", truth.notes())
        target = metrics.setdefault("without_copies", {}) if drop_duplicates else metrics
        for kind, title in IOU_TYPES.items():
            evaluation, table = _coco_eval(truth.to_coco(kind), _scored(results, kind), kind, image_ids)
            target[kind] = dict(zip(METRICS, map(float, evaluation.stats), strict=True))
            if not drop_duplicates:
                metrics["table"] += f"{title}\n{table}"
                if per_class:
                    metrics.setdefault("per_class", {})[kind] = _per_class(evaluation, dataset)
    if dataset.num_copies:
        box, mask = (metrics["without_copies"][kind]["AP"] for kind in IOU_TYPES)
        metrics["notes"].append(
            f"{dataset.path}: annotations that repeat another one of their image: {dataset.num_copies}; without them "
            f"box AP is {box:.3f} and mask AP {mask:.3f}"
        )
    return metrics


class GroundTruth:
    """The ground truth in the form that pycocotools needs: integer ids, valid areas, and masks that can be decoded."""

    def __init__(self, dataset: CocoDataset, sizes: Sizes, drop_duplicates: bool = False):
        self.dataset = dataset
        self.images: list[dict[str, Any]] = []
        self.annotations: list[list[Annotation]] = []  # of each image
        for index, image_id in enumerate(dataset.image_ids):
            height, width = dataset.stated_size(index) or sizes.get(image_id) or _size_on_disk(dataset, index)
            self.images.append({"id": image_id, "height": height, "width": width})
            self.annotations.append(dataset.parsed(index, (height, width), drop_duplicates))

    def notes(self) -> list[str]:
        """Return messages about annotations that are ignored or corrected."""
        path, notes = self.dataset.path, []
        without_mask = sum(a.segmentation is None for listed in self.annotations for a in listed)
        if without_mask:
            notes.append(f"{path}: annotations without a usable mask: {without_mask}; mask AP ignores their regions")
        pairs = zip(self.images, self.annotations, strict=True)
        wrong = sum(a.area(image["height"], image["width"])[1] for image, listed in pairs for a in listed)
        if wrong:
            notes.append(
                f"{path}: areas that differ from the mask's by more than a factor of two: {wrong}; the mask's are used "
                "for AP of small, medium and large objects"
            )
        return notes

    def to_coco(self, kind: str) -> COCO:
        """Return the ground truth for "bbox" or "segm".

        For "bbox", an annotation without a usable mask is an object like any other. For "segm", its box becomes a crowd
        region, as in training: detections there are ignored, because no mask could match and they may be correct.
        """
        entries: list[dict[str, Any]] = []
        for image, listed in zip(self.images, self.annotations, strict=True):
            height, width = image["height"], image["width"]
            for annotation in listed:
                segmentation, crowd = annotation.segmentation, annotation.crowd
                if segmentation is None:
                    if annotation.box is None:
                        continue
                    x1, y1, x2, y2 = annotation.box
                    segmentation = to_rle([[x1, y1, x2, y1, x2, y2, x1, y2]], height, width)
                    crowd = crowd or kind == "segm"
                box = annotation.stated_box
                if box is None or min(box[2:]) <= 0:  # some tools write zeros beside a mask
                    box = rle.toBbox(to_rle(segmentation, height, width)).tolist()
                entries.append(
                    {
                        "id": len(entries) + 1,  # COCOeval treats a match with id 0 as no match
                        "image_id": image["id"],
                        "category_id": self.dataset.category_ids[annotation.label],
                        "iscrowd": int(crowd),
                        "segmentation": segmentation,
                        "bbox": box,
                        "area": annotation.area(height, width)[0],
                    }
                )
        named = zip(self.dataset.category_ids, self.dataset.class_names, strict=True)
        categories = [{"id": i, "name": name} for i, name in named]
        truth = COCO()
        truth.dataset = {"info": {}, "images": self.images, "annotations": entries, "categories": categories}
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth


def _size_on_disk(dataset: CocoDataset, index: int) -> tuple[int, int]:
    """Return the size of an image file.

    If it cannot be read, its objects still count: the size is that of a run-length encoding, or what they extend to.
    """
    with contextlib.suppress(UserError):
        height, width = dataset.read_image(index).shape[:2]
        return height, width
    for entry in dataset.annotations(index):
        code = entry.get("segmentation")
        size = code.get("size") if isinstance(code, dict) else None
        if isinstance(size, list) and len(size) == 2 and (valid := valid_size(*size)):
            return valid
    boxes = [annotation.box for annotation in dataset.parsed(index, (LONGEST, LONGEST)) if annotation.box]
    x, y = np.ceil(np.max([box[2:] for box in boxes], axis=0)).astype(int).tolist() if boxes else (1, 1)
    return y, x


def _scored(results: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return results for "bbox" or "segm" with only that geometry and the score that ranks it.

    COCO.loadRes takes the area from the box if a result has one, so mask results must not have boxes.
    """
    dropped = "segmentation" if kind == "bbox" else "bbox"
    return [
        {k: v for k, v in r.items() if k != dropped}
        | {"score": r["score"] if kind == "bbox" else r.get("mask_score", r["score"])}
        for r in results
    ]


def write_coco_results(path: Path, results: list[dict[str, Any]]) -> list[str]:
    """Write COCO results beside `path`, boxes as .bbox.json and masks as .segm.json, as COCO's server takes them.

    Each file has the scores that rank its kind; with both in one entry, a server would rank masks by the box's score.
    """
    paths = []
    for kind in IOU_TYPES:
        write_json(path.with_suffix(f".{kind}.json"), _scored(results, kind))
        paths.append(str(path.with_suffix(f".{kind}.json")))
    return paths


def _coco_eval(truth: COCO, scored: list[dict[str, Any]], kind: str, image_ids: list[int]) -> tuple[COCOeval, str]:
    """Run COCOeval; return the evaluation and its table as text."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        if scored:
            found = truth.loadRes(scored)
        else:  # pycocotools' loadRes does not accept an empty list
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, kind)
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        log.truncate(0)  # drop the progress messages, so that only the table remains
        log.seek(0)
        evaluation.summarize()
    return evaluation, log.getvalue()


def _per_class(evaluation: COCOeval, dataset: CocoDataset) -> dict[str, dict[str, float]]:
    """Return AP, AP50, and precision and recall at the best F1 for IoU 0.5, of every class with ground truth."""
    averaged = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class] for all areas, 100 detections
    order = list(evaluation.params.catIds)  # COCOeval sorts the ids
    # One entry for each class, range of areas and image, in this order; the first range is that of all areas.
    matches = np.array(evaluation.evalImgs, dtype=object).reshape(len(order), -1, len(evaluation.params.imgIds))
    table = {}
    for name, category_id in zip(dataset.class_names, dataset.category_ids, strict=True):
        values = averaged[:, :, order.index(category_id)]
        if (values < 0).all():
            continue
        precision, recall = _best_point([entry for entry in matches[order.index(category_id), 0] if entry])
        table[name] = {
            "AP": float(values.mean()),
            "AP50": float(values[0].mean()),
            "precision": precision,
            "recall": recall,
        }
    return table


def _best_point(images: list[dict[str, Any]]) -> tuple[float, float]:
    """Return precision and recall at the score threshold with the best F1, from COCOeval's matches at IoU 0.5.

    These are the numbers of a user who chooses that threshold; COCOeval's own precision is interpolated.
    """
    scores = np.concatenate([image["dtScores"] for image in images])
    correct = np.concatenate([image["dtMatches"][0] > 0 for image in images])
    used = ~np.concatenate([image["dtIgnore"][0] for image in images]).astype(bool)
    objects = sum(int((np.asarray(image["gtIgnore"]) == 0).sum()) for image in images)
    ranked = np.argsort(-scores[used], kind="stable")
    scores, correct = scores[used][ranked], np.cumsum(correct[used][ranked])
    f1 = 2 * correct / (np.arange(1, len(correct) + 1) + objects)
    f1[:-1][scores[1:] == scores[:-1]] = -1  # a threshold does not separate equal scores
    if not len(f1):
        return 0.0, 0.0
    best = int(f1.argmax())
    return float(correct[best] / (best + 1)), float(correct[best] / objects)


def per_class_table(metrics: dict[str, Any]) -> str:
    """Return the "per_class" metrics as lines of text."""
    lines = [f"{'class':<24}{'box AP':>8}{'mask AP':>9}{'AP50':>8}{'precision':>11}{'recall':>8}"]
    for name, box in metrics["per_class"]["bbox"].items():
        row = metrics["per_class"]["segm"].get(name, {})  # a class may have no mask
        values = [box["AP"], *(row.get(key, -1) for key in ("AP", "AP50", "precision", "recall"))]
        texts = (f"{value:.3f}" if value >= 0 else "-" for value in values)
        lines.append(f"{name:<24}" + "".join(f"{v:>{w}}" for v, w in zip(texts, (8, 9, 8, 11, 8), strict=True)))
    return "\n".join(lines)
