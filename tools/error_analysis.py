"""Match detections with the ground truth at one IoU, and name each error (after TIDE, Bolya et al., ECCV 2020)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as rle

from data.annotation import to_rle
from data.coco import CocoDataset

MIN_IOU = 0.5  # of masks: a detection with at least this is correct
BACKGROUND_IOU = 0.1  # below it a detection has nothing to do with an object
# The kinds of wrong detections.
ERROR_KINDS = {
    "class": "right place, wrong class",
    "localisation": f"right class, IoU of {BACKGROUND_IOU} to {MIN_IOU}",
    "class and localisation": "neither class nor place is right",
    "duplicate": "another detection of the same object scores higher",
    "background": f"IoU under {BACKGROUND_IOU} with every object",
}
# As in TIDE, an object that an error of these kinds is about is found, but not rightly: it is not missed as well.
FOUND_KINDS = ("correct", "class", "localisation")
MISSED = "no detection is near it with its class, or on it with another"


@dataclass
class MatchedDetections:
    """A detection, and what it matches."""

    index: int  # of the image in the data set
    label: int
    score: float
    result: dict[str, Any]
    kind: str = ""  # "correct", "ignored" (in a crowd region), or a key of ERROR_KINDS
    iou: float = 0.0  # with the object that it matches, or that it comes nearest to
    truth: int = -1  # that object, as an index into Outcome.objects; -1: none


@dataclass
class TrueObject:
    """An object of the ground truth."""

    index: int  # of the image in the data set
    label: int
    segmentation: dict[str, Any]  # RLE


@dataclass
class Outcome:
    """The outcome for a whole data set of `classes` classes."""

    classes: int
    found: list[MatchedDetections] = field(default_factory=list)
    objects: list[TrueObject] = field(default_factory=list)

    def missed(self, threshold: float) -> list[TrueObject]:
        """Return the objects that no detection finds, not even with an error of FOUND_KINDS, at a score threshold."""
        strong = (item for item in self.found if item.score >= threshold and item.kind in FOUND_KINDS)
        touched = {item.truth for item in strong}
        return [item for number, item in enumerate(self.objects) if number not in touched]


def match_dataset(
    dataset: CocoDataset, results: list[dict[str, Any]], sizes: dict[int, tuple[int, int]], min_score: float = 0.0
) -> Outcome:
    """Match COCO results by their masks, image by image, highest score first.

    Args:
        dataset: the ground truth.
        results: COCO results; "mask_score" ranks them if it is present.
        sizes: (height, width) of the images that were read, by image id. Other images are left out.
        min_score: leave out weaker detections.
    """
    labels = {category: label for label, category in enumerate(dataset.category_ids)}
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if _score(result) >= min_score:
            by_image[result["image_id"]].append(result)
    outcome = Outcome(len(dataset.class_names))
    for index, image_id in enumerate(dataset.image_ids):
        if image_id not in sizes:
            continue
        height, width = sizes[image_id]
        objects: list[TrueObject] = []
        crowds: list[TrueObject] = []
        for annotation in dataset.parsed(index, (height, width), drop_duplicates=True):
            if annotation.box is None:
                continue
            # An object without a mask is a region to ignore, as in the evaluation of masks.
            x1, y1, x2, y2 = annotation.box
            shape = annotation.segmentation or [[x1, y1, x2, y1, x2, y2, x1, y2]]
            ignored = annotation.crowd or annotation.segmentation is None
            (crowds if ignored else objects).append(TrueObject(index, annotation.label, to_rle(shape, height, width)))
        found = [MatchedDetections(index, labels[r["category_id"]], _score(r), r) for r in by_image[image_id]]
        _match(found, objects, crowds, first=len(outcome.objects))
        outcome.found += found
        outcome.objects += objects
    return outcome


def _score(result: dict[str, Any]) -> float:
    return float(result.get("mask_score", result["score"]))


def _match(found: list[MatchedDetections], objects: list[TrueObject], crowds: list[TrueObject], first: int) -> None:
    """Fill in kind, IoU and truth of the detections of one image; `first` is the index of its first object."""
    found.sort(key=lambda item: -item.score)
    masks = [item.result["segmentation"] for item in found]
    ious = np.array(rle.iou(masks, [o.segmentation for o in objects], [0] * len(objects)))
    inside = np.array(rle.iou(masks, [c.segmentation for c in crowds], [1] * len(crowds)))
    truth, regions = (np.array([item.label for item in items], int) for items in (objects, crowds))
    taken: set[int] = set()
    rows = zip(found, ious.reshape(len(found), len(objects)), inside.reshape(len(found), len(crowds)), strict=True)
    for item, row, crowd in rows:
        own = np.where(truth == item.label, row, -1.0)
        free = np.where([i in taken for i in range(len(row))], -1.0, own)
        if len(row) and free.max() >= MIN_IOU:
            position = int(free.argmax())
            taken.add(position)
            item.kind, item.iou, item.truth = "correct", float(free[position]), first + position
        elif (crowd[regions == item.label] >= MIN_IOU).any():  # only regions of its class, as in COCOeval
            item.kind = "ignored"
        elif len(row):
            item.kind = _kind(float(row.max()), float(own.max()))
            best = int((own if item.kind in ("localisation", "duplicate") else row).argmax())
            item.iou, item.truth = float(row[best]), first + best if row[best] >= BACKGROUND_IOU else -1
        else:
            item.kind = "background"


def _kind(overall: float, same: float) -> str:
    """Name an error by its largest IoU with any object, and with an object of its own class."""
    if same >= MIN_IOU:
        return "duplicate"
    if overall >= MIN_IOU:
        return "class"
    if same >= BACKGROUND_IOU:
        return "localisation"
    return "class and localisation" if overall >= BACKGROUND_IOU else "background"


def f1_curve(outcome: Outcome) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return scores in descending order, and precision, recall and F1 when all detections from each score on count."""
    items = sorted((item for item in outcome.found if item.kind != "ignored"), key=lambda item: -item.score)
    scores = np.array([item.score for item in items])
    correct = np.cumsum([item.kind == "correct" for item in items])
    count, total = np.arange(1, len(items) + 1), max(1, len(outcome.objects))
    return scores, correct / count, correct / total, 2 * correct / (count + total)


