"""Anchors fitted to a training set by a rule, and the size of the training input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import run, to_corners, train_args

from config import geometric_sizes, get_config
from data.augment import Augment
from data.coco import CocoDataset
from layers.anchors import make_anchors
from layers.boxes import box_iou
from tools.fit_anchors import fit_anchors, keep_anchors
from training.trainer import NetworkAndLoss
from weights import load_model
from yolact import Yolact


def test_sizes_are_a_geometric_progression():
    sizes = np.array(geometric_sizes(512))
    assert sizes.shape == (5, 3)
    assert (sizes[0, 0], sizes[-1, -1]) == (16, 512)
    ratios = sizes.ravel()[1:] / sizes.ravel()[:-1]
    assert np.allclose(ratios, ratios.mean(), rtol=0.02)


def test_ratios_are_quantiles_of_the_boxes_in_the_networks_input(tmp_path):
    """Images of 200 x 100 pixels become squares, so a box of 40 x 20 has the ratio 1."""
    boxes = [(40, 20)] * 5 + [(20, 20)] * 5  # ratios 1 and 1 / 2
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, w, h], "area": w * h, "iscrowd": 0,
         "segmentation": [[0, 0, w, 0, w, h, 0, h]]}
        for i, (w, h) in enumerate(boxes)
    ]  # fmt: skip
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 200, "height": 100}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    config = get_config("yolact_lite", max_size=320)
    fitted = fit_anchors(config, CocoDataset(tmp_path / "a.json", tmp_path)).model
    assert fitted.aspect_ratios == (1, 0.5)
    assert fitted.anchor_sizes == geometric_sizes(256)
    content["annotations"] = []
    (tmp_path / "none.json").write_text(json.dumps(content))
    assert fit_anchors(config, CocoDataset(tmp_path / "none.json", tmp_path)) == config


def test_every_size_of_object_has_an_anchor():
    """Boxes of the fitted ratios from 12 pixels to the side, anywhere: the best IoU is seldom below 0.5."""
    rng = np.random.default_rng(0)
    side = 512
    anchors = to_corners(make_anchors(side, side, get_config("yolact_lite", anchor_sizes=geometric_sizes(side)).model))
    sizes = np.exp(rng.uniform(np.log(12), np.log(side * 0.9), 300))
    width, height = sizes * 0.5**0.25, sizes / 0.5**0.25
    x, y = (rng.uniform(0, np.maximum(side - length, 1)) for length in (width, height))
    boxes = torch.tensor(np.stack((x, y, x + width, y + height), axis=1) / side, dtype=torch.float32).clamp(0, 1)
    best = box_iou(boxes, anchors).amax(dim=1)
    assert (best > 0.5).float().mean() > 0.85


def test_the_training_input_is_smaller():
    config = get_config("yolact_lite")
    assert (config.model.max_size, config.train_size) == (640, 512)
    assert get_config("yolact_lite", max_size=120).train_size == 96  # a multiple of 32
    assert get_config("yolact_lite", max_size=100, train_scale=1).train_size == 100
    assert Augment(config).size == 512
    small = get_config("yolact_lite", max_size=160)
    assert len(NetworkAndLoss(Yolact(small)).anchors) == len(Yolact(small).anchors(128, 128))


@pytest.mark.slow
def test_training_fits_anchors_unless_they_are_given(dataset, tmp_path):
    def trained(name, *more):
        words = [word for word in train_args(dataset) if not str(word).startswith("anchor_sizes")]
        words = [w for i, w in enumerate(words) if not (w == "--set" and words[i + 1 : i + 2] in (["--set"], []))]
        run(*words, "--max_iter", 1, "--batch_size", 2, "--output_dir", tmp_path / name, *more)
        return load_model(tmp_path / name / "last.pth").config.model

    fitted = trained("fitted")
    assert fitted.anchor_sizes == geometric_sizes(96)
    assert fitted.aspect_ratios != get_config("yolact_lite").model.aspect_ratios
    given = trained("given", "--set", "aspect_ratios=(1,2)")
    assert given.aspect_ratios == (1, 2)


def test_anchors_of_initial_weights_are_kept():
    config, other = get_config("yolact_lite"), get_config("yolact_lite", aspect_ratios=(0.3, 0.2))
    assert keep_anchors(config, other).model.aspect_ratios == (0.3, 0.2)
    different = get_config("yolact_resnet50")  # three anchors at each position instead of six
    assert keep_anchors(config, different) == config
