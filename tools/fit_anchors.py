"""Anchors that are fitted to a training set by a rule, instead of by hand."""

from __future__ import annotations

import numpy as np

from config import Config, geometric_sizes, override
from data.coco import CocoDataset
from tools.advice import objects_per_class

QUANTILES = (0.75, 0.25)  # of width / height, in the order of the anchors


def fit_anchors(config: Config, dataset: CocoDataset) -> Config:
    """Return `config` with anchors for the objects of `dataset`.

    The aspect ratios are two quantiles of the ratios of all boxes, as they are in the square input of the network. The
    sizes depend on the training input only, see `config.geometric_sizes`: objects have all sizes after augmentation.
    Without any box, the configuration's own anchors are returned.
    """
    _, sides = objects_per_class(dataset)
    sides = sides[(sides > 0).all(axis=1)]
    if not len(sides):
        return config
    ratios = np.quantile(sides[:, 0] / sides[:, 1], QUANTILES)
    fitted = tuple(round(float(ratio), 2) for ratio in ratios.clip(0.05, 20))
    return override(config, anchor_sizes=geometric_sizes(config.train_size), aspect_ratios=fitted)


def keep_anchors(config: Config, other: Config) -> Config:
    """Return `config` with the anchors of `other`, whose weights it starts from, if their number is the same."""
    if config.model.anchors_per_position != other.model.anchors_per_position:
        return config
    keys = ("anchor_sizes", "aspect_ratios", "square_anchors")
    return override(config, **{key: getattr(other.model, key) for key in keys})
