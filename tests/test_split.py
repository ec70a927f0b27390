"""tools.formats --split: whole groups of near copies on one side, decided by the name."""

from __future__ import annotations

import json

import cv2
import numpy as np
from conftest import make_dataset, random_image, run

from tools.formats.split import split_images
from tools.formats.structures import LabelledImage


def test_a_split_keeps_near_copies_together(tmp_path):
    path = make_dataset(tmp_path / "data", 24)
    content = json.loads(path.read_text())
    for number, image in enumerate(content["images"]):  # three photos, each eight times, but for some noise
        scene = random_image(96, 128, seed=number % 3).astype(int)
        noise = np.random.default_rng(number).integers(-3, 4, scene.shape)
        cv2.imwrite(str(path.parent / "images" / image["file_name"]), (scene + noise).clip(0, 255).astype(np.uint8))
    args = ["tools.formats", path, "--images", path.parent / "images", "--output", tmp_path / "coco.json"]
    run(*args, "--split", "0.4")
    sides = [json.loads((tmp_path / f"coco_{side}.json").read_text()) for side in ("train", "val")]
    names = [image["file_name"] for image in content["images"]]
    scenes = [{names.index(image["file_name"]) % 3 for image in side["images"]} for side in sides]
    assert sorted(len(side["images"]) for side in sides) == [8, 16]
    assert scenes[0] | scenes[1] == {0, 1, 2}
    assert not scenes[0] & scenes[1]
    assert sides[0]["categories"] == sides[1]["categories"]
    assert sum(len(side["annotations"]) for side in sides) == len(content["annotations"])
    # All photos in one group: nothing would be left for training.
    for image in content["images"]:
        cv2.imwrite(str(path.parent / "images" / image["file_name"]), random_image(96, 128))
    assert "no image is left for training" in run(*args, "--split", "0.4", code=2)


def test_a_split_is_that_of_the_names(tmp_path):
    """An image keeps its side when others are added; about the wanted share goes to validation."""
    images = [LabelledImage(tmp_path / f"{number}.png", (64, 64)) for number in range(200)]
    for number, image in enumerate(images):
        cv2.imwrite(str(image.path), random_image(64, 64, seed=number))
    val = {image.path for image in split_images(images, 0.25)["val"]}
    assert 35 < len(val) < 65
    before = {image.path for image in split_images(images[:100], 0.25)["val"]}
    assert before == {image.path for image in images[:100]} & val
