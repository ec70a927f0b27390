"""What the readers of all formats return, and the rules that hold for all of them: how images and text are found.

Coordinates refer to the image as a tool showed it: upright by its EXIF orientation, or as its pixels are stored. A size
in the source decides which; without one, as in YOLO, the image is taken as upright.
"""

from __future__ import annotations

import unicodedata
import urllib.parse
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
from pycocotools import mask as rle

from data.image import SUFFIXES, read_image
from utils.errors import UserError

NOT_FOUND = "images that were not found"  # a kind of problem that --images can solve
ONLY_BOX = "objects without a mask, of which only the box is kept"
RECTANGLES = "rectangles, which are taken as masks; if they are boxes, draw outlines, or see tools.pseudo_masks"
UNSURE = "photos turned by EXIF whose size does not show whether labels refer to them upright, which is assumed"
NOT_UTF8 = "files that are not UTF-8 text; save them as UTF-8"
EXAMPLES_PER_LINE = 3  # number of examples shown for each kind of problem
TURNED, CHANGED = (5, 6, 7, 8), range(2, 9)  # EXIF orientations that exchange the sides; and that change anything
ORIENTATION = 0x112  # its tag
Size = tuple[int, int]  # height, width


@dataclass
class LabelledObject:
    """One object: its class, and its mask as polygons [[x, y, ...], ...] in pixels or as a COCO RLE, or its box."""

    class_name: str
    segmentation: Any
    crowd: bool = False
    box: tuple[float, float, float, float] | None = None  # x1, y1, x2, y2 in pixels, of an object without a mask

    def __post_init__(self) -> None:
        self.class_name = unicodedata.normalize("NFC", self.class_name)  # the same text may be stored in two forms


@dataclass
class LabelledImage:
    """An image with its objects. Their coordinates refer to an image of `size` (height, width)."""

    path: Path
    size: Size
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
    """Counts what could not be used, or was used in another way than it says, by kind, with examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.used: set[str] = set()  # kinds of things that were used nevertheless

    def add(self, kind: str, example: object, count: int = 1) -> None:
        """Count a problem, such as ("boxes without an outline", "a.txt line 3")."""
        self.counts[kind] += count
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES_PER_LINE and str(example) not in shown:
            shown.append(str(example))

    def note(self, kind: str, example: object) -> None:
        """Count something that was used, but that a person should know of."""
        self.used.add(kind)
        self.add(kind, example)

    def lines(self) -> list[str]:
        """Return one line for each kind."""
        lines = []
        for kind, count in self.counts.items():
            more = ", ..." if count > len(self.examples[kind]) else ""
            level = "note" if kind in self.used else "not used"
            lines.append(f"{level}: {kind} ({count}): {', '.join(self.examples[kind])}{more}")
        return lines


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without a BOM. Raises UserError if it is not."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def visible_files(folder: Path, suffixes: set[str]) -> list[Path]:
    """Return the files with one of `suffixes` in a folder and below, sorted, without hidden ones and those of macOS."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)
        and path.is_file()
    ]


