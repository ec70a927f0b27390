"""Read a COCO annotation file and its images as samples. The classes and their ids come from the file."""

from __future__ import annotations

import array
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import Dataset

from data.annotation import Annotation, Sample, as_id, exact_copies, is_crowd, parse_annotation
from data.image import read_image
from utils.errors import UserError

T = TypeVar("T")
LARGEST_SIDE = 10**6  # pixels; no image file is larger
LONGEST_NAME = 255  # bytes, in Linux, macOS and Windows


class PackedList(Generic[T]):
    """A read-only list that stores its items pickled in one array and unpickles them on access.

    The index of a data set has millions of small Python objects. In a forked worker, each access to one changes its
    reference count and so copies its memory page, until every worker holds the whole index (pytorch#13246). The pages
    of a single array are not written to, so they stay shared.
    """

    def __init__(self, items: Iterable[T]):
        data, ends = bytearray(), array.array("q", [0])
        for item in items:
            data += pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
            ends.append(len(data))
        self._data = np.frombuffer(bytes(data), np.uint8)
        self._ends = np.asarray(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> T:
        return pickle.loads(self._data[self._ends[index] : self._ends[index + 1]].tobytes())


class CocoDataset(Dataset[Sample]):
    """The images of a COCO annotation file in the order of the file, including images without objects.

    `class_names` and `category_ids` have the order of the file's `categories`; label i is their i-th entry. File names
    are relative to `image_dir`. Raises UserError if the file or the folder is missing, or the file is not valid.
    """

    def __init__(self, annotations: str | Path, image_dir: str | Path):
        self.path = Path(annotations)
        self.image_dir = Path(image_dir)
        content = read_coco_json(self.path)
        if not self.image_dir.is_dir():
            raise UserError(f"{self.image_dir}: no such image folder")
        categories = content["categories"]
        self.class_names = tuple(_text(c.get("name", c["id"]), f"{self.path}: category name") for c in categories)
        self.category_ids = tuple(as_id(c["id"], f"{self.path}: category id") for c in categories)
        self.image_ids = array.array("q", (as_id(image["id"], f"{self.path}: image id") for image in content["images"]))
        self._images = PackedList(
            (_text(i["file_name"], f"{self.path}: file_name", file=True), valid_size(i.get("height"), i.get("width")))
            for i in content["images"]
        )
        self.has_annotations = "annotations" in content
        self.labels = {category: label for label, category in enumerate(self.category_ids)}  # by category id
        self._check_ids()
        self.orphans: list[dict[str, Any]] = []  # annotations of images that are not listed
        grouped = self._by_image(content.get("annotations", []))
        # Counted here, because unpickling all annotations of a large file again takes seconds.
        self.num_annotations = sum(map(len, grouped))
        self.num_copies = sum(len(exact_copies(entries)) for entries in grouped)  # that repeat one of their image
        self._annotations = PackedList(grouped)

    def _check_ids(self) -> None:
        if not len(self.image_ids):
            raise UserError(f"{self.path}: the file lists no images")
        if not self.class_names:
            raise UserError(f"{self.path}: its list of categories is empty")
        for what, ids in (("image", self.image_ids), ("category", self.category_ids)):
            repeated = [key for key, count in Counter(ids).items() if count > 1]
            if repeated:
                raise UserError(f"{self.path}: {what} id {repeated[0]} is used more than once")

    def _by_image(self, annotations: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Group the annotations by image, with checked ids and only the fields that are used."""
        position = {image_id: index for index, image_id in enumerate(self.image_ids)}
        grouped: list[list[dict[str, Any]]] = [[] for _ in position]
        for annotation in annotations:
            where = f"{self.path}: annotation {annotation.get('id')}:"
            category = as_id(annotation["category_id"], f"{where} category_id")
            if category not in self.labels:
                raise UserError(f"{where} category_id {category} is not among the categories")
            try:
                kept: dict[str, Any] = {"category_id": category, "iscrowd": int(is_crowd(annotation))}
            except ValueError as error:
                raise UserError(f"{where} {error}") from None
            kept |= {key: annotation[key] for key in ("id", "bbox", "segmentation", "area") if key in annotation}
            index = position.get(as_id(annotation["image_id"], f"{where} image_id"))
            if index is None:
                self.orphans.append({"id": annotation.get("id"), "image_id": annotation["image_id"]})
            else:
                grouped[index].append(kept)
        return grouped

    def adopt_classes(self, names: Sequence[str]) -> None:
        """Number the classes as in `names`, which include those of the file. Others get ids that the file does not use.

        The same classes are often in another order in the file of the validation set, or only some of them.
        """
        ids = dict(zip(self.class_names, self.category_ids, strict=True))
        unused = (number for number in itertools.count(1) if number not in self.labels)
        self.category_ids = tuple(ids[name] if name in ids else next(unused) for name in names)
        self.class_names = tuple(names)
        self.labels = {category: label for label, category in enumerate(self.category_ids)}

    def __len__(self) -> int:
        return len(self.image_ids)

    def check_folder(self) -> None:
        """Raise UserError if not a single image of the file is in the folder."""
        if not any((self.image_dir / self.file_name(index)).is_file() for index in range(len(self))):
            raise UserError(
                f"{self.image_dir}: none of the images of {self.path} exists, such as {self.file_name(0)}; is it the "
                "right folder? If only the names differ, python -m tools.formats finds them and corrects the names"
            )

    def check_images(self) -> None:
        """Raise UserError unless every image of the file is present."""
        self.check_folder()
        missing = [path for path in map(self.image_path, range(len(self))) if not path.is_file()]
        if missing:
            raise UserError(f"{self.path}: {len(missing)} of {len(self)} images are missing, the first is {missing[0]}")

    def file_name(self, index: int) -> str:
        """Return the `file_name` of an image."""
        return self._images[index][0]

    def stated_size(self, index: int) -> tuple[int, int] | None:
        """Return the (height, width) of an image from the annotation file, or None if it gives none."""
        return self._images[index][1]

    def image_path(self, index: int) -> Path:
        """Return the path of an image. Raises UserError if its name leads out of the image folder."""
        name = Path(self.file_name(index))
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{self.path}: file_name {str(name)!r} leads out of the image folder")
        return self.image_dir / name

    def read_image(self, index: int) -> np.ndarray:
        """Read an image as uint8 BGR [H, W, 3].

        Raises UserError if it cannot be read or its size is not the one in the annotation file.
        """
        path, stated = self.image_path(index), self.stated_size(index)
        where = f"image {self.image_ids[index]} of {self.path.name}"
        try:
            image = read_image(path)
            if stated is None or image.shape[:2] == stated:
                return image
            # Some tools annotate the pixels as they are stored and ignore the EXIF orientation.
            stored = read_image(path, ignore_orientation=True)
        except UserError as error:
            raise UserError(f"{error} ({where})") from None
        if stored.shape[:2] == stated:
            return stored
        height, width = image.shape[:2]
        swapped = ": width and height are swapped" if (width, height) == stated else ""
        raise UserError(
            f"{self.path}: image {self.image_ids[index]} ({path.name}) is {stated[1]}x{stated[0]} in the file and "
            f"{width}x{height} on disk{swapped}"
        )

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """Return the annotations of an image as they are in the file, with checked ids and iscrowd."""
        return self._annotations[index]

    def parsed(self, index: int, size: tuple[int, ...], drop_duplicates: bool = False) -> list[Annotation]:
        """Return the parsed annotations of an image of `size` (H, W), on request without exact copies of another."""
        entries = self.annotations(index)
        repeated = set(exact_copies(entries)) if drop_duplicates else set()
        return [
            parse_annotation(entry, self.labels[entry["category_id"]], size[0], size[1])
            for position, entry in enumerate(entries)
            if position not in repeated
        ]

    def __getitem__(self, index: int) -> Sample:
        """Return an image and its objects, as training uses them: exact copies are dropped."""
        image = self.read_image(index)
        usable = [a for a in self.parsed(index, image.shape[:2], drop_duplicates=True) if a.box is not None]
        objects = [annotation for annotation in usable if not annotation.crowd]
        return Sample(
            image,
            boxes=np.array([annotation.box for annotation in objects], np.float32).reshape(-1, 4),
            labels=np.array([annotation.label for annotation in objects], np.int64),
            segmentations=[annotation.segmentation for annotation in objects],
            crowds=np.array([annotation.box for annotation in usable if annotation.crowd], np.float32).reshape(-1, 4),
        )


def _text(value: Any, where: str, file: bool = False) -> str:
    """Return a name as text. Raises UserError for one that no file system or terminal can represent."""
    text = str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
    # Lone surrogates are valid in JSON but cannot be encoded as UTF-8.
    printable = "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
    if not text or not printable:
        raise UserError(f"{where} {value!a:.60} is not a usable text")
    if file and any(len(part.encode()) > LONGEST_NAME for part in Path(text).parts):
        raise UserError(f"{where} {text[:40]!r}... is longer than file systems allow")
    return text


def valid_size(height: Any, width: Any) -> tuple[int, int] | None:
    """Return height and width as integers, or None if they cannot be those of an image."""
    try:
        size = int(float(height)), int(float(width))
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 and max(size) < LARGEST_SIDE else None


def read_coco_json(path: Path) -> dict[str, Any]:
    """Read an annotation file and check its structure: lists of objects with the keys that COCO requires.

    Raises UserError that names the file and the invalid entry, and the format if it looks like another known one.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such annotation file"
        raise UserError(f"{path}: {problem}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a BOM
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    wanted = {"images": ("id", "file_name"), "categories": ("id",), "annotations": ("image_id", "category_id")}
    for key, fields in wanted.items():
        if not isinstance(content, dict) or (key not in content and key != "annotations"):
            raise UserError(f"{path}: not a COCO annotation file: it has no list of {key!r}")
        entries = content.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: {key!r} must be a list of objects")
        for position, entry in enumerate(entries):
            absent = [name for name in fields if name not in entry]
            if absent:
                raise UserError(f"{path}: entry {position} of {key!r} has no {absent[0]!r}")
    return content
