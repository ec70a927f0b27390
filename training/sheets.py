"""Contact sheets of a run: the training input of a batch, and predictions beside the ground truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from config import Config
from data.coco import CocoDataset
from data.image import denormalise
from data.loader import Batch
from data.sheets import LARGEST_SHEET, draw_truth, label_text
from evaluation.errors import KINDS, match_dataset
from evaluation.evaluator import Sizes
from inference import Predictor
from utils.draw import contact_sheet, draw_objects
from utils.errors import UserError

SHOWN_SCORE = 0.3  # predictions that are drawn, and that count as false positives


def batch_sheet(batch: Batch, config: Config) -> np.ndarray:
    """Draw up to 16 images of a batch, augmented, with the boxes and masks that the loss uses as targets."""
    images = []
    for planes, target in zip(batch.images[:LARGEST_SHEET], batch.targets, strict=False):
        image = denormalise(planes.cpu().float().numpy(), config.model.mean, config.model.std)
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
    errors = Counter(item.index for item in outcome.found if item.kind in KINDS)
    errors.update(item.index for item in outcome.missed)
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
