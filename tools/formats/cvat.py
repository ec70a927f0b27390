"""CVAT for images 1.1: an annotations.xml with polygons and masks."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tools.formats.structures import (
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
    rectangle,
)


def recognise(source: Path) -> bool:
    """Return whether `source` is such a file, or a folder with one called annotations.xml."""
    return _load(source) is not None


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a file."""
    root = _load(source)
    assert root is not None
    names = [(name.text or "").strip() for name in root.findall("meta//label/name")]
    folder = source if source.is_dir() else source.parent
    return Labels("CVAT", names, {"": _images(root, ImageFinder(images or folder, problems), problems)})


def _load(source: Path) -> ET.Element | None:
    path = source / "annotations.xml" if source.is_dir() else source
    if path.suffix != ".xml" or not path.is_file():
        return None
    try:
        root = ET.parse(path).getroot()
    except (ET.ParseError, OSError, UnicodeError):
        return None
    return root if root.tag == "annotations" and root.find("image") is not None else None


def _images(root: ET.Element, finder: ImageFinder, problems: Problems) -> Iterator[LabelledImage]:
    for image in root.iter("image"):
        name = image.get("name", "")
        opened = finder.open(name, (image.get("height"), image.get("width")))
        if opened is None:
            continue
        groups: dict[tuple[str, str], list[ET.Element]] = {}  # shapes of a label and group are one object
        for number, shape in enumerate(image):
            if shape.tag not in ("tag", "skeleton"):
                group = shape.get("group_id") or f"shape {number}"
                groups.setdefault((shape.get("label", "").strip(), group), []).append(shape)
        objects = []
        for (label, _), members in groups.items():
            polygons, masks = [], []
            for shape in members:
                polygon, mask = _polygon(shape), _mask(shape, opened[1])
                polygons += [] if polygon is None else [polygon]
                masks += [] if mask is None else [mask]
                if polygon is None and mask is None:
                    problems.add(f"shapes of the type {shape.tag} without an area", name)
            segmentation = compose(polygons, [], masks, opened[1])
            if segmentation is not None:
                objects.append(LabelledObject(label, segmentation))
        yield LabelledImage(*opened, objects)


def _polygon(shape: ET.Element) -> list[float] | None:
    """Return the outline of a polygon, box or ellipse, or None for another shape."""
    try:
        if shape.tag == "polygon":
            return polygon_from([point.split(",") for point in shape.get("points", "").split(";")])
        if shape.tag == "box":
            return rectangle(*(float(shape.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr")))
        if shape.tag == "ellipse":
            cx, cy, rx, ry = (float(shape.attrib[key]) for key in ("cx", "cy", "rx", "ry"))
            return ellipse(cx, cy, rx, ry)
    except (KeyError, ValueError):
        return None
    return None


def _mask(shape: ET.Element, size: Size) -> np.ndarray | None:
    """Decode a mask: run lengths of a rectangle, row by row, beginning with zeros; None for another shape."""
    try:
        left, top, width, height = (int(shape.attrib[key]) for key in ("left", "top", "width", "height"))
        counts = [int(count) for count in shape.attrib["rle"].split(",")]
        values = np.repeat(np.arange(len(counts)) % 2, counts).reshape(height, width)
    except (KeyError, ValueError):
        return None
    mask = place(values, left, top, size)
    return mask if mask.any() else None
