"""Measure how stable masks and boxes are from frame to frame (paper, section 1: temporal stability).

python benchmarks/stability.py                                      # the images in data/demo
python benchmarks/stability.py --images images --max_images 50      # your own

An image is panned by a known motion of fractions of a pixel, with new sensor noise in every frame ("pan"), or only gets
noise ("still"). Detections of consecutive frames are matched by their boxes, the motion is undone, and the IoU of their
masks and of their boxes is reported. 100 means that nothing flickers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.stages import device_name
from data.image import read_image
from inference import Detections, Predictor
from layers.boxes import box_iou
from tools.images import find_images
from utils.device import configure_process
from utils.errors import run_main
from weights import load_model
from weights.released import BUNDLED

ROOT = Path(__file__).resolve().parent.parent
MOTION = (0.37, 0.21)  # pixels per frame, to the right and down
NOISE = 4.0  # standard deviation, of 255: a camera in good light
MARGIN = 24  # pixels of the image that are outside of the frames at first
SAME = 0.5  # IoU of boxes from which two detections are taken for the same object
CROPS = {
    "cropped at the prototypes' resolution": {"crop": True, "crop_after_resize": False},
    "also cropped at full resolution": {"crop": True, "crop_after_resize": True},
    "not cropped": {"crop": False, "crop_after_resize": False},
}


@dataclass
class Scores:
    """IoUs of masks and boxes between consecutive frames, and how often an object was found again."""

    masks: list[float]
    boxes: list[float]
    found: int = 0
    lost: int = 0

    def summary(self) -> dict[str, float]:
        found = max(1, self.found + self.lost)
        rows = {"mask": self.masks, "box": self.boxes}
        values = {f"{name}_mean": 100 * float(np.mean(ious)) for name, ious in rows.items()}
        values |= {f"{name}_5th_percentile": 100 * float(np.percentile(ious, 5)) for name, ious in rows.items()}
        return values | {"pairs": self.found, "lost": 100 * self.lost / found}


def frame(image: np.ndarray, number: int, moves: bool, rng: np.random.Generator) -> np.ndarray:
    """Return frame `number` of an image: a window that moves by MOTION, with noise."""
    height, width = image.shape[0] - 2 * MARGIN, image.shape[1] - 2 * MARGIN
    x, y = (number * MOTION[0], number * MOTION[1]) if moves else (0.0, 0.0)
    matrix = np.array([[1, 0, x - MARGIN], [0, 1, y - MARGIN]])
    moved = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_CUBIC)
    return (moved + rng.normal(0, NOISE, moved.shape)).round().clip(0, 255).astype(np.uint8)


def shifted(mask: np.ndarray, x: float, y: float) -> np.ndarray:
    """Move a bool mask by a fraction of a pixel."""
    matrix = np.array([[1, 0, x], [0, 1, y]])
    soft = cv2.warpAffine(mask.astype(np.float32), matrix, mask.shape[::-1], flags=cv2.INTER_LINEAR)
    return soft > 0.5


def compare(before: Detections, after: Detections, moves: bool, scores: Scores) -> None:
    """Add the IoUs of the objects of two consecutive frames, after undoing the motion."""
    x, y = MOTION if moves else (0.0, 0.0)
    boxes = after.boxes - torch.tensor((x, y, x, y))
    if not len(before):
        return
    if not len(after):
        scores.lost += len(before)
        return
    overlaps = box_iou(before.boxes, boxes)
    old, new = before.masks.numpy(), after.masks.numpy()
    for i, (iou, j) in enumerate(zip(*overlaps.max(dim=1), strict=True)):
        if iou < SAME:
            scores.lost += 1
            continue
        back = shifted(new[int(j)], -x, -y)
        # The last pixels of the frame have no counterpart in the other frame.
        inside = np.s_[2:-2, 2:-2]
        union = (old[i] | back)[inside].sum()
        scores.found += 1
        scores.boxes.append(float(iou))
        scores.masks.append(float((old[i] & back)[inside].sum() / max(1, union)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", default=str(BUNDLED))
    parser.add_argument("--images", type=Path, default=ROOT / "data/demo")
    parser.add_argument("--max_images", type=int)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--score_threshold", type=float, default=0.5)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/stability.json"))
    args = parser.parse_args()
    configure_process()
    predictor = Predictor(load_model(args.weights), "cpu", args.precision, score_threshold=args.score_threshold)
    sources, _ = find_images([], [str(args.images)], Path("unused"))
    paths = [source.path for source in sources if "_segmented" not in source.path.name][: args.max_images]
    scores = {(motion, name): Scores([], []) for motion in ("still", "pan") for name in CROPS}
    for path in tqdm(paths):
        image = read_image(path)
        for motion in ("still", "pan"):
            rng = np.random.default_rng(0)
            frames = [frame(image, number, motion == "pan", rng) for number in range(args.frames)]
            found = [predictor(each) for each in frames]
            for name, options in CROPS.items():  # masks are computed on access, so only their cropping differs
                variants = [replace(some, config=replace(some.config, **options)) for some in found]
                for before, after in itertools.pairwise(variants):
                    compare(before, after, motion == "pan", scores[motion, name])
    rows = [{"motion": motion, "masks": name} | score.summary() for (motion, name), score in scores.items()]
    for row in rows:
        print(row)
    words = f"--images {args.images.name}" + (f" --max_images {args.max_images}" if args.max_images else "")
    report = {
        "command": f"python benchmarks/stability.py {words} --frames {args.frames}",
        "weights": Path(args.weights).name,
        "images": len(paths),
        "noise": NOISE,
        "motion": MOTION,
        "device": device_name(torch.device("cpu")),
        "rows": rows,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
