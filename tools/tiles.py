"""Segment images that are much larger than the network's input: predict on overlapping tiles, and merge the masks.

An object that a border of a tile cuts is found in both tiles. Two detections of a class are taken for one object if
their masks agree in the region that both tiles cover, and then their masks are united. The image as a whole is one of
the tiles, so that objects larger than a tile are found, too; their pieces in other tiles are dropped.
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

MERGE_IOU = 0.5  # of two masks in the region that both tiles cover
# A piece is dropped if at least this share of its area lies in a detection on the whole image.
MIN_INSIDE = 0.7
LARGE = 0.5  # an object is large if its longer side is at least this fraction of a tile's
CUT_MARGIN = 4  # pixels; masks rarely reach the very border
MIN_SHARED = 16  # pixels that at least one of two masks must have there; with fewer, the IoU says nothing
Window = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the image


@dataclass(eq=False)
class TiledDetections(Detections):
    """Detections whose masks are stored as run-length encodings, because they come from several predictions."""

    codes: tuple[dict[str, Any], ...] = ()  # COCO RLE of each mask

    def __getitem__(self, index: Any) -> TiledDetections:
        order = torch.arange(len(self))[self._selection(index)]
        chosen = super().__getitem__(order)
        assert isinstance(chosen, TiledDetections)
        return replace(chosen, codes=tuple(self.codes[i] for i in order.tolist()))

    def _chunks(self, budget: int) -> Iterator[Tensor]:
        """Decode the masks, about `budget` bytes at a time."""
        step = max(1, budget // (self.size[0] * self.size[1]))
        for start in range(0, len(self.codes), step):
            masks = rle.decode(list(self.codes[start : start + step]))
            yield torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1))).bool()


@dataclass
class _Part:
    """One or several detections that are taken for one object."""

    windows: list[Window]  # of the tiles in which it was found
    score: float
    mask_score: float
    label: int
    code: dict[str, Any]
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
                for part in _parts(found, window, (height, width)):
                    _add(parts, part)
        return _to_detections(self.config, parts, (height, width))


def tile_windows(height: int, width: int, tile: int, overlap: float) -> list[Window]:
    """Return windows of at most `tile` pixels a side that cover an image; neighbours share at least `overlap`."""

    def starts(length: int) -> list[int]:
        if length <= tile:
            return [0]
        count = int(np.ceil((length - tile) / (tile * (1 - overlap)))) + 1
        return np.linspace(0, length - tile, count).round().astype(int).tolist()

    return [(x, y, min(x + tile, width), min(y + tile, height)) for y in starts(height) for x in starts(width)]


def _parts(found: Detections, window: Window, size: tuple[int, int]) -> Iterator[_Part]:
    """Yield the detections of a tile, with masks in the coordinates of the image; empty masks are left out."""
    x1, y1, x2, y2 = window
    scores, mask_scores, labels = found.scores.tolist(), found.mask_scores.tolist(), found.labels.tolist()
    for i, mask in enumerate(found.iter_masks()):
        if mask.any():
            whole = np.zeros(size, np.uint8, order="F")
            whole[y1:y2, x1:x2] = mask
            yield _Part([window], scores[i], mask_scores[i], labels[i], rle.encode(whole), _is_cut(mask, window, size))


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


def _add(parts: list[_Part], new: _Part) -> None:
    """Combine a detection with those that are the same object, or append it.

    A detection on the whole image, which comes first, stands for its pieces in the tiles if it is large or a border cut
    the piece off. For a small object, the tile's finer mask replaces it. Detections on two tiles are united.
    """
    height, width = new.code["size"]
    whole = (0, 0, width, height)
    for part in parts:
        if part.label != new.label or part.windows != [whole] or new.windows == [whole]:
            continue
        if new.cut or _side(part) >= LARGE * _side(new, window=True):
            shared = rle.area(rle.merge([part.code, new.code], intersect=True))
            if shared >= MIN_INSIDE * rle.area(new.code):
                return
        elif _agree(part, new):
            parts.remove(part)
            best = max(part.score, new.score), max(part.mask_score, new.mask_score)
            parts.append(_Part(new.windows, *best, new.label, new.code, new.cut))
            return
    same = [part for part in parts if part.label == new.label and part.windows != [whole] and _agree(part, new)]
    for part in same:
        parts.remove(part)
        best = max(part.score, new.score), max(part.mask_score, new.mask_score)
        code = rle.merge([part.code, new.code])
        new = _Part(part.windows + new.windows, *best, new.label, code, part.cut and new.cut)
    parts.append(new)


def _side(part: _Part, window: bool = False) -> float:
    """Return the longer side of a detection's mask, or of its (first) tile."""
    if window:
        x1, y1, x2, y2 = part.windows[0]
        return max(x2 - x1, y2 - y1)
    return float(max(rle.toBbox(part.code)[2:]))


def _agree(a: _Part, b: _Part) -> bool:
    """Whether the masks agree where a tile of `a` and a tile of `b` overlap."""
    if rle.area(rle.merge([a.code, b.code], intersect=True)) == 0:
        return False
    size = a.code["size"]
    for first in a.windows:
        for second in b.windows:
            x1, y1 = max(first[0], second[0]), max(first[1], second[1])
            x2, y2 = min(first[2], second[2]), min(first[3], second[3])
            if first == second or x1 >= x2 or y1 >= y2:  # the NMS has decided within a tile
                continue
            region = rle.frPyObjects([[x1, y1, x2, y1, x2, y2, x1, y2]], *size)[0]
            inside = [rle.merge([part.code, region], intersect=True) for part in (a, b)]
            if max(rle.area(inside)) >= MIN_SHARED and rle.iou([inside[0]], [inside[1]], [0])[0, 0] >= MERGE_IOU:
                return True
    return False


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
