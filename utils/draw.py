"""Draw masks, boxes and labels on images, and arrange images in contact sheets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

MANY = 30  # with more objects than this, labels wider than their box are omitted
FONT = cv2.FONT_HERSHEY_SIMPLEX
Place = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels

# BGR colours that are visible on dark images and easy to distinguish.
COLORS = (
    (60, 76, 231), (219, 152, 52), (113, 204, 46), (18, 156, 243), (182, 89, 155), (156, 188, 26), (15, 196, 241),
    (180, 105, 255), (34, 126, 230), (212, 255, 127), (205, 90, 106), (80, 200, 120), (255, 191, 0), (147, 20, 255),
)  # fmt: skip


def color_of(index: int) -> tuple[int, int, int]:
    """Return the colour of the index-th object, BGR."""
    return COLORS[index % len(COLORS)]


def draw_objects(
    image: np.ndarray,
    masks: Iterable[np.ndarray],
    boxes: np.ndarray,
    texts: Sequence[str],
    colors: Sequence[int],
    alpha: float = 0.45,
) -> np.ndarray:
    """Return a copy of `image` (uint8 BGR [H, W, 3]) with objects drawn on it, the last on top.

    Lines and text scale with the size of the image. A label that would overlap an earlier one is moved to a free place
    at its box, or omitted if there is none. With more than MANY objects, labels wider than their box are omitted, too.
    Raises ValueError if `image` has another type or shape.

    Args:
        masks: n bool arrays [H, W].
        boxes: [n, 4] in corner form, in pixels.
        texts: n labels; an empty one is not drawn.
        colors: n indices for `color_of`.
        alpha: opacity of the masks, 0..1.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 image [H, W, 3], not {image.dtype} {list(image.shape)}")
    out = image.copy()
    scale = max(image.shape[:2]) / 900
    line = max(1, round(1.6 * scale))
    for mask, color in zip(masks, colors, strict=True):
        _paint(out, mask, color_of(color), alpha, line)
    for box, color in zip(boxes, colors, strict=True):
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        cv2.rectangle(out, (x1, y1), (x2, y2), color_of(color), line, cv2.LINE_AA)
    taken: list[Place] = []
    for i in reversed(range(len(texts))):  # the best detection gets the first choice
        label = _Label.fitting(texts[i], scale)
        if not texts[i] or (len(texts) > MANY and label.size[0] > boxes[i][2] - boxes[i][0]):
            continue
        place = _free_place(out.shape[:2], label.size, boxes[i], taken)
        if place is not None:
            label.draw(out, place, color_of(colors[i]))
            taken.append(place)
    return out


def _paint(out: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], alpha: float, line: int) -> None:
    """Tint the pixels of `mask` in `out` and draw its outline. Only the bounding box of the mask is processed."""
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
class _Label:
    """A text on a coloured background."""

    text: str
    size: tuple[int, int]  # width, height
    font_scale: float
    thickness: int
    origin: tuple[int, int]  # of the text in the label

    @classmethod
    def fitting(cls, text: str, scale: float) -> _Label:
        """Return a label that is sized to fit `text`."""
        text = text.encode("ascii", "replace").decode()  # OpenCV's fonts have only ASCII
        font_scale, thickness, pad = max(0.36, 0.55 * scale), max(1, round(1.3 * scale)), max(2, round(3 * scale))
        (w, h), below = cv2.getTextSize(text, FONT, font_scale, thickness)
        return cls(text, (w + 2 * pad, h + below + pad), font_scale, thickness, (pad, h + pad // 2 + 1))

    def draw(self, out: np.ndarray, place: Place, color: tuple[int, int, int]) -> None:
        """Draw the label on `out`, with dark or light text depending on the brightness of `color`."""
        cv2.rectangle(out, place[:2], place[2:], color, -1)
        luminance = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2]
        ink = (20, 20, 20) if luminance > 140 else (255, 255, 255)
        origin = (place[0] + self.origin[0], place[1] + self.origin[1])
        cv2.putText(out, self.text, origin, FONT, self.font_scale, ink, self.thickness, cv2.LINE_AA)


def _free_place(
    image_size: tuple[int, int], label: tuple[int, int], box: np.ndarray, taken: list[Place]
) -> Place | None:
    """Return the first free place for a label (width, height): above the box, inside an edge, or below it."""
    (height, width), (w, h) = image_size, label
    left, top, right, bottom = (round(float(v)) for v in box)
    above = top - h if top >= h else top
    wanted = [(left, above), (left, top), (right - w, above), (right - w, top), (left, bottom - h), (left, bottom)]
    places = []
    for x, y in wanted:
        x, y = int(np.clip(x, 0, max(0, width - w))), int(np.clip(y, 0, max(0, height - h)))
        places.append((x, y, x + w, y + h))
    free = (p for p in places if not any(_overlap(p, other) for other in taken))
    return next(free, None)


def _overlap(a: Place, b: Place) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
