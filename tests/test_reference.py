"""The numbers of the two public implementations, from the same weights, image, predictions and targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
from conftest import FIXTURES, to_corners
from pycocotools import mask as rle

from config import get_config
from inference import Predictor
from layers.anchors import make_anchors
from layers.loss import MultiBoxLoss
from weights import load_model
from yolact import Predictions

FILES = {"authors": "dbolya_yolact_resnet50.npz", "mmdet": "mmdet_yolact_r50.npz"}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module", params=list(FILES))
def reference(request, tmp_path_factory):
    """The stored numbers, the image, and a model loaded from a file in the released format."""
    stored = np.load(FIXTURES / FILES[request.param], allow_pickle=False)
    shapes = {n: json.loads(s) for n, s in zip(stored["names"].tolist(), stored["shapes"].tolist(), strict=True)}
    state = recipe.state_dict(shapes, int(stored["seed"]), float(stored["gain"]))
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state if request.param == "authors" else {"meta": {}, "state_dict": state}, path)
    image = recipe.image(*map(int, stored["image_hw"]), int(stored["seed"]))
    return request.param, stored, image, load_model(path)


def test_raw_outputs(reference):
    layout, stored, image, model = reference
    assert model.config.name == {"authors": "yolact_resnet50", "mmdet": "yolact_r50"}[layout]
    images = Predictor(model, device="cpu", precision="fp32").preprocess(image)[None]
    assert np.abs(images[0, :, ::50, ::50].numpy() - stored["input_sample"]).max() < 1e-5
    with torch.no_grad():
        out = model(images)
    at = stored["anchor_index"]
    scores = out.logits[0, at].softmax(dim=-1).numpy()
    if layout == "mmdet":
        scores = np.roll(scores, -1, axis=1)  # the background is last there
    assert out.boxes.shape[1] == int(stored["num_priors"])
    assert relative(out.boxes[0, at].numpy(), stored["loc"]) < 1e-4
    assert relative(scores, stored["conf"]) < 1e-4
    assert relative(out.coefficients[0, at].numpy(), stored["coeff"]) < 1e-4
    assert relative(out.prototypes[0, ::6, ::6].numpy(), stored["proto"]) < 1e-4
    anchors = model.anchors(550, 550)[at]
    if layout == "mmdet":
        assert np.abs(to_corners(anchors).numpy() * 550 - stored["priors_xyxy"]).max() < 1e-3
    else:
        assert np.abs(anchors.numpy() - stored["priors"]).max() < 1e-7


def test_detections_and_masks(reference):
    layout, stored, image, model = reference
    found = Predictor(model, device="cpu", precision="fp32").published()(image)
    assert found.labels.tolist() == stored["post_class"].tolist()
    assert np.abs(found.scores.numpy() - stored["post_score"]).max() < 1e-4
    beyond = found.boxes.numpy() - stored["post_box"]
    if layout == "authors":  # they cut boxes down to whole pixels
        assert beyond.min() > -0.01
        assert beyond.max() < 1.01
    else:
        assert np.abs(beyond).max() < 0.01
    areas, wanted = found.masks.sum(dim=(1, 2)).numpy(), stored["post_area"]
    assert (np.abs(areas - wanted) <= np.maximum(5, 0.005 * wanted)).all()
    for code, counts in zip(found[:30].encode_masks(), stored["rle"].tolist(), strict=True):
        assert rle.iou([code], [{"size": code["size"], "counts": counts}], [0])[0, 0] > 0.99


@pytest.mark.parametrize(("nms", "key", "top_k"), [("fast", "fast", 100), ("cross_class", "cross", 200)])
def test_nms_variants_of_the_authors(reference, nms, key, top_k):
    layout, stored, image, model = reference
    if layout != "authors":
        pytest.skip("stored for the authors' code alone")
    found = Predictor(model, device="cpu", precision="fp32", nms=nms, top_k=top_k)(image)
    assert found.labels.tolist() == stored[f"{key}_class"].tolist()
    assert np.abs(found.scores.numpy() - stored[f"{key}_score"]).max() < 1e-4
    assert np.abs(found.relative_boxes.numpy() - stored[f"{key}_box"]).max() < 1e-4


@pytest.mark.parametrize("stored", json.loads((FIXTURES / "losses.json").read_text()), ids=lambda s: f"seed{s['seed']}")
def test_losses_and_gradients(stored):
    config = get_config(stored["config"])
    raw = recipe.predictions(stored["seed"], stored["num_priors"], 81, (138, 138), (69, 69))
    for value in raw.values():
        value.requires_grad_()
    targets = []
    for boxes, masks, crowds in zip(*recipe.targets(stored["seed"], 550, 81), strict=True):
        n = len(boxes) - crowds
        targets.append(
            {"boxes": boxes[:n, :4], "labels": boxes[:n, 4].long(), "masks": masks[:n], "crowds": boxes[n:, :4]}
        )
    anchors = make_anchors(550, 550, config.model)
    predictions = Predictions(raw["loc"], raw["conf"], raw["mask"], raw["proto"], raw["segm"])
    losses = MultiBoxLoss(config.loss)(predictions, anchors, targets)
    for term, key in (("box", "B"), ("mask", "M"), ("class", "C"), ("semantic", "S")):
        assert float(losses[term].detach()) == pytest.approx(stored["losses"][key], rel=1e-4)
    sum(losses.values()).backward()
    for name, value in raw.items():
        norm, total = stored["grad_norm_and_sum"][name]
        assert float(value.grad.norm()) == pytest.approx(norm, rel=1e-3)
        assert float(value.grad.sum()) == pytest.approx(total, rel=1e-3, abs=1e-4)


def test_fixtures_are_the_published_ones():
    """The copies here are those that other checks use, where those lie beside the repository."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "reference"
    if not shared.is_dir():
        pytest.skip("nothing to compare with")
    for name in (*FILES.values(), "losses.json", "state_dict_shapes.json", "recipe.py"):
        assert (shared / name).read_bytes() == (FIXTURES / name).read_bytes()
