"""COCO JSON as other tools export it: CVAT, Label Studio, Roboflow.

Their paths are those of the server, and CVAT marks every object that was drawn with its brush as a crowd region, which
training and AP ignore.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.annotation import is_crowd, normalise_segmentation
from data.formats.structures import ImageFinder, LabelledImage, LabelledObject, Labels, Problems, image_size
from utils.errors import UserError


def recognise(source: Path) -> bool:
    """Return whether `source` is a COCO file."""
    if not source.is_file() or source.suffix != ".json":
        return False
    try:
        content = json.loads(source.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a file. Raises UserError if its lists are not those of COCO."""
    content: dict[str, Any] = json.loads(source.read_text(encoding="utf-8-sig"))
    try:
        names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in content["categories"]}
        by_image: dict[Any, list[dict[str, Any]]] = {}
        for entry in content["annotations"]:
            by_image.setdefault(entry["image_id"], []).append(entry)
        listed = [(entry["id"], str(entry["file_name"])) for entry in content["images"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: not a COCO file, an entry has no {error}") from None
    # Annotations of CVAT have attributes with "occluded".
    from_cvat = any("occluded" in (e.get("attributes") or {}) for e in content["annotations"])
    finder = ImageFinder([images or source.parent])
    return Labels("COCO", list(names.values()), {"": _images(listed, by_image, names, from_cvat, finder, problems)})


def _images(
    listed: list[tuple[Any, str]],
    by_image: dict[Any, list[dict[str, Any]]],
    names: dict[Any, str],
    from_cvat: bool,
    finder: ImageFinder,
    problems: Problems,
) -> Iterator[LabelledImage]:
    for image_id, file_name in listed:
        path = finder.find(file_name)
        if path is None:
            problems.add("images that were not found", file_name)
            continue
        size = image_size(path, problems)
        if size is None:
            continue
        objects = []
        for entry in by_image.get(image_id, []):
            segmentation = normalise_segmentation(entry.get("segmentation"), *size)
            if entry.get("category_id") not in names:
                problems.add("annotations of an unknown category", file_name)
            elif segmentation is None:
                problems.add("annotations without a usable mask", file_name)
            else:
                crowd = is_crowd(entry)
                if crowd and from_cvat:
                    problems.add("crowd flags of CVAT (its brush sets them; the objects are kept)", file_name)
                objects.append(LabelledObject(names[entry["category_id"]], segmentation, crowd and not from_cvat))
        yield LabelledImage(path, size, objects)
