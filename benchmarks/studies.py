"""Measure what one choice in inference costs and gains: AP by COCOeval, and the time per image.

python benchmarks/studies.py nms --weights runs/mine --annotations val.json --image_dir images --output nms.json
python benchmarks/studies.py precision ... --calibration train.json     # also exports, int8 calibrated on 200 images
python benchmarks/studies.py tiles ...

`nms` compares every NMS, box voting, and ways of cropping masks (compare Table 2a of the paper); `precision` compares
bfloat16, compiled and exported models with float32; `tiles` compares sizes of tiles. Compare rows of one run only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.stages import device_name
from data.coco import CocoDataset
from evaluation import evaluate
from inference import Predictor
from layers.nms import NMS
from tools.export.exporting import write_export
from tools.tiles import TiledPredictor
from utils.device import configure_process
from utils.errors import run_main
from weights import load_model
from yolact import Yolact

Variants = dict[str, Callable[[], Any]]
KEYS = ("AP", "AP50", "APs", "APm", "APl")


def nms(model: Yolact, args: argparse.Namespace, _folder: Path) -> Variants:
    options: dict[str, dict[str, Any]] = {name: {"nms": name, "box_voting": False} for name in NMS}
    options |= {f"{name}, box voting": {"nms": name, "box_voting": True} for name in ("fast", "cluster")}
    options |= {
        "crop before resize": {"crop_after_resize": False},
        "no crop": {"crop": False, "crop_after_resize": False},
        "crop after resize": {"crop_after_resize": True},
    }
    return {name: partial(Predictor, model, args.device, **given) for name, given in options.items()}


def precision(model: Yolact, args: argparse.Namespace, folder: Path) -> Variants:
    size = (model.config.model.max_size,) * 2  # that of the exported models
    start = partial(Predictor, model, args.device, size=size)
    variants: Variants = {"float32, the model as written": partial(start, optimize=False)}
    for name, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        variants[name] = partial(start, precision=short)
        variants[f"{name} compiled"] = partial(start, precision=short, compile=True)
    if args.calibration is None:
        return variants
    calibration = CocoDataset(args.calibration, args.image_dir)
    files = {name: folder / f"{name}.{'onnx' if name == 'onnx' else 'xml'}" for name in ("onnx", "float", "int8")}
    for name, path in files.items():
        images = map(calibration.read_image, range(200)) if name == "int8" else None
        write_export(model, path, size, model.config.detection, calibration=images)
    exported = {
        "ONNX Runtime float32": ("onnx", "fp32"),
        "OpenVINO float32": ("float", "fp32"),
        "OpenVINO bfloat16": ("float", "bf16"),
        "OpenVINO int8, the rest float32": ("int8", "fp32"),
        "OpenVINO int8, the rest bfloat16": ("int8", "bf16"),
    }
    for name, (file, short) in exported.items():
        variants[name] = partial(Predictor.from_weights, files[file], precision=short)
    return variants


def tiles(model: Yolact, args: argparse.Namespace, _folder: Path) -> Variants:
    predictor = Predictor(model, args.device)
    variants: Variants = {"none": lambda: predictor}
    return variants | {str(side): partial(TiledPredictor, predictor, side) for side in args.tiles}


def main() -> int:
    studies = {"nms": nms, "precision": precision, "tiles": tiles}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=studies)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--image_dir", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="annotations of other images in --image_dir, for int8")
    parser.add_argument("--tiles", type=int, nargs="+", default=[208, 320], help="sides of the tiles")
    parser.add_argument("--max_images", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    configure_process()
    model, dataset = load_model(args.weights), CocoDataset(args.annotations, args.image_dir)
    report: dict[str, Any] = {
        "command": f"python benchmarks/studies.py {args.study} --weights {Path(args.weights).name} "
        f"--annotations {args.annotations.name} --image_dir {args.image_dir.name}",
        "configuration": model.config.name,
        "images": args.max_images or len(dataset),
        "torch": torch.__version__,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, make in studies[args.study](model, args, Path(folder)).items():
            predictor = make()
            started = time.perf_counter()
            metrics = evaluate(predictor, dataset, args.max_images, progress=False)
            ms = round(1000 * (time.perf_counter() - started) / report["images"], 1)  # COCOeval included
            box, mask = metrics["bbox"], metrics["segm"]
            row = {"variant": name, "ms": ms, "box_AP": box["AP"]} | {f"mask_{key}": mask[key] for key in KEYS}
            report["rows"].append(row)
            print(row, flush=True)
            report["device"] = device_name(getattr(predictor, "device", torch.device("cpu")))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
