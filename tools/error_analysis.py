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
# The kinds of wrong detections. Objects that no detection matches are "missed".
ERROR_KINDS = {
    "class": "right place, wrong class",
    "localisation": f"right class, IoU of {BACKGROUND_IOU} to {MIN_IOU}",
    "class and localisation": "neither class nor place is right",
    "duplicate": "another detection of the same object scores higher",
    "background": f"IoU under {BACKGROUND_IOU} with every object",
}


@dataclass
class MatchedDetections:
    """A detection, and what it matches."""

    index: int  # of the image in the data set
    label: int
    score: float
    result: dict[str, Any]
    kind: str = ""  # "correct", "ignored" (in a crowd region), or a key of ERROR_KINDS
    iou: float = 0.0  # with the object that it matches, or that it comes nearest to
    truth: int = -1  # the label of that object; -1: none


@dataclass
class Missed:
    """An object that no detection of its class matches."""

    index: int
    label: int
    area: float
    segmentation: dict[str, Any]


@dataclass
class Outcome:
    """The outcome for a whole data set."""

    found: list[MatchedDetections] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    objects: np.ndarray = field(default_factory=lambda: np.zeros(0, int))  # [C] of each class


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
    outcome = Outcome(objects=np.zeros(len(dataset.class_names), int))
    for index, image_id in enumerate(dataset.image_ids):
        if image_id not in sizes:
            continue
        objects: list[tuple[int, dict[str, Any]]] = []
        crowds: list[tuple[int, dict[str, Any]]] = []
        for annotation in dataset.parsed(index, sizes[image_id], drop_duplicates=True):
            if annotation.segmentation is None:
                continue
            code = to_rle(annotation.segmentation, *sizes[image_id])
            (crowds if annotation.crowd else objects).append((annotation.label, code))
        found = [MatchedDetections(index, labels[r["category_id"]], _score(r), r) for r in by_image[image_id]]
        taken = _match(found, objects, [code for _, code in crowds])
        outcome.found += found
        for position, (label, code) in enumerate(objects):
            outcome.objects[label] += 1
            if position not in taken:
                outcome.missed.append(Missed(index, label, float(rle.area(code)), code))
    return outcome


def _score(result: dict[str, Any]) -> float:
    return float(result.get("mask_score", result["score"]))


def _match(
    found: list[MatchedDetections], objects: list[tuple[int, dict[str, Any]]], crowds: list[dict[str, Any]]
) -> set[int]:
    """Fill in kind, IoU and truth of the detections of one image; return the positions of the matched objects."""
    found.sort(key=lambda item: -item.score)
    masks = [item.result["segmentation"] for item in found]
    codes = [code for _, code in objects]
    ious = np.array(rle.iou(masks, codes, [0] * len(codes))).reshape(len(found), len(codes))
    inside = np.array(rle.iou(masks, crowds, [1] * len(crowds))).reshape(len(found), len(crowds))
    truth = np.array([label for label, _ in objects], int)
    taken: set[int] = set()
    for item, row, crowd in zip(found, ious, inside, strict=True):
        own = np.where(truth == item.label, row, -1.0)
        free = np.where([i in taken for i in range(len(row))], -1.0, own)
        if len(row) and free.max() >= MIN_IOU:
            position = int(free.argmax())
            taken.add(position)
            item.kind, item.iou, item.truth = "correct", float(free[position]), item.label
        elif len(crowd) and crowd.max() >= MIN_IOU:
            item.kind = "ignored"
        else:
            best = int(row.argmax()) if len(row) else -1
            overall, same = (float(row[best]), float(own.max())) if len(row) else (0.0, 0.0)
            item.iou, item.truth = overall, int(truth[best]) if overall >= BACKGROUND_IOU else -1
            item.kind = _kind(overall, same)
    return taken


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
    count, total = np.arange(1, len(items) + 1), max(1, int(outcome.objects.sum()))
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
    return counts | {"missed": int(outcome.objects.sum()) - counts["correct"]}


def confusion_matrix(outcome: Outcome, threshold: float) -> np.ndarray:
    """Return counts [C + 1, C + 1], true class by predicted class; the last row and column are the background.

    A detection of the wrong class counts for the object that it overlaps, once.
    """
    classes = len(outcome.objects)
    matrix = np.zeros((classes + 1, classes + 1), int)
    for item in outcome.found:
        if item.score < threshold or item.kind in ("ignored", "duplicate"):
            continue
        row = item.truth if item.kind in ("correct", "class") else classes
        matrix[row, item.label] += 1
    for label, total in enumerate(outcome.objects):
        matrix[label, classes] = max(0, total - matrix[label, :classes].sum())
    return matrix