def best_threshold(outcome: Outcome) -> tuple[float, float]:
    """Return the score threshold with the highest F1, and that F1; (1, 0) if nothing is correct.

    A threshold keeps or drops all detections of equal score, so F1 is compared after the last of each. The threshold
    lies halfway to the next lower score, so that rounding does not decide.
    """
    scores, _, _, f1 = f1_curve(outcome)
    last = np.append(scores[1:] < scores[:-1], True)[: len(scores)]  # of equal scores
    if not len(f1) or f1[last].max() == 0:
        return 1.0, 0.0
    best = int(np.where(last, f1, -1.0).argmax())
    lower = scores[best + 1] if best + 1 < len(scores) else 0.0
    return float(scores[best] + lower) / 2, float(f1[best])


def count_errors(outcome: Outcome, threshold: float) -> dict[str, int]:
    """Count correct detections and each kind of error at a score threshold."""
    strong = [item for item in outcome.found if item.score >= threshold]
    counts = {kind: sum(item.kind == kind for item in strong) for kind in ("correct", *ERROR_KINDS)}
    return counts | {"missed": len(outcome.missed(threshold))}


def confusion_matrix(outcome: Outcome, threshold: float) -> np.ndarray:
    """Return counts [C + 1, C + 1], true class by predicted class; the last row and column are the background.

    Each object counts once in the row of its class: as what it is if a detection is correct, else as the class of the
    best detection that confuses it, else as background. Detections that are about no object are in the last row.
    """
    classes = outcome.classes
    matrix = np.zeros((classes + 1, classes + 1), int)
    strong = [item for item in outcome.found if item.score >= threshold]
    chosen: dict[int, int] = {}  # the predicted class of each object that is found
    for kind in ("correct", "class"):
        for item in sorted(strong, key=lambda item: -item.score):
            if item.kind == kind:
                chosen.setdefault(item.truth, item.label)
    for number, true in enumerate(outcome.objects):
        matrix[true.label, chosen.get(number, classes)] += 1
    for item in strong:
        if item.kind in ("localisation", "class and localisation", "background"):
            matrix[classes, item.label] += 1
    return matrix
