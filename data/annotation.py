"""Parse the entries of COCO files: ids, boxes and masks, in the variants that occur in practice.

Every value is checked here once, before it reaches pycocotools. That library trusts its input: damaged run lengths or
huge coordinates make it read out-of-bounds memory, hang or crash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as rle

from utils.errors import UserError

Box = tuple[float, float, float, float]
LARGEST_ID = 2**53  # JSON readers that store numbers as float64 round larger integers
# The file's area is used if it is within this factor of the mask's area, or, for small objects, within this many
# pixels. COCO's own files give the areas of the polygons, which differ from the pixel counts of small masks the most.
AREA_FACTOR, AREA_PIXELS = 2.0, 64.0


@dataclass
class Annotation:
    """One checked annotation, in pixels of the image."""

    label: int  # 0..C-1
    crowd: bool
    box: Box | None  # x1, y1, x2, y2, clipped to the image and of positive area
    stated_box: list[float] | None  # x, y, width, height as in the file, even where it exceeds the image
    segmentation: Any  # a list of polygons, an RLE with compressed counts, or None if there is no usable mask
    stated_area: float | None

    def area(self, height: int, width: int) -> tuple[float, bool]:
        """Return the area in pixels that COCO's size ranges use, and whether the file's area was rejected.

        The file's area is used if it agrees with the mask (see AREA_FACTOR), otherwise the area of the mask. An
        annotation without a mask has the file's area, or else the area of its box.
        """
        if self.segmentation is None:
            _, _, w, h = self.stated_box or (0, 0, 0, 0)
            return (max(0.0, w * h) if self.stated_area is None else self.stated_area), False
        own = float(rle.area(to_rle(self.segmentation, height, width)))
        if self.stated_area is None:
            return own, False
        low, high = sorted((own, self.stated_area))
        agrees = high - low <= AREA_PIXELS or high <= AREA_FACTOR * low
        return (self.stated_area, False) if agrees else (own, True)


@dataclass
class Sample:
    """An image and its objects. Boxes are (x1, y1, x2, y2) in pixels, inside the image and of positive area."""

    image: np.ndarray  # uint8 [H, W, 3], BGR
    boxes: np.ndarray  # float32 [n, 4]
    labels: np.ndarray  # int64 [n], 0..C-1
    segmentations: list[Any] = field(default_factory=list)  # n, each a list of polygons, an RLE, or None: only a box
    crowds: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))  # [m, 4]


def as_id(value: Any, where: str) -> int:
    """Return an id as an int; ids stored as strings of digits or as integral floats are accepted.

    Raises UserError, beginning with `where`, if the value is not an integer below LARGEST_ID.
    """
    number = value
    as_text = isinstance(value, str) and len(value) < 20 and re.fullmatch(r"\s*-?[0-9]+\s*", value)
    if as_text or (isinstance(value, float) and value.is_integer()):
        number = int(value)
    if not isinstance(number, int) or isinstance(number, bool) or abs(number) >= LARGEST_ID:
        raise UserError(f"{where} {value!r:.40} is not a whole number")
    return number


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Return whether an annotation is a crowd region. Besides 0 and 1, "0", "1", true and false are accepted.

    Raises ValueError for any other value, so that a typo does not turn an object into an ignored region.
    """
    value = annotation.get("iscrowd")
    if value in (None, 0, 1, "0", "1", ""):
        return value in (1, "1")
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"iscrowd is {value!r}, but it must be 0 or 1")


def parse_annotation(annotation: dict[str, Any], label: int, height: int, width: int) -> Annotation:
    """Check one entry of a file, with class `label` (0..C-1), for an image of `height` x `width` pixels.

    Unusable boxes, masks and areas become None. Raises ValueError if iscrowd is invalid.
    """
    segmentation = normalise_segmentation(annotation.get("segmentation"), height, width)
    stated = _numbers(annotation.get("bbox"))
    stated_box = stated.tolist() if stated is not None and len(stated) == 4 else None
    return Annotation(
        label,
        is_crowd(annotation),
        _clipped_box(stated_box, segmentation, height, width),
        stated_box,
        segmentation,
        _area(annotation.get("area")),
    )


def exact_copies(annotations: Sequence[dict[str, Any]]) -> list[int]:
    """Return the indices of those annotations of one image that equal an earlier one except for id and area."""
    groups: dict[Any, list[int]] = {}
    copies = []
    for position, annotation in enumerate(annotations):
        # Segmentations are long, so they are compared only for annotations with the same category and box.
        earlier = groups.setdefault((str(annotation["category_id"]), str(annotation.get("bbox"))), [])
        fields = ("segmentation", "iscrowd")
        if any(all(annotations[i].get(f) == annotation.get(f) for f in fields) for i in earlier):
            copies.append(position)
        else:
            earlier.append(position)
    return copies


