"""One picture with its detections drawn: masks, outlines, boxes, names and scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from engine.predictor import Detections

CROWD = 30  # objects
FONT = cv2.FONT_HERSHEY_SIMPLEX
Place = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels

# BGR, bright enough for dark photos and far enough from each other for neighbours
COLORS = (
    (60, 76, 231), (219, 152, 52), (113, 204, 46), (18, 156, 243), (182, 89, 155), (156, 188, 26), (15, 196, 241),
    (180, 105, 255), (34, 126, 230), (212, 255, 127), (205, 90, 106), (80, 200, 120), (255, 191, 0), (147, 20, 255),
)  # fmt: skip


def color_of(index: int) -> tuple[int, int, int]:
    """A colour for the index-th detection, BGR."""
    return COLORS[index % len(COLORS)]


def draw(image: np.ndarray, detections: Detections, alpha: float = 0.45) -> np.ndarray:
    """A copy of `image` (uint8 BGR [H, W, 3]) with the detections on it, the best on top."""
    if image.shape[:2] != tuple(detections.size):
        raise ValueError(f"the detections are of a picture of {detections.size}, not {image.shape[:2]}")
    labels, scores = detections.labels.tolist(), detections.mask_scores.tolist()
    texts = [f"{detections.class_names[k]} {score:.2f}" for k, score in zip(labels, scores, strict=True)]
    order = list(range(len(detections)))[::-1]
    masks = (mask for chunk in detections[order].iter_masks(budget=64 * 2**20) for mask in chunk.cpu().numpy())
    return draw_objects(image, masks, detections.boxes.cpu().numpy()[order], texts[::-1], order, alpha)


def draw_objects(
    image: np.ndarray,
    masks: Iterable[np.ndarray],
    boxes: np.ndarray,
    texts: Sequence[str],
    colors: Sequence[int],
    alpha: float = 0.45,
) -> np.ndarray:
    """A copy of `image` (uint8 BGR [H, W, 3]) with objects on it, the last on top.

    masks: n, bool [H, W]; boxes [n, 4] corners in pixels; colors: n numbers for `color_of`. Lines and letters grow with
    the picture, so that a photo of 12 megapixels and one of 300 pixels both read well. A name that would lie on an
    earlier one moves to a free place at its box, and is left out where there is none; among more than CROWD objects so
    is a name wider than its box.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 picture [H, W, 3], not {image.dtype} {list(image.shape)}")
    out = image.copy()
    scale = max(image.shape[:2]) / 900
    line = max(1, round(1.6 * scale))
    for mask, color in zip(masks, colors, strict=True):
        _paint(out, mask, color_of(color), alpha, line)
    for box, color in zip(boxes, colors, strict=True):
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        cv2.rectangle(out, (x1, y1), (x2, y2), color_of(color), line, cv2.LINE_AA)
    taken: list[Place] = []
    for i in reversed(range(len(texts))):  # the best chooses its place first
        plate = _Plate.fitting(texts[i], scale)
        if not texts[i] or (len(texts) > CROWD and plate.size[0] > boxes[i][2] - boxes[i][0]):
            continue
        place = _free_place(out.shape[:2], plate.size, boxes[i], taken)
        if place is not None:
            plate.draw(out, place, color_of(colors[i]))
            taken.append(place)
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


@dataclass
class _Plate:
    """A name on a coloured ground."""

    text: str
    size: tuple[int, int]  # width, height
    font_scale: float
    thickness: int
    origin: tuple[int, int]  # of the letters in the plate

    @classmethod
    def fitting(cls, text: str, scale: float) -> _Plate:
        """A plate as large as the text."""
        text = text.encode("ascii", "replace").decode()  # all that cv2's own fonts have
        font_scale, thickness, pad = max(0.36, 0.55 * scale), max(1, round(1.3 * scale)), max(2, round(3 * scale))
        (w, h), below = cv2.getTextSize(text, FONT, font_scale, thickness)
        return cls(text, (w + 2 * pad, h + below + pad), font_scale, thickness, (pad, h + pad // 2 + 1))

    def draw(self, out: np.ndarray, place: Place, color: tuple[int, int, int]) -> None:
        """Draw it on `out`, its own ink chosen to be read on `color`."""
        cv2.rectangle(out, place[:2], place[2:], color, -1)
        luminance = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2]
        ink = (20, 20, 20) if luminance > 140 else (255, 255, 255)
        origin = (place[0] + self.origin[0], place[1] + self.origin[1])
        cv2.putText(out, self.text, origin, FONT, self.font_scale, ink, self.thickness, cv2.LINE_AA)


def _free_place(picture: tuple[int, int], plate: tuple[int, int], box: np.ndarray, taken: list[Place]) -> Place | None:
    """Where a plate (width, height) goes: over the box, in its top, in its bottom, under it: the first that is free."""
    (height, width), (w, h) = picture, plate
    left, top, right, bottom = (round(float(v)) for v in box)
    above = top - h if top >= h else top
    wanted = [(left, above), (left, top), (right - w, above), (right - w, top), (left, bottom - h), (left, bottom)]
    places = []
    for x, y in wanted:
        x, y = int(np.clip(x, 0, max(0, width - w))), int(np.clip(y, 0, max(0, height - h)))
        places.append((x, y, x + w, y + h))
    free = (p for p in places if not any(_meet(p, other) for other in taken))
    return next(free, None)


def _meet(a: Place, b: Place) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
