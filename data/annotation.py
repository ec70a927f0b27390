"""What one entry of a COCO file says: ids, boxes and masks, in the spellings that such files have in the wild."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from data.errors import UserError


def as_id(value: Any, path: Path) -> int:
    """An id as a number: JSON files in the wild also have it as a string of digits."""
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{path}: id {value!r} is not a whole number") from None


def stated_box(annotation: dict[str, Any]) -> list[float] | None:
    """The annotation's own box (x, y, width, height), even where it sticks out of the photo; None if it is none."""
    numbers = _numbers(annotation.get("bbox"))
    return numbers.tolist() if numbers is not None and len(numbers) == 4 else None


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Whether an annotation is a crowd region; some files have "0" and "1" for it."""
    return str(annotation.get("iscrowd") or 0) not in ("0", "false", "False")


def normalise_segmentation(segmentation: Any, height: int, width: int) -> Any:
    """Flat polygons of at least three points, or an RLE with compressed counts of the photo's size; None if neither."""
    if isinstance(segmentation, list):
        if len(segmentation) == 1 and isinstance(segmentation[0], dict):
            return normalise_segmentation(segmentation[0], height, width)
        if segmentation and not isinstance(segmentation[0], (list, tuple)):
            segmentation = [segmentation]  # one flat polygon
        polygons = [values.tolist() for p in segmentation if (values := _numbers(p)) is not None]
        return [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0] or None
    if not isinstance(segmentation, dict) or _sides(segmentation.get("size")) != (height, width):
        return None
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        numbers = _numbers(counts)
        if numbers is None or (numbers < 0).any() or numbers.sum() != height * width:
            return None
        return rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return segmentation if isinstance(counts, (str, bytes)) else None


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """What `normalise_segmentation` gives, as one RLE."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return segmentation


def _numbers(values: Any) -> np.ndarray | None:
    """Finite numbers [n], whatever lists they lie in; None if they are anything else."""
    try:
        out = np.asarray(values, np.float64).ravel()
    except (TypeError, ValueError):
        return None
    return out if isinstance(values, (list, tuple)) and np.isfinite(out).all() else None


def _sides(size: Any) -> tuple[float, ...]:
    numbers = _numbers(size)
    return () if numbers is None else tuple(numbers.tolist())
