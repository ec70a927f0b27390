"""A COCO JSON and its photos -> samples. The classes, their number and their ids come from the file.

dataset = CocoDataset("instances_train.json", "photos")
sample = dataset[0]                                  # a Sample: the photo and its objects, in pixels
loader = training_batches(dataset, config, seed=0)   # endless (images, targets) for the loss
"""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.annotation import as_id, is_crowd, normalise_segmentation, stated_box
from data.augment import Augment, Augmented
from data.config import Config
from data.copy_paste import copy_paste
from data.errors import UserError

Target = dict[str, Tensor]
Box = tuple[float, float, float, float]


@dataclass
class Sample:
    """One photo and its objects. Boxes are (x1, y1, x2, y2) in pixels, inside the photo and of positive area."""

    image: np.ndarray  # uint8 [H, W, 3], BGR
    boxes: np.ndarray  # float32 [n, 4]
    labels: np.ndarray  # int64 [n], 0..C-1
    segmentations: list[Any] = field(
        default_factory=list
    )  # n, each a list of polygons or an RLE with compressed counts
    crowds: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))  # [m, 4]


class CocoDataset(Dataset):
    """The images of an annotation file, in its order, also those without objects.

    `class_names` and `category_ids` are in the order of the file's `categories`, whatever the ids are.
    Raises UserError when the file is missing or is not a COCO annotation file.
    """

    def __init__(self, annotations: str | Path, image_dir: str | Path):
        self.path = Path(annotations)
        self.image_dir = Path(image_dir)
        content = _read_json(self.path)
        if not self.image_dir.is_dir():
            raise UserError(f"{self.image_dir}: no such photo folder")
        categories = content["categories"]
        self.class_names = tuple(str(c.get("name", c["id"])) for c in categories)
        self.category_ids = tuple(as_id(c["id"], self.path) for c in categories)
        self.images: list[dict[str, Any]] = content["images"]
        self.image_ids = [as_id(image["id"], self.path) for image in self.images]
        self.has_annotations = "annotations" in content
        self._label = {category: label for label, category in enumerate(self.category_ids)}
        self._annotations: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in self.image_ids}
        self.orphans: list[dict[str, Any]] = []  # annotations of photos that are not listed
        for annotation in content.get("annotations", []):
            self._annotations.get(as_id(annotation["image_id"], self.path), self.orphans).append(annotation)
        self._check()

    def _check(self) -> None:
        if not self.images:
            raise UserError(f"{self.path}: it lists no images")
        if not self.class_names:
            raise UserError(f"{self.path}: its list of categories is empty")
        for what, ids in (("image", self.image_ids), ("category", self.category_ids)):
            if len(set(ids)) < len(ids):
                twice = next(i for i in ids if ids.count(i) > 1)
                raise UserError(f"{self.path}: {what} id {twice} is used more than once")
        for some in self._annotations.values():
            for annotation in some:
                if as_id(annotation["category_id"], self.path) not in self._label:
                    raise UserError(
                        f"{self.path}: annotation {annotation.get('id')} has category_id {annotation['category_id']}, "
                        "which is not among the categories"
                    )

    def __len__(self) -> int:
        return len(self.images)

    def check_photos(self) -> None:
        """Raise UserError unless every photo of the file is there."""
        missing = [path for path in map(self.image_path, range(len(self))) if not path.is_file()]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of {len(self)} photos are not there, the first is {missing[0]}"
            )

    def image_path(self, index: int) -> Path:
        """Where the photo lies. Names that lead out of the photo folder are refused."""
        name = Path(str(self.images[index]["file_name"]))
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{self.path}: file_name {str(name)!r} leads out of the photo folder")
        return self.image_dir / name

    def read_image(self, index: int) -> np.ndarray:
        """The photo, uint8 BGR [H, W, 3]. Raises UserError when it is missing, unreadable or not of the stated size."""
        path, stated = self.image_path(index), self.stated_size(index)
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            problem = "cannot be read as a picture" if path.is_file() else "no such photo"
            raise UserError(f"{path}: {problem} (image {self.image_ids[index]} of {self.path.name})")
        if stated is None or image.shape[:2] == stated:
            return image
        # Some tools annotate the pixels as they are stored, whatever orientation the camera noted.
        stored = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if stored.shape[:2] == stated:
            return stored
        height, width = image.shape[:2]
        swapped = ": width and height are swapped" if (width, height) == stated else ""
        raise UserError(
            f"{self.path}: image {self.image_ids[index]} ({path.name}) is {stated[1]}x{stated[0]} in the file and "
            f"{width}x{height} on disk{swapped}"
        )

    def stated_size(self, index: int) -> tuple[int, int] | None:
        """Height and width of a photo as the file has them, None where it does not say."""
        image = self.images[index]
        try:
            size = int(float(image["height"])), int(float(image["width"]))
        except (KeyError, TypeError, ValueError):
            return None
        return size if min(size) > 0 else None

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """The annotations of a photo, as they are in the file."""
        return self._annotations[self.image_ids[index]]

    def label_of(self, annotation: dict[str, Any]) -> int:
        """The label 0..C-1 of an annotation."""
        return self._label[as_id(annotation["category_id"], self.path)]

    @staticmethod
    def box_of(annotation: dict[str, Any], segmentation: Any, height: int, width: int) -> Box | None:
        """The annotation's box (x1, y1, x2, y2), clipped to the photo; None if nothing is left of it."""
        stated = stated_box(annotation)
        if stated is not None:
            x, y, w, h = stated
        elif isinstance(segmentation, list):
            points = np.concatenate([np.reshape(p, (-1, 2)) for p in segmentation])
            (x, y), (w, h) = points.min(axis=0), np.ptp(points, axis=0)
        elif segmentation is not None:
            x, y, w, h = rle.toBbox(segmentation)
        else:
            return None
        x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None

    def __getitem__(self, index: int) -> Sample:
        image = self.read_image(index)
        height, width = image.shape[:2]
        boxes, labels, segmentations, crowds = [], [], [], []
        for annotation in self.annotations(index):
            segmentation = normalise_segmentation(annotation.get("segmentation"), height, width)
            box = self.box_of(annotation, segmentation, height, width)
            if box is None:
                continue
            if is_crowd(annotation) or segmentation is None:
                crowds.append(box)  # without a mask it can still keep its anchors from being called background
            else:
                boxes.append(box)
                labels.append(self.label_of(annotation))
                segmentations.append(segmentation)
        return Sample(
            image,
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(labels, np.int64),
            segmentations,
            np.array(crowds, np.float32).reshape(-1, 4),
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such annotation file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    wanted = {"images": ("id", "file_name"), "categories": ("id",), "annotations": ("image_id", "category_id")}
    for key, fields in wanted.items():
        if not isinstance(content, dict) or (key not in content and key != "annotations"):
            raise UserError(f"{path}: not a COCO annotation file, it has no list of {key!r}")
        entries = content.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: {key!r} must be a list of objects")
        for position, entry in enumerate(entries):
            missing = [name for name in fields if name not in entry]
            if missing:
                raise UserError(f"{path}: entry {position} of {key!r} has no {missing[0]!r}")
    return content


class TrainingSet(Dataset):
    """Augmented samples. The key (epoch, index) and the seed decide all that is random, in whatever process."""

    def __init__(self, dataset: CocoDataset, config: Config, seed: int):
        self.dataset = dataset
        self.augment = Augment(config)
        self.copy_paste = config.copy_paste
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Augmented | None, int, list[str]]:
        """The sample, its image id, and what was wrong with photos that it replaces; None after ten of those."""
        epoch, index = key
        problems: list[str] = []
        for attempt in range(10):
            rng = np.random.default_rng((self.seed, epoch, index, attempt))
            chosen = index if attempt == 0 else int(rng.integers(len(self.dataset)))
            try:
                sample = self.dataset[chosen]
                if self.copy_paste and rng.random() < self.copy_paste:
                    sample = copy_paste(sample, self.dataset[int(rng.integers(len(self.dataset)))], rng)
            except UserError as error:
                problems.append(str(error))
                continue
            return self.augment(sample, rng), self.dataset.image_ids[chosen], problems
        return None, -1, problems