def normalise_segmentation(segmentation: Any, height: int, width: int) -> Any:
    """Return flat polygons of at least three points, or an RLE of the image's size with compressed counts.

    Returns None if the value is neither, or is damaged.
    """
    if isinstance(segmentation, list):
        if segmentation and all(isinstance(part, dict) for part in segmentation):
            codes = [normalise_segmentation(part, height, width) for part in segmentation]
            return None if None in codes else rle.merge(codes)
        if segmentation and not isinstance(segmentation[0], (list, tuple)):
            segmentation = [segmentation]  # one flat polygon
        polygons = [values for p in segmentation if (values := _numbers(p)) is not None]
        polygons = [_near(p, height, width) for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
        return [p.tolist() for p in polygons if len(p) >= 6] or None
    if not isinstance(segmentation, dict):
        return None
    size = _numbers(segmentation.get("size"))
    if size is None or tuple(size.tolist()) != (height, width):
        return None
    counts = _run_lengths(segmentation.get("counts"))
    if counts is None or (counts < 0).any() or counts.sum() != height * width:
        return None
    return rle.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return a segmentation from `normalise_segmentation` as a single RLE of `height` x `width` pixels."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return segmentation


def to_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return a segmentation from `normalise_segmentation` as a bool mask [H, W]; an empty one for None."""
    if segmentation is None:
        return np.zeros((height, width), bool)
    return rle.decode(to_rle(segmentation, height, width)).astype(bool)


def _run_lengths(counts: Any) -> np.ndarray | None:
    """Return run lengths, int64 [n], from COCO's compressed string or from a list; None if `counts` is neither."""
    if isinstance(counts, list):
        numbers = _numbers(counts)
        if numbers is None or (numbers != numbers.round()).any() or (np.abs(numbers) > 2**40).any():
            return None
        return numbers.astype(np.int64)
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError:
            return None
    if not isinstance(counts, bytes) or not counts:
        return None
    # COCO's variable-length code: each character minus 48 ("0") holds five bits of a number, lowest bits first. Bit 32
    # says that another character follows; bit 16 of a number's last character is its sign.
    values = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = (values & 32) == 0
    if (values < 0).any() or (values > 63).any() or not last[-1]:
        return None
    ends = np.flatnonzero(last) + 1
    starts = np.concatenate(([0], ends[:-1]))
    lengths = ends - starts
    if lengths.max() > 8:  # 40 bits are more than any image needs; longer numbers could overflow int64
        return None
    position = np.arange(len(values)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((values & 31) << (5 * position), starts)
    numbers -= np.where(values[ends - 1] & 16, np.int64(1) << (5 * lengths), 0)
    # From the fourth number on, the file stores the difference from the number two positions earlier.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def _near(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip a polygon [2n] to the image plus a margin of its longer side (Sutherland and Hodgman 1974).

    pycocotools allocates points along every edge, so a coordinate of 1e8 would exhaust the memory.
    """
    margin = max(height, width)
    low, high = np.array((-margin, -margin)), np.array((width + margin, height + margin))
    points = polygon.reshape(-1, 2)
    if ((points >= low) & (points <= high)).all():
        return polygon
    for axis in (0, 1):
        for limit, sign in ((low[axis], 1.0), (high[axis], -1.0)):
            points = _clip_side(points, axis, float(limit), sign)
            if not len(points):
                return np.zeros(0)
    return points.ravel()


def _clip_side(points: np.ndarray, axis: int, limit: float, sign: float) -> np.ndarray:
    """Return the part of a polygon [n, 2] where sign * (coordinate - limit) >= 0 along `axis`."""
    distance = sign * (points[:, axis] - limit)
    kept: list[np.ndarray] = []
    for i in range(len(points)):
        a, b = distance[i - 1], distance[i]
        if (a >= 0) != (b >= 0):
            crossing = points[i - 1] + (points[i] - points[i - 1]) * (a / (a - b))
            crossing[axis] = limit
            kept.append(crossing)
        if b >= 0:
            kept.append(points[i])
    return np.array(kept).reshape(-1, 2)


def _clipped_box(stated: list[float] | None, segmentation: Any, height: int, width: int) -> Box | None:
    """Return the file's box, or else the mask's, as corners clipped to the image; None if its area is zero.

    Some tools write a box of zeros beside a mask.
    """
    if stated is not None and (segmentation is None or min(stated[2:]) > 0):
        x, y, w, h = stated
    elif isinstance(segmentation, list):
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in segmentation])
        (x, y), (w, h) = points.min(axis=0), np.ptp(points, axis=0)
    elif segmentation is not None:
        x, y, w, h = rle.toBbox(segmentation)
    else:
        return None
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    return (float(x1), float(y1), float(x2), float(y2)) if x2 > x1 and y2 > y1 else None


def _area(value: Any) -> float | None:
    """Return an area, also one stored as text, as a float; None unless it is a finite, non-negative number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 and not isinstance(value, bool) else None


def _numbers(values: Any) -> np.ndarray | None:
    """Flatten a (nested) list of finite numbers to float64 [n]; None if it holds anything else, such as strings."""
    if not isinstance(values, (list, tuple)):
        return None
    try:
        raw = np.asarray(values)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None
    if raw.dtype.kind not in "iuf":  # text, booleans, and integers beyond 64 bits
        return None
    out = raw.astype(np.float64).ravel()
    return out if np.isfinite(out).all() else None
