"""LabelMe: a folder with a JSON file for each image, as LabelMe, X-AnyLabeling and `--save polygons` write them.

Shapes with the same label and group_id are parts of one object. A shape with the flag "hole", which `--save polygons`
writes, is cut out of its group.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tools.formats.structures import (
    ImageFinder,
    LabelledImage,
    LabelledObject,
    Labels,
    Problems,
    ellipse,
    encode,
    image_size,
    polygon_from,
    rectangle,
    with_holes,
)


def recognise(source: Path) -> bool:
    """Return whether `source` is a LabelMe file, or a folder with at least one."""
    paths = [source] if source.is_file() and source.suffix == ".json" else source.rglob("*.json")
    return any(_load(path) is not None for _, path in zip(range(200), paths, strict=False))


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a file, or all files of a folder."""
    paths = [source] if source.is_file() else sorted(source.rglob("*.json"))
    finder = ImageFinder([images or (source.parent if source.is_file() else source)])
    names: list[str] = []
    return Labels("LabelMe", names, {"": _images(paths, finder, problems)})


def _load(path: Path) -> dict[str, Any] | None:
    """Return the content of a LabelMe file, or None for another one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("shapes"), list) else None


def _images(paths: list[Path], finder: ImageFinder, problems: Problems) -> Iterator[LabelledImage]:
    for path in paths:
        content = _load(path)
        if content is None:
            problems.add("JSON files that are not LabelMe's", path.name)
            continue
        name = str(content.get("imagePath") or path.with_suffix(".jpg").name)
        beside = path.parent / name.replace("\\", "/")
        image = beside if beside.is_file() else finder.find(name)
        if image is None:
            problems.add("files whose image was not found", f"{path.name} ({name})")
            continue
        size = image_size(image, problems)
        if size is None:
            continue
        stated = content.get("imageHeight"), content.get("imageWidth")
        if None not in stated and stated != size:
            if stated != (size[1], size[0]):
                problems.add("files made for an image of another size", path.name)
                continue
            size = size[1], size[0]  # annotated without applying the EXIF orientation
        yield LabelledImage(image, size, list(_objects(content["shapes"], size, path.name, problems)))


def _objects(shapes: list[Any], size: tuple[int, int], where: str, problems: Problems) -> Iterator[LabelledObject]:
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for number, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            problems.add("shapes without a label", where)
            continue
        group = shape.get("group_id")
        groups.setdefault((shape["label"], ("shape", number) if group is None else group), []).append(shape)
    for (label, _), members in groups.items():
        parts: list[list[float]] = []
        holes: list[list[float]] = []
        masks: list[np.ndarray] = []
        for shape in members:
            kind = shape.get("shape_type") or "polygon"
            if kind == "mask":
                mask = _mask(shape, size)
                masks += [] if mask is None else [mask]
                usable = mask is not None
            else:
                polygon = _polygon(kind, shape.get("points"))
                is_hole = bool((shape.get("flags") or {}).get("hole"))
                (holes if is_hole else parts).extend([] if polygon is None else [polygon])
                usable = polygon is not None
            if not usable:
                problems.add(f"shapes of the type {kind} without an area", where)
        if masks:
            drawn = np.logical_or.reduce(masks)
            for polygon in parts:
                cv2.fillPoly(
                    canvas := drawn.astype(np.uint8), [np.array(polygon).reshape(-1, 2).round().astype(int)], 1
                )
                drawn = canvas > 0
            yield LabelledObject(label, encode(drawn))
        elif parts:
            yield LabelledObject(label, with_holes(parts, holes, size))


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


def _mask(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray | None:
    """Decode a shape of the type mask: a PNG in base64, placed at the upper left point."""
    try:
        data = np.frombuffer(base64.b64decode(shape["mask"], validate=True), np.uint8)
        piece = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
        (x, y), *_ = np.asarray(shape["points"], np.float64).round().astype(int).tolist()
    except (KeyError, ValueError, TypeError, binascii.Error, cv2.error):
        return None
    if piece is None or x < 0 or y < 0:
        return None
    mask = np.zeros(size, bool)
    target = mask[y : y + piece.shape[0], x : x + piece.shape[1]]
    target[:] = piece[: target.shape[0], : target.shape[1]] > 0
    return mask if mask.any() else None
