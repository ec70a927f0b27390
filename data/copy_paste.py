"""Simple Copy-Paste (Ghiasi et al., CVPR 2021): paste objects from one training image onto another.

This shows existing objects in new contexts, overlaps and sizes, which helps most on small data sets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from data.annotation import Sample, to_mask

MIN_VISIBLE = 0.2  # objects with a smaller visible fraction of their area are dropped


def copy_paste(sample: Sample, source: Sample, rng: np.random.Generator, smallest: float = 0.5) -> Sample:
    """Return a new Sample: `sample` with a random subset of the objects of `source` pasted over it.

    One transform is applied to all pasted objects, so they keep their arrangement: a scale drawn log-uniformly from
    `smallest` to 1 / `smallest`, mirroring with probability 0.5, and a translation that puts the centre of one of them
    inside the image. Masks and boxes of partly covered objects are reduced to their visible part. Crowd regions of
    `source` are not pasted.
    """
    if not len(source.boxes):
        return sample
    count = int(rng.integers(1, len(source.boxes) + 1))
    chosen = rng.permutation(len(source.boxes))[:count]
    height, width = sample.image.shape[:2]
    matrix = _placement(source.boxes[chosen[0]], (height, width), rng, smallest)
    present = []
    for i in chosen:
        whole = to_mask(source.segmentations[i], *source.image.shape[:2])
        mask = cv2.warpAffine(whole * np.uint8(255), matrix, (width, height), flags=cv2.INTER_LINEAR) > 127
        # matrix[1, 1] is the scale, so this is the visible fraction of the whole scaled object.
        if mask.sum() >= max(1, MIN_VISIBLE * whole.sum() * matrix[1, 1] ** 2):
            present.append((mask, int(source.labels[i])))
    if not present:
        return sample
    cover = np.any([mask for mask, _ in present], axis=0)
    warped = cv2.warpAffine(source.image, matrix, (width, height), flags=cv2.INTER_LINEAR)
    image = np.where(cover[..., None], warped, sample.image)

    objects = []
    for box, label, segmentation in zip(sample.boxes, sample.labels, sample.segmentations, strict=True):
        x1, y1, x2, y2 = np.array((*np.floor(box[:2]), *np.ceil(box[2:])), int)
        # Objects whose box is not touched keep their polygons and their annotated box.
        if cover[y1:y2, x1:x2].any():
            mask = to_mask(segmentation, height, width)
            visible = mask & ~cover
            if visible.sum() < MIN_VISIBLE * mask.sum() or not visible.any():
                continue
            box, segmentation = _outline(visible)
        objects.append((box, label, segmentation))
    for mask, label in present:
        box, segmentation = _outline(mask)
        objects.append((box, label, segmentation))
    boxes, labels, segmentations = zip(*objects, strict=True)
    return replace(
        sample,
        image=image,
        boxes=np.array(boxes, np.float32),
        labels=np.array(labels, np.int64),
        segmentations=list(segmentations),
    )


def _placement(box: np.ndarray, size: tuple[int, int], rng: np.random.Generator, smallest: float) -> np.ndarray:
    """Return a random [2, 3] matrix for cv2.warpAffine that maps the centre of `box` into an image of `size` (h, w)."""
    scale = np.exp(rng.uniform(np.log(smallest), -np.log(smallest)))
    across = -scale if rng.random() < 0.5 else scale
    x, y = rng.uniform(0, size[1]), rng.uniform(0, size[0])
    centre = (box[:2] + box[2:]) / 2
    return np.array([[across, 0, x - across * centre[0]], [0, scale, y - scale * centre[1]]])


def _outline(mask: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the box (x1, y1, x2, y2) in pixels and the RLE of a bool mask [h, w]."""
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    x, y, w, h = rle.toBbox(encoded)
    return np.array((x, y, x + w, y + h), np.float32), encoded
