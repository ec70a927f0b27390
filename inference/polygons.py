"""Outlines of masks as polygons along the edges of pixels, as COCO and LabelMe read them."""

from __future__ import annotations

from collections import defaultdict

import cv2
import numpy as np
from pycocotools import mask as rle

from utils.windows import MaskWindow

POLYGON_TOLERANCE = 1.0  # pixels; people edit the outlines, and a mask has a corner at almost every pixel of its edge
# Steps (x, y) along the edges of a pixel, with the inside to the right, and the corner of the pixel where each starts.
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
CORNERS = ((0, 0), (1, 0), (1, 1), (0, 1))


def rings(mask: np.ndarray, tolerance: float = 0.0) -> list[tuple[np.ndarray, bool]]:
    """Return the outlines of a bool mask [H, W] as pairs: points [n, 2] (x, y), and whether it is that of a hole.

    Coordinates are those of pixel edges: pixel i covers i to i + 1, so a mask of one pixel has an outline of area 1.
    With a `tolerance`, outlines are simplified (Douglas and Peucker 1973): no point of an outline is farther from the
    result than this many pixels.
    """
    found = []
    for points in _trace(mask):
        x, y = points.T
        hole = float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) < 0  # the sign of the area
        simple = cv2.approxPolyDP(points[:, None], tolerance, closed=True)[:, 0] if tolerance > 0 else points
        found.append((simple if len(simple) >= 3 else points, hole))
    return found


def _trace(mask: np.ndarray) -> list[np.ndarray]:
    """Return the closed outlines of a mask as corners, int32 [n, 2]. Pixels that only touch diagonally are separate."""
    left, top, pixels = MaskWindow.around(mask)
    padded = np.pad(pixels, 1)
    steps: dict[tuple[int, int], list[int]] = defaultdict(list)  # directions that start at a point
    for direction, (dx, dy) in enumerate(STEPS):
        # The neighbour outside lies to the left of the step.
        outside = np.roll(padded, (dx, -dy), axis=(0, 1))
        ys, xs = np.nonzero(padded & ~outside)
        x, y = CORNERS[direction]
        for point in zip((xs - 1 + x + left).tolist(), (ys - 1 + y + top).tolist(), strict=True):
            steps[point].append(direction)
    outlines = []
    while steps:
        start = next(iter(steps))
        point, direction, corners = start, steps[start][0], list[tuple[int, int]]()
        while point in steps:
            options = steps[point]
            # Where two outlines meet, turn right, so that each stays with its pixels.
            turned = next(d for d in ((direction + 1) % 4, direction, (direction + 3) % 4) if d in options)
            options.remove(turned)
            if not options:
                del steps[point]
            if turned != direction or not corners:
                corners.append(point)
            direction = turned
            point = (point[0] + STEPS[direction][0], point[1] + STEPS[direction][1])
        outlines.append(np.array(corners, np.int32))
    return outlines


def polygon_iou(mask: np.ndarray, found: list[tuple[np.ndarray, bool]]) -> float:
    """Return the IoU of a bool mask [H, W] with its `rings`, as pycocotools draws them."""
    drawn = np.zeros(mask.shape, bool)
    for wanted in (False, True):
        polygons = [points.ravel().astype(float).tolist() for points, hole in found if hole == wanted]
        if polygons:
            inside = rle.decode(rle.merge(rle.frPyObjects(polygons, *mask.shape))).astype(bool)
            drawn = drawn & ~inside if wanted else inside
    union = int((mask | drawn).sum())
    return int((mask & drawn).sum()) / union if union else 1.0
