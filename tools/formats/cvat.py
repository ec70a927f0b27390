"""CVAT for images 1.1: an annotations.xml with polygons and masks."""

from __future__ import annotations

import contextlib
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tools.formats.structures import (
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
    rectangle,
)
from utils.errors import UserError

SPLITS = ("train", "val", "test")  # Datumaro writes a file for each


def recognise(source: Path) -> bool:
    """Return whether `source` is such a file, or a folder with annotations.xml, or with train.xml and the like."""
    return bool(_load(source))


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a file, or those of a folder."""
    finder = ImageFinder(images or (source if source.is_dir() else source.parent), problems)
    files = _load(source)
    for split in SPLITS:
        if source.is_dir() and split not in files and (source / f"{split}.xml").is_file():
            raise UserError(f"{source / f'{split}.xml'}: not annotations of CVAT, unlike others beside it")
    names = [(name.text or "").strip() for root in files.values() for name in root.findall("meta//label/name")]
    splits = {name if len(files) > 1 else "": _images(root, finder, problems) for name, root in files.items()}
    return Labels("CVAT", list(dict.fromkeys(names)), splits)


def _load(source: Path) -> dict[str, ET.Element]:
    """Return the roots of the files by their names without suffix."""
    paths = [source / f"{name}.xml" for name in ("annotations", *SPLITS)] if source.is_dir() else [source]
    found = {}
    for path in paths:
        if path.suffix.lower() == ".xml" and path.is_file():
            # ValueError: an encoding that the parser does not know
            with contextlib.suppress(ET.ParseError, OSError, ValueError):
                found[path.stem] = ET.parse(path).getroot()
    return {name: root for name, root in found.items() if root.tag == "annotations" and root.find("image") is not None}


def _images(root: ET.Element, finder: ImageFinder, problems: Problems) -> Iterator[LabelledImage]:
    for image in root.iter("image"):
        name = image.get("name", "")
        opened = finder.open(name, (image.get("height"), image.get("width")))
        if opened is None:
            continue
        groups: dict[tuple[str, str], list[ET.Element]] = {}  # shapes of a label and group are one object
        for number, shape in enumerate(image):
            if shape.tag != "tag":
                group = shape.get("group_id") or f"shape {number}"
                groups.setdefault((shape.get("label", "").strip(), group), []).append(shape)
        objects = []
        for (label, _), members in groups.items():
            polygons, masks = [], []
            outlines = [shape for shape in members if shape.tag not in ("box", "skeleton")]
            if 0 < len(outlines) < len(members):  # Datumaro writes the bounding box beside the outline
                problems.note("boxes in a group with outlines left out", name)
            for shape in outlines or members:
                polygon, mask = _polygon(shape), _mask(shape, opened[1])
                polygons += [] if polygon is None else [polygon]
                masks += [] if mask is None else [mask]
                if shape.tag == "box" and polygon is not None:
                    problems.note(RECTANGLES, name)
                if polygon is None and mask is None:
                    problems.add(f"shapes of the type {shape.tag} without an area", name)
            segmentation = compose(polygons, [], masks, opened[1])
            if not label:
                problems.add("shapes without a label", name)
            elif segmentation is not None:
                objects.append(LabelledObject(label, segmentation))
        yield LabelledImage(*opened, objects)


def _polygon(shape: ET.Element) -> list[float] | None:
    """Return the outline of a polygon, box or ellipse, or None for another shape."""
    try:
        if shape.tag == "polygon":
            return polygon_from([point.split(",") for point in shape.get("points", "").split(";")])
        angle = math.radians(float(shape.get("rotation", 0)))
        if shape.tag == "box":
            x1, y1, x2, y2 = (float(shape.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
            return rectangle(x1, y1, x2, y2, angle)
        if shape.tag == "ellipse":
            cx, cy, rx, ry = (float(shape.attrib[key]) for key in ("cx", "cy", "rx", "ry"))
            return ellipse(cx, cy, rx, ry, angle)
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
