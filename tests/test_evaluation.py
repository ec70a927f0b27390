"""COCO metrics: the same as pycocotools by hand, also where the original's own metric differed from it."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import run
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.coco import CocoDataset
from evaluation.evaluator import coco_metrics, evaluate, per_class_table, predict_dataset, write_coco_results
from inference import Predictor
from utils.distributed import Ranks
from utils.errors import UserError
from yolact import Yolact

SIZE = 100


def box_mask(x, y, w, h):
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    code = rle.encode(mask)
    return {"size": [SIZE, SIZE], "counts": code["counts"].decode()}


def truth(folder, annotations, images=2, categories=(1,)):
    """A data set of empty images; annotations are (image, category, box, crowd)."""
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
ONE, TWO = (0, 1, OBJECT, 0), (1, 1, OTHER, 0)  # objects in image 0 and 1
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
    for kind, path in zip(("bbox", "segm"), write_coco_results(tmp_path / "out.json", results), strict=True):
        written = json.loads(Path(path).read_text())  # a COCO server computes the same from the files
        assert list(metrics[kind].values()) == pytest.approx(by_hand(data, written, kind).tolist())


def test_no_detections_at_all_and_per_class(tmp_path):
    data = truth(tmp_path / "d", [(0, 2, OBJECT, 0), (0, 1, OTHER, 0)], categories=(2, 1))
    assert coco_metrics(data, [])["segm"]["AP"] == 0
    table = coco_metrics(data, [result(0, 1, OTHER, 0.9)], per_class=True)["per_class"]["segm"]
    assert table["c1"] == pytest.approx({"AP": 1, "AP50": 1, "precision": 1, "recall": 1})
    assert table["c2"]["AP"] == 0


def test_precision_and_recall_are_those_of_a_threshold(tmp_path):
    """Of two equal scores, one right, no threshold keeps the right one alone; recall is not rounded to hundredths."""
    places = [(x, 10, 15, 15) for x in (0, 20, 40)]
    data = truth(tmp_path / "d", [(0, 1, box, 0) for box in places])
    results = [result(0, 1, places[0], 0.9), result(0, 1, (70, 50, 9, 9), 0.9), result(0, 1, places[1], 0.8)]
    row = coco_metrics(data, results, per_class=True)["per_class"]["segm"]["c1"]
    assert (row["precision"], row["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    row = coco_metrics(data, results[:2], per_class=True)["per_class"]["segm"]["c1"]
    assert (row["precision"], row["recall"]) == (pytest.approx(1 / 2), pytest.approx(1 / 3))


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


def changed(data, tmp_path, **fields):
    """The same file with other values in its first annotation."""
    content = json.loads(data.path.read_text())
    content["annotations"][0] |= fields
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    return CocoDataset(path, data.image_dir)


def test_an_annotation_without_a_mask_is_an_object_for_boxes_and_a_region_to_ignore_for_masks(tmp_path):
    data = truth(tmp_path / "d", [(0, 1, OTHER, 0), ONE])
    other = changed(data, tmp_path, segmentation=None)
    metrics = coco_metrics(other, [result(*HIT), result(0, 1, OTHER, 0.9)])
    assert metrics["segm"]["AP"] == pytest.approx(1)  # the detection on its box is neither right nor wrong
    assert metrics["bbox"]["AP"] == pytest.approx(1)
    assert coco_metrics(other, [result(*HIT)])["segm"]["AP"] == pytest.approx(1)
    assert coco_metrics(other, [result(*HIT)])["bbox"]["AP"] == pytest.approx(0.505, abs=2e-3)
    assert "annotations without a usable mask: 1;" in metrics["notes"][0]


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [20, 20, 40, 0], None])
def test_an_empty_box_beside_a_mask_is_that_of_the_mask(tmp_path, box):
    metrics = coco_metrics(changed(truth(tmp_path / "d", [ONE]), tmp_path, bbox=box), [result(*HIT)])
    assert metrics["bbox"]["AP"] == pytest.approx(1)


def test_objects_of_an_image_that_cannot_be_read_are_missed(tmp_path):
    """Also if the file does not state its size. The masks are polygons, as a run-length encoding needs a size."""
    data = truth(tmp_path / "d", [ONE, TWO])
    wanted = coco_metrics(data, [result(*HIT)])
    content = json.loads(data.path.read_text())
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        del image["height"], image["width"]
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    data.path.write_text(json.dumps(content))
    data.image_path(1).write_bytes(b"broken")
    found = coco_metrics(CocoDataset(data.path, data.image_dir), [result(*HIT)])
    for kind in ("bbox", "segm"):
        assert 0 < wanted[kind]["AP"] < 0.6
        assert found[kind]["AP"] == pytest.approx(wanted[kind]["AP"])


def test_a_class_without_masks_is_in_the_table(tmp_path):
    data = truth(tmp_path / "d", [(0, 1, OTHER, 0), (1, 2, OBJECT, 0)], categories=(1, 2))
    metrics = coco_metrics(changed(data, tmp_path, segmentation=None), [result(0, 1, OTHER, 0.9)], per_class=True)
    assert [line.split()[:3] for line in per_class_table(metrics).splitlines()[1:]] == [
        ["c1", "1.000", "-"],
        ["c2", "0.000", "0.000"],
    ]


@pytest.mark.parametrize("area", [None, "n/a", 0, 1, 9e8])
def test_wrong_and_missing_areas_do_not_move_size_classes(tmp_path, area):
    """An object of 30x30 pixels is small, whatever its stated area or its box says."""
    data = truth(tmp_path / "d", [ONE])
    other = changed(data, tmp_path, area=area, bbox=[0, 0, 100, 100])
    metrics = coco_metrics(other, [result(*HIT)])
    assert metrics["segm"]["APs"] == pytest.approx(1)
    assert metrics["segm"]["APm"] == metrics["segm"]["APl"] == -1
    assert any("areas that differ from the mask" in note for note in metrics["notes"]) == (area in (0, 1, 9e8))


def test_stated_areas_that_agree_are_kept(tmp_path):
    """1100 is on the other side of COCO's limit of 32 x 32 = 1024 than the mask's 900, as a polygon's may be."""
    other = changed(truth(tmp_path / "d", [ONE]), tmp_path, area=1100)
    metrics = coco_metrics(other, [result(*HIT)])
    assert (metrics["segm"]["APs"], metrics["segm"]["APm"]) == (-1, pytest.approx(1))


