"""Measure how much private memory a forked worker gains while it reads the annotation index of a COCO-sized data set.

python benchmarks/index_memory.py

The index is synthetic: like train2017 it has 118,287 images and 860,001 annotations, here with polygons of 20 points. A
child process reads every entry once in random order; each DataLoader worker costs the growth of its private memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.coco import CocoDataset


def private_mib() -> float:
    """Return the private memory of this process in MiB, as Linux reports it."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty")) / 1024


def generate(path: Path, images: int, annotations: int) -> None:
    """Write an annotation file."""
    rng = random.Random(0)
    entries = [
        {
            "id": k,
            "image_id": k % images,
            "category_id": 1,
            "bbox": [round(rng.uniform(0, 300), 2) for _ in range(4)],
            "area": 100.0,
            "iscrowd": 0,
            "segmentation": [[round(rng.uniform(0, 600), 2) for _ in range(40)]],
        }
        for k in range(annotations)
    ]
    listed = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(images)]
    path.write_text(json.dumps({"images": listed, "annotations": entries, "categories": [{"id": 1, "name": "a"}]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--annotations", type=int, default=860_001)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        generate(path, args.images, args.annotations)
        started = time.perf_counter()
        dataset = CocoDataset(path, folder)
        print(f"loaded in {time.perf_counter() - started:.1f} s, {private_mib():.0f} MiB private memory", flush=True)
        order = random.Random(1).sample(range(len(dataset)), len(dataset))
        if os.fork() == 0:
            before = private_mib()
            for index in order:
                for entry in dataset.annotations(index):  # training reads every number of every annotation
                    _ = [list(entry["bbox"]), list(entry["segmentation"][0]), *entry.values()]
            print(f"private memory of a worker grew by {private_mib() - before:.0f} MiB", flush=True)
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main()
