"""How many images are enough: AP after a fixed number of steps with subsets of a training set, from two starts.

python benchmarks/data_size.py --train train.json --val val.json --images images --output benchmarks/data_size.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from utils.errors import run_main
from weights.released import BUNDLED

ROOT = Path(__file__).resolve().parent.parent
STARTS = {"bundled weights": ["--init", str(BUNDLED)], "ImageNet": ["--config", "yolact_lite", "--init", "imagenet"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 200, 800, 0], help="images; 0: all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=288)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    content = json.loads(args.train.read_text())
    order = np.random.default_rng(0).permutation(len(content["images"]))
    report: dict[str, Any] = {
        "command": f"python benchmarks/data_size.py --train {args.train.name} --val {args.val.name} "
        f"--images {args.images.name} --steps {args.steps} --size {args.size}",
        "steps": args.steps,
        "size": args.size,
        "val_images": len(json.loads(args.val.read_text())["images"]),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for count in args.counts:
            path = Path(folder) / f"train_{count}.json"
            images = [content["images"][i] for i in order[: count or None]]
            ids = {image["id"] for image in images}
            annotations = [a for a in content["annotations"] if a["image_id"] in ids]
            path.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
            for start, options in STARTS.items():
                run = Path(folder) / f"{count}_{start.split()[0]}"
                train(args, path, run, options)
                metrics = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][-1]
                row = {"images": len(images), "start": start}
                row |= {f"{kind}_{key}": metrics[kind][key] for kind in ("bbox", "segm") for key in ("AP", "AP50")}
                report["rows"].append(row)
                print(row, flush=True)
                args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def train(args: argparse.Namespace, annotations: Path, run: Path, options: list[str]) -> None:
    """Train with the default settings for a fixed number of steps, and validate at the end."""
    command = [sys.executable, "train.py", *options, "--train_annotations", str(annotations)]
    command += [
        "--train_images",
        str(args.images),
        "--val_annotations",
        str(args.val),
        "--val_images",
        str(args.images),
    ]
    command += ["--max_iter", str(args.steps), "--val_interval", str(args.steps), "--workers", "1"]
    command += ["--set", f"max_size={args.size}", "train_scale=1", "warmup_iters=20", "--output_dir", str(run)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    run_main(main)