def test_exact_copies_are_named_and_ap_is_given_without_them(tmp_path):
    data = truth(tmp_path / "d", [ONE, TWO, ONE])
    metrics = coco_metrics(data, [result(*HIT), result(1, 1, OTHER, 0.9)])
    assert metrics["segm"]["AP"] == pytest.approx(by_hand(data, [result(*HIT), result(1, 1, OTHER, 0.9)], "segm")[0])
    assert metrics["segm"]["AP"] < 0.7
    assert metrics["without_copies"]["segm"]["AP"] == pytest.approx(1)
    (note,) = metrics["notes"]
    assert "truth.json: annotations that repeat another one of their image: 1;" in note
    assert "mask AP 1.000" in note
    assert "without_copies" not in coco_metrics(truth(tmp_path / "e", [ONE]), [result(*HIT)])


def test_an_image_without_a_size_that_cannot_be_read_does_not_end_the_evaluation(dataset, small_config):
    """Sizes come from the images that were read; nothing is read a second time."""
    content = json.loads(dataset.read_text())
    for image in content["images"]:
        del image["height"], image["width"]
    dataset.write_text(json.dumps(content))
    (dataset.parent / "images/image_2.png").write_bytes(b"broken")
    data = CocoDataset(dataset, dataset.parent / "images")
    predictor = Predictor(Yolact(small_config), "cpu", score_threshold=0.0, top_k=5)
    metrics = evaluate(predictor, data, progress=False)
    (problem,) = metrics["problems"]
    assert "image_2.png: cannot be read as an image (image 16" in problem
    assert metrics["bbox"]["AP"] >= 0


def test_problems_of_every_process_reach_the_main_one(dataset, small_config, monkeypatch):
    """Each process reads its own share; what it reports is gathered with its results."""
    (dataset.parent / "images/image_2.png").write_bytes(b"broken")
    data = CocoDataset(dataset, dataset.parent / "images")
    predictor = Predictor(Yolact(small_config), "cpu", top_k=5)
    monkeypatch.setattr(Ranks, "gather", lambda self, items: items)
    ranks = [Ranks(torch.device("cpu"), rank, 2) for rank in range(2)]
    shares = [predict_dataset(predictor, data, progress=False, ranks=r) for r in ranks]
    assert [len(share.problems) for share in shares] == [1, 0]
    assert sorted([*shares[0].sizes, *shares[1].sizes]) == sorted(set(data.image_ids) - {16})


def test_evaluation_names_unreadable_images_and_exits_with_1(dataset, weights):
    (dataset.parent / "images/image_2.png").write_bytes(b"broken")
    args = ["--weights", weights, "--device", "cpu", "--annotations", dataset, "--image_dir", dataset.parent / "images"]
    out = run("eval.py", *args, code=1)
    assert "image_2.png: cannot be read as an image" in out
    assert "counts as an image without detections" in out