class EndlessShuffle(Sampler):
    """Keys (epoch, index) for ever, each epoch in an order of its own, from any position on."""

    def __init__(self, length: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1):
        self.length, self.seed, self.start, self.rank, self.world_size = length, seed, start, rank, world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, offset = divmod(self.start, self.length)
        position = self.start
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            for index in order[offset:]:
                if position % self.world_size == self.rank:
                    yield epoch, int(index)
                position += 1
            epoch, offset = epoch + 1, 0


@dataclass
class Batch:
    images: Tensor  # [B, 3, S, S] normalised RGB; empty when ten photos in a row could not be used
    targets: list[Target]
    image_ids: list[int]
    problems: list[str]  # photos that could not be read and were replaced

    def to(self, device: torch.device) -> Batch:
        images = self.images.to(device, non_blocking=True)
        targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in self.targets]
        return Batch(images, targets, self.image_ids, self.problems)

    def split(self, parts: int) -> list[Batch]:
        """The batch in `parts` of equal size, as far as that goes."""
        cuts = [round(i * len(self.images) / parts) for i in range(parts + 1)]
        return [
            Batch(self.images[a:b], self.targets[a:b], self.image_ids[a:b], [])
            for a, b in itertools.pairwise(cuts)
            if b > a
        ]

    def pin_memory(self) -> Batch:
        targets = [{k: v.pin_memory() for k, v in target.items()} for target in self.targets]
        return Batch(self.images.pin_memory(), targets, self.image_ids, self.problems)


def _collate(samples: list[tuple[Augmented | None, int, list[str]]]) -> Batch:
    augmented, image_ids, problems = zip(*samples, strict=True)
    if None in augmented:
        return Batch(torch.empty(0), [], [], [p for some in problems for p in some])
    images = torch.stack([torch.from_numpy(a.image) for a in augmented])
    targets = [
        {key: torch.from_numpy(getattr(a, key)) for key in ("boxes", "labels", "masks", "crowds", "seed")}
        for a in augmented
    ]
    return Batch(images, targets, list(image_ids), [p for some in problems for p in some])


def _start_worker(_worker: int) -> None:
    if cv2.getNumThreads() != 1:  # where processes are spawned; a forked one must not touch OpenCV's threads
        cv2.setNumThreads(1)  # the processes are the parallelism
    torch.set_num_threads(1)
    # Ctrl-C and a batch system's SIGTERM reach all processes; the main one ends the run, and with it the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def training_batches(
    dataset: CocoDataset,
    config: Config,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Endless batches of `batch_size` pictures for one process, from the `start`-th picture of the whole run on."""
    loader = DataLoader(
        TrainingSet(dataset, config, seed),
        batch_size=batch_size,
        sampler=EndlessShuffle(len(dataset), seed, start, rank, world_size),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
    )
    # A process forked while OpenCV has threads hangs in its first call: let there be none for the moment.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    batches = iter(loader)
    cv2.setNumThreads(threads)
    return batches
