"""Files for annotation tools: predictions become annotations again, with the same masks."""

from __future__ import annotations

import json

import cv2
import numpy as np
from conftest import ROOT, run, spawn

from data.annotation import to_mask
from data.coco import CocoDataset


def test_the_way_through_label_studio(tmp_path):
    """Tasks of examples/label_studio.py have the polygons of the masks, in percent."""
    image = ROOT / "data/demo/astronaut.jpg"
    args = ["--image", image, "--output", tmp_path, "--device", "cpu", "--precision", "fp32"]
    run("eval.py", *args, "--save", "masks,polygons")
    script = ROOT / "examples/label_studio.py"
    spawn(script, tmp_path / "astronaut.polygons.json", "--root", "/files/", "--output", tmp_path / "tasks.json")
    (task,) = json.loads((tmp_path / "tasks.json").read_text())
    assert task["data"] == {"image": "/files/astronaut.jpg"}
    (prediction,) = task["predictions"]
    drawn = np.zeros(cv2.imread(str(image)).shape[:2], np.uint8)
    for result in prediction["result"]:
        assert result["value"]["polygonlabels"] == ["person"]
        assert (result["original_height"], result["original_width"]) == drawn.shape
        points = np.array(result["value"]["points"]) / 100 * (drawn.shape[1], drawn.shape[0])
        cv2.fillPoly(drawn, [points.round().astype(np.int32)], 1)
    mask = cv2.imread(str(tmp_path / "astronaut.masks.png"), cv2.IMREAD_UNCHANGED) > 0
    assert (mask & (drawn > 0)).sum() / (mask | (drawn > 0)).sum() > 0.95


def test_the_coco_file_of_a_folder_can_be_trained_on(tmp_path):
    """What CVAT imports is a complete COCO file, which tools.formats and training accept as well."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("astronaut", "camera"):
        (images / f"{name}.jpg").write_bytes((ROOT / f"data/demo/{name}.jpg").read_bytes())
    args = ["--output", tmp_path / "out", "--device", "cpu", "--precision", "fp32"]
    run("eval.py", "--images", images, *args, "--save", "json")
    exported = tmp_path / "exported/annotations"
    exported.mkdir(parents=True)
    (exported / "instances_default.json").write_bytes((tmp_path / "out/coco.json").read_bytes())
    converted = tmp_path / "train.json"
    run("tools.formats", tmp_path / "exported", "--images", images, "--output", converted)
    before, after = CocoDataset(tmp_path / "out/coco.json", images), CocoDataset(converted, images)
    assert before.class_names == after.class_names == ("person",)
    for i in range(2):
        for one, other in zip(before[i].segmentations, after[i].segmentations, strict=True):
            assert np.array_equal(to_mask(one, *one["size"]), to_mask(other, *other["size"]))
        assert len(before[i].boxes) >= 1
