"""tools.pseudo_masks: boxes get the masks that the bundled model predicts for them."""

from __future__ import annotations

import json

import cv2
import pytest
from conftest import ROOT, run
from pycocotools import mask as rle

from inference import Predictor

WEIGHTS = ROOT / "weights/yolact_lite_person.pth"


@pytest.fixture
def boxes(tmp_path):
    """A detection data set: the boxes of the people that the model finds, and one box around nobody."""
    path = ROOT / "data/demo/astronaut.jpg"
    image = cv2.imread(str(path))
    found = Predictor.from_weights(WEIGHTS, device="cpu", precision="fp32")(image).to_coco(7)
    assert found
    height, width = image.shape[:2]
    listed = [{"id": i, **{k: a[k] for k in ("image_id", "category_id", "bbox")}} for i, a in enumerate(found)]
    listed.append({"id": 99, "image_id": 7, "category_id": 1, "bbox": [2, 2, 25, 60]})
    content = {
        "images": [{"id": 7, "file_name": path.name, "height": height, "width": width}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": listed,
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return tmp_path / "boxes.json", found


def test_boxes_get_the_masks_of_the_model(boxes, tmp_path):
    path, found = boxes
    args = ["--weights", WEIGHTS, "--annotations", path, "--image_dir", ROOT / "data/demo", "--device", "cpu"]
    out = run("tools.pseudo_masks", *args, "--output", tmp_path / "masks.json")
    annotations = json.loads((tmp_path / "masks.json").read_text())["annotations"]
    *people, nobody = annotations
    with_masks = [a for a in people if "segmentation" in a]
    assert with_masks
    assert f"{len(with_masks)} of {len(annotations)} boxes" in out
    for annotation in with_masks:
        wanted = next(a["segmentation"] for a in found if a["bbox"] == annotation["bbox"])
        assert rle.iou([wanted], [annotation["segmentation"]], [0])[0, 0] > 0.85
        assert annotation["area"] == rle.area(annotation["segmentation"])
        assert annotation["pseudo_mask_iou"] >= 0.75
    assert "segmentation" not in nobody
    out = run("tools.pseudo_masks", *args, "--least_iou", "1", "--output", tmp_path / "none.json")
    assert "0 of" in out


def test_other_classes_are_refused(boxes, tmp_path):
    path, _ = boxes
    path.write_text(path.read_text().replace('"person"', '"cat"'))
    args = ["--weights", WEIGHTS, "--annotations", path, "--image_dir", ROOT / "data/demo"]
    assert "classes differ" in run("tools.pseudo_masks", *args, "--output", tmp_path / "x.json", code=2)
