"""Segment images that are much larger than the network's input: predict on overlapping tiles, and merge the masks.

An object that a border of a tile cuts is found in both tiles, and the image as a whole is one of the tiles, so that
objects larger than a tile are found, too. Detections that are the same object where both see it form a group, and each
group becomes one detection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from config import Config
from inference.detections import Detections
from inference.predictor import MAX_BATCH, Predictor
from utils.errors import UserError
from utils.windows import MaskWindow

MERGE_IOU = 0.5  # of two masks in the region that both tiles cover
# On the whole image masks are coarser: thin ones come out thinner, or thicker. There the smaller of two masks must have
# this share of its area in the other one, and at least the second share of the other's.
SHARE_OF_SMALLER, SHARE_OF_LARGER = 0.7, 0.2
LARGE = 0.5  # an object is large if its longer side is at least this fraction of a tile's
CUT_MARGIN = 4  # pixels; masks rarely reach the very border
MIN_SHARED = 16  # pixels that at least one of two masks must have there; with fewer, the IoU says nothing
Window = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the image


@dataclass(eq=False)
class TiledDetections(Detections):
    """Detections whose masks are stored as run-length encodings, because they come from several predictions."""

    codes: tuple[dict[str, Any], ...] = ()  # COCO RLE of each mask

    def __getitem__(self, index: Any) -> TiledDetections:
        order = self._positions(index)
        chosen = super().__getitem__(order)
        assert isinstance(chosen, TiledDetections)
        return replace(chosen, codes=tuple(self.codes[i] for i in order.tolist()))

    def windows(self) -> Iterator[MaskWindow]:
        return map(MaskWindow.around, self.iter_masks())

    def _chunks(self, budget: int) -> Iterator[Tensor]:
        """Decode the masks, about `budget` bytes at a time."""
        step = max(1, budget // (self.size[0] * self.size[1]))
        for start in range(0, len(self.codes), step):
            masks = rle.decode(list(self.codes[start : start + step]))
            yield torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1))).bool()


@dataclass
class _Part:
    """A detection of one tile, or on the whole image."""

    window: Window  # of the tile
    score: float
    mask_score: float
    label: int
    code: dict[str, Any]  # RLE of the size of the image
    box: Window  # of the mask
    cut: bool  # by a border of its tile inside the image


class TiledPredictor:
    """Call it with an image, uint8 BGR [H, W, 3], for the detections on its tiles and on the whole image.

    Args:
        predictor: predicts each tile, which is resized to the network's input.
        tile: the side of the tiles in pixels.
        overlap: the part of a tile's side that it shares with the next one, 0..0.9.

    Raises:
        UserError: if `tile` or `overlap` is out of range.
    """

    def __init__(self, predictor: Predictor, tile: int, overlap: float = 0.25):
        if tile < 32 or not 0 <= overlap <= 0.9:
            raise UserError(f"tiles of {tile} pixels with an overlap of {overlap:g}: use at least 32, and 0 to 0.9")
        self.predictor, self.tile, self.overlap = predictor, tile, overlap
        self.config = predictor.config

    def published(self) -> TiledPredictor:
        """See `Predictor.published`."""
        return TiledPredictor(self.predictor.published(), self.tile, self.overlap)

    def __call__(self, image: np.ndarray) -> Detections:
        height, width = image.shape[:2]
        if max(height, width) <= self.tile:
            return self.predictor(image)
        windows: list[Window] = [(0, 0, width, height), *tile_windows(height, width, self.tile, self.overlap)]
        parts: list[_Part] = []
        for start in range(0, len(windows), MAX_BATCH):
            batch = windows[start : start + MAX_BATCH]
            pieces = [np.ascontiguousarray(image[y1:y2, x1:x2]) for x1, y1, x2, y2 in batch]
            for window, found in zip(batch, self.predictor(pieces), strict=True):
                parts += _parts(found, window, (height, width))
        merged = [part for group in _groups(parts) for part in _merge(group, self.tile)]
        found = _to_detections(self.config, merged, (height, width))
        found.image = image
        return found


def tile_windows(height: int, width: int, tile: int, overlap: float) -> list[Window]:
    """Return windows of at most `tile` pixels a side that cover an image; neighbours share at least `overlap`."""

    def starts(length: int) -> list[int]:
        if length <= tile:
            return [0]
        count = int(np.ceil((length - tile) / (tile * (1 - overlap)))) + 1
        return np.linspace(0, length - tile, count).round().astype(int).tolist()

    return [(x, y, min(x + tile, width), min(y + tile, height)) for y in starts(height) for x in starts(width)]


def _parts(found: Detections, window: Window, size: tuple[int, int]) -> Iterator[_Part]:
    """Yield the detections of a tile, with masks in the coordinates of the image; empty ones and tips are left out."""
    x1, y1, x2, y2 = window
    scores, mask_scores, labels = found.scores.tolist(), found.mask_scores.tolist(), found.labels.tolist()
    for i, mask in enumerate(found.iter_masks()):
        cut = _is_cut(mask, window, size)
        if mask.sum() >= (MIN_SHARED if cut else 1):  # other tiles show more of an object than a tip
            whole = np.zeros(size, np.uint8, order="F")
            whole[y1:y2, x1:x2] = mask
            code = rle.encode(whole)
            x, y, w, h = map(int, rle.toBbox(code))
            yield _Part(window, scores[i], mask_scores[i], labels[i], code, (x, y, x + w, y + h), cut)


def _is_cut(mask: np.ndarray, window: Window, size: tuple[int, int]) -> bool:
    """Whether a mask of a tile comes within CUT_MARGIN pixels of a border of the tile that lies inside the image."""
    x1, y1, x2, y2 = window
    height, width = size
    borders = (
        (x1 > 0, mask[:, :CUT_MARGIN]),
        (y1 > 0, mask[:CUT_MARGIN]),
        (x2 < width, mask[:, -CUT_MARGIN:]),
        (y2 < height, mask[-CUT_MARGIN:]),
    )
    return any(inside and strip.any() for inside, strip in borders)


def _groups(parts: list[_Part]) -> list[list[_Part]]:
    """Group the detections that are the same object, also by way of others, such as the pieces in a row of tiles."""
    group = list(range(len(parts)))  # the index of another one in the group; the first one has its own

    def first(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    boxes = np.array([part.box for part in parts]).reshape(-1, 4)
    for i, part in enumerate(parts):
        # Most pairs are far apart, and comparing masks is slow.
        near = (boxes[:i, :2] < boxes[i, 2:]).all(axis=1) & (boxes[:i, 2:] > boxes[i, :2]).all(axis=1)
        for j in np.flatnonzero(near).tolist():
            if first(i) != first(j) and _same(parts[j], part):
                group[first(i)] = first(j)
    found: dict[int, list[_Part]] = {}
    for i, part in enumerate(parts):
        found.setdefault(first(i), []).append(part)
    return list(found.values())


def _same(a: _Part, b: _Part) -> bool:
    """Whether two detections of different tiles are the same object in the region that both tiles cover."""
    region = _intersection(a.window, b.window)
    x1, y1, x2, y2 = region
    if a.label != b.label or a.window == b.window or x1 >= x2 or y1 >= y2:  # NMS has decided within a tile
        return False
    rectangle = rle.frPyObjects([[x1, y1, x2, y1, x2, y2, x1, y2]], *a.code["size"])[0]
    inside = [rle.merge([part.code, rectangle], intersect=True) for part in (a, b)]
    shared = int(rle.area(rle.merge(inside, intersect=True)))
    smaller, larger = sorted(int(rle.area(code)) for code in inside)
    if region in (a.window, b.window):  # one is the whole image
        return shared > 0 and shared >= max(SHARE_OF_SMALLER * smaller, SHARE_OF_LARGER * larger)
    return larger >= MIN_SHARED and shared >= MERGE_IOU * (smaller + larger - shared)


def _intersection(a: Window, b: Window) -> Window:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _merge(group: list[_Part], tile: int) -> list[_Part]:
    """Return the detections that stand for a group: one, unless several on the whole image were found to belong to it.

    A detection on the whole image stands for its pieces in the tiles if it is large or if borders cut the pieces off.
    For a small object, the tiles' finer masks replace it.
    """
    height, width = group[0].code["size"]
    wholes = [part for part in group if part.window == (0, 0, width, height)]
    pieces = [part for part in group if part.window != (0, 0, width, height)]
    large = any(max(x2 - x1, y2 - y1) >= LARGE * tile for x1, y1, x2, y2 in (part.box for part in wholes))
    if not pieces or (wholes and (large or len(wholes) > 1 or all(part.cut for part in pieces))):
        return wholes
    score, mask_score = (max(getattr(part, key) for part in group) for key in ("score", "mask_score"))
    return [replace(pieces[0], score=score, mask_score=mask_score, code=rle.merge([part.code for part in pieces]))]


def _to_detections(config: Config, parts: list[_Part], size: tuple[int, int]) -> TiledDetections:
    parts = sorted(parts, key=lambda part: -part.mask_score)[: config.detection.top_k]
    boxes = torch.tensor([rle.toBbox(part.code).tolist() for part in parts], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    height, width = size
    return TiledDetections(
        boxes=boxes,
        scores=torch.tensor([part.score for part in parts]),
        mask_scores=torch.tensor([part.mask_score for part in parts]),
        labels=torch.tensor([part.label for part in parts], dtype=torch.long),
        class_names=config.class_names,
        category_ids=config.category_ids,
        size=size,
        coefficients=torch.zeros(len(parts), 0),
        prototypes=torch.zeros(1, 1, 0),
        relative_boxes=boxes / boxes.new_tensor((width, height, width, height)),
        config=config.detection,
        codes=tuple(part.code for part in parts),
    )
