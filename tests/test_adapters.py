"""Detections in the forms of other libraries, images in the forms that people have, and torch.hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, random_image, run
from PIL import Image
from test_predict import disc_detections

import hubconf
from inference import Predictor
from inference.detections import BLUR_CELLS
from utils.errors import UserError
from weights import load_model
from weights.released import RELEASED


def test_dictionaries_have_areas_and_centroids():
    found = disc_detections(300, 200)
    rows = found.to_dicts()
    assert json.loads(json.dumps(rows)) == rows
    assert [row["class"] for row in rows] == ["disc", "tile"]
    for row, mask, centre in zip(rows, found.masks.numpy(), [(0.3, 0.4), (0.7, 0.6)], strict=True):
        assert row["area"] == mask.sum()
        assert (row["centroid_x"], row["centroid_y"]) == pytest.approx((200 * centre[0], 300 * centre[1]), abs=1)
        assert "track_id" not in row
    tracked = replace(found, track_ids=torch.tensor([4, -1])).to_dicts()
    assert [row.get("track_id") for row in tracked] == [4, None]


def test_pandas():
    pytest.importorskip("pandas", reason="needs requirements-tools.txt")
    found = disc_detections(300, 200)
    table = found.to_pandas()
    assert table["area"].tolist() == [int(mask.sum()) for mask in found.masks]
    assert found[:0].to_pandas().empty


def test_supervision():
    supervision = pytest.importorskip("supervision", reason="needs requirements-tools.txt")
    found = replace(disc_detections(300, 200), track_ids=torch.tensor([4, 7]))
    converted = found.to_supervision()
    assert np.array_equal(converted.mask, found.masks.numpy())
    assert np.allclose(converted.xyxy, found.boxes.numpy())
    assert converted.tracker_id.tolist() == [4, 7]
    assert converted["class_name"].tolist() == ["disc", "tile"]
    image = random_image(300, 200)
    painted = supervision.MaskAnnotator().annotate(image.copy(), converted)
    changed = (painted != image).any(axis=2)
    assert changed[found.masks.any(dim=0).numpy()].mean() > 0.9
    assert not changed[~found.masks.any(dim=0).numpy()].any()
    assert len(found[:0].to_supervision()) == 0


def test_missing_packages_are_named(monkeypatch):
    for name in ("pandas", "supervision"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"{name} is not installed; run: pip install -r requirements-tools.txt"):
            getattr(disc_detections(30, 20), f"to_{name}")()


def test_crops_are_transparent_outside_of_the_mask():
    image = random_image(300, 200)
    found = disc_detections(300, 200)
    for crop, mask in zip(found.crops(image), found.masks.numpy(), strict=True):
        ys, xs = np.nonzero(mask)
        assert crop.shape == (ys.max() - ys.min() + 1, xs.max() - xs.min() + 1, 4)
        inside = crop[..., 3] == 255
        assert inside.sum() == mask.sum()
        assert np.array_equal(crop[inside][:, :3], image[mask])
    with pytest.raises(ValueError, match="of an image of"):
        found.crops(image[:100])


def test_blurring_hides_the_instances_only():
    image = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    found = disc_detections(300, 200)
    blurred = found.blur(image)
    union = found.masks.any(dim=0).numpy()
    assert np.array_equal(blurred[~union], image[~union])
    mask = found.masks[0].numpy()
    ys, xs = np.nonzero(mask)
    side = max(np.ptp(ys), np.ptp(xs))
    steps = np.abs(np.diff(blurred.astype(int), axis=1))[mask[:, 1:] & mask[:, :-1]]
    assert steps.max() < 255 * 2 * BLUR_CELLS / side  # no edge sharper than the coarse grid's
    with pytest.raises(ValueError, match="of an image of"):
        found.blur(image[:100])


def test_paths_arrays_and_pil_images_agree(weights, tmp_path):
    image = cv2.imread(str(ROOT / "data/demo/astronaut.jpg"))
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(image[..., ::-1])))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, which readers undo
    turned.save(tmp_path / "turned.png", exif=exif)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    predictor = Predictor.from_weights(weights, device="cpu", precision="fp32")
    expected = predictor(image)
    rgb = np.ascontiguousarray(image[..., ::-1])
    same = [
        predictor(tmp_path / "a.png"),
        predictor(str(tmp_path / "a.png")),
        predictor(Image.fromarray(rgb)),
        predictor(rgb, channels="rgb"),
        predictor(Image.open(tmp_path / "turned.png")),
        *predictor([Image.fromarray(rgb), rgb], channels="rgb"),
    ]
    assert len(expected)
    for found in same:
        assert torch.allclose(found.boxes, expected.boxes, atol=1e-2)
    assert not torch.allclose(predictor(rgb)[:3].coefficients, expected[:3].coefficients, atol=1e-2)
    grey = Image.fromarray(rgb).convert("L")  # is converted to colour
    assert torch.equal(predictor(grey).boxes, predictor(cv2.cvtColor(np.asarray(grey), cv2.COLOR_GRAY2BGR)).boxes)
    with pytest.raises(ValueError, match="channels must be 'bgr' or 'rgb'"):
        predictor(rgb, channels="RGB")
    with pytest.raises(UserError, match="no such image"):
        predictor("missing.jpg")


HUB = """
import json, os, sys, torch
os.chdir(sys.argv[2])  # the project is not the working directory, which has modules of the same names
sys.path.insert(0, "")
import config, utils
bundled = torch.hub.load(sys.argv[1], "yolact_lite_person", source="local", device="cpu", score_threshold=0.5)
own = torch.hub.load(sys.argv[1], "custom", "run/small.pth", source="local", device="cpu")
import data, utils.errors  # imported only now
assert (config.MINE, data.MINE, utils.errors.MINE) == (1, 2, 3)
print(json.dumps({
    "found": [len(bundled(sys.argv[4])), bundled.config.class_names, own.config.name],
}))
"""


def test_torch_hub(tmp_path, weights):
    for name, text in {
        "config": "MINE = 1",
        "data": "MINE = 2",
        "utils/__init__": "",
        "utils/errors": "MINE = 3",
    }.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "run").mkdir()
    shutil.copy(weights, tmp_path / "run/small.pth")
    arguments = [ROOT, tmp_path, weights, ROOT / "data/demo/astronaut.jpg"]
    done = subprocess.run(
        [sys.executable, "-c", HUB, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["found"][0] >= 1
    assert result["found"][1] == ["person"]


def test_torch_hub_has_every_released_name(monkeypatch):
    """The weights cannot be downloaded here, so the entry points are called with a stand-in for loading."""
    asked = []
    monkeypatch.setattr("inference.predictor.load_model", lambda name: asked.append(name) or load_model("none.pth"))
    for name, released in RELEASED.items():
        entry = getattr(hubconf, name)
        assert released.mask_ap in entry.__doc__
        with pytest.raises(UserError, match=r"none\.pth"):
            entry(device="cpu")
    assert asked == list(RELEASED)


def test_cutouts_and_blur_of_images(tmp_path):
    args = ["eval.py", "--image", ROOT / "data/demo/astronaut.jpg", "--output", tmp_path, "--device", "cpu"]
    run(*args, "--save", "cutout,blur", "--precision", "fp32", "--score_threshold", 0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["astronaut.blur.jpg", "astronaut.cutout_1.png"]
    cutout = cv2.imread(str(tmp_path / "astronaut.cutout_1.png"), cv2.IMREAD_UNCHANGED)
    assert cutout.shape[2] == 4
    assert set(np.unique(cutout[..., 3])) == {0, 255}
    run(*args, "--save", "cutout", "--score_threshold", 1)
    assert not (tmp_path / "astronaut.cutout_1.png").exists()  # an earlier result without its instance
