"""Show failure cases of weights on freely licensed images: one person at decreasing sizes, and a crowd.

    python benchmarks/failures.py --output data/demo/failures.jpg

Both images are composed from `data/demo/camera.jpg`, so that they can be published and reproduced. The script prints
how many copies are detected with a box IoU of at least 0.5, and at which heights in pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from inference import Predictor  # noqa: E402
from layers.boxes import box_iou  # noqa: E402
from weights import load_model  # noqa: E402

WEIGHTS = ROOT / "weights" / "yolact_lite_person.pth"
MAN = (0, 60, 285, 505)  # (x1, y1, x2, y2) of the man in the 512x512 image
HEIGHTS = (240, 160, 110, 75, 50, 34, 24, 16)  # of the copies
SIDE = 416


def shrunk(photo: NDArray[np.uint8], height: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Crop the man with a margin and resize him to `height` pixels; return the crop and his box within it."""
    left, top, right, bottom = MAN
    margin = 6
    scale = height / (bottom - top)
    piece = photo[top - margin : bottom + margin, max(left - margin, 0) : right + margin]
    size = (max(round(piece.shape[1] * scale), 1), max(round(piece.shape[0] * scale), 1))
    offset = (left - max(left - margin, 0), margin)
    box = np.array([*offset, offset[0] + right - left, offset[1] + bottom - top], np.float32) * scale
    return cv2.resize(piece, size, interpolation=cv2.INTER_AREA), box


def paste(canvas: NDArray[np.uint8], photo: NDArray[np.uint8], height: int, x: int, y: int) -> NDArray[np.float32]:
    """Paste a copy with its top-left corner at (x, y); return the man's box on the canvas."""
    piece, box = shrunk(photo, height)
    piece = piece[: canvas.shape[0] - y, : canvas.shape[1] - x]
    canvas[y : y + piece.shape[0], x : x + piece.shape[1]] = piece
    return box + np.array([x, y, x, y], np.float32)


def smaller_and_smaller(photo: NDArray[np.uint8], shade: int) -> tuple[NDArray[np.uint8], list[NDArray[np.float32]]]:
    canvas = np.full((SIDE, SIDE, 3), shade, np.uint8)
    boxes, x, y, row = [], 8, 8, 0
    for height in HEIGHTS:
        size = shrunk(photo, height)[0].shape
        if x + size[1] > SIDE:
            x, y, row = 8, y + row + 8, 0
        boxes.append(paste(canvas, photo, height, x, y))
        x, row = x + size[1] + 8, max(row, size[0])
    return canvas, boxes


def crowd(photo: NDArray[np.uint8], shade: int) -> tuple[NDArray[np.uint8], list[NDArray[np.float32]]]:
    """Rows of men who stand in front of one another, the nearest largest."""
    canvas = np.full((SIDE, SIDE, 3), shade, np.uint8)
    boxes, y = [], 10
    for height, step in ((50, 34), (80, 54), (120, 80), (180, 110)):
        boxes += [paste(canvas, photo, height, x, y) for x in range(4, SIDE - step, step)]
        y += round(0.75 * height)
    return canvas, boxes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", default=WEIGHTS)
    parser.add_argument("--output", default="results/failures.jpg")
    args = parser.parse_args()

    photo = cv2.imread(str(ROOT / "data" / "demo" / "camera.jpg"))
    shade = int(photo[:60].mean())  # the sky's
    predictor = Predictor(load_model(args.weights), device="cpu", score_threshold=0.3)
    panels = []
    for name, make in (("smaller and smaller", smaller_and_smaller), ("crowd", crowd)):
        canvas, boxes = make(photo, shade)
        detections = predictor(canvas)
        panels.append(detections.draw(canvas))
        overlap = box_iou(torch.from_numpy(np.stack(boxes)), detections.boxes.cpu())
        found = (overlap >= 0.5).any(1) if len(detections) else torch.zeros(len(boxes), dtype=torch.bool)
        print(f"{name}: {int(found.sum())} of {len(boxes)} found, {len(detections)} detections")
        if name != "crowd":
            heights = [h for h, f in zip(HEIGHTS, found.tolist(), strict=True) if f]
            print(f"  found at {heights} of {list(HEIGHTS)} pixels")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(args.output), np.hstack(panels), [cv2.IMWRITE_JPEG_QUALITY, 90])


if __name__ == "__main__":
    main()
