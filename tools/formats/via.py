"""VGG Image Annotator, versions 1 and 2: the annotations or the whole project as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.formats.structures import (
    RECTANGLES,
    ImageFinder,
    LabelledImage,
    LabelledObject,
    Labels,
    Problems,
    ellipse,
    polygon_from,
    read_text,
    rectangle,
)
from utils.errors import UserError

USUAL_ATTRIBUTES = ("class", "label", "name", "type", "category", "object")


def recognise(source: Path) -> bool:
    """Return whether `source` is a VIA file."""
    return source.is_file() and _load(source) is not None


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a file. The class of a region is the attribute that names one; a file without attributes has one class."""
    files = _load(source) or []
    attribute = _class_attribute(files, source)
    finder = ImageFinder(images or source.parent, problems)
    options = _options(source, attribute)
    return Labels("VIA", [], {"": _images(files, attribute, options, finder, problems)})


def _options(source: Path, attribute: str | None) -> dict[str, str]:
    """Return the names of an attribute's options by their ids, which regions store. Only projects contain them."""
    content = json.loads(read_text(source))
    attributes = content.get("_via_attributes") or {}
    definition = (attributes.get("region") or {}).get(attribute) or {}
    options = definition.get("options") if isinstance(definition, dict) else None
    return {str(key): str(name) for key, name in options.items() if name} if isinstance(options, dict) else {}


def _load(source: Path) -> list[dict[str, Any]] | None:
    """Return the entries of the files, or None if it is another kind of JSON."""
    try:
        content = json.loads(read_text(source))
    except (ValueError, UserError, RecursionError):
        return None
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)
    entries = list(content.values()) if isinstance(content, dict) else []
    usable = [e for e in entries if isinstance(e, dict) and "filename" in e and "regions" in e]
    return usable if usable and len(usable) == len(entries) else None


def _regions(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the regions of a file, with both of their dictionaries: a list in version 2, a dictionary in version 1."""
    regions = entry["regions"]
    values = regions.values() if isinstance(regions, dict) else regions if isinstance(regions, list) else []
    keys = ("shape_attributes", "region_attributes")
    return [
        {key: region[key] if isinstance(region.get(key), dict) else {} for key in keys}
        for region in values
        if isinstance(region, dict)
    ]


def _class_attribute(files: list[dict[str, Any]], source: Path) -> str | None:
    """Return the attribute that holds the class, or None if there are no attributes."""
    used = Counter(
        name
        for entry in files
        for region in _regions(entry)
        for name, value in region["region_attributes"].items()
        if isinstance(value, (str, dict, int, float)) and value not in ("", {})
    )
    if not used:
        return None
    if len(used) == 1:
        return next(iter(used))
    for name in USUAL_ATTRIBUTES:
        if name in used:
            return name
    raise UserError(
        f"{source}: regions have the attributes {', '.join(sorted(used))}; "
        "rename the one that holds the class to `class`"
    )


def _images(
    files: list[dict[str, Any]], attribute: str | None, options: dict[str, str], finder: ImageFinder, problems: Problems
) -> Iterator[LabelledImage]:
    for entry in files:
        opened = finder.open(str(entry["filename"]))  # browsers show images upright
        if opened is None:
            continue
        objects = []
        for region in _regions(entry):
            shape = region["shape_attributes"]
            polygon = _polygon(shape)
            name = region["region_attributes"].get(attribute, "") if attribute else "object"
            if isinstance(name, dict):  # a checkbox: {"person": true}
                chosen = [key for key, is_set in name.items() if is_set]
                if len(chosen) > 1:
                    problems.add("regions with several classes", entry["filename"])
                    continue
                name = chosen[0] if chosen else ""
            if polygon is None:
                problems.add(f"regions of the shape {shape.get('name')} without an area", entry["filename"])
            elif name is None or not str(name).strip():
                problems.add("regions without a class", entry["filename"])
            else:
                if shape.get("name") == "rect":
                    problems.note(RECTANGLES, entry["filename"])
                name = options.get(str(name), str(name))
                objects.append(LabelledObject(name.strip(), [polygon]))
        yield LabelledImage(*opened, objects)


def _polygon(shape: dict[str, Any]) -> list[float] | None:
    """Return the outline of a shape as a polygon, or None for one without an area."""
    try:
        kind = shape.get("name")
        if kind in ("polygon", "polyline"):
            return polygon_from(list(zip(shape["all_points_x"], shape["all_points_y"], strict=True)))
        if kind == "rect":
            x, y, width, height = (float(shape[key]) for key in ("x", "y", "width", "height"))
            return rectangle(x, y, x + width, y + height) if width > 0 and height > 0 else None
        if kind in ("circle", "ellipse"):
            rx, ry = (float(shape[key]) for key in (("r", "r") if kind == "circle" else ("rx", "ry")))
            angle = math.radians(float(shape.get("theta") or 0)) if kind == "ellipse" else 0.0
            return ellipse(float(shape["cx"]), float(shape["cy"]), rx, ry, angle) if rx > 0 and ry > 0 else None
    except (KeyError, TypeError, ValueError):
        return None
    return None
