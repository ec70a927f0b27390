"""Contact sheets of a run: the training input of a batch, and predictions beside the ground truth."""

from __future__ import annotations

import cv2
import numpy as np

from config import Config
from data.coco import CocoDataset
from data.image import denormalise
from data.loader import Batch
from data.sheets import LARGEST_SHEET, draw_truth, label_text
from inference import Predictor
from utils.draw import contact_sheet, draw_objects
from utils.errors import UserError


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


def comparison_sheet(predictor: Predictor, dataset: CocoDataset, count: int = 8, score: float = 0.3) -> np.ndarray:
    """Draw the first `count` images in pairs: with the ground truth, and with predictions that score >= `score`."""
    images, captions = [], []
    for index in range(min(count, len(dataset))):
        try:
            sample = dataset[index]
        except UserError:
            continue  # the evaluation reports it
        found = predictor(sample.image)
        found = found[found.scores >= score]
        images += [draw_truth(sample, dataset.class_names), found.draw(sample.image)]
        captions += [f"{dataset.image_ids[index]}: truth", f"{len(found)} predicted"]
    return contact_sheet(images, captions)
