"""Ground truth drawn on images."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from data.annotation import Sample, to_mask
from data.coco import CocoDataset
from utils.draw import contact_sheet, draw_objects
from utils.errors import UserError

LARGEST_SHEET = 16  # images


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
