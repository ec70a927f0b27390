from __future__ import annotations

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from conftest import make_dataset, run, train_args
from test_data import edit

from config import get_config
from data.audit import audit, quick_audit
from data.coco import CocoDataset
from evaluation.evaluator import GroundTruth


def findings(path, **settings):
    dataset = CocoDataset(path, path.parent / "images")
    report = audit(dataset, get_config("yolact_r50", **settings))
    return {finding.kind: finding for finding in report.findings}


def test_nothing_is_wrong(dataset):
    assert findings(dataset) == {}
    report = audit(CocoDataset(dataset, dataset.parent / "images"), get_config("yolact_r50"))
    assert not report.errors
    assert (report.images, report.negatives, report.objects) == (8, 1, 14)
    assert sum(row["objects"] for row in report.classes) == 14


def swap_sizes(content):
    for image in content["images"]:
        image["width"], image["height"] = image["height"], image["width"]


def shift_polygons(content):
    for annotation in content["annotations"][::2]:
        annotation["segmentation"] = [[v + 40 for v in annotation["segmentation"][0]]]


def shrink_objects(content):
    for annotation in content["annotations"]:
        x, y = annotation["bbox"][:2]
        annotation |= {"bbox": [x, y, 2, 2], "segmentation": [[x, y, x + 2, y, x + 2, y + 2, x, y + 2]]}


def empty_masks(content):
    x, y = content["annotations"][0]["bbox"][:2]
    content["annotations"][0]["segmentation"] = [[x, y, x + 5, y, x + 9, y]]


def outside(content):
    content["annotations"][0] |= {"bbox": [500, 500, 9, 9], "segmentation": [[500, 500, 509, 500, 509, 509]]}


@pytest.mark.parametrize(
    ("change", "kind", "is_error"),
    [
        (swap_sizes, "unreadable", True),
        (shift_polygons, "box_and_mask", True),
        (empty_masks, "empty_mask", False),
        (outside, "unusable", False),
        (lambda c: c["annotations"].append(c["annotations"][0] | {"id": 99}), "same_annotation", False),
        (lambda c: c["annotations"][0].pop("segmentation"), "no_mask", False),
        (lambda c: c["categories"].append({"id": 50, "name": "ghost"}), "unused_class", False),
        (lambda c: c["categories"].append({"id": 50, "name": "disc"}), "same_name", False),
        (lambda c: c["images"].append(c["images"][0] | {"id": 999}), "listed_twice", False),
        (lambda c: c["annotations"].clear(), "no_object", True),
        (lambda c: c["images"].pop(0), "orphan", True),
        (lambda c: c["images"][0].update(file_name="../image_0.png"), "missing", True),
    ],
)
def test_each_defect_is_found(dataset, change, kind, is_error):
    found = findings(edit(dataset, change))
    assert kind in found
    assert found[kind].is_error == is_error
    assert found[kind].examples


def test_size_of_objects_counts_at_the_networks_input(dataset):
    path = edit(dataset, shrink_objects)
    assert set(findings(path)) == {"area"}  # 2 of 128 pixels are 8 of 550
    small = findings(path, max_size=96)
    assert small["tiny"].count == 14
    assert 5 < small["vanishing_mask"].count < 14  # it depends on where they lie


def test_photos_that_are_broken_missing_or_copies(dataset):
    images = dataset.parent / "images"
    (images / "image_0.png").unlink()
    (images / "image_1.png").write_bytes(b"no picture")
    shutil.copy(images / "image_2.png", images / "image_3.png")
    found = findings(dataset)
    assert found["missing"].count == found["unreadable"].count == 1
    assert found["missing"].is_error  # train.py refuses to start
    assert not found["unreadable"].is_error  # one is tolerated
    assert found["same_image"].count == 1
    assert "image_2.png" in found["same_image"].examples[0]


