"""Annotations are checked before pycocotools sees them, and each defect has one consequence everywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import run, train_args
from pycocotools import mask as rle
from test_data import edit

from data.annotation import as_id, exact_copies, normalise_segmentation, parse_annotation, to_mask
from data.coco import CocoDataset
from utils.errors import UserError


def compressed(mask):
    return rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def test_valid_run_lengths_pass_unchanged():
    rng = np.random.default_rng(0)
    for n in range(100):
        height, width = (int(v) for v in rng.integers(1, 200, 2))
        blocks = np.kron(rng.integers(0, 2, (height // 9 + 1, width // 9 + 1)), np.ones((9, 9)))[:height, :width]
        mask = blocks > 0 if n % 2 else rng.random((height, width)) < rng.random()
        counts = compressed(mask)
        checked = normalise_segmentation({"size": [height, width], "counts": counts}, height, width)
        assert checked["counts"].decode() == counts
        assert np.array_equal(to_mask(checked, height, width), mask)


@pytest.mark.parametrize(
    "counts", ["garbage!!", "PPPP", "", "0", "é", "\0\0", 5, [5, 7], [96 * 128 - 0.5, 0.5], [96 * 128 + 0.5, 0], [-1]]
)
def test_damaged_run_lengths_are_no_mask(counts):
    assert normalise_segmentation({"size": [96, 128], "counts": counts}, 96, 128) is None


def test_shortened_and_altered_run_lengths_are_no_mask():
    """pycocotools hangs or reads foreign memory for these."""
    rng = np.random.default_rng(1)
    mask = np.zeros((96, 128), bool)
    mask[20:70, 30:100] = rng.random((50, 70)) < 0.8
    counts = compressed(mask)
    for cut in range(1, len(counts)):
        segmentation = {"size": [96, 128], "counts": counts[:-cut]}
        assert normalise_segmentation(segmentation, 96, 128) is None
    for _ in range(300):
        position, value = rng.integers(len(counts)), chr(int(rng.integers(32, 127)))
        altered = counts[:position] + value + counts[position + 1 :]
        checked = normalise_segmentation({"size": [96, 128], "counts": altered}, 96, 128)
        if checked is not None:  # the total is right by chance: then it is a mask
            assert to_mask(checked, 96, 128).shape == (96, 128)


def test_polygons_far_outside_are_clipped():
    """A coordinate of 1e9 must not be rasterised, and what lies inside the image must not change."""
    near = [10.0, 10.0, 90.0, 20.0, 30.0, 80.0]
    assert normalise_segmentation([near], 96, 128) == [near]
    far = normalise_segmentation([[10, 10, 1e9, 10, 1e9, 60, 10, 60]], 96, 128)
    assert np.abs(far[0]).max() <= 256
    wanted = np.zeros((96, 128), bool)
    wanted[10:60, 10:] = True
    assert (to_mask(far, 96, 128) ^ wanted).mean() < 0.01
    assert normalise_segmentation([[1e9, 1e9, 2e9, 1e9, 2e9, 2e9]], 96, 128) is None


def test_exact_copies():
    one = {"id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3, 4, 5, 6]], "iscrowd": 0}
    entries = [one, one | {"id": 2}, one | {"iscrowd": 1}, one | {"category_id": 4}, one | {"segmentation": [[1] * 6]}]
    assert exact_copies([*entries, one]) == [1, 5]


@pytest.mark.parametrize(
    ("stated", "area", "rejected"),
    [
        (5000.0, 5000.0, False),  # agrees: kept, so COCO's own figures do not move
        (4100.0, 4100.0, False),
        ("4100", 4100.0, False),
        (0, 5000.0, True),
        (350.0, 5000.0, True),  # fourteen times too small
        (70000.0, 5000.0, True),
        (None, 5000.0, False),
        ("n/a", 5000.0, False),
        (float("nan"), 5000.0, False),
        (-3, 5000.0, False),
    ],
)
def test_areas(stated, area, rejected):
    """The stated area counts where it agrees with the mask, which has 5000 pixels; its box has 10000."""
    triangle = [[0.0, 0.0, 100.0, 0.0, 0.0, 100.0]]
    entry = {"bbox": [0, 0, 100, 100], "segmentation": triangle, "area": stated}
    found, wrong = parse_annotation(entry, 0, 120, 120).area(120, 120)
    assert (found, wrong) == (pytest.approx(area, rel=0.02), rejected)


def test_small_areas_agree_by_pixels():
    """The polygon and the pixels of a small object may differ by a large factor."""
    entry = {"segmentation": [[5, 5, 9, 5, 9, 9, 5, 9]], "area": 3.0}
    assert parse_annotation(entry, 0, 50, 50).area(50, 50) == (3.0, False)


@pytest.mark.parametrize("value", ["3.9", 3.9, True, None, {}, "x", 10**400, 2.0**60])
def test_ids_are_whole_numbers(value):
    with pytest.raises(UserError, match="not a whole number"):
        as_id(value, "a.json: image id")
    assert as_id("7", "") == as_id(7.0, "") == 7


@pytest.mark.parametrize("value", ["no", 2, -1, {}, []])
def test_a_strange_iscrowd_is_named(dataset, value):
    path = edit(dataset, lambda c: c["annotations"][3].update(iscrowd=value))
    with pytest.raises(UserError, match=r"annotation 4: iscrowd is .* it must be 0 or 1"):
        CocoDataset(path, path.parent / "images")


def corrupt(content):
    content["annotations"][1]["segmentation"] = {"size": [96, 128], "counts": "PPPP"}
    content["annotations"][2]["segmentation"] = {"size": [96, 128], "counts": "garbage!!"}


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_run_lengths_are_reported_and_training_goes_on(dataset, tmp_path, workers):
    path = edit(dataset, corrupt)
    out = run("tools.audit", "--annotations", path, "--image_dir", path.parent / "images", "--output", tmp_path / "a")
    assert "annotations have a box and no usable mask (2 of 14)" in out
    args = train_args(path, "--batch_size", "4", "--max_iter", "2", "--output_dir", tmp_path / "run")
    args[args.index("--workers") + 1] = workers
    assert "no usable mask" in run(*args)


def test_evaluation_says_that_masks_are_corrupt(dataset, weights, tmp_path):
    path = edit(dataset, corrupt)
    args = ["--weights", weights, "--device", "cpu", "--image_dir", path.parent / "images"]
    out = run("eval.py", *args, "--annotations", path, "--output", tmp_path / "metrics.json")
    assert "annotations without a usable mask: 2; mask AP ignores their regions" in out
    assert "NaN" not in (tmp_path / "metrics.json").read_text()
    assert json.loads((tmp_path / "metrics.json").read_text())["notes"]


def test_a_byte_order_mark_is_read(dataset):
    dataset.write_text(dataset.read_text(), encoding="utf-8-sig")
    assert len(CocoDataset(dataset, dataset.parent / "images")) == 8
