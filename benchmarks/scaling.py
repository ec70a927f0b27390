"""Measure how time and memory grow with the input size, the batch size, the number of detections and the image size.

python benchmarks/scaling.py --config yolact_lite --output benchmarks/scaling_lite.json
python benchmarks/scaling.py --config yolact_resnet50 --device cuda --output benchmarks/scaling_r50_cuda.json

Weights are random and detections are synthetic. Each case runs in its own process, so that peak memory is per case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

USUAL = {"size": 0, "batch_size": 1, "detections": 10, "image": [480, 640]}
IMAGE_SIZES = ([240, 320], [480, 640], [1080, 1920], [3000, 4000])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="yolact_lite")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 320, 416, 550])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--detections", type=int, nargs="+", default=[1, 10, 30, 100])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/scaling.json"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(args, args.case)))
        return 0
    varied = {"size": args.sizes, "batch_size": args.batches, "detections": args.detections, "image": list(IMAGE_SIZES)}
    rows, report = [], {}
    for name, values in varied.items():
        for value in values:
            command = [sys.executable, __file__, *sys.argv[1:], "--case", json.dumps(USUAL | {name: value})]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            report = json.loads(done.stdout.splitlines()[-1])
            stages = report["stages_ms"]
            row = {
                "varied": name,
                "value": value,
                "network_ms": round(stages["network"]["median"], 2),
                "masks_ms": round(stages["masks"]["median"], 2),
                "image_to_masks_ms": round(stages["image to masks"]["median"], 2),
                "memory_mib": round(report["peak_memory_mib"]),
            }
            print(row)
            rows.append(row)
    summary = {
        "command": " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]]),
        **{key: report[key] for key in ("configuration", "device", "precision", "versions")},
        "usual": USUAL | {"size": report["size"][0]},
        "rows": rows,
    }
    args.output.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    """Run benchmarks.stages for one case and return its report."""
    from benchmarks.stages import benchmark
    from config import get_config
    from inference import Predictor
    from yolact import Yolact

    size = (case["size"],) * 2 if case["size"] else None
    predictor = Predictor(Yolact(get_config(args.config)), args.device, args.precision, size=size)
    return benchmark(predictor, case["batch_size"], case["detections"], tuple(case["image"]), args.repeats)


if __name__ == "__main__":
    sys.exit(main())
