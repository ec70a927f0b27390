"""What the fast paths do to AP: float32 as it is written, prepared, in bfloat16, compiled, on the same images.

python benchmarks/precision.py --weights runs/mine/best.pth --annotations val.json --image_dir images
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.stages import device_name
from data.coco import CocoDataset
from evaluation.evaluator import evaluate
from inference import Predictor
from utils.errors import run_main
from weights import load_model

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
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/precision.json"))
    args = parser.parse_args()
    model = load_model(args.weights)
    dataset = CocoDataset(args.annotations, args.image_dir)
    rows = []
    for name, options in VARIANTS.items():
        predictor = Predictor(model, args.device, **options)
        metrics = evaluate(predictor, dataset, args.max_images, progress=False)
        row = {"variant": name, "box_AP": metrics["bbox"]["AP"], "mask_AP": metrics["segm"]["AP"]}
        first = rows[0] if rows else row
        row |= {
            "box_difference": row["box_AP"] - first["box_AP"],
            "mask_difference": row["mask_AP"] - first["mask_AP"],
        }
        rows.append(row)
        print(row)
    report = {
        "command": f"python benchmarks/precision.py --weights {Path(args.weights).name} "
        f"--annotations {args.annotations.name} --image_dir {args.image_dir.name}"
        + f" --max_images {args.max_images}"
        * bool(args.max_images),
        "configuration": model.config.name,
        "input": model.config.model.max_size,
        "images": args.max_images or len(dataset),
        "device": device_name(predictor.device),
        "torch": torch.__version__,
        "rows": rows,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
