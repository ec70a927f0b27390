"""Warnings about data and settings with which training is unlikely to work, and a hint for evaluation."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from config import Config
from data.coco import CocoDataset
from data.image import INPUT_STEP
from evaluation import evaluate
from inference import Predictor

FEW_PER_CLASS = 10  # objects
HINT_IMAGES = 50  # on which other input sizes are tried
HINT_GAIN = 0.02  # of mask AP; smaller differences on so few images say nothing
SMALL_SIDE = 8  # pixels at the network's size: the stride of P3, whose anchors are the smallest


def objects_per_class(dataset: CocoDataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of objects of each class [C], and the sides of all boxes in shares of their images [n, 2]."""
    counts = np.zeros(len(dataset.class_names), int)
    sides = []
    for index in range(len(dataset)):
        size = dataset.stated_size(index)
        for entry in dataset.annotations(index):
            if entry["iscrowd"]:
                continue
            counts[dataset.labels[entry["category_id"]]] += 1
            box = entry.get("bbox")
            if size is not None and isinstance(box, list) and len(box) == 4:
                try:
                    sides.append((float(box[2]) / size[1], float(box[3]) / size[0]))
                except (TypeError, ValueError):
                    continue
    return counts, np.array(sides).reshape(-1, 2)


def unlikely_settings(config: Config, per_pass: int, objects: tuple[np.ndarray, np.ndarray]) -> list[str]:
    """Return one warning for each property of the data or settings that probably prevents good results.

    Args:
        config: the configuration of the run.
        per_pass: the number of images over which batch norm computes its statistics.
        objects: see `objects_per_class`.
    """
    counts, sides = objects
    lines = []
    largest = np.sqrt(np.prod(sides, axis=1)) * config.train_size  # geometric mean of the sides, in pixels
    if len(largest) and np.median(largest) < SMALL_SIDE:
        lines.append(
            f"half of the objects are smaller than {np.median(largest):.0f} pixels at {config.train_size} px, "
            "which is too small for the anchors; increase max_size, and predict with --tile"
        )
    few = [name for name, count in zip(config.class_names, counts, strict=True) if count < FEW_PER_CLASS]
    if few:
        shown = ", ".join(few[:3]) + (", ..." if len(few) > 3 else "")
        lines.append(
            f"{len(few)} of {len(counts)} classes have fewer than {FEW_PER_CLASS} objects ({shown}); "
            "annotate more images, or merge classes"
        )
    if per_pass <= 2 and not config.training.freeze_bn:
        lines.append(
            f"batch norm is trained with statistics of {per_pass} image{'s' if per_pass > 1 else ''}, "
            "which are too noisy; use --set freeze_bn=true or a larger batch"
        )
    if config.model.preserve_aspect_ratio and not config.augmentation.augment_crop:
        lines.append(
            "without augment_crop, images are only seen as squares, but inference preserves their aspect ratio; "
            "use --set preserve_aspect_ratio=false"
        )
    return lines


def better_size(predictor: Predictor, dataset: CocoDataset) -> str:
    """Try the first images with network inputs of other sizes; return a line about one that is better, or "".

    A network that was trained at a small size often finds more at a larger one, without training.
    """
    backend = predictor.backend
    if backend.model is None or backend.compile_seconds:  # an exported or compiled network has one size
        return ""
    sizes: list[int | tuple[int, int]] = [backend.size]
    for factor in (0.75, 1.5):
        sides = (backend.size,) if isinstance(backend.size, int) else backend.size
        first, *second = (max(INPUT_STEP, INPUT_STEP * round(factor * side / INPUT_STEP)) for side in sides)
        sizes.append((first, second[0]) if second else first)
    found = {}
    for size in sizes:
        other = copy.copy(predictor)
        other.backend = replace(backend, size=size)
        metrics = evaluate(other, dataset, HINT_IMAGES, progress=False)
        assert metrics is not None
        found[str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"] = metrics["segm"]["AP"]
    own, best = next(iter(found)), max(found, key=lambda size: found[size])
    if found[best] < found[own] + HINT_GAIN:
        return ""
    number = min(HINT_IMAGES, len(dataset))
    return (
        f"--size {best} is better here: mask AP {100 * found[best]:.1f} instead of {100 * found[own]:.1f} on the first "
        f"{number} images, without training"
    )
