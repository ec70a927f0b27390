"""Outlines of masks as polygons."""

from __future__ import annotations

import cv2
import numpy as np

POLYGON_TOLERANCE = 1.0  # pixels; people edit the outlines, and a mask has a corner at almost every pixel of its edge


def rings(mask: np.ndarray, tolerance: float = 0.0) -> list[tuple[np.ndarray, bool]]:
    """Return the contours of a bool mask [H, W] as pairs: points [n, 2] (x, y) in pixels, and whether it is a hole.

    With a `tolerance`, contours are simplified (Douglas and Peucker 1973): no point of a contour is farther from the
    result than this many pixels.
    """
    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    found = []
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0] if hierarchy is not None else (), strict=True):
        points = contour[:, 0]
        simple = cv2.approxPolyDP(contour, tolerance, closed=True)[:, 0] if tolerance > 0 else points
        points = simple if len(simple) >= 3 else points
        if len(points) < 3:  # a single pixel or a line becomes a rectangle, so that it keeps an area
            x, y, w, h = cv2.boundingRect(contour)
            points = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
        found.append((points, parent >= 0))
    return found


def polygon_iou(mask: np.ndarray, found: list[tuple[np.ndarray, bool]]) -> float:
    """Return the IoU of a bool mask [H, W] with the area of its `rings`."""
    drawn = np.zeros(mask.shape, np.uint8)
    for points, hole in found:
        if not hole:
            cv2.fillPoly(drawn, [points.astype(np.int32)], 1)
    for points, hole in found:
        if hole:  # the contour of a hole runs through the mask's own pixels around it
            cv2.fillPoly(drawn, [points.astype(np.int32)], 0)
            cv2.polylines(drawn, [points.astype(np.int32)], True, 1)
    union = int((mask | (drawn > 0)).sum())
    return int((mask & (drawn > 0)).sum()) / union if union else 1.0
