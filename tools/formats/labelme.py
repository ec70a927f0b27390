"""LabelMe and ISAT: a folder with a JSON file for each image, as LabelMe, X-AnyLabeling, ISAT and `--save polygons` do.

Shapes with the same label and group_id are parts of one object. A shape with the flag "hole", which `--save polygons`
writes, is cut out of its group.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tools.formats.structures import (
    NOT_UTF8,
    RECTANGLES,
    ImageFinder,
    LabelledImage,
    LabelledObject,
    Labels,
    Problems,
    Size,
    compose,
    ellipse,
    place,
    polygon_from,
    read_text,
    rectangle,
    visible_files,
)
from utils.errors import UserError

RESERVED = ("__ignore__", "_background_", "__background__")  # names of LabelMe and ISAT for regions that are no objects


def recognise(source: Path) -> bool:
    """Return whether `source` is a LabelMe or ISAT file, or a folder with at least one."""
    return any(_load(path, Problems()) is not None for _, path in zip(range(200), _paths(source), strict=False))


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a file, or all files of a folder."""
    finder = ImageFinder(images or (source.parent if source.is_file() else source), problems)
    return Labels("LabelMe", [], {"": _images(_paths(source), finder, problems)})


def _paths(source: Path) -> list[Path]:
    if source.is_file():
        return [source] if source.suffix.lower() == ".json" else []
    return visible_files(source, {".json"})


def _load(path: Path, problems: Problems) -> dict[str, Any] | None:
    """Return the content of a file in LabelMe's terms, or None for another one, with a problem."""
    try:
        content = json.loads(read_text(path))
    except UserError:
        problems.add(NOT_UTF8, path.name)
        return None
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and isinstance(content.get("shapes"), list):
        return content
    if isinstance(content, dict) and isinstance(content.get("objects"), list) and isinstance(content.get("info"), dict):
        return _from_isat(content)
    problems.add("JSON files that are not LabelMe's", path.name)
    return None


def _from_isat(content: dict[str, Any]) -> dict[str, Any]:
    """Return an ISAT file in LabelMe's terms. Objects of one group and category are parts of one object there, too."""
    info = content["info"]
    shapes = [
        {
            "label": item.get("category"),
            "points": item.get("segmentation"),
            "group_id": item.get("group"),
            "crowd": item.get("iscrowd") in (1, True),
        }
        for item in content["objects"]
        if isinstance(item, dict)
    ]
    size = {"imageHeight": info.get("height"), "imageWidth": info.get("width")}
    return {"shapes": shapes, "imagePath": info.get("name"), **size}


def _images(paths: list[Path], finder: ImageFinder, problems: Problems) -> Iterator[LabelledImage]:
    for path in paths:
        content = _load(path, problems)
        if content is None:
            continue
        name = str(content.get("imagePath") or path.stem)
        beside = path.parent / name.replace("\\", "/")
        stated = content.get("imageHeight"), content.get("imageWidth")
        is_beside = os.path.isfile(beside)  # False also for a name that no file can have
        if not is_beside and content.get("imageData") and not finder.knows(name):
            problems.add("images that are stored inside the JSON (imageData); write them to files beside it", path.name)
            continue
        opened = finder.settle(beside, stated) if is_beside else finder.open(name, stated)
        if opened is not None:
            yield LabelledImage(*opened, list(_objects(content["shapes"], opened[1], path.name, problems)))


def _objects(shapes: list[Any], size: Size, where: str, problems: Problems) -> Iterator[LabelledObject]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number, shape in enumerate(shapes):
        label = shape.get("label") if isinstance(shape, dict) else None
        label = str(label).strip() if isinstance(label, (str, int, float)) else ""
        if not label:
            problems.add("shapes without a label", where)
        elif label in RESERVED:
            problems.add(f"shapes with the reserved label {label}", where)
        else:
            group = shape.get("group_id")
            groups.setdefault((label, f"shape {number}" if group in (None, "") else repr(group)), []).append(shape)
    for (label, _), members in groups.items():
        parts: list[list[float]] = []
        holes: list[list[float]] = []
        masks: list[np.ndarray] = []
        for shape in members:
            kind = shape.get("shape_type") or "polygon"
            mask = _mask(shape, size) if kind == "mask" else None
            polygon = None if kind == "mask" else _polygon(kind, shape.get("points"))
            if mask is not None:
                masks.append(mask)
            elif polygon is not None:
                if kind == "rectangle":
                    problems.note(RECTANGLES, where)
                flags = shape.get("flags")
                (holes if isinstance(flags, dict) and flags.get("hole") else parts).append(polygon)
            else:
                problems.add(f"shapes of the type {kind} without an area", where)
        segmentation = compose(parts, holes, masks, size)
        if segmentation is not None:
            yield LabelledObject(label, segmentation, any(shape.get("crowd") is True for shape in members))
        elif holes:
            problems.add("holes without the object that they are in", where)


def _polygon(kind: str, points: Any) -> list[float] | None:
    """Return the outline of a shape as a polygon, or None for one without an area."""
    try:
        values = np.asarray(points, np.float64).reshape(-1, 2)
    except (ValueError, TypeError):
        return None
    if not np.isfinite(values).all():
        return None
    if kind == "rectangle" and len(values) in (2, 4):
        (x1, y1), (x2, y2) = values.min(axis=0), values.max(axis=0)
        return rectangle(x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None
    if kind == "circle" and len(values) == 2:  # the centre, and a point on the circle
        radius = float(np.hypot(*(values[1] - values[0])))
        return ellipse(float(values[0, 0]), float(values[0, 1]), radius, radius) if radius > 0 else None
    return polygon_from(values) if kind in ("polygon", "rotation") else None


def _mask(shape: dict[str, Any], size: Size) -> np.ndarray | None:
    """Decode a shape of the type mask: a PNG in base64, placed at the upper left point."""
    try:
        data = np.frombuffer(base64.b64decode(shape["mask"], validate=True), np.uint8)
        piece = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
        (x, y), *_ = np.asarray(shape["points"], np.float64).round().astype(int).tolist()
    except (KeyError, ValueError, TypeError, binascii.Error, cv2.error):
        return None
    mask = None if piece is None else place(piece, x, y, size)
    return mask if mask is not None and mask.any() else None
