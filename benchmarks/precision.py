"""Compare the AP of the unmodified float32 model with that of the optimised, bfloat16 and compiled models.

python benchmarks/precision.py --weights runs/mine/best.pth --annotations val.json --image_dir images
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.stages import device_name
from data.coco import CocoDataset
from data.image import read_image
from evaluation.evaluator import evaluate
from inference import Predictor
from tools.export.exporting import write_export
from utils.device import choose_device
from utils.errors import run_main
from weights import load_model
from yolact import Yolact

CALIBRATION_IMAGES = 200

VARIANTS = {
    "float32, the model as written": {"optimize": False},
    "float32": {"precision": "fp32"},
    "float32 compiled": {"precision": "fp32", "compile": True},
    "bfloat16": {"precision": "bf16"},
    "bfloat16 compiled": {"precision": "bf16", "compile": True},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--image_dir", type=Path, required=True)
    parser.add_argument("--max_images", type=int)
    parser.add_argument("--calibration", type=Path, help="annotations whose first 200 images calibrate int8 exports")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/precision.json"))
    args = parser.parse_args()
    model = load_model(args.weights)
    dataset = CocoDataset(args.annotations, args.image_dir)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        size = (model.config.model.max_size,) * 2  # that of the exported models
        makers = {name: partial(Predictor, model, args.device, size=size, **o) for name, o in VARIANTS.items()}
        if args.calibration:
            makers |= exported(model, calibration_images(args), Path(folder))
        for name, make in makers.items():
            metrics = evaluate(make(), dataset, args.max_images, progress=False)
            rows.append(compared(name, metrics, rows))
            print(rows[-1])
    report = {
        "command": f"python benchmarks/precision.py --weights {Path(args.weights).name} "
        f"--annotations {args.annotations.name} --image_dir {args.image_dir.name}"
        + f" --max_images {args.max_images}" * bool(args.max_images)
        + (f" --calibration {args.calibration.name}" if args.calibration else ""),
        "configuration": model.config.name,
        "input": model.config.model.max_size,
        "images": args.max_images or len(dataset),
        "device": device_name(choose_device(args.device)),
        "torch": torch.__version__,
        "rows": rows,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def compared(name: str, metrics: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the AP of a variant and its difference from the first row's."""
    row = {"variant": name, "box_AP": metrics["bbox"]["AP"], "mask_AP": metrics["segm"]["AP"]}
    first = rows[0] if rows else row
    differences = {f"{kind}_difference": row[f"{kind}_AP"] - first[f"{kind}_AP"] for kind in ("box", "mask")}
    return row | differences


def calibration_images(args: argparse.Namespace) -> Iterator[np.ndarray]:
    """Yield the first images of the calibration set, which should not be those that are evaluated."""
    images = json.loads(args.calibration.read_text())["images"][:CALIBRATION_IMAGES]
    return (read_image(args.image_dir / image["file_name"]) for image in images)


def exported(model: Yolact, calibration: Iterator[np.ndarray], folder: Path) -> dict[str, Callable[[], Predictor]]:
    """Export the model; return predictors for each runtime and precision."""
    side = model.config.model.max_size
    files = {"onnx": folder / "model.onnx", "float": folder / "float.xml", "int8": folder / "int8.xml"}
    for name, path in files.items():
        images = calibration if name == "int8" else None
        write_export(model, path, (side, side), model.config.detection, calibration=images)
    variants = {
        "ONNX Runtime float32": ("onnx", "fp32"),
        "OpenVINO float32": ("float", "fp32"),
        "OpenVINO bfloat16": ("float", "bf16"),
        "OpenVINO int8, the rest float32": ("int8", "fp32"),
        "OpenVINO int8, the rest bfloat16": ("int8", "bf16"),
    }
    return {
        name: partial(Predictor.from_weights, files[key], precision=precision)
        for name, (key, precision) in variants.items()
    }


if __name__ == "__main__":
    run_main(main)
