"""YOLO segmentation: a data.yaml, or a folder with `images` and `labels`; a text file of polygons for each image.

A line is `class x1 y1 x2 y2 ...`, relative to the upright image. Objects of several parts are stored as one outline.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.image import SUFFIXES
from tools.formats.structures import (
    NOT_UTF8,
    ONLY_BOX,
    ImageFinder,
    LabelledImage,
    LabelledObject,
    Labels,
    Problems,
    Size,
    read_text,
    visible_files,
)
from utils.errors import UserError

SPLITS = ("train", "val", "test")
NAMES_OF_VAL = ("valid", "validation")  # other keys for it
MOST_CLASSES = 100_000  # a larger index is another kind of number


def find_yaml(source: Path) -> Path | None:
    """Return the data.yaml that `source` is or contains; other names are found by the key `names` inside."""
    if source.is_file():
        return source if source.suffix.lower() in (".yaml", ".yml") else None
    found = [path for path in [*source.glob("data.y*ml"), *sorted(source.glob("*.y*ml"))] if path.is_file()]
    for path in found:
        named = re.search(rb"^\W{0,4}names\W? *:", path.read_bytes(), re.MULTILINE)
        if path.stem == "data" or (
            named and not path.name.startswith(".")
        ):  # `_load` says what is wrong with the first
            return path
    return None


def recognise(source: Path) -> bool:
    """Return whether `source` is a data.yaml, or a folder with one or with text labels."""
    return find_yaml(source) is not None or (source.is_dir() and bool(visible_files(source / "labels", {".txt"})))


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a data set. Unusable images and label lines are added to `problems`.

    Raises UserError if the data.yaml is unusable or names a place that does not exist, or if PyYAML is not installed.
    """
    path = find_yaml(source)
    root = source if source.is_dir() else source.parent
    finder = ImageFinder(images or root, problems)
    labels = ImageFinder(root / "labels", problems, {".txt"})
    content = {} if path is None else _load(path)
    if "kpt_shape" in content:
        raise UserError(f"{path}: labels of poses (kpt_shape) have no outlines; export segmentation labels instead")
    names = _class_names(source) if path is None else _names_by_index(content.get("names"), path)
    places: dict[str, list[Path]] = {}
    for split in SPLITS:
        if path is not None and content.get(split):
            found = _places(content, split, path, images)
            same = [other for other in places if places[other] == found and content[other] != content[split]]
            if same:
                raise UserError(
                    f"{path}: {split} and {same[0]} would both be {found[0]}, because {content[split]} does not exist; "
                    "correct the file"
                )
            if found or split != "test":
                places[split] = found
    pairs = {split: _pairs(found, finder, labels) for split, found in places.items()}
    if not places:  # without a data.yaml, or with that of supervision, which only names the classes
        if not visible_files(root / "labels", {".txt"}):
            raise UserError(f"{path}: has none of {', '.join(SPLITS)}, and there is no folder labels beside it")
        pairs[""] = _from_labels(root / "labels", finder, labels)
    used: set[Path] = set()  # label files
    splits = {split: _images(found, names, finder, used, problems) for split, found in pairs.items()}
    if places:
        last = list(splits)[-1]
        splits[last] = itertools.chain(splits[last], _unused_labels(root / "labels", used, problems))
    return Labels("YOLO", list(names.values()), splits)