def image_sizes(path: Path) -> tuple[Size, Size, bool]:
    """Return the size of an image upright and as its pixels are stored, and whether EXIF turns or mirrors it.

    Only the header is read, unless Pillow does not know the format. Raises UserError if the image is unreadable.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(path) as image:
                stored = image.height, image.width
                orientation = image.getexif().get(ORIENTATION, 1)
                turned = orientation in TURNED
                if isinstance(image, PIL.TiffImagePlugin.TiffImageFile):  # every reader turns these, Pillow since 12
                    stored = image.tag_v2[257], image.tag_v2[256]
                    return (stored[::-1], stored[::-1], False) if turned else (stored, stored, False)
    except Exception:  # each format's parser has its own
        height, width = read_image(path).shape[:2]
        return (height, width), (height, width), False
    return stored[::-1] if turned else stored, stored, orientation in CHANGED


class ImageFinder:
    """Finds images (or files with other `suffixes`) by the names that annotation tools write, and settles which size
    their coordinates refer to.

    Names may be paths of another computer or addresses: the image with the longest common end of the path is taken.
    """

    def __init__(self, folder: Path, problems: Problems, suffixes: set[str] = SUFFIXES):
        self.folder, self.problems, self.of_images = folder, problems, suffixes is SUFFIXES
        self.by_name: dict[str, list[Path]] = {}  # by the name, and by the name without its suffix
        for path in visible_files(folder, suffixes) if folder.is_dir() else ():
            for key in dict.fromkeys((_plain(path.name), _plain(path.stem))):
                self.by_name.setdefault(key, []).append(path)

    def knows(self, name: str) -> bool:
        """Whether there is an image of this name, in any folder."""
        return _plain(Path(name.replace("\\", "/")).name) in self.by_name

    def find(self, name: str) -> Path | None:
        """Return the image called `name`, or add a problem and return None."""
        # The name as it is, without the query of an address, and both with their percent-encoding decoded.
        forms = (name, name.partition("?")[0])
        for form in dict.fromkeys((*forms, *map(urllib.parse.unquote, forms))):
            tried = form.replace("\\", "/")
            last = tried.rpartition("/")[2]
            # Label Studio puts a random prefix before uploaded files: 7a0b5f3c-street.jpg.
            prefix, _, rest = last.partition("-")
            without_prefix = rest if len(prefix) == 8 and all(c in "0123456789abcdef" for c in prefix) else last
            for key in (last, without_prefix, Path(last).stem, Path(without_prefix).stem):
                found = self.by_name.get(_plain(key), [])
                if found:
                    return self._nearest(tried, found)
        self.problems.add(NOT_FOUND, name)
        return None

    def _nearest(self, name: str, found: list[Path]) -> Path | None:
        """Return the path that is `name` itself, or else the one whose last parts agree with it the longest."""
        exact = [path for path in found if path.relative_to(self.folder).as_posix() == name]
        if exact:
            return exact[0]

        def common(path: Path) -> int:
            pairs = zip(
                reversed(name.split("/")[:-1]), reversed(path.relative_to(self.folder).parts[:-1]), strict=False
            )
            count = 0
            for ours, theirs in pairs:
                if _plain(ours) != _plain(theirs):
                    break
                count += 1
            return count

        longest = max(map(common, found))
        nearest = [path for path in found if common(path) == longest]
        stated, actual = (path.split("/")[:-1] for path in (name, nearest[0].relative_to(self.folder).as_posix()))
        if self.of_images and stated and actual and stated[-1] not in actual and actual[-1] not in stated:
            self.problems.note("images found by their name alone, in another folder than the source says", name)
        depth = min(len(path.parts) for path in nearest)  # thumbnails and drawings are often in a folder below
        nearest = [path for path in nearest if len(path.parts) == depth]
        if len(nearest) > 1:  # they differ in the suffix or in the case of letters
            nearest = [path for path in nearest if path.name == name.rpartition("/")[2]] or nearest
        if len(nearest) > 1:
            both = " and ".join(str(path.relative_to(self.folder)) for path in nearest[:2])
            self.problems.add("images whose name fits several files", f"{name} ({both})")
            return None
        return nearest[0]

    def open(self, name: str, stated: tuple[Any, Any] | None = None) -> tuple[Path, Size] | None:
        """Find an image; return its path and the (height, width) that coordinates refer to, or None with a problem.

        Args:
            name: see `find`.
            stated: the height and width that the source gives, if any.
        """
        path = self.find(name)
        return None if path is None else self.settle(path, stated)

    def settle(self, path: Path, stated: tuple[Any, Any] | None = None) -> tuple[Path, Size] | None:
        """Do the second half of `open`."""
        try:
            upright, stored, changed = image_sizes(path)
            size = None if stated is None or None in stated else (int(float(stated[0])), int(float(stated[1])))
        except UserError as error:
            self.problems.add("images that cannot be read", error)
            return None
        except (TypeError, ValueError, OverflowError):
            size = None
        if size in (None, upright) or min(size) <= 0:  # some tools write 0 for an unknown size
            if changed and size == stored:
                self.problems.note(UNSURE, path.name)
            return path, upright
        if size == stored:
            self.problems.note("rotated photos whose labels refer to the pixels as they are stored", path.name)
            return path, stored
        wrong = f"{path.name} ({size[1]}x{size[0]} in the labels, {upright[1]}x{upright[0]} on disk)"
        self.problems.add("images of another size than their labels were made for", wrong)
        return None


def _plain(text: str) -> str:
    """Return a name in one Unicode form, in which macOS and other systems may differ, and in lower case."""
    return unicodedata.normalize("NFC", text).casefold()


def polygon_from(points: Any) -> list[float] | None:
    """Return [x, y, ...] of points [[x, y], ...]; None unless there are at least three finite ones."""
    try:
        values = np.asarray(points, np.float64).reshape(-1, 2)
    except (ValueError, TypeError):
        return None
    return values.ravel().tolist() if len(values) >= 3 and np.isfinite(values).all() else None


def lost_parts(stated: Any, used: Any) -> bool:
    """Whether fewer polygons of a COCO segmentation can be used than are stated: some are damaged or off the image."""
    nested = isinstance(stated, list) and isinstance(used, list) and all(isinstance(p, (list, tuple)) for p in stated)
    return nested and len(used) < len(stated)


def rectangle(x1: float, y1: float, x2: float, y2: float, angle: float = 0.0) -> list[float]:
    """Return the polygon of a box that is rotated by `angle` radians about its centre."""
    x, y = (x2 - x1) / 2, (y2 - y1) / 2
    return _rotated(np.array((-x, x, x, -x)), np.array((-y, -y, y, y)), (x1 + x, y1 + y), angle)


def ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, count: int = 48) -> list[float]:
    """Return the polygon of an ellipse that is rotated by `angle` radians."""
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return _rotated(rx * np.cos(t), ry * np.sin(t), (cx, cy), angle)


def _rotated(x: np.ndarray, y: np.ndarray, centre: tuple[float, float], angle: float) -> list[float]:
    cos, sin = np.cos(angle), np.sin(angle)
    return (np.stack((x * cos - y * sin, x * sin + y * cos), axis=1) + centre).ravel().tolist()


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Return the COCO RLE of a bool mask [H, W]."""
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()}


def place(piece: np.ndarray, x: int, y: int, size: Size) -> np.ndarray:
    """Return a bool mask [H, W] of `size` with a smaller one, whose upper left corner is at (x, y), clipped to it."""
    mask = np.zeros(size, bool)
    piece = piece[max(0, -y) :, max(0, -x) :]
    target = mask[max(0, y) :, max(0, x) :][: piece.shape[0], : piece.shape[1]]
    target[:] = piece[: target.shape[0], : target.shape[1]] > 0
    return mask


def compose(parts: list[Any], holes: list[list[float]], masks: list[np.ndarray], size: Size) -> Any:
    """Return the segmentation of polygons and masks minus holes: polygons if there is nothing else, otherwise an RLE.

    None if nothing is left.
    """
    if not holes and not masks:
        return parts or None
    solid = np.logical_or.reduce([*masks, *(_filled([part], size) for part in parts), np.zeros(size, bool)])
    solid &= ~(_filled(holes, size) if holes else np.zeros(size, bool))
    return encode(solid) if solid.any() else None


def _filled(polygons: list[list[float]], size: Size) -> np.ndarray:
    return rle.decode(rle.merge(rle.frPyObjects(polygons, *size))).astype(bool)
