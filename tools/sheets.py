"""Contact sheets: ground truth drawn on images, the training input of a batch, and predictions beside the truth."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from config import Config
from data.annotation import Sample, to_mask
from data.augment import distort
from data.coco import CocoDataset
from data.loader import Batch
from evaluation.evaluator import Sizes
from inference import Predictor
from tools.error_analysis import ERROR_KINDS, match_dataset
from utils.draw import draw_objects
from utils.errors import UserError

LARGEST_SHEET = 16  # images
SHOWN_SCORE = 0.3  # predictions that are drawn, and that count as false positives


def label_text(class_names: Sequence[str], label: int) -> str:
    """Return the class name, or "" if there is only one class."""
    return class_names[label] if len(class_names) > 1 else ""


def draw_truth(sample: Sample, class_names: Sequence[str]) -> np.ndarray:
    """Return a copy of the image, uint8 BGR [H, W, 3], with its ground truth drawn."""
    height, width = sample.image.shape[:2]
    masks = (to_mask(segmentation, height, width) for segmentation in sample.segmentations)
    texts = [label_text(class_names, label) for label in sample.labels]
    return draw_objects(sample.image, masks, sample.boxes, texts, range(len(texts)))


def truth_sheet(dataset: CocoDataset, seed: int = 0) -> np.ndarray:
    """Draw up to 16 random images with their ground truth; images without objects are used only to fill the sheet.

    Returns uint8 BGR [H, W, 3]; a blank sheet if no image can be read.
    """
    images: list[np.ndarray] = []
    captions: list[str] = []
    order = np.random.default_rng(seed).permutation(len(dataset))
    for index in sorted(order.tolist(), key=lambda i: not dataset.annotations(i)):
        if len(images) == LARGEST_SHEET:
            break
        with contextlib.suppress(UserError):  # the audit reports it
            images.append(draw_truth(dataset[index], dataset.class_names))
            captions.append(f"{dataset.image_ids[index]}: {dataset.image_path(index).name}")
    return contact_sheet(images, captions)


def batch_sheet(batch: Batch, config: Config) -> np.ndarray:
    """Draw up to 16 images of a batch, augmented, with the boxes and masks that the loss uses as targets."""
    images = []
    distorted = distort(batch.images[:LARGEST_SHEET], batch.distortions[:LARGEST_SHEET])
    for planes, target in zip(distorted.round().clamp(0, 255).byte(), batch.targets, strict=False):
        image = np.ascontiguousarray(planes.permute(1, 2, 0).cpu().numpy())
        side = image.shape[0]
        masks = [
            cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST) > 0
            for mask in target["masks"].cpu().numpy()
        ]
        texts = [label_text(config.class_names, label) for label in target["labels"].tolist()]
        images.append(draw_objects(image, masks, target["boxes"].cpu().numpy() * side, texts, range(len(texts))))
    return contact_sheet(images, [str(image_id) for image_id in batch.image_ids[:LARGEST_SHEET]])


def worst_images(dataset: CocoDataset, results: list[dict[str, Any]], sizes: Sizes, count: int = 6) -> list[int]:
    """Return the indices of the images with the most errors (missed objects and false positives), worst first."""
    outcome = match_dataset(dataset, results, sizes, SHOWN_SCORE)
    errors = Counter(item.index for item in outcome.found if item.kind in ERROR_KINDS)
    errors.update(item.index for item in outcome.missed(SHOWN_SCORE))
    others = [index for index in range(len(dataset)) if index not in errors]
    return [*(index for index, _ in errors.most_common(count)), *others][:count]


def comparison_sheet(
    predictor: Predictor, dataset: CocoDataset, indices: Sequence[int], score: float = SHOWN_SCORE
) -> np.ndarray:
    """Draw images in pairs: with the ground truth, and with predictions that score at least `score`."""
    images, captions = [], []
    for index in indices:
        try:
            sample = dataset[index]
        except UserError:
            continue  # the evaluation reports it
        found = predictor(sample.image)
        found = found[found.scores >= score]
        images += [draw_truth(sample, dataset.class_names), found.draw(sample.image)]
        captions += [f"{dataset.image_ids[index]}: truth", f"{len(found)} predicted"]
    return contact_sheet(images, captions, side=540)


def contact_sheet(
    images: Sequence[np.ndarray], captions: Sequence[str], side: int = 360, columns: int = 4
) -> np.ndarray:
    """Arrange images of any size in a grid, uint8 BGR [H, W, 3].

    Each image is scaled to fit a square of `side` pixels below its caption. Without images, the sheet is white.
    """
    if not images:
        images, captions = [np.full((side, side, 3), 255, np.uint8)], ["no readable images"]
    tiles = []
    for image, caption in zip(images, captions, strict=True):
        tile = np.full((side + 22, side, 3), 255, np.uint8)
        scale = (side - 4) / max(image.shape[:2])
        height, width = (max(1, round(v * scale)) for v in image.shape[:2])
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        x, y = (side - width) // 2, 20 + (side - height) // 2
        tile[y : y + height, x : x + width] = small
        cv2.putText(tile, caption[:48], (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        tiles.append(tile)
    columns = min(columns, len(tiles))
    blank = np.full_like(tiles[0], 255)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    return np.vstack([np.hstack(row + [blank] * (columns - len(row))) for row in rows])
