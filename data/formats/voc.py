"""Pascal VOC: JPEGImages, SegmentationObject and SegmentationClass, and ImageSets/Segmentation with the splits.

SegmentationObject has an index for each object of an image, SegmentationClass the class of each pixel. Files of CVAT
have colours instead of indices, which labelmap.txt explains.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from config import PASCAL_CLASSES
from data.formats.structures import ImageFinder, LabelledImage, LabelledObject, Labels, Problems, encode, image_size
from utils.errors import UserError

VOID = 255  # pixels at the borders of objects
Colour = tuple[int, int, int]


def recognise(source: Path) -> bool:
    """Return whether `source` is a folder with SegmentationObject."""
    return (source / "SegmentationObject").is_dir()


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a data set. Raises UserError if the folder with the classes is missing."""
    if not (source / "SegmentationClass").is_dir():
        raise UserError(f"{source}: SegmentationClass is missing, which has the class of each object")
    colours = _label_map(source / "labelmap.txt")
    names = list(colours.values()) if colours else list(PASCAL_CLASSES)
    finder = ImageFinder([images or source / "JPEGImages"])
    lists = {path.stem: path for path in sorted((source / "ImageSets/Segmentation").glob("*.txt"))}
    splits = {name: path for name, path in lists.items() if name in ("train", "val", "test")}
    masks = sorted(path.stem for path in (source / "SegmentationObject").glob("*.png"))
    if not splits:
        return Labels("Pascal VOC", names, {"": _images(source, masks, colours, finder, problems)})
    stems = {name: path.read_text(encoding="utf-8").split("\n") for name, path in splits.items()}
    return Labels(
        "Pascal VOC",
        names,
        {
            name: _images(source, [line.strip() for line in lines if line.strip()], colours, finder, problems)
            for name, lines in stems.items()
        },
    )


def _label_map(path: Path) -> dict[Colour, str]:
    """Return the classes by colour in CVAT's labelmap.txt, without the background: `name:r,g,b:parts:actions`."""
    colours: dict[Colour, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        name, _, rest = line.partition(":")
        values = rest.split(":")[0].split(",")
        if line.startswith("#") or len(values) != 3 or name == "background":
            continue
        red, green, blue = (int(value) for value in values)
        colours[red, green, blue] = name
    return colours


def _images(
    source: Path, stems: list[str], colours: dict[Colour, str], finder: ImageFinder, problems: Problems
) -> Iterator[LabelledImage]:
    for stem in stems:
        path = finder.find(f"{stem}.jpg")
        if path is None:
            problems.add("images that were not found", stem)
            continue
        size = image_size(path, problems)
        objects, classes = (_read_png(source / f"Segmentation{kind}" / f"{stem}.png") for kind in ("Object", "Class"))
        if objects is None or classes is None:
            problems.add("masks that are missing or cannot be read", f"{stem}.png")
            continue
        if size is None:
            continue
        if objects.shape[:2] != classes.shape[:2] or objects.shape[:2] not in (size, size[::-1]):
            problems.add("masks of another size than their image", stem)
            continue
        # Masks may be stored like the pixels of an image whose EXIF orientation was not applied.
        yield LabelledImage(path, objects.shape[:2], list(_objects(objects, classes, colours, stem, problems)))


def _read_png(path: Path) -> np.ndarray | None:
    """Return palette indices [H, W], or colours [H, W, 3] of a file without a palette; None if it is unreadable."""
    try:
        with Image.open(path) as image:
            return np.array(image if image.mode in ("P", "L") else image.convert("RGB"))
    except (OSError, UnidentifiedImageError):
        return None


def _objects(
    objects: np.ndarray, classes: np.ndarray, colours: dict[Colour, str], where: str, problems: Problems
) -> Iterator[LabelledObject]:
    flat = objects.reshape(*objects.shape[:2], -1)
    background = np.zeros(flat.shape[2], flat.dtype)
    for value in np.unique(flat.reshape(-1, flat.shape[2]), axis=0):
        if (value == background).all() or (flat.shape[2] == 1 and value[0] == VOID):
            continue
        mask = (flat == value).all(axis=2)
        name = _class_of(classes[mask], colours)
        if name is None:
            problems.add("objects without a class", where)
        else:
            yield LabelledObject(name, encode(mask))


def _class_of(pixels: np.ndarray, colours: dict[Colour, str]) -> str | None:
    """Return the class of most pixels of an object, or None if it is unknown."""
    values, counts = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_counts=True)
    value = values[counts.argmax()]
    if len(value) == 3:
        return colours.get((int(value[0]), int(value[1]), int(value[2])))
    index = int(value[0])
    if colours:  # the indices of a label map count its lines, with the background as 0
        names = list(colours.values())
        return names[index - 1] if 1 <= index <= len(names) else None
    return PASCAL_CLASSES[index - 1] if 1 <= index <= len(PASCAL_CLASSES) else None