def _load(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path}: reading it needs a package: pip install pyyaml") from None
    try:
        # Everything stays text: YAML would read the class name `no` as false.
        content = yaml.load(read_text(path), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a data.yaml, it has no keys")
    content = {str(key).lower(): value for key, value in content.items()}
    for key in NAMES_OF_VAL:
        if key in content:
            content.setdefault("val", content[key])
    return content


def _names_by_index(listed: Any, path: Path) -> dict[int, str]:
    """Return the class names by their index in label files, from a list, or a mapping that may have gaps.

    Raises UserError if there are none, or if a key is not an integer.
    """
    if not isinstance(listed, (list, dict)) or not listed:
        raise UserError(f"{path}: has no list of class names")
    pairs = listed.items() if isinstance(listed, dict) else enumerate(listed)
    try:
        found = {int(index): name for index, name in pairs}
    except ValueError:
        raise UserError(f"{path}: the keys of `names` must be class indices") from None
    for index, name in found.items():
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: `names` must be texts; that of class {index} is not")
    return found


def _class_names(source: Path) -> dict[int, str]:
    """Return the names in classes.txt by their line, or class_0, class_1, ... for as many as the labels use."""
    for path in (source / "classes.txt", source / "labels" / "classes.txt", source / "obj.names"):
        if path.is_file():
            names = {i: line.strip() for i, line in enumerate(read_text(path).splitlines()) if line.strip()}
            if not names:
                raise UserError(f"{path}: has no class names")
            return names
    used = [
        int(values[0])
        for path in visible_files(source / "labels", {".txt"})
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(values := _numbers(line.split())) > 4
    ]
    return {i: f"class_{i}" for i in range(max(used, default=0) + 1)}


def _places(content: dict[str, Any], split: str, path: Path, images: Path | None) -> list[Path]:
    """Return the image folders of a split, and the text files that list its images.

    Paths in a data.yaml are often those of another computer, so the longest end of a path that exists here is taken.
    Roboflow writes ../train/images where train/images is meant, and may leave out the folder of test.
    """
    entries = content[split] if isinstance(content[split], list) else [content[split]]
    roots = [path.parent / str(content.get("path") or "."), path.parent, *([images] if images else [])]
    places = []
    for entry in entries:
        name = str(entry).replace("\\", "/")
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        tries = [name, *("/".join(parts[i:]) for i in range(len(parts)))]
        found = next((root / tried for tried in tries for root in roots if (root / tried).exists()), images)
        if found is None and split == "test":
            continue
        if found is None:
            raise UserError(f"{path}: {split} is {entry}, which does not exist; correct the file or its `path`")
        places.append(found)
    return places


def _from_labels(folder: Path, finder: ImageFinder, labels: ImageFinder) -> Iterator[tuple[Path, Path]]:
    """Yield the image and the label file of each label, and of each image without one."""
    seen = set()
    for label in visible_files(folder, {".txt"}):
        name = label.relative_to(folder.parent).with_suffix("").as_posix()
        if label.name != "classes.txt" and (image := finder.find(f"images{name.removeprefix('labels')}")) is not None:
            seen.add(image)
            yield image, label
    for image in visible_files(folder.parent / "images", SUFFIXES):
        if image not in seen:
            yield image, _label_path(image, labels)


def _pairs(places: list[Path], finder: ImageFinder, labels: ImageFinder) -> Iterator[tuple[Path, Path]]:
    """Yield the images of a split with the paths of their label files."""
    for place in places:
        if place.suffix.lower() in SUFFIXES and place.is_file():
            yield place, _label_path(place, labels)
            continue
        if place.is_dir():
            yield from ((path, _label_path(path, labels)) for path in visible_files(place, SUFFIXES))
            continue
        for line in filter(None, map(str.strip, read_text(place).splitlines())):  # a list of images
            path = place.parent / line
            found = path if path.is_file() else finder.find(line)
            if found is not None:
                yield found, _label_path(found, labels)


def _label_path(image: Path, labels: ImageFinder) -> Path:
    """Return the label file of an image: the last folder called images becomes labels.

    If there is no such file, because the photos are in another folder, it is that of the source with its name.
    """
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    path = Path(*parts).with_suffix(".txt")
    if path.is_file() or not labels.knows(path.name):
        return path
    # Among the labels of other images, an image without a file has no objects.
    if path.parent != image.parent and any(label.name != "classes.txt" for label in path.parent.glob("*.txt")):
        return path
    found = labels.find(path.as_posix())
    splits = {folder.parent.name.lower() for folder in (path, found or path)} & {*SPLITS, *NAMES_OF_VAL}
    return path if found is None or len(splits) > 1 else found  # not the labels of another split


def _images(
    pairs: Iterator[tuple[Path, Path]], names: dict[int, str], finder: ImageFinder, used: set[Path], problems: Problems
) -> Iterator[LabelledImage]:
    without: list[Path] = []
    labelled = 0
    for path, label in pairs:
        used.add(label)
        opened = finder.settle(path)
        if opened is None:
            continue
        without += [] if label.is_file() else [label]
        labelled += label.is_file()
        yield LabelledImage(*opened, list(_objects(label, opened[1], names, problems)))
    if without and not labelled:  # an image without objects has no file, but not all images
        problems.add("images without a label file", f"looked for {without[0]}", len(without))


def _unused_labels(root: Path, used: set[Path], problems: Problems) -> Iterator[LabelledImage]:
    """Add a problem for each label file beside those that were used, or below `root`, that was not; yield nothing."""
    folders = {root, *(label.parent for label in used if label.is_file())}
    known = {label.resolve() for label in used}
    for path in sorted({path.resolve() for folder in folders for path in visible_files(folder, {".txt"})} - known):
        if path.name != "classes.txt":
            problems.add("label files that belong to no image of the source", path.name)
    yield from ()


def _numbers(words: list[str]) -> np.ndarray:
    """Return the values of a label line: a class index and numbers; a single NaN for another line."""
    try:
        values = np.array(words, np.float64)
    except ValueError:
        values = np.zeros(0)
    usable = len(values) and np.isfinite(values).all() and values[0] == int(values[0]) and 0 <= values[0] < MOST_CLASSES
    return values if usable else np.array([np.nan])


def _objects(path: Path, size: Size, names: dict[int, str], problems: Problems) -> Iterator[LabelledObject]:
    try:
        lines = read_text(path).splitlines() if path.is_file() else []
    except UserError:
        problems.add(NOT_UTF8, path.name)
        return
    shown = f"0 to {len(names) - 1}" if max(names) == len(names) - 1 else ", ".join(map(str, names))
    for number, line in enumerate(lines, 1):
        words, where = line.split(), f"{path.name} line {number}"
        if not words:
            continue
        values = _numbers(words)
        if np.isnan(values[0]) or int(values[0]) not in names:
            problems.add(f"lines that are not a class index ({shown}) followed by numbers", where)
        elif len(values) == 5:
            problems.note(ONLY_BOX, where)
            x, y, w, h = (values[1:] * (size[1], size[0], size[1], size[0])).tolist()
            x1, y1, x2, y2 = max(0.0, x - w / 2), max(0.0, y - h / 2), min(x + w / 2, size[1]), min(y + h / 2, size[0])
            if x2 > x1 and y2 > y1:
                yield LabelledObject(names[int(values[0])], None, box=(x1, y1, x2, y2))
            else:
                problems.add("boxes without an area inside their image", where)
        elif len(values) % 2 == 0:
            problems.add("outlines with half a point; if predictions end with a confidence, save them without", where)
        elif len(values) < 7:
            problems.add("outlines with fewer than three points", where)
        elif np.abs(values[1:]).max() > 2:
            problems.add("outlines that are not relative to the image (0 to 1)", where)
        else:
            polygon = values[1:].reshape(-1, 2) * (size[1], size[0])
            yield LabelledObject(names[int(values[0])], [polygon.ravel().tolist()])
