"""Mosaic (Bochkovskiy et al., YOLOv4, 2020): four training images side by side in one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data.annotation import Sample, to_mask
from data.copy_paste import _outline

CANVAS_BGR = (104, 117, 124)


def mosaic(samples: list[Sample], rng: np.random.Generator) -> Sample:
    """Return one Sample with four images around a common corner."""
    heights, widths = [s.image.shape[0] for s in samples], [s.image.shape[1] for s in samples]
    top, bottom = max(heights[:2]), max(heights[2:])
    left, right = max(widths[0], widths[2]), max(widths[1], widths[3])
    canvas = np.full((top + bottom, left + right, 3), CANVAS_BGR, np.uint8)
    boxes, labels, segmentations, crowds = [], [], [], []
    for i, s in enumerate(samples):
        h, w = s.image.shape[:2]
        x, y = (left - w if i % 2 == 0 else left), (top - h if i < 2 else top)
        canvas[y : y + h, x : x + w] = s.image
        shift = np.array((x, y, x, y), np.float32)
        for box, label, segmentation in zip(s.boxes, s.labels, s.segmentations, strict=True):
            boxes.append(box + shift)
            labels.append(label)
            if isinstance(segmentation, list):
                segmentations.append(
                    [(np.asarray(p, float).reshape(-1, 2) + (x, y)).ravel().tolist() for p in segmentation]
                )
            else:
                mask = np.zeros(canvas.shape[:2], bool)
                mask[y : y + h, x : x + w] = to_mask(segmentation, h, w)
                segmentations.append(_outline(mask)[1])
        crowds += [box + shift for box in s.crowds]
    return replace(
        samples[0],
        image=canvas,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int64),
        segmentations=segmentations,
        crowds=np.array(crowds, np.float32).reshape(-1, 4),
    )
