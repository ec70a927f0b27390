"""COCO metrics: the same as pycocotools by hand, also where the original's own metric differed from it."""

from __future__ import annotations

import contextlib
import io
import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.coco import CocoDataset
from evaluation.evaluator import coco_metrics, evaluate
from inference import Predictor
from utils.errors import UserError
from yolact import Yolact

SIZE = 100


def box_mask(x, y, w, h):
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    code = rle.encode(mask)
    return {"size": [SIZE, SIZE], "counts": code["counts"].decode()}


def truth(folder, annotations, images=2, categories=(1,)):
    """A data set of empty pictures; annotations are (image, category, box, crowd)."""
    folder.mkdir(exist_ok=True)
    for i in range(images):
        cv2.imwrite(str(folder / f"{i}.png"), np.zeros((SIZE, SIZE, 3), np.uint8))
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(images)],
        "categories": [{"id": c, "name": f"c{c}"} for c in categories],
        "annotations": [
            {"id": k + 1, "image_id": i, "category_id": c, "bbox": list(b), "area": b[2] * b[3], "iscrowd": crowd,
             "segmentation": box_mask(*b)}
            for k, (i, c, b, crowd) in enumerate(annotations)
        ],
    }  # fmt: skip
    (folder / "truth.json").write_text(json.dumps(content))
    return CocoDataset(folder / "truth.json", folder)


def result(image, category, box, score):
    return {
        "image_id": image,
        "category_id": category,
        "bbox": list(map(float, box)),
        "score": score,
        "segmentation": box_mask(*box),
    }


OBJECT, OTHER, TINY, CROWD = (10, 10, 30, 30), (60, 60, 30, 30), (80, 5, 3, 3), (50, 50, 45, 45)
ONE, TWO = (0, 1, OBJECT, 0), (1, 1, OTHER, 0)  # objects in picture 0 and 1
HIT = (0, 1, OBJECT, 0.8)
# What there is, what is found, and the mask AP that COCOeval gives; the original's metric says otherwise for the first
# five.
CASES = {
    "a crowd hit by a better detection": ([ONE, (0, 1, CROWD, 1)], [(0, 1, OTHER, 0.9), HIT], 1.0),
    "objects but no detection": ([ONE, TWO], [HIT], 0.505),
    "a missed object of 3 pixels": ([ONE, (0, 1, TINY, 0)], [HIT], 0.505),
    "a false positive where nothing is": ([ONE], [(1, 1, OTHER, 0.9), HIT], 0.5),
    "a class without ground truth": ([ONE], [HIT, (0, 2, OTHER, 0.8)], 1.0),
    "all found": ([ONE, TWO], [HIT, (1, 1, OTHER, 0.9)], 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_five_cases_of_the_original(tmp_path, case):
    annotations, found, wanted = CASES[case]
    data = truth(tmp_path / "data", annotations, categories=(1, 2))
    metrics = coco_metrics(data, [result(*one) for one in found])
    assert metrics["segm"]["AP"] == pytest.approx(wanted, abs=2e-3)
    assert metrics["bbox"]["AP"] == pytest.approx(wanted, abs=2e-3)


def by_hand(data, results, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(data.path))
        coco.dataset.setdefault("info", {})
        evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_equal_to_pycocotools_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    boxes = [(int(x), int(y), 20, 25) for x, y in rng.integers(0, 70, (8, 2))]
    data = truth(tmp_path / "d", [(i % 2, 1 + i % 3, b, 0) for i, b in enumerate(boxes)], categories=(1, 2, 3))
    moved = [
        (x + int(dx), y + int(dy), w, h)
        for (x, y, w, h), (dx, dy) in zip(boxes, rng.integers(0, 6, (8, 2)), strict=True)
    ]
    results = [result(i % 2, 1 + i % 3, b, float(rng.random())) for i, b in enumerate(moved)]
    metrics = coco_metrics(data, results)
    assert 0 < metrics["segm"]["AP"] < 1
    for kind in ("bbox", "segm"):
        stripped = [{k: v for k, v in r.items() if kind == "segm" or k != "segmentation"} for r in results]
        assert list(metrics[kind].values()) == pytest.approx(by_hand(data, stripped, kind).tolist())


def test_masks_are_ranked_by_their_own_score(tmp_path):
    data = truth(tmp_path / "d", [(0, 1, OBJECT, 0)])
    results = [result(0, 1, OBJECT, 0.5) | {"mask_score": 0.9}, result(0, 1, OTHER, 0.8) | {"mask_score": 0.1}]
    metrics = coco_metrics(data, results)
    assert metrics["bbox"]["AP"] == pytest.approx(0.5, abs=1e-3)
    assert metrics["segm"]["AP"] == pytest.approx(1.0)


def test_no_detections_at_all_and_per_class(tmp_path):
    data = truth(tmp_path / "d", [(0, 2, OBJECT, 0), (0, 1, OTHER, 0)], categories=(2, 1))
    assert coco_metrics(data, [])["segm"]["AP"] == 0
    table = coco_metrics(data, [result(0, 1, OTHER, 0.9)], per_class=True)["per_class"]["segm"]
    assert table["c1"] == pytest.approx({"AP": 1, "AP50": 1, "precision": 1, "recall": 1})
    assert table["c2"]["AP"] == 0


def test_the_whole_way_and_classes_that_do_not_fit(dataset, small_config, tmp_path):
    data = CocoDataset(dataset, dataset.parent / "images")
    predictor = Predictor(Yolact(small_config), "cpu", score_threshold=0.0, top_k=5)
    metrics = evaluate(predictor, data, max_images=3, progress=False)
    assert {r["image_id"] for r in metrics["results"]} == set(data.image_ids[:3])
    assert {r["category_id"] for r in metrics["results"]} <= {7, 3}
    assert "boxes" in metrics["table"]
    other = truth(tmp_path / "other", [(0, 1, OBJECT, 0)])
    with pytest.raises(UserError, match="disc"):
        evaluate(predictor, other)
