"""One picture with its detections drawn: masks, outlines, boxes, names and scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from engine.predictor import Detections

# BGR, bright enough for dark photos and far enough from each other for neighbours
COLORS = (
    (60, 76, 231), (219, 152, 52), (113, 204, 46), (18, 156, 243), (182, 89, 155), (156, 188, 26), (15, 196, 241),
    (180, 105, 255), (34, 126, 230), (212, 255, 127), (205, 90, 106), (80, 200, 120), (255, 191, 0), (147, 20, 255),
)  # fmt: skip


def color_of(index: int) -> tuple[int, int, int]:
    """A colour for the index-th detection, BGR."""
    return COLORS[index % len(COLORS)]


def draw(image: np.ndarray, detections: Detections, alpha: float = 0.45) -> np.ndarray:
    """A copy of `image` (uint8 BGR [H, W, 3]) with the detections on it, the best on top.

    Lines and letters grow with the picture, so that a photo of 12 megapixels and one of 300 pixels both read well.
    """
    out = image.copy()
    order = list(range(len(detections)))[::-1]
    scale = max(image.shape[:2]) / 900
    line = max(1, round(1.6 * scale))
    index = 0
    for chunk in detections[order].iter_masks(budget=64 * 2**20):
        for mask in chunk.cpu().numpy():
            _paint(out, mask, color_of(order[index]), alpha, line)
            index += 1
    boxes = detections.boxes.cpu().numpy()
    scores, labels = detections.mask_scores.tolist(), detections.labels.tolist()
    for i in order:
        x1, y1, x2, y2 = (round(v) for v in boxes[i])
        cv2.rectangle(out, (x1, y1), (x2, y2), color_of(i), line, cv2.LINE_AA)
    for i in order:
        text = f"{detections.class_names[labels[i]]} {scores[i]:.2f}"
        _write(out, text, boxes[i], color_of(i), scale)
    return out


def _paint(out: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], alpha: float, line: int) -> None:
    """Tint the pixels of `mask` and draw its outline, touching only the part of the picture where it is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    part, inside = out[window], mask[window]
    tinted = cv2.addWeighted(part, 1 - alpha, np.full_like(part, color), alpha, 0)
    part[inside] = tinted[inside]
    contours, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    offset = (int(columns[0]), int(rows[0]))
    cv2.drawContours(out, contours, -1, color, line, cv2.LINE_AA, offset=offset)


def _write(out: np.ndarray, text: str, box: np.ndarray, color: tuple[int, int, int], scale: float) -> None:
    """`text` on a plate over the box, moved inside the picture where it would stick out."""
    height, width = out.shape[:2]
    font, size = cv2.FONT_HERSHEY_SIMPLEX, max(0.36, 0.55 * scale)
    thickness = max(1, round(1.3 * scale))
    text = text.encode("ascii", "replace").decode()  # all that cv2's own fonts have
    (w, h), below = cv2.getTextSize(text, font, size, thickness)
    pad = max(2, round(3 * scale))
    plate_w, plate_h = w + 2 * pad, h + below + pad
    x = int(np.clip(box[0], 0, max(0, width - plate_w)))
    y = int(box[1]) - plate_h if box[1] >= plate_h else int(box[1])
    y = int(np.clip(y, 0, max(0, height - plate_h)))
    cv2.rectangle(out, (x, y), (x + plate_w, y + plate_h), color, -1)
    luminance = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2]
    ink = (20, 20, 20) if luminance > 140 else (255, 255, 255)
    cv2.putText(out, text, (x + pad, y + h + pad // 2 + 1), font, size, ink, thickness, cv2.LINE_AA)
