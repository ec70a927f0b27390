"""The report of an evaluation: errors are named rightly, the page is complete, and the threshold can be used."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.parse
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, make_dataset, run
from pycocotools import mask as rle

from data.coco import CocoDataset
from inference import Predictor
from tools import advice
from tools.error_analysis import (
    MatchedDetections,
    Outcome,
    TrueObject,
    best_threshold,
    confusion_matrix,
    count_errors,
    f1_curve,
    match_dataset,
)
from weights import load_model
from weights.checkpoint import save_checkpoint
from weights.released import BUNDLED

SIDE = 100


def code(x1, y1, x2, y2):
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    found = rle.encode(mask)
    return {"size": [SIDE, SIDE], "counts": found["counts"].decode()}


@pytest.fixture
def errors(tmp_path):
    """One image with two cats and a dog, a crowd, and one detection of each kind."""
    boxes = {"cat 1": (0, 0, 20, 20), "cat 2": (30, 0, 50, 20), "dog": (60, 0, 80, 20), "crowd": (0, 60, 100, 100)}
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images/a.png"), np.zeros((SIDE, SIDE, 3), np.uint8))
    annotations = [
        {
            "id": i,
            "image_id": 1,
            "category_id": 2 if name == "dog" else 1,
            "iscrowd": int(name == "crowd"),
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "segmentation": code(*box),
        }
        for i, (name, box) in enumerate(boxes.items(), 1)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIDE, "width": SIDE}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": annotations,
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    detections = [
        (0.9, 1, (0, 0, 20, 20), "correct"),
        (0.8, 1, (0, 0, 20, 18), "duplicate"),
        (0.7, 1, (60, 0, 80, 20), "class"),
        (0.6, 1, (30, 0, 36, 20), "localisation"),  # IoU 0.3
        (0.5, 2, (30, 0, 36, 20), "class and localisation"),
        (0.4, 1, (0, 30, 20, 50), "background"),
        (0.3, 1, (10, 70, 20, 80), "ignored"),
    ]
    results = [
        {"image_id": 1, "category_id": c, "score": s, "mask_score": s, "segmentation": code(*b), "bbox": list(b)}
        for s, c, b, _ in detections
    ]
    dataset = CocoDataset(tmp_path / "a.json", tmp_path / "images")
    return match_dataset(dataset, results, {1: (SIDE, SIDE)}), [kind for *_, kind in detections]


def test_errors_are_named(errors):
    outcome, kinds = errors
    assert [item.kind for item in outcome.found] == kinds
    assert [item.label for item in outcome.objects] == [0, 0, 1]
    assert [item.truth for item in outcome.found] == [0, 0, 2, 1, 1, -1, -1]
    # The dog was taken for a cat and the second cat found badly, so at a low threshold nothing is missed.
    assert [[item.label for item in outcome.missed(threshold)] for threshold in (0, 0.65, 0.95)] == [[], [0], [0, 0, 1]]
    assert outcome.found[3].iou == pytest.approx(0.3)


def test_counts_threshold_and_confusion(errors):
    outcome, _ = errors
    expected = dict.fromkeys(("class", "localisation", "class and localisation", "duplicate", "background"), 1)
    assert count_errors(outcome, 0.0) == expected | {"correct": 1, "missed": 0}
    assert count_errors(outcome, 0.75) == dict.fromkeys(expected, 0) | {"duplicate": 1, "correct": 1, "missed": 2}
    scores, precision, recall, f1 = f1_curve(outcome)
    assert scores.tolist() == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]  # without the ignored one
    assert precision[:2].tolist() == [1.0, 0.5]
    assert recall[0] == pytest.approx(1 / 3)
    assert f1[0] == pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3))
    assert best_threshold(outcome) == (pytest.approx(0.85), pytest.approx(0.5))  # halfway to the next score
    # cat: one right, one not found well enough; dog: taken for a cat; background: three false positives
    assert confusion_matrix(outcome, 0.0).tolist() == [[1, 0, 1], [1, 0, 0], [2, 1, 0]]


def test_each_object_counts_once_in_the_confusion_matrix(errors):
    """Also where it is both found and confused, and where two detections confuse it."""
    outcome, _ = errors
    dog, cat = outcome.found[2], outcome.found[0]
    outcome.found += [replace(dog, score=0.2), replace(cat, kind="class", label=1, score=0.95)]
    matrix = confusion_matrix(outcome, 0.0)
    assert matrix.tolist() == [[1, 0, 1], [1, 0, 0], [2, 1, 0]]
    assert matrix[:2].sum(axis=1).tolist() == [2, 1]


def test_regions_to_ignore_are_those_of_the_class(tmp_path, errors):
    """As in COCOeval, a crowd of cats does not excuse a dog; an object without a mask excuses its class."""
    content = json.loads((tmp_path / "a.json").read_text())
    content["annotations"].append({"id": 9, "image_id": 1, "category_id": 2, "bbox": [60, 30, 20, 20], "iscrowd": 0})
    (tmp_path / "a.json").write_text(json.dumps(content))
    places = {"in a crowd of cats": (10, 70, 20, 80), "on a dog without a mask": (62, 32, 78, 48)}
    results = [
        {"image_id": 1, "category_id": c, "score": 0.5, "segmentation": code(*box), "bbox": [0, 0, 1, 1]}
        for box in places.values()
        for c in (1, 2)
    ]
    dataset = CocoDataset(tmp_path / "a.json", tmp_path / "images")
    outcome = match_dataset(dataset, results, {1: (SIDE, SIDE)})
    assert [item.kind for item in outcome.found] == ["ignored", "background", "background", "ignored"]


@pytest.fixture
def report(dataset, weights, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "report"
    checkpoint = tmp_path / "w.pth"
    shutil.copy(weights, checkpoint)
    common = ["--weights", checkpoint, "--precision", "fp32", "--annotations", dataset]
    text = run("eval.py", *common, "--image_dir", dataset.parent / "images", "--report", folder, "--store_threshold")
    return folder, checkpoint, text


def test_the_page_is_complete_and_alone(report):
    folder, _, text = report
    page = (folder / "index.html").read_text()
    assert "report -> " in text
    for part in ("mask AP", "Confusion matrix", "disc", "tile", "localisation", "missed", "color-scheme: light dark"):
        assert part in page
    assert not re.findall(r"src='(?!data:)", page)  # nothing is loaded from elsewhere
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "report.json"]
    figures = re.findall(r"src='data:image/png;base64,([^']*)'", page)
    assert len(figures) == 4  # with the curves of both classes
    for figure in figures:
        image = cv2.imdecode(np.frombuffer(base64.b64decode(figure), np.uint8), cv2.IMREAD_UNCHANGED)
        assert len(np.unique(image)) > 20
        assert image[0, 0, 3] == 0  # transparent, for dark pages
    captions = re.findall(r"<figcaption>.*?</figcaption>", page)
    assert captions
    for link, name in re.findall(r"<a href='(.*?)'>(.*?)</a>", "".join(captions)):
        assert Path(urllib.parse.unquote(link.removeprefix("file://"))).name == name
        assert name.startswith("image_")
    summary = json.loads((folder / "report.json").read_text())
    assert summary["images"] == 8
    errors = summary["errors"]
    assert errors["correct"] + errors["missed"] <= summary["objects"] == 14
    assert 0 < summary["best_threshold"] <= 1


def test_equal_scores_are_kept_or_dropped_together():
    """Of .9 (right), .9 and .9 (wrong), no threshold keeps the first alone."""
    outcome = Outcome(1, objects=[TrueObject(0, 0, {})])
    outcome.found = [MatchedDetections(0, 0, 0.9, {}, kind) for kind in ("correct", "background", "background")]
    assert best_threshold(outcome) == (pytest.approx(0.45), pytest.approx(0.5))


def test_the_best_threshold_is_stored_and_used(report, dataset, tmp_path):
    folder, checkpoint, text = report
    assert "stored for --score_threshold best in" in text
    best = json.loads((folder / "report.json").read_text())["best_threshold"]
    assert load_model(checkpoint).config.detection.best_score_threshold == pytest.approx(best)
    image = dataset.parent / "images/image_0.png"
    counts = []
    for threshold in ("best", best):
        out = tmp_path / f"out{len(counts)}"
        run("eval.py", "--weights", checkpoint, "--image", image, "--score_threshold", threshold, "--output", out,
            "--save", "json", "--precision", "fp32")  # fmt: skip
        counts.append(json.loads((out / "image_0.json").read_text()))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("size", "best"), [(None, "--size 192 is better here: mask AP 44.0"), ((64, 128), "")])
def test_a_better_input_size_is_named(weights, dataset, monkeypatch, size, best):
    """By mask AP at the given input sizes; a gain within the noise is not mentioned."""
    found = {128: 0.37, 96: 0.30, 192: 0.44, (64, 128): 0.37, (64, 96): 0.2, (96, 192): 0.385}
    monkeypatch.setattr(advice, "evaluate", lambda p, *_, **__: {"segm": {"AP": found[p.backend.size]}})
    predictor = Predictor.from_weights(weights, size=size or 128)
    if isinstance(predictor.backend.size, tuple) and size is None:
        predictor.backend.size = 128
    line = advice.better_size(predictor, CocoDataset(dataset, dataset.parent / "images"))
    assert line.startswith(best)
    assert bool(line) == bool(best)


def test_mistakes_of_reports_get_one_line(weights, dataset, tmp_path, monkeypatch):
    import sys

    common = ["--annotations", dataset, "--image_dir", dataset.parent / "images", "--weights", weights]
    assert "needs --report" in run("eval.py", *common, "--store_threshold", code=2)
    report = ["--report", tmp_path / "r", "--store_threshold"]
    assert "and all images" in run("eval.py", *common, *report, "--max_images", 2, code=2)
    bundled = BUNDLED.read_bytes()
    for name in (BUNDLED.stem, BUNDLED.relative_to(ROOT)):
        assert "would change a file of this project" in run("eval.py", *common[:-1], name, *report, code=2)
    assert bundled == BUNDLED.read_bytes()
    save_checkpoint(tmp_path / "last.pth", load_model(weights), training={"step": 1})
    assert "a run's best.pth" in run("eval.py", *common[:-1], tmp_path / "last.pth", *report, code=2)
    assert not (tmp_path / "r").exists()
    image = ["--weights", weights, "--image", dataset.parent / "images/image_0.png"]
    assert "none is stored" in run("eval.py", *image, "--score_threshold", "best", code=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in run("eval.py", *common, "--report", tmp_path / "r", code=2)


@pytest.mark.slow
def test_a_browser_shows_the_page(report, tmp_path, chromium):
    shot = tmp_path / "shot.png"
    page = ["--window-size=1200,3000", f"--screenshot={shot}", f"file://{report[0] / 'index.html'}"]
    subprocess.run([*chromium, *page], check=True, timeout=120, capture_output=True)
    image = cv2.imread(str(shot))
    assert image.shape == (3000, 1200, 3)
    rows = (image != image[0, 0]).any(axis=(1, 2))
    assert rows[:2500].mean() > 0.5  # there is something on most lines


def test_many_classes(tmp_path):
    """The matrix shows those with the most errors."""
    pytest.importorskip("matplotlib")
    from tools.report import confusion_figure

    matrix = np.diag(np.arange(81))
    matrix[5, 70] = 9
    data = np.frombuffer(confusion_figure(matrix, [f"class {i}" for i in range(80)]), np.uint8)
    assert min(cv2.imdecode(data, cv2.IMREAD_COLOR).shape[:2]) > 700


def test_class_names_with_the_signs_of_formulas():
    pytest.importorskip("matplotlib")
    from tools.report import confusion_figure

    assert confusion_figure(np.eye(3, dtype=int), ["$_$", "a"]).startswith(b"\x89PNG")


def test_a_dataset_without_detections_has_a_report(tmp_path, weights):
    pytest.importorskip("matplotlib")
    path = make_dataset(tmp_path / "data", 2, negatives=2)
    common = ["--weights", weights, "--annotations", path, "--image_dir", path.parent / "images"]
    run("eval.py", *common, "--score_threshold", 1.0, "--report", tmp_path / "r")
    assert json.loads((tmp_path / "r/report.json").read_text())["objects"] == 0
