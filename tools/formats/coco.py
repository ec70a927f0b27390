"""COCO JSON as other tools export it: CVAT, Label Studio, Roboflow, supervision.

Their paths are those of the server, ids may be text, and CVAT and supervision mark every object that is stored as a
run-length encoding as a crowd region, which training and AP ignore.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.annotation import is_crowd, normalise_segmentation, parse_annotation
from tools.findings import too_many_crowds
from tools.formats.structures import (
    ONLY_BOX,
    ImageFinder,
    LabelledImage,
    LabelledObject,
    Labels,
    Problems,
    lost_parts,
    read_text,
)
from utils.errors import UserError

LISTS = ("images", "annotations", "categories")


def recognise(source: Path) -> bool:
    """Return whether `source` is a COCO file, or a folder with such files as CVAT, Datumaro or Roboflow export it."""
    return bool(files_of(source)) if source.is_dir() else _is_coco(source)


def files_of(folder: Path) -> dict[str, Path]:
    """Return the COCO files of an exported folder by their split: "train" for annotations/instances_train.json."""
    files = [path for path in sorted((folder / "annotations").glob("*.json")) if _is_coco(path)]
    if not files:
        beside = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith((".", "_annotations"))]
        # A folder of LabelMe may contain the COCO file that it was converted to.
        files = beside if all(map(_is_coco, beside)) else []
    instances = [path for path in files if path.stem.startswith("instances_")]
    found = {path.stem.removeprefix("instances_"): path for path in instances or files}
    roboflow = sorted([*folder.glob("*/_annotations.coco.json"), *folder.glob("_annotations.coco.json")])
    return found or {"" if path.parent == folder else path.parent.name: path for path in roboflow if _is_coco(path)}


def _load(source: Path) -> Any:
    try:
        return json.loads(read_text(source))
    except (ValueError, RecursionError):
        return None


def _is_coco(source: Path) -> bool:
    """Whether a file has COCO's lists, and masks: not captions, panoptic segments or keypoints alone."""
    if not source.is_file() or source.suffix.lower() != ".json":
        return False
    try:
        content = _load(source)
    except UserError:
        return False
    if not isinstance(content, dict) or not set(LISTS) <= content.keys():
        return False
    listed = content["annotations"]
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        return True  # `read` says what is wrong
    return any("category_id" in entry for entry in listed) and "segments_info" not in listed[0]


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a file or an exported folder. Raises UserError if the lists of a file are not those of COCO."""
    files = files_of(source) if source.is_dir() else {"": source}
    for path in [*source.glob("annotations/instances_*.json"), *source.glob("*/_annotations.coco.json")]:
        if path not in files.values():
            raise UserError(f"{path}: not a COCO annotation file with masks, unlike others beside it")
    found = {}
    for split, path in files.items():
        # CVAT keeps annotations and images in two folders; Roboflow keeps the images of a split beside its file.
        folder = source if source.is_dir() and path.parent.name == "annotations" else path.parent
        found[split] = _read_file(path, ImageFinder(images or folder, problems), problems)
    all_names = dict.fromkeys(name for names, _ in found.values() for name in names)
    splits = {"" if len(files) == 1 else split: listed for split, (_, listed) in found.items()}
    return Labels("COCO", list(all_names), splits)


def _key(value: Any) -> str:
    """Return an id as text, so that 1, 1.0 and "1" are one id."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _read_file(source: Path, finder: ImageFinder, problems: Problems) -> tuple[list[str], Iterator[LabelledImage]]:
    """Return the class names and the images of one file. Raises UserError if its structure is not COCO's."""
    content = _load(source)
    for key in LISTS:
        if not isinstance(content[key], list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{source}: {key!r} must be a list of objects, as COCO has it")
    try:
        named = ((entry["id"], entry.get("name")) for entry in content["categories"])
        names = {_key(key): str(key if name in (None, "") else name).strip() for key, name in named}
        listed = {_key(entry["id"]): entry for entry in content["images"]}
        files = Counter(str(entry["file_name"]) for entry in content["images"])
        by_image: dict[str, list[dict[str, Any]]] = {}
        for entry in content["annotations"]:
            by_image.setdefault(_key(entry["image_id"]), []).append(entry)
    except KeyError as error:
        raise UserError(f"{source}: not a COCO file, an entry has no {error}") from None
    for what, entries, known in (("image", content["images"], listed), ("category", content["categories"], names)):
        if len(known) < len(entries):
            ids = Counter(_key(entry["id"]) for entry in entries)
            raise UserError(f"{source}: {what} id {ids.most_common(1)[0][0]} is used more than once")
    name, count = files.most_common(1)[0] if files else ("", 0)
    if count > 1:
        ids = Counter({key: 1 for key, entry in listed.items() if entry["file_name"] == name})
        raise UserError(
            f"{source}: {name} is the file_name of {count} image ids ({', '.join(ids)}), perhaps frames of different "
            "videos; give each image a name of its own"
        )
    for key in by_image.keys() - listed.keys():
        problems.add("annotations of images that are not listed", f"image_id {key}", len(by_image[key]))
    crowds = sum(entry.get("iscrowd") in (1, "1", True) for entry in content["annotations"])
    # Annotations of CVAT have attributes with "occluded".
    attributes = (entry.get("attributes") for entry in content["annotations"])
    from_cvat = any(isinstance(values, dict) and "occluded" in values for values in attributes)
    clear = from_cvat or too_many_crowds(crowds, len(content["annotations"]))
    return list(names.values()), _images(listed, by_image, names, clear, finder, problems)


def _images(
    listed: dict[str, dict[str, Any]],
    by_image: dict[str, list[dict[str, Any]]],
    names: dict[str, str],
    clear_crowds: bool,
    finder: ImageFinder,
    problems: Problems,
) -> Iterator[LabelledImage]:
    for key, image in listed.items():
        file_name = str(image["file_name"])
        opened = finder.open(file_name, (image.get("height"), image.get("width")))
        if opened is None:
            continue
        path, size = opened
        objects = []
        for entry in by_image.get(key, []):
            name = names.get(_key(entry.get("category_id")))
            if name is None:
                problems.add("annotations of an unknown category", file_name)
                continue
            try:
                crowd = is_crowd(entry)
            except ValueError as error:
                problems.add(f"annotations whose {error}", file_name)
                continue
            segmentation = normalise_segmentation(entry.get("segmentation"), *size)
            if segmentation is None:
                box = parse_annotation(entry, 0, *size).box
                if box is None:
                    problems.add("annotations without a usable mask or box", file_name)
                else:
                    problems.note(ONLY_BOX, file_name)
                    objects.append(LabelledObject(name, None, crowd and not clear_crowds, box))
            elif isinstance(segmentation, list) and max(map(np.max, segmentation)) <= 1.0:
                problems.add("outlines that are relative (0 to 1) instead of in pixels", file_name)
            else:
                if lost_parts(entry["segmentation"], segmentation):
                    problems.note("objects of several outlines, of which a damaged one is left out", file_name)
                if crowd and clear_crowds:
                    problems.note("crowd flags cleared, which CVAT and supervision set for RLE masks", file_name)
                objects.append(LabelledObject(name, segmentation, crowd and not clear_crowds))
        yield LabelledImage(path, size, objects)
