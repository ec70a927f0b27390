"""Repeat-factor sampling: images with rare classes are seen more often (Gupta et al., LVIS, CVPR 2019, section 4.4)."""

from __future__ import annotations

import numpy as np

from data.coco import CocoDataset


def epoch_indices(dataset: CocoDataset, threshold: float) -> np.ndarray:
    """Return the indices of the images of one epoch, int64 [n]; each image occurs at least once.

    An image is repeated max(1, sqrt(threshold / f)) times, where f is the share of images with its rarest class. The
    fractional part is rounded at random, with a fixed seed, so that all epochs and processes agree.

    Args:
        threshold: classes in a smaller share of the images are oversampled; 0: none.
    """
    count = len(dataset)
    if threshold <= 0:
        return np.arange(count)
    labels = [
        {dataset.label_of(entry) for entry in dataset.annotations(index) if not entry["iscrowd"]}
        for index in range(count)
    ]
    frequency = np.zeros(len(dataset.class_names))
    for found in labels:
        frequency[list(found)] += 1 / count
    rarest = np.array([min((frequency[label] for label in found), default=1.0) for found in labels])
    repeats = np.sqrt(threshold / rarest).clip(min=1)
    whole = repeats.astype(int) + (np.random.default_rng(0).random(count) < repeats % 1)
    return np.repeat(np.arange(count), whole)
