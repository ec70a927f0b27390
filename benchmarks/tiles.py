"""Compare AP and time with and without tiles, by the size of the objects.

python benchmarks/tiles.py --weights runs/mine --annotations val.json --image_dir images --tiles 208 320
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.stages import device_name
from data.coco import CocoDataset
from evaluation.evaluator import evaluate
from inference import Predictor
from tools.tiles import TiledPredictor
from utils.device import configure_process
from utils.errors import run_main
from weights import load_model

KEYS = ("AP", "AP50", "APs", "APm", "APl")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--image_dir", type=Path, required=True)
    parser.add_argument("--tiles", type=int, nargs="+", default=[208, 320])
    parser.add_argument("--max_images", type=int)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/tiles.json"))
    args = parser.parse_args()
    configure_process()
    predictor = Predictor(load_model(args.weights), "cpu")
    dataset = CocoDataset(args.annotations, args.image_dir)
    sides = [max(dataset.read_image(i).shape[:2]) for i in range(min(20, len(dataset)))]
    rows = []
    for tile in (None, *args.tiles):
        tested = predictor if tile is None else TiledPredictor(predictor, tile)
        started = time.perf_counter()
        metrics = evaluate(tested, dataset, args.max_images, progress=False)
        assert metrics is not None
        seconds = time.perf_counter() - started
        count = args.max_images or len(dataset)
        row = {"tile": tile, "ms": round(1000 * seconds / count)} | {key: metrics["segm"][key] for key in KEYS}
        rows.append(row)
        print(row)
    report = {
        "command": f"python benchmarks/tiles.py --weights {Path(args.weights).name} "
        f"--annotations {args.annotations.name} --image_dir {args.image_dir.name} "
        f"--tiles {' '.join(map(str, args.tiles))}",
        "configuration": predictor.config.name,
        "input": predictor.size[0],
        "images": args.max_images or len(dataset),
        "longest_side": max(sides),
        "device": device_name(torch.device("cpu")),
        "rows": rows,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
