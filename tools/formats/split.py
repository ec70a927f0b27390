"""Split images into a training and a validation set, with near copies on one side."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.image import read_image
from tools.audit import NEAR_COPY_BITS, fingerprint
from tools.formats.structures import LabelledImage
from utils.errors import UserError


def split_images(images: list[LabelledImage], share: float) -> dict[str, list[LabelledImage]]:
    """Return "train" and "val" with about `share` (0..1) of the images in "val".

    A hash of the name of a file decides, so that an image keeps its side when others are added, unless these are near
    copies of it. Near copies, such as the frames of a video, form a group, and the first name of a group decides for
    all of it: on both sides, they would make AP too high. Raises UserError if no image would be left for training.
    """
    images = sorted(images, key=lambda image: image.path.name)
    first = groups_of_copies([image.path for image in images])
    positions = [_position(images[number].path.name) for number in first]
    # In a small set, no position may be below the share; the lowest one then is.
    limit = max(share, min(positions))
    sides: dict[str, list[LabelledImage]] = {"train": [], "val": []}
    for image, position in zip(images, positions, strict=True):
        sides["val" if position <= limit else "train"].append(image)
    if not sides["train"]:
        raise UserError(f"--split {share:g}: no image is left for training; all of them are near copies, or too few")
    return sides


def groups_of_copies(paths: list[Path]) -> list[int]:
    """Return for each image the index of the first one of its group; near copies of near copies are in one group."""
    prints = [fingerprint(read_image(path)) for path in tqdm(paths, "comparing", disable=None)]
    # An image without contrast has no fingerprint, and is a copy of none.
    known = [number for number, bits in enumerate(prints) if bits is not None]
    table = np.array([prints[number] for number in known], bool).reshape(len(known), -1)
    groups = np.arange(len(paths))
    for row, number in enumerate(known):
        near = np.count_nonzero(table[:row] ^ table[row], axis=1) <= NEAR_COPY_BITS
        joined = {int(groups[known[other]]) for other in np.flatnonzero(near)} | {number}
        groups[np.isin(groups, list(joined))] = min(joined)
    return groups.tolist()


def _position(name: str) -> float:
    """Return a number in 0..1 that depends on a name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