def test_truncated_jpeg_is_found(dataset):
    def change(content):
        content["images"][0]["file_name"] = "cut.jpg"

    images = dataset.parent / "images"
    data = cv2.imencode(".jpg", cv2.imread(str(images / "image_0.png")))[1].tobytes()
    (images / "cut.jpg").write_bytes(data)
    assert "unreadable" not in findings(edit(dataset, change))
    (images / "cut.jpg").write_bytes(data[: len(data) * 2 // 3])
    assert findings(dataset)["unreadable"].count == 1


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"bbox": None}, None),  # the mask has one
        ({"bbox": [None, 1, 2, 3]}, "bad_box"),
        ({"bbox": {"x": 1, "y": 2, "w": 3, "h": 4}}, "bad_box"),
        ({"bbox": 7}, "bad_box"),
        ({"segmentation": [[1, 2, 3], None]}, "no_mask"),
        ({"segmentation": {"size": None, "counts": [5]}}, "no_mask"),
        ({"segmentation": {"size": [96, 128], "counts": [5, 7]}}, "no_mask"),
        ({"segmentation": {"size": [96, 128], "counts": None}}, "no_mask"),
        ({"segmentation": "polygon"}, "no_mask"),
        ({"segmentation": [["a", "b", "c", "d", "e", "f"]]}, "no_mask"),
        ({"segmentation": None, "bbox": None}, "unusable"),
        ({"iscrowd": "0"}, None),
    ],
)
def test_malformed_annotations_are_named_and_nothing_crashes(dataset, changed, kind):
    path = edit(dataset, lambda c: c["annotations"][0].update(changed))
    assert set(findings(path)) <= {kind}
    if kind is not None:
        assert findings(path)[kind].count == 1
    data = CocoDataset(path, path.parent / "images")
    assert len(data[0].boxes) == (2 if kind in (None, "bad_box") else 1)
    assert len(GroundTruth(data, {}).to_coco("bbox").anns) == (13 if kind == "unusable" else 14)


def test_polygons_as_points(dataset):
    def change(content):
        first = content["annotations"][0]
        first["segmentation"] = [np.reshape(first["segmentation"][0], (-1, 2)).tolist()]

    before = CocoDataset(dataset, dataset.parent / "images")[0].segmentations
    path = edit(dataset, change)
    assert CocoDataset(path, path.parent / "images")[0].segmentations == before


def test_swapped_sides_are_said_before_training(dataset):
    path = edit(dataset, swap_sizes)
    (error, *_) = quick_audit(CocoDataset(path, path.parent / "images"), get_config("yolact_r50"))
    assert re.search("all 8 images are unreadable.*width and height are swapped", str(error))
    assert "are swapped" in run(*train_args(path), code=2)


def test_quick_form_is_silent_about_good_data_and_names_unused_classes(dataset, capsys):
    quick_audit(CocoDataset(dataset, dataset.parent / "images"), get_config("yolact_r50"))
    assert capsys.readouterr().out == ""
    path = edit(dataset, lambda c: c["categories"].append({"id": 50, "name": "ghost"}))
    quick_audit(CocoDataset(path, path.parent / "images"), get_config("yolact_r50"))
    assert "ghost" in capsys.readouterr().out


def test_command_line(tmp_path):
    path = make_dataset(tmp_path / "data", 6)
    args = [
        "-m",
        "data.audit",
        "--annotations",
        path,
        "--image_dir",
        path.parent / "images",
        "--output",
        tmp_path / "a",
    ]
    assert "nothing is wrong" in run(*args)
    assert cv2.imread(str(tmp_path / "a/sheet.jpg")).std() > 20
    report = json.loads((tmp_path / "a/audit.json").read_text())
    assert report["objects"] == 12
    edit(path, swap_sizes)
    out = run(*args, code=1)
    assert re.search("error: all 6 images are unreadable or not of the stated size", out)
    assert "no such annotation file" in run(
        "-m", "data.audit", "--annotations", "none.json", "--image_dir", ".", code=2
    )


def test_sheet_shows_the_truth(dataset):
    """The drawn objects lie where the picture has them."""
    from data.sheets import draw_truth

    sample = CocoDataset(dataset, dataset.parent / "images")[0]
    drawn = draw_truth(sample, ("disc", "tile"))
    changed = np.abs(drawn.astype(int) - sample.image).sum(axis=2) > 0
    for x1, y1, x2, y2 in sample.boxes.round().astype(int):
        assert changed[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].mean() > 0.6
    assert not changed[:4, :4].any()
