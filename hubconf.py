"""Entry points for torch.hub.

    predictor = torch.hub.load("path/of/this/folder", "yolact_r50", source="local")
    detections = predictor("street.jpg")  # or a PIL image, or an array with channels="bgr" (default) or "rgb"

Each entry point returns a `Predictor`, and passes its arguments on: `yolact_r50(device="cpu", score_threshold=0.3)`.
Released weights are downloaded once, into `weights/`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
# The modules that `inference` imports. Projects have their own `utils`, `data` and `config`.
NAMES = {"backbone", "config", "data", "inference", "layers", "utils", "weights", "yolact"}


@contextlib.contextmanager
def _own_modules() -> Iterator[None]:
    """Import the modules of this folder in the block; afterwards, others of the same names are what they were."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in NAMES}
    loaded = getattr(before.get("config"), "__file__", None)
    if loaded and Path(loaded).resolve().parent == FOLDER:  # this folder is on the path, and in use
        sys.modules.update(before)
        yield
        return
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
            del sys.modules[name]
        sys.modules.update(before)


with _own_modules():
    from inference import Predictor
    from weights.released import BUNDLED, RELEASED

dependencies = ["torch", "torchvision", "pycocotools", "numpy", "cv2", "tqdm"]


def custom(path: str | Path, **options: Any) -> Predictor:
    """A Predictor for a checkpoint, the folder of a run, or an exported .onnx or .xml file."""
    return Predictor.from_weights(path, **options)


def yolact_lite_person(**options: Any) -> Predictor:
    """A Predictor for the bundled weights, which detect people only."""
    return Predictor.from_weights(BUNDLED, **options)


def _entry(name: str) -> Callable[..., Predictor]:
    entry = partial(Predictor.from_weights, name)
    entry.__doc__ = f"A Predictor for the released {name}: mask AP {RELEASED[name].mask_ap} on COCO."
    return entry


yolact_r50 = _entry("yolact_r50")
yolact_r50_8xb8 = _entry("yolact_r50_8xb8")
yolact_r101 = _entry("yolact_r101")
yolact_resnet50 = _entry("yolact_resnet50")
yolact_darknet53 = _entry("yolact_darknet53")
yolact_base = _entry("yolact_base")
yolact_im700 = _entry("yolact_im700")
yolact_plus_resnet50 = _entry("yolact_plus_resnet50")
yolact_plus_base = _entry("yolact_plus_base")
