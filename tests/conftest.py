"""What the tests share: small generated data sets, small models, and running the scripts."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# As in train.py and eval.py, and for the same reason: beside another process, a step would take seconds.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes run tests: each, and those it starts, use one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pytest
import recipe
import torch
from pycocotools import mask as rle
from torchvision.ops import box_convert

import eval as eval_script
import train as train_script
from config import Config, get_config
from inference import Predictor
from tools import audit as audit_script
from tools import demo as demo_script
from tools import pseudo_masks as pseudo_masks_script
from tools.export import __main__ as export_script
from tools.formats import __main__ as formats_script
from utils.errors import run_main
from weights import load_model
from weights.checkpoint import save_checkpoint
from yolact import Yolact

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures"
SCRIPTS = {
    "train.py": train_script.main,
    "eval.py": eval_script.main,
    "tools.export": export_script.main,
    "tools.demo": demo_script.main,
    "tools.audit": audit_script.main,
    "tools.pseudo_masks": pseudo_masks_script.main,
    "tools.formats": formats_script.main,
}
SMALL = [
    "--set",
    "max_size=96",
    "--set",
    "anchor_sizes=((8,),(16,),(32,),(64,),(96,))",
    "--set",
    "train_scale=1",
    "--init",
    "none",
]

CLASSES = ({"id": 7, "name": "disc"}, {"id": 3, "name": "tile"})  # neither sorted nor from 1


def ellipse(cx: float, cy: float, rx: float, ry: float) -> list[float]:
    """A polygon of 24 points."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack((cx + rx * np.cos(angles), cy + ry * np.sin(angles)), axis=1).ravel().round(2).tolist()


def make_dataset(
    folder: Path, count: int = 8, size: tuple[int, int] = (96, 128), seed: int = 0, negatives: int = 0
) -> Path:
    """`count` images of discs and tiles on noise, with polygons, some as RLE; the path of the JSON.

    The last `negatives` images hold nothing.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        image = rng.integers(90, 130, (height, width, 3)).astype(np.uint8)
        for k in range(0 if i >= count - negatives else 2):
            label = int(rng.integers(2))
            rx, ry = rng.uniform(0.12, 0.2, 2) * min(size)
            cx = width * (0.27 + 0.46 * k) + rng.uniform(-4, 4)  # one left, one right: they do not overlap
            cy = rng.uniform(ry + 2, height - ry - 2)
            if label == 0:
                polygon, color = ellipse(cx, cy, rx, ry), (40, 60, 230)
            else:
                polygon = [cx - rx, cy - ry, cx + rx, cy - ry, cx + rx, cy + ry, cx - rx, cy + ry]
                polygon, color = [round(v, 2) for v in polygon], (220, 160, 40)
            points = np.array(polygon).reshape(-1, 2)
            cv2.fillPoly(image, [points.round().astype(np.int32)], color)
            x1, y1, x2, y2 = *points.min(axis=0), *points.max(axis=0)
            segmentation = [polygon]
            if k == 1 and i % 2:
                code = rle.merge(rle.frPyObjects([polygon], height, width))
                segmentation = {"size": [height, width], "counts": code["counts"].decode()}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + 3 * i,
                    "category_id": CLASSES[label]["id"],
                    "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
                    "area": float((x2 - x1) * (y2 - y1)),
                    "segmentation": segmentation,
                    "iscrowd": 0,
                }
            )
        name = f"image_{i}.png"
        cv2.imwrite(str(folder / "images" / name), image)
        images.append({"id": 10 + 3 * i, "file_name": name, "height": height, "width": width})
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": list(CLASSES)}))
    return path


def run(*args, code=0):
    """Run train.py, eval.py or -m tools.audit in this process, as from the command line; return what it prints."""
    words = [str(arg) for arg in args if arg != "-m"]
    main, out = SCRIPTS[words[0]], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as ended:
        run_main(lambda: main(words[1:]))
    return checked(out.getvalue(), ended.value.code, code)


def spawn(*args, code=0, cwd=ROOT, timeout=900, **options):
    """Run Python in a process of its own, for tests that are about processes; return what it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )
    return checked(done.stdout + done.stderr, done.returncode, code)


def checked(text, code, wanted):
    """Return `text`, after checking the exit code, and that a mistake is reported in one line."""
    assert code == wanted, text
    if code == 2:
        assert re.search("^error: ", text, re.MULTILINE), text
        assert "Traceback" not in text
    return text


def train_args(path, *more):
    images = path.parent / "images"
    files = ["--train_annotations", path, "--train_images", images, "--val_annotations", path, "--val_images", images]
    return ["train.py", "--config", "yolact_lite", *files, "--device", "cpu", "--workers", "0", *SMALL, *more]


to_corners = functools.partial(box_convert, in_fmt="cxcywh", out_fmt="xyxy")
to_centres = functools.partial(box_convert, in_fmt="xyxy", out_fmt="cxcywh")


def random_image(height: int = 90, width: int = 130, seed: int = 0) -> np.ndarray:
    """Blurred colours."""
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def noisy_model(name: str, **overrides) -> Yolact:
    """A model whose random weights detect objects: the background's logits are lowered."""
    model = Yolact(get_config(name, **overrides)).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(recipe.state_dict(shapes, seed=1, gain=0.7))
    with torch.no_grad():
        model.head.cls.bias.view(-1, model.config.num_classes + 1)[:, 0] -= 1
    return model


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """The JSON of eight images, the last one without objects; they lie beside it in `images`."""
    return make_dataset(tmp_path / "data", 8, negatives=1)


@pytest.fixture(scope="session")
def chromium() -> list[str]:
    """The command of a Chromium that starts on this machine, with the arguments that a container needs."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium (chromium and chromium-driver in Debian)")
    command = [path, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    started = subprocess.run([*command, "--dump-dom", "about:blank"], capture_output=True, timeout=120, check=False)
    if started.returncode:
        pytest.skip(f"{path} does not start here: {started.stderr.decode(errors='replace')[-200:]}")
    return command


@pytest.fixture(scope="session")
def small_config() -> Config:
    """yolact_lite at 96 pixels for the two generated classes: runs in milliseconds."""
    return get_config(
        "yolact_lite",
        max_size=96,
        train_scale=1,
        anchor_sizes=((8,), (16,), (32,), (64,), (96,)),
        aspect_ratios=(1, 0.5, 2),
        mask_threshold=0.5,
        crop_after_resize=False,
        maskness=False,
        box_voting=False,  # anchors with random weights do not agree, so their scores would become very low
        class_names=("disc", "tile"),
        category_ids=(7, 3),
    )


@pytest.fixture(scope="session")
def weights(tmp_path_factory, small_config):
    """Random ones whose outputs differ from place to place, with the background turned down: it finds plenty."""
    model = Yolact(small_config)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(recipe.state_dict(shapes, seed=1, gain=1.0))
    with torch.no_grad():
        model.head.cls.bias.view(-1, 3)[:, 0] -= 3
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    save_checkpoint(path, model)
    return path


@pytest.fixture(scope="session")
def predictor(weights):
    return Predictor(load_model(weights), device="cpu", precision="fp32")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption("--fuzz", type=int, default=1, help="run this many times as many cases of tests/fuzz")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
