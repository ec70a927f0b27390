"""Folders `images` and `masks`: for each image a PNG in which every object has a value, or a colour, of its own.

Nothing says what the objects are, so all have the class "object". A mask with one value beside the background is one
object, unless its parts are apart: masks of a single class are often drawn so, and every part is then an object.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from data.image import SUFFIXES
from tools.formats.structures import ImageFinder, LabelledImage, LabelledObject, Labels, Problems, encode, visible_files
from tools.formats.voc import read_png

CLASS = "object"
EXACT = {".png", ".bmp", ".tif", ".tiff"}  # formats that keep values
SMALLEST = 10  # pixels; smaller parts are noise at edges
MOST_VALUES = 1000  # a photo has more


def recognise(source: Path) -> bool:
    """Return whether `source` is a folder with `masks`, in which there are some."""
    return (source / "masks").is_dir() and bool(visible_files(source / "masks", EXACT))


def read(source: Path, images: Path | None, problems: Problems) -> Labels:
    """Read a data set."""
    # With the folder of everything as --images, a mask would be taken for its image.
    if images is None or images.resolve() == source.resolve():
        images = source / "images"
    finder = ImageFinder(images, problems)
    return Labels("masks", [CLASS], {"": _images(source / "masks", finder, problems)})


def _images(folder: Path, finder: ImageFinder, problems: Problems) -> Iterator[LabelledImage]:
    used = set()
    for path in visible_files(folder, SUFFIXES):
        if path.suffix.lower() not in EXACT:
            problems.add("masks in a format that changes values; save them as PNG", path.name)
            continue
        pixels = read_png(path)
        if pixels is None:
            problems.add("masks that cannot be read", path.name)
            continue
        opened = finder.open(path.relative_to(folder).as_posix(), pixels.shape[:2])
        if opened is None:
            continue
        used.add(opened[0])
        flat = pixels.reshape(-1, pixels.shape[2] if pixels.ndim == 3 else 1)
        values, index = np.unique(flat, axis=0, return_inverse=True)
        if len(values) > MOST_VALUES:
            problems.add(f"masks with more than {MOST_VALUES} values; save them as PNG without smoothing", path.name)
            continue
        numbers = index.reshape(pixels.shape[:2])
        background = 0 * values[0]
        if (
            len(values) > 1
            and values.any(axis=1).all()
            and len({int(numbers[y, x]) for y in (0, -1) for x in (0, -1)}) == 1
        ):
            background = values[numbers[0, 0]]  # the value of all corners, as none is 0
            problems.note("masks without 0, in which the value of the corners is taken as background", path.name)
        masks = [numbers == i for i, value in enumerate(values) if (value != background).any()]
        if 2 * sum(map(_is_edge, masks)) > len(masks):
            problems.add("masks with smoothed edges; save them without smoothing", path.name)
            continue
        if len(masks) == 1:
            count, parts = cv2.connectedComponents(masks[0].astype(np.uint8))
            masks = [parts == i for i in range(1, count)]
        objects = [LabelledObject(CLASS, encode(mask)) for mask in masks if mask.sum() >= SMALLEST]
        if len(objects) < len(masks):
            problems.add(f"objects of fewer than {SMALLEST} pixels", path.name, len(masks) - len(objects))
        yield LabelledImage(*opened, objects)
    for photo in visible_files(finder.folder, SUFFIXES):
        if photo not in used:
            problems.add("images without a usable mask", photo.name)


def _is_edge(mask: np.ndarray) -> bool:
    """Whether the pixels of a value are scattered, as those between an object and the background are, and no area."""
    inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0)
    return not inside.any() and cv2.connectedComponents(mask.astype(np.uint8))[0] > 3
