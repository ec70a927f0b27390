"""Draw masks, boxes and labels on images, and arrange images in contact sheets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from utils.windows import MaskWindow

# Fonts for characters that Pillow's own font lacks, by the first of these characters. Most systems have one of them.
FONTS = (
    (0x2E80, ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc")),
    (0x80, ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")),
)
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
    masks: Iterable[np.ndarray | MaskWindow],
    boxes: np.ndarray,
    texts: Sequence[str],
    colors: Sequence[int],
    alpha: float = 0.45,
) -> np.ndarray:
    """Return a copy of `image` (uint8 BGR [H, W, 3]) with objects drawn on it, the last on top.

    Where masks overlap, a pixel has the tint of the topmost one. Outlines have a dark rim, so that they are visible on
    any ground. Lines and text scale with the root of the image's area. A label that would overlap an earlier one is
    moved to a free place at its box. It is omitted if there is none, or if it is more than twice as wide as its box.
    Raises ValueError if `image` has another type or shape.

    `masks` are n bool arrays [H, W] or windows of such masks, `boxes` [n, 4] in corner form, in pixels, `texts` n
    labels, of which empty ones are not drawn, `colors` n indices for `color_of`, and `alpha` the masks' opacity, 0..1.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 image [H, W, 3], not {image.dtype} {list(image.shape)}")
    out = image.copy()
    scale = (image.shape[0] * image.shape[1]) ** 0.5 / 750
    line = max(1, round(1.6 * scale))
    for mask, color in zip(masks, colors, strict=True):
        _paint(out, image, mask, color_of(color), alpha, line)
    for box, color in zip(boxes, colors, strict=True):
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        cv2.rectangle(out, (x1, y1), (x2, y2), color_of(color), line, cv2.LINE_AA)
    taken: list[Place] = []
    for i in reversed(range(len(texts))):  # the best detection gets the first choice
        if not texts[i]:
            continue
        label = draw_label(texts[i], round(max(9, 16 * scale)), color_of(colors[i]))
        if label.shape[1] > 2 * (boxes[i][2] - boxes[i][0]):  # it would hide the neighbours
            continue
        place = _free_place(out.shape[:2], label.shape[1::-1], boxes[i], taken)
        if place is not None:
            x1, y1, x2, y2 = place
            out[y1:y2, x1:x2] = label[: out.shape[0] - y1, : out.shape[1] - x1]
            taken.append(place)
    return out


def draw_label(text: str, height: int, color: tuple[int, int, int]) -> np.ndarray:
    """Return a text on a background of `color`, uint8 BGR [h, w, 3], dark on light colours and light on dark ones.

    `height` is that of the font in pixels. Characters that no font of the system has are drawn as "?".
    """
    font = find_font(text, height)
    if font is None:
        text, font = text.encode("ascii", "replace").decode(), PIL.ImageFont.load_default(height)
    left, top, right, bottom = (round(value) for value in font.getbbox(text + "Ag"))
    right, pad = round(font.getlength(text)), max(2, height // 6)
    luminance = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2]
    ink = (20, 20, 20) if luminance > 140 else (255, 255, 255)
    label = PIL.Image.new("RGB", (right - left + 2 * pad, bottom - top + 2 * pad), color)
    PIL.ImageDraw.Draw(label).text((pad - left, pad - top), text, ink, font)
    return np.asarray(label)  # the colour is BGR, and the ink is grey


def find_font(text: str, height: int) -> PIL.ImageFont.ImageFont | PIL.ImageFont.FreeTypeFont | None:
    """Return a font that has the characters of `text`, or None if the system has none."""
    largest = max(map(ord, text))
    for first, names in FONTS:
        if largest >= first:
            for name in names:
                with contextlib.suppress(OSError):
                    return PIL.ImageFont.truetype(name, height)
            return None
    return PIL.ImageFont.load_default(height)


def _paint(
    out: np.ndarray,
    image: np.ndarray,
    mask: np.ndarray | MaskWindow,
    color: tuple[int, int, int],
    alpha: float,
    line: int,
) -> None:
    """Draw the pixels of `mask` in `out`, as those of `image` with a tint, and its outline.

    Only the bounding box of the mask is processed.
    """
    window = mask.tight() if isinstance(mask, MaskWindow) else MaskWindow.around(mask)
    if not window.pixels.size:
        return
    original, inside = image[window.place], window.pixels.astype(np.uint8)
    tinted = cv2.addWeighted(original, 1 - alpha, np.full_like(original, color), alpha, 0)
    cv2.copyTo(tinted, inside, out[window.place])  # six times as fast as by NumPy's indices
    contours, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for ink, width in (((20, 20, 20), 2 * line + 1), (color, line)):
        cv2.drawContours(out, contours, -1, ink, width, cv2.LINE_AA, offset=(window.x, window.y))


def _free_place(
    image_size: tuple[int, ...], label: tuple[int, ...], box: np.ndarray, taken: list[Place]
) -> Place | None:
    """Return the first free place for a label (width, height): above the box, inside an edge, or below it."""
    (height, width), (w, h) = image_size, label
    left, top, right, bottom = (round(float(v)) for v in box)
    above = top - h if top >= h else top
    wanted = [(left, above), (left, top), (right - w, above), (right - w, top), (left, bottom - h), (left, bottom)]
    for x, y in wanted:
        x, y = int(np.clip(x, 0, max(0, width - w))), int(np.clip(y, 0, max(0, height - h)))
        if not any(x < x2 and x1 < x + w and y < y2 and y1 < y + h for x1, y1, x2, y2 in taken):
            return x, y, x + w, y + h
    return None
