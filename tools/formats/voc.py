"""Pascal VOC: JPEGImages, SegmentationObject and SegmentationClass, and ImageSets/Segmentation with the splits.

SegmentationObject has an index for each object of an image, SegmentationClass the class of each pixel. Files of CVAT
have colours instead of indices; labelmap.txt lists the classes with their colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from config import PASCAL_CLASSES
from tools.formats.labelme import RESERVED
from tools.formats.structures import (
    ImageFinder,
    LabelledImage,
    LabelledObject,
    Labels,
    Problems,
    encode,
    read_text,
    visible_files,
)
from utils.errors import UserError

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # names of their lists
BACKGROUND = "background"
VOID = 255  # pixels at the borders of objects
Colour = tuple[int, int, int]


def recognise(source: Path) -> bool:
    """Return whether `source` is a folder with SegmentationObject."""
    return (source / "SegmentationObject").is_dir()


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a data set. Raises UserError if the folder with the classes is missing."""
    if not (source / "SegmentationClass").is_dir():
        raise UserError(f"{source}: SegmentationClass is missing, which has the class of each object")
    label_map = _label_map(source, problems)
    names = label_map.classes
    finder = ImageFinder(images or source / "JPEGImages", problems)
    splits: dict[str, list[str]] = {}
    for path in sorted((source / "ImageSets/Segmentation").glob("*.txt")):
        if path.stem.lower() in SPLITS:
            lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            splits.setdefault(SPLITS[path.stem.lower()], []).extend(lines)
    masks = list(_stems(source / "SegmentationObject"))
    listed = {stem for stems in splits.values() for stem in stems}
    for stem in [stem for stem in masks if splits and stem not in listed]:
        problems.add("masks that no split lists", f"{stem}.png")
    if not splits:
        return Labels("Pascal VOC", names, {"": _images(source, masks, label_map, finder, problems)})
    images_of = {name: _images(source, stems, label_map, finder, problems) for name, stems in splits.items()}
    return Labels("Pascal VOC", names, images_of)


@dataclass
class LabelMap:
    """The classes of a data set, as labelmap.txt lists them, or those of Pascal VOC."""

    names: list[str]  # by the index in SegmentationClass; the background is one of them
    colours: dict[Colour, str]  # for files without a palette

    @property
    def classes(self) -> list[str]:
        return [name for name in self.names if name != BACKGROUND]


def _label_map(source: Path, problems: Problems) -> LabelMap:
    """Read labelmap.txt, `name:r,g,b:parts:actions` in each line. The colour may be missing; it is then
    Pascal VOC's for the index.

    CVAT and Datumaro write this file, LabelMe class_names.txt, one name in each line. Without them, the classes are
    those of Pascal VOC.
    """
    path = source / "labelmap.txt"
    if not path.is_file():
        names = [BACKGROUND, *PASCAL_CLASSES]
        if (source / "class_names.txt").is_file():
            lines = [line.strip() for line in read_text(source / "class_names.txt").splitlines()]
            names = [BACKGROUND, *(name for name in lines if name and name not in RESERVED)]
        else:
            problems.note("folders without labelmap.txt; the class names are assumed to be Pascal VOC's", source.name)
        return LabelMap(names, {voc_colour(index): name for index, name in enumerate(names)})
    found = LabelMap([], {})
    for line in read_text(path).splitlines():
        name, _, rest = line.partition(":")
        if line.startswith("#") or not line.strip():
            continue
        name = name.strip()
        found.names.append(name)
        values = rest.split(":")[0].split(",")
        if len(values) == 3 and all(value.strip().isdecimal() for value in values):
            red, green, blue = (int(value) for value in values)
            found.colours[red, green, blue] = name
        else:
            found.colours[voc_colour(len(found.names) - 1)] = name
    return found


def voc_colour(index: int) -> Colour:
    """Return the colour (red, green, blue) of a class in Pascal VOC's palette.

    Bits 0, 3, 6, ... of the index are the highest, second highest, ... bits of red; the next two are green and blue.
    """
    red, green, blue = (
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)
    )
    return red, green, blue


def _images(
    source: Path, stems: list[str], label_map: LabelMap, finder: ImageFinder, problems: Problems
) -> Iterator[LabelledImage]:
    files = [_stems(source / f"Segmentation{kind}") for kind in ("Object", "Class")]
    for stem in stems:
        objects, classes = (read_png(paths[stem]) if stem in paths else None for paths in files)
        if objects is None or classes is None:
            problems.add("masks that are missing or cannot be read", f"{stem}.png")
            continue
        if objects.shape[:2] != classes.shape[:2]:
            problems.add("pairs of masks that differ in size", stem)
            continue
        opened = finder.open(f"{stem}.jpg", objects.shape[:2])
        if opened is not None:
            yield LabelledImage(*opened, list(objects_of(objects, classes, label_map, stem, problems)))


def _stems(folder: Path) -> dict[str, Path]:
    """Return the PNG files of a folder and those below it, by their names without suffix: CVAT writes subfolders."""
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in visible_files(folder, {".png"})}


def read_png(path: Path) -> np.ndarray | None:
    """Return palette indices [H, W], or colours [H, W, 3] of a file without a palette; None if it is unreadable."""
    try:
        with Image.open(path) as image:
            if image.mode in ("LA", "RGBA"):  # the objects may be in the transparency alone
                colours, alpha = np.asarray(image.convert("RGB")), np.asarray(image.getchannel("A"))
                return alpha if (colours == colours[0, 0]).all() else colours
            return np.array(image if image.mode[0] in "PLI" else image.convert("RGB"))  # I: more than 8 bits
    except (OSError, UnidentifiedImageError):
        return None


def objects_of(
    objects: np.ndarray, classes: np.ndarray, label_map: LabelMap, where: str, problems: Problems
) -> Iterator[LabelledObject]:
    flat = objects.reshape(*objects.shape[:2], -1)
    background = np.zeros(flat.shape[2], flat.dtype)
    for value in np.unique(flat.reshape(-1, flat.shape[2]), axis=0):
        if (value == background).all() or (flat.shape[2] == 1 and value[0] == VOID):
            continue
        mask = (flat == value).all(axis=2)
        name = _class_of(classes[mask], label_map)
        if name is None:
            problems.add("objects without a class", where)
        else:
            yield LabelledObject(name, encode(mask))


def _class_of(pixels: np.ndarray, label_map: LabelMap) -> str | None:
    """Return the class of most pixels of an object, or None if it is unknown."""
    values, counts = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_counts=True)
    value = values[counts.argmax()]
    if len(value) == 3:
        name = label_map.colours.get((int(value[0]), int(value[1]), int(value[2])))
    else:
        name = label_map.names[int(value[0])] if value[0] < len(label_map.names) else None
    return None if name == BACKGROUND else name
