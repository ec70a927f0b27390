"""The bundled weights and the README's first command: people in a image, without a download."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from pycocotools import mask as rle

from inference import Predictor
from weights import load_model
from weights.released import BUNDLED

CARD = BUNDLED.with_suffix(".md").read_text(encoding="utf-8")
METRICS = json.loads(BUNDLED.with_suffix(".json").read_text(encoding="utf-8"))
PERSON = ROOT.parent / "shared/data/person576"
KINDS = {"bbox": "box", "segm": "mask"}
# Drawn by hand: left, top, right, bottom of the person in images of 512x512.
PEOPLE = {"astronaut.jpg": (5, 15, 395, 512), "camera.jpg": (0, 58, 285, 505)}


def test_the_file_is_small_and_in_half_precision():
    assert BUNDLED.stat().st_size <= 16e6
    state = torch.load(BUNDLED, map_location="cpu", weights_only=True)["model"]
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}


def test_it_knows_people():
    model = load_model(BUNDLED)
    assert (model.config.name, model.config.class_names) == ("yolact_lite", ("person",))
    assert all(p.dtype is torch.float32 for p in model.parameters())


@pytest.mark.parametrize("image", PEOPLE)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_people_in_the_demo_images(image, precision):
    predictor = Predictor(load_model(BUNDLED), device="cpu", precision=precision, score_threshold=0.3)
    detections = predictor(cv2.imread(str(ROOT / "data/demo" / image)))
    left, top, right, bottom = PEOPLE[image]
    x1, y1, x2, y2 = detections.boxes[0].tolist()
    overlap = (min(x2, right) - max(x1, left)) * (min(y2, bottom) - max(y1, top))
    assert overlap / ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - overlap) > 0.6
    inside = detections.masks[0][top:bottom, left:right].float().mean()
    assert detections.scores[0] > 0.6
    assert 0.35 < inside < 0.85


def test_first_command_of_the_readme(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^pip install -r requirements.txt && python (.*)$", readme, re.MULTILINE)[1]
    words = [sys.executable, *shlex.split(command), "--output", str(tmp_path)]
    offline = {**os.environ, "HTTPS_PROXY": "http://0.0.0.0:1"}
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=offline)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\n") <= 3
    assert "people only" in ran.stdout
    assert "yolact_r50" in ran.stdout
    results = json.loads((tmp_path / "astronaut.json").read_text())
    best = max(results, key=lambda result: result["score"])
    assert 0.25 < rle.decode(best["segmentation"]).mean() < 0.75  # of the image is she
    image, drawn = (cv2.imread(str(p)) for p in (ROOT / "data/demo/astronaut.jpg", tmp_path / "astronaut.jpg"))
    assert np.abs(image.astype(int) - drawn).mean() > 3  # it is painted


def test_the_card_says_what_was_measured():
    for kind, name in KINDS.items():
        row = re.search(rf"\| {name}, float32 \|(.*)\|", CARD)[1]
        assert [float(v) for v in row.split("|")[:2]] == [round(100 * METRICS[kind][k], 1) for k in ("AP", "AP50")]


# Scores, boxes and mask pixels of the detections over 0.3 in float32.
PINNED = {
    "astronaut.jpg": [(0.9996, (26.5, 24.5, 361.6, 467.4), 88578)],
    "camera.jpg": [(0.9992, (7.5, 60.1, 312.6, 470.5), 73644), (0.5303, (305.9, 152.3, 332.6, 233.7), 1395)],
}


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("image", PINNED)
def test_detections_do_not_change(image, optimize):
    predictor = Predictor.from_weights(BUNDLED, device="cpu", precision="fp32", optimize=optimize, score_threshold=0.3)
    found = predictor(cv2.imread(str(ROOT / "data/demo" / image)))
    assert len(found) == len(PINNED[image])
    for i, (score, box, pixels) in enumerate(PINNED[image]):
        assert float(found.scores[i]) == pytest.approx(score, abs=2e-4)
        assert found.boxes[i].tolist() == pytest.approx(box, abs=0.1)
        assert int(found.masks[i].sum()) == pytest.approx(pixels, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not PERSON.is_dir(), reason="needs the images that the weights were measured on")
def test_the_cards_ap_is_reproduced(tmp_path):
    output = tmp_path / "metrics.json"
    run("eval.py", "--annotations", PERSON / "instances_val.json", "--image_dir", PERSON / "images", "--precision",
        "fp32", "--device", "cpu", "--output", output)  # fmt: skip
    measured = json.loads(output.read_text())
    for kind in KINDS:
        assert measured[kind]["AP"] == pytest.approx(METRICS[kind]["AP"], abs=5e-5)
