"""What the readers of all formats return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from data.image import SUFFIXES, read_image
from utils.errors import UserError

NOT_FOUND = "images that were not found"  # a kind of problem that --images can solve
EXAMPLES_PER_LINE = 3  # number of examples shown for each kind of problem


@dataclass
class LabelledObject:
    """One object: its class, and its mask as polygons [[x, y, ...], ...] in pixels or as a COCO RLE."""

    class_name: str
    segmentation: Any
    crowd: bool = False


@dataclass
class LabelledImage:
    """An image with its objects. Their coordinates refer to an image of `size` (height, width)."""

    path: Path
    size: tuple[int, int]
    objects: list[LabelledObject] = field(default_factory=list)


@dataclass
class Labels:
    """Everything that was read from a source.

    Args:
        format: the name of the format.
        class_names: in the order of the source; classes that only objects mention are appended.
        splits: images by the name of their split; a source without splits has one, called "".
    """

    format: str
    class_names: list[str]
    splits: dict[str, Iterator[LabelledImage]]


class Problems:
    """Counts what could not be used, by kind, with examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: object, count: int = 1) -> None:
        """Count a problem, such as ("boxes without an outline", "a.txt line 3")."""
        self.counts[kind] += count
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES_PER_LINE:
            shown.append(str(example))

    def lines(self) -> list[str]:
        """Return one line for each kind."""
        lines = []
        for kind, count in self.counts.items():
            more = ", ..." if count > len(self.examples[kind]) else ""
            lines.append(f"not used: {count} {kind}: {', '.join(self.examples[kind])}{more}")
        return lines


def image_size(path: Path, problems: Problems) -> tuple[int, int] | None:
    """Return (height, width) of an image, upright by its EXIF orientation, or None if it is unreadable."""
    try:
        height, width = read_image(path).shape[:2]
    except UserError as error:
        problems.add("images that cannot be read", str(error))
        return None
    return height, width


class ImageFinder:
    """Finds images by the names that annotation tools write: other folders, suffixes and prefixes are tolerated."""

    def __init__(self, folders: list[Path]):
        self.folders = folders
        self.by_name: dict[str, Path] = {}
        self.by_stem: dict[str, Path] = {}
        for folder in folders:
            for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
                if path.suffix.lower() in SUFFIXES and path.is_file():
                    self.by_name.setdefault(path.name, path)
                    self.by_stem.setdefault(path.stem, path)

    def find(self, name: str) -> Path | None:
        """Return the image called `name`, which may be a path of another computer."""
        name = name.replace("\\", "/")
        for folder in self.folders:
            if (folder / name).is_file():
                return folder / name
        last = name.rsplit("/", 1)[-1]
        # Label Studio puts a random prefix before uploaded files: 7a0b5f3c-street.jpg.
        prefix, _, rest = last.partition("-")
        without_prefix = rest if len(prefix) == 8 and all(c in "0123456789abcdef" for c in prefix) else last
        for candidate in (last, without_prefix):
            if candidate in self.by_name:
                return self.by_name[candidate]
        return self.by_stem.get(Path(last).stem)


def polygon_from(points: Any) -> list[float] | None:
    """Return [x, y, ...] of points [[x, y], ...]; None unless there are at least three finite ones."""
    try:
        values = np.asarray(points, np.float64).reshape(-1, 2)
    except (ValueError, TypeError):
        return None
    return values.ravel().tolist() if len(values) >= 3 and np.isfinite(values).all() else None


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """Return the polygon of a box."""
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, count: int = 48) -> list[float]:
    """Return the polygon of an ellipse that is rotated by `angle` radians."""
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)
    x, y = rx * np.cos(t), ry * np.sin(t)
    points = np.stack((cx + x * np.cos(angle) - y * np.sin(angle), cy + x * np.sin(angle) + y * np.cos(angle)), axis=1)
    return points.ravel().tolist()


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Return the COCO RLE of a bool mask [H, W]."""
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()}


def with_holes(parts: list[list[float]], holes: list[list[float]], size: tuple[int, int]) -> Any:
    """Return the segmentation of polygons minus holes: polygons if there are no holes, otherwise an RLE."""
    if not holes:
        return parts
    solid = rle.decode(rle.merge(rle.frPyObjects(parts, *size))).astype(bool)
    return encode(solid & ~rle.decode(rle.merge(rle.frPyObjects(holes, *size))).astype(bool))
