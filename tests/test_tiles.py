"""Tiles: they cover the image, objects cut by borders are one object, and large and small objects are both found."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, random_image, run
from pycocotools import mask as rle

from config import get_config
from inference import Detections, Predictor
from tools.tiles import TiledPredictor, tile_windows
from utils.errors import UserError
from weights import load_model

BUNDLED = ROOT / "weights/yolact_lite_person.pth"


@pytest.mark.parametrize(("height", "width"), [(100, 100), (640, 1000), (333, 2000), (101, 99)])
def test_windows_cover_the_image(height, width):
    covered = np.zeros((height, width), int)
    windows = tile_windows(height, width, 100, 0.25)
    for x1, y1, x2, y2 in windows:
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert max(x2 - x1, y2 - y1) <= 100
        covered[y1:y2, x1:x2] += 1
    assert covered.all()
    lefts = sorted({x1 for x1, *_ in windows})
    assert all(b - a <= 75 for a, b in itertools.pairwise(lefts))  # neighbours share a quarter


class Squares:
    """A predictor that finds bright squares: those that a tile cuts are found as far as they are visible."""

    config = get_config("yolact_lite", class_names=("square",), category_ids=(1,), score_threshold=0.3)

    def __init__(self, whole=None, erosion=0):
        """Masks of an image of the size `whole` are `erosion` pixels too thin on each side, as if seen coarsely."""
        self.whole, self.erosion = whole, erosion

    def __call__(self, images):
        return [self.find(image) for image in images]

    def find(self, image):
        count, labels, stats, _ = cv2.connectedComponentsWithStats((image[..., 0] > 100).astype(np.uint8))
        masks = np.stack([labels == i for i in range(1, count)]) if count > 1 else np.zeros((0, *image.shape[:2]), bool)
        if image.shape[:2] == self.whole:
            kernel = np.ones((2 * self.erosion + 1,) * 2, np.uint8)
            masks = np.stack([cv2.erode(mask.astype(np.uint8), kernel).astype(bool) for mask in masks])
        found = Detections(
            boxes=torch.tensor(stats[1:, :4], dtype=torch.float32),
            scores=torch.full((count - 1,), 0.8),
            mask_scores=torch.full((count - 1,), 0.8),
            labels=torch.zeros(count - 1, dtype=torch.long),
            class_names=("square",),
            category_ids=(1,),
            size=image.shape[:2],
            coefficients=torch.zeros(count - 1, 0),
            prototypes=torch.zeros(1, 1, 0),
            relative_boxes=torch.zeros(count - 1, 4),
        )
        found.iter_masks = lambda: iter(masks)
        return found


def test_objects_cut_by_borders_become_one():
    image = np.zeros((300, 500, 3), np.uint8)
    squares = [(10, 10, 30, 30), (80, 80, 260, 130), (200, 150, 220, 290), (300, 10, 490, 290), (480, 0, 488, 6)]
    for x1, y1, x2, y2 in squares:
        image[y1:y2, x1:x2] = 255
    found = TiledPredictor(Squares(), tile=128)(image)
    assert sorted(map(tuple, found.boxes.int().tolist())) == sorted(squares)
    masks = found.masks.numpy()
    for (x1, y1, x2, y2), mask in zip(found.boxes.int().tolist(), masks, strict=True):
        assert mask.sum() == mask[y1:y2, x1:x2].sum() == (x2 - x1) * (y2 - y1)


def scattered(seed, count, size):
    """An image of `count` ellipses, rods of 7 to 13 pixels and rectangles that do not touch."""
    rng = np.random.default_rng(seed)
    image = np.zeros(size, np.uint8)
    while count:
        shape, (x, y), turn = np.zeros(size, np.uint8), rng.integers(0, size[::-1]).tolist(), rng.uniform(0, np.pi)
        kind = rng.integers(3)
        if kind == 0:
            cv2.ellipse(shape, (x, y), rng.integers(6, 120, 2).tolist(), np.degrees(turn), 0, 360, 255, -1)
        elif kind == 1:
            length = rng.integers(40, 400)
            end = int(x + length * np.cos(turn)), int(y + length * np.sin(turn))
            cv2.line(shape, (x, y), end, 255, int(rng.integers(7, 14)))
        else:
            shape[y : y + rng.integers(8, 60), x : x + rng.integers(8, 250)] = 255
        if (shape > 0).sum() >= 40 and not (cv2.dilate(shape, np.ones((5, 5))) & image).any():
            image |= shape
            count -= 1
    return np.repeat(image[..., None], 3, axis=2)


@pytest.mark.parametrize("erosion", [0, 2])
@pytest.mark.parametrize("tile", [256, 400])
def test_no_pieces_are_left(erosion, tile):
    """Of objects of every size and shape, also where the whole image shows thin ones even thinner."""
    for seed in (0, 1):
        image = scattered(seed, 45, (900, 1400))
        found = TiledPredictor(Squares(image.shape[:2], erosion), tile)(image)
        assert len(found) == 45


def test_detections_of_tiles_behave_like_others():
    image = np.zeros((200, 300, 3), np.uint8)
    image[20:60, 20:60] = image[100:150, 200:280] = 255
    found = TiledPredictor(Squares(), tile=128)(image)
    assert len(found) == 2
    assert len(found[:1]) == len(found[0]) == len(found[found.scores > 0.5][:1]) == 1
    assert torch.equal(found[1].masks[0], found.masks[1])
    results = found.to_coco(7)
    assert [rle.area(r["segmentation"]) for r in results] == found.masks.sum(dim=(1, 2)).tolist()
    assert found.draw(image).shape == image.shape
    assert sum(1 for _ in found.iter_masks(budget=1)) == 2


def test_a_small_image_is_not_tiled(predictor):
    image = random_image(90, 130)
    tiled, plain = TiledPredictor(predictor, tile=200)(image), predictor(image)
    assert torch.equal(tiled.boxes, plain.boxes)


def test_small_people_are_found_on_tiles():
    """People 35 pixels high in an image of 2000: too small for the network's 640, and found on tiles."""
    man = cv2.imread(str(ROOT / "data/demo/camera.jpg"))
    small = cv2.resize(man, (40, 40), interpolation=cv2.INTER_AREA)
    image = np.full((1500, 2000, 3), small.mean(axis=(0, 1)).astype(np.uint8))
    places = [(200, 300), (1200, 900), (620, 1210)]
    for x, y in places:
        image[y : y + 40, x : x + 40] = small
    predictor = Predictor(load_model(BUNDLED), "cpu", "fp32", score_threshold=0.5)

    def hits(found):
        centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
        return sum(
            bool(((centres - torch.tensor([x + 20.0, y + 20.0])).abs() < 22).all(dim=1).any()) for x, y in places
        )

    plain, tiled = predictor(image), TiledPredictor(predictor, tile=400)(image)
    assert hits(tiled) == 3
    assert hits(plain) < 3


def test_the_command_line(weights, dataset, tmp_path):
    cv2.imwrite(str(tmp_path / "large.png"), random_image(200, 300))
    image = ["--weights", weights, "--image", tmp_path / "large.png", "--output", tmp_path / "out", "--tile", 128]
    run("eval.py", *image, "--save", "overlay,json,masks,polygons")
    assert len(list((tmp_path / "out").iterdir())) == 5
    assert "each tile has its own" in run("eval.py", *image, "--save", "prototypes", code=2)
    common = ["--weights", weights, "--tile", 64]
    text = run("eval.py", *common, "--annotations", dataset, "--image_dir", dataset.parent / "images")
    assert "Average Precision" in text
    assert "--tile has no effect with --benchmark" in run("eval.py", *common, "--benchmark", code=2)
    with pytest.raises(UserError, match="at least 32"):
        TiledPredictor(Squares(), 10)


def test_no_detections_can_be_drawn(weights):
    image = random_image(150, 220)
    found = TiledPredictor(Predictor(load_model(weights), "cpu", score_threshold=1.0), tile=100)(image)
    assert len(found) == 0
    assert (found.draw(image) == image).all()
