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
from tools.formats.structures import NOT_FOUND, ImageFinder, LabelledImage, LabelledObject, Labels, Problems, image_size
from utils.errors import UserError


def recognise(source: Path) -> bool:
    """Return whether `source` is a COCO file, or a folder with `annotations/*.json` as CVAT and Datumaro export it."""
    if source.is_dir():
        return bool(_files_of(source))
    return _is_coco(source)


def _files_of(folder: Path) -> dict[str, Path]:
    """Return the COCO files of an exported folder by their split: "train" for annotations/instances_train.json."""
    files = [path for path in sorted((folder / "annotations").glob("*.json")) if _is_coco(path)]
    return {path.stem.removeprefix("instances_"): path for path in files}


def _is_coco(source: Path) -> bool:
    if not source.is_file() or source.suffix != ".json":
        return False
    try:
        content = json.loads(source.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a file or an exported folder. Raises UserError if the lists of a file are not those of COCO."""
    if source.is_file():
        names, listed = _read_file(source, ImageFinder([images or source.parent]), problems)
        return Labels("COCO", names, {"": listed})
    files = _files_of(source)
    finder = ImageFinder([images or source])
    read_files = {split: _read_file(path, finder, problems) for split, path in files.items()}
    all_names = dict.fromkeys(name for names, _ in read_files.values() for name in names)
    splits = {"" if len(files) == 1 else split: listed for split, (_, listed) in read_files.items()}
    return Labels("COCO", list(all_names), splits)


def _read_file(source: Path, finder: ImageFinder, problems: Problems) -> tuple[list[str], Iterator[LabelledImage]]:
    """Return the class names and the images of one file."""
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
    return list(names.values()), _images(listed, by_image, names, from_cvat, finder, problems)


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
            problems.add(NOT_FOUND, file_name)
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
