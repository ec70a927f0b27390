"""Measure the time per training sample on one core, compared with the original (github.com/dbolya/yolact).

python benchmarks/loader.py --original ../yolact --annotations train.json --image_dir images --output loader.json

Both projects read and augment the same images for 550 px, alternately, in one process with one OpenCV thread. The
original runs from the given folder, unmodified except for two uses of NumPy that newer versions no longer support.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", type=Path, required=True, help="a clone of the authors' repository")
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--image_dir", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=150, help="samples in each of three rounds")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/loader.json")
    parser.add_argument("--only", choices=["ours", "original"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        read = ours(args) if args.only == "ours" else original(args)
        print(json.dumps(measure(read, args.samples)))
        return 0
    times: dict[str, list[float]] = {"ours": [], "original": []}
    for _ in range(3):
        for name, values in times.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            values += json.loads(done.stdout.splitlines()[-1])
    medians = {name: statistics.median(values) for name, values in times.items()}
    means = {name: statistics.fmean(values) for name, values in times.items()}
    report = {
        "command": f"python benchmarks/loader.py --original {args.original.name} --annotations {args.annotations.name} "
        f"--image_dir {args.image_dir.name} --samples {args.samples}",
        "processor": processor(),
        "median_ms": {name: round(1000 * value, 2) for name, value in medians.items()},
        "mean_ms": {name: round(1000 * value, 2) for name, value in means.items()},
        "ratio_of_medians": round(medians["original"] / medians["ours"], 2),
        "ratio_of_means": round(means["original"] / means["ours"], 2),
        "samples": len(times["ours"]),
        "opencv": cv2.__version__,
        "numpy": np.__version__,
    }
    print(json.dumps(report, indent=1))
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def processor() -> str:
    """Return the name of the processor and the number of threads."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.stages import device_name

    return device_name(torch.device("cpu"))


def measure(read: Callable[[int], object], samples: int, warmup: int = 10) -> list[float]:
    """Return the seconds per sample, after `warmup` samples that are not timed."""
    cv2.setNumThreads(1)
    times = []
    for index in range(samples + warmup):
        started = time.perf_counter()
        read(index)
        times.append(time.perf_counter() - started)
    return times[warmup:]


def ours(args: argparse.Namespace) -> Callable[[int], object]:
    """Return a function that reads and augments a sample with this project."""
    sys.path.insert(0, str(ROOT))
    from config import get_config
    from data.coco import CocoDataset
    from data.loader import TrainingSet

    dataset = CocoDataset(args.annotations, args.image_dir)
    training = TrainingSet(dataset, get_config("yolact_base"), seed=0)
    # The original uses only images with objects, in the order of the annotations.
    entries = json.loads(args.annotations.read_text(encoding="utf-8"))["annotations"]
    position = {image_id: i for i, image_id in enumerate(dataset.image_ids)}
    indices = [position[image_id] for image_id in dict.fromkeys(int(entry["image_id"]) for entry in entries)]
    return lambda index: training[index // len(indices), indices[index % len(indices)]]


def original(args: argparse.Namespace) -> Callable[[int], object]:
    """Return a function that reads and augments a sample with the original."""
    annotations, image_dir, folder = (p.resolve() for p in (args.annotations, args.image_dir, args.original))
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    np.float = float  # removed in NumPy 1.24
    from utils.augmentations import RandomSampleCrop, SSDAugmentation

    from data import COCODetection, cfg, set_cfg

    set_cfg("yolact_base_config")
    cfg.max_size = 550
    augmentation = SSDAugmentation()
    for step in augmentation.augment.transforms:
        if isinstance(step, RandomSampleCrop):  # NumPy no longer creates ragged arrays implicitly
            step.sample_options = np.array(step.sample_options, dtype=object)
    dataset = COCODetection(str(image_dir), str(annotations), transform=augmentation)
    dataset.target_transform.label_map = dict.fromkeys(dataset.coco.getCatIds(), 1)  # any category ids
    return lambda index: dataset.pull_item(index % len(dataset))


if __name__ == "__main__":
    sys.exit(main())
