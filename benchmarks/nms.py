"""Measure the effect of each NMS and each way of cropping masks on AP and time (compare Table 2a of the paper).

python benchmarks/nms.py --weights runs/mine/best.pth --annotations val.json --image_dir images --output nms.json

AP is computed by COCOeval. The time is the median over images of the varied step alone: from raw outputs to detections
for NMS, and from detections to masks at the image's size for cropping.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.stages import device_name
from data.coco import CocoDataset
from evaluation.evaluator import evaluate
from inference import Predictor
from layers.nms import NMS
from utils.errors import run_main
from weights import load_model

NMS_VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"nms": name, "box_voting": False} for name in NMS},
    **{f"{name}, box voting": {"nms": name, "box_voting": True} for name in ("fast", "cluster")},
}
CROPS: dict[str, dict[str, Any]] = {
    "crop before resize": {"crop_after_resize": False},
    "no crop": {"crop": False, "crop_after_resize": False},
    "crop after resize": {"crop_after_resize": True},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--image_dir", type=Path, required=True)
    parser.add_argument("--max_images", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/nms.json"))
    args = parser.parse_args()
    model = load_model(args.weights)
    dataset = CocoDataset(args.annotations, args.image_dir)
    rows = []
    for name, options in {**NMS_VARIANTS, **CROPS}.items():
        predictor = Predictor(model, args.device, **options)
        metrics = evaluate(predictor, dataset, args.max_images)
        step = _mask_times(predictor, dataset) if name in CROPS else _detect_times(predictor, dataset)
        box, mask = metrics["bbox"], metrics["segm"]
        rows.append(
            {"variant": name, "box_AP": box["AP"], "mask_AP": mask["AP"], "mask_AP50": mask["AP50"], "ms": step}
        )
        print(rows[-1])
    report = {
        "command": f"python benchmarks/nms.py --weights {Path(args.weights).name} "
        f"--annotations {args.annotations.name} --image_dir {args.image_dir.name}"
        + f" --max_images {args.max_images}"
        * bool(args.max_images),
        "configuration": model.config.name,
        "input": model.config.model.max_size,
        "classes": model.config.num_classes,
        "images": args.max_images or len(dataset),
        "device": device_name(predictor.device),
        "torch": torch.__version__,
        "rows": rows,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _median(dataset: CocoDataset, prepare: Callable[[Any], Any], step: Callable[[Any], Any], images: int = 40) -> float:
    """Return the median milliseconds of `step` on `prepare(image)` for the first images, after three warm-up calls."""
    times = []
    with torch.inference_mode():
        for index in range(min(images, len(dataset))):
            given = prepare(dataset.read_image(index))
            started = time.perf_counter()
            step(given)
            times.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(times[3:] or times), 2)


def _detect_times(predictor: Predictor, dataset: CocoDataset) -> float:
    return _median(dataset, lambda image: predictor.predict(predictor.preprocess(image)[None]), predictor.detect)


def _mask_times(predictor: Predictor, dataset: CocoDataset) -> float:
    return _median(dataset, predictor, lambda found: list(found.iter_masks()))


if __name__ == "__main__":
    run_main(main)
