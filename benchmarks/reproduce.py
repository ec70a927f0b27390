"""Evaluate the released weights on COCO val2017 and print AP and frames per second beside the published figures.

python benchmarks/reproduce.py --coco DIR --output reproduced.json     # DIR has annotations/ and val2017/
python benchmarks/reproduce.py --coco DIR --weights yolact_r50 --device cuda --compile

Weights are downloaded once. Those of the authors were published with the AP on test-dev, for which COCO has no public
annotations. A file that cannot be used is reported and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.stages import benchmark, device_name
from data.coco import CocoDataset
from evaluation import evaluate
from inference import Predictor
from utils.errors import UserError, integer, run_main
from weights.released import RELEASED

# Frames per second that the authors' README gives, on a Titan Xp.
PAPER_FPS = {
    "yolact_base": 33.5, "yolact_resnet50": 42.5, "yolact_darknet53": 40.0, "yolact_im700": 23.6,
    "yolact_plus_resnet50": 33.5, "yolact_plus_base": 27.3,
}  # fmt: skip
LINE = "{:<24}{:>8}{:>9}  {:<18}{:>10}{:>11}"


def reproduce(name: str, dataset: CocoDataset, args: argparse.Namespace) -> dict[str, Any]:
    """Return AP and frames per second of one file of weights, given by its name or path."""
    options = {"device": args.device, "precision": args.precision, "compile": args.compile}
    predictor = Predictor.from_weights(name, **options)
    metrics = evaluate(predictor, dataset, args.max_images)
    assert metrics is not None
    speed = benchmark(predictor, repeats=args.repeats)
    config = predictor.config.name
    return {
        "configuration": config,
        "box_AP": metrics["bbox"]["AP"],
        "mask_AP": metrics["segm"]["AP"],
        "published_mask_AP": RELEASED[config].mask_ap if config in RELEASED else "",
        "fps": speed["paper_fps"],
        "published_fps_titan_xp": PAPER_FPS.get(config),
        "precision": speed["precision"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--coco", type=Path, required=True, help="COCO's folder, with annotations and val2017")
    parser.add_argument("--weights", nargs="+", default=list(RELEASED), help="names or files (default: all released)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--max_images", type=integer(1), help="evaluate only the first images")
    parser.add_argument("--repeats", type=integer(1), default=30, help="timed passes")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    dataset = CocoDataset(args.coco / "annotations/instances_val2017.json", args.coco / "val2017")
    dataset.check_folder()
    report: dict[str, Any] = {"torch": torch.__version__, "images": args.max_images or len(dataset), "rows": []}
    print(LINE.format("configuration", "box AP", "mask AP", "published", "frames/s", "Titan Xp"))
    problems = 0
    for name in args.weights:
        try:
            row = reproduce(name, dataset, args)
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            problems += 1
            continue
        aps = [f"{100 * row[key]:.1f}" for key in ("box_AP", "mask_AP")]
        fps = f"{row['fps']:.1f}", str(row["published_fps_titan_xp"] or "-")
        print(LINE.format(row["configuration"], *aps, row["published_mask_AP"] or "-", *fps), flush=True)
        report["rows"].append(row)
        report["device"] = device_name(Predictor.from_weights(name, device=args.device).device)
        if args.output:
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
