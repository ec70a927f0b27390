"""Contact sheets: ground truth drawn on photos, what the network is fed, predictions beside the truth."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from pycocotools import mask as rle

from data.annotation import to_rle
from data.coco import Batch, CocoDataset, Sample
from data.config import Config
from data.errors import UserError
from engine.draw import draw_objects

if TYPE_CHECKING:
    from engine.predictor import Predictor

LARGEST = 16  # pictures on a sheet


def truth_picture(sample: Sample, class_names: Sequence[str]) -> np.ndarray:
    """The photo with its objects drawn."""
    height, width = sample.image.shape[:2]
    masks = (rle.decode(to_rle(segmentation, height, width)) > 0 for segmentation in sample.segmentations)
    texts = [_name(class_names, label) for label in sample.labels]
    return draw_objects(sample.image, masks, sample.boxes, texts, range(len(texts)))


def _name(class_names: Sequence[str], label: int) -> str:
    """The class, where there is more than one."""
    return class_names[label] if len(class_names) > 1 else ""


def truth_sheet(dataset: CocoDataset, seed: int = 0) -> np.ndarray:
    """Some photos of a data set with their objects drawn, those without objects last; white if none can be read."""
    pictures, captions = [], []
    order = np.random.default_rng(seed).permutation(len(dataset))
    for index in sorted(order, key=lambda i: not dataset.annotations(i)):
        if len(pictures) == LARGEST:
            break
        with contextlib.suppress(UserError):  # the audit tells of it
            pictures.append(truth_picture(dataset[index], dataset.class_names))
            captions.append(f"{dataset.image_ids[index]}: {dataset.image_path(index).name}")
    return sheet(pictures, captions)


def batch_sheet(batch: Batch, config: Config) -> np.ndarray:
    """What the network gets: the augmented pictures of a batch with the boxes and masks that the loss compares with."""
    pictures = []
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (config.mean, config.std))
    for image, target in zip(batch.images[:LARGEST], batch.targets, strict=False):
        pixels = (image.cpu().float().numpy() * std + mean).clip(0, 255).astype(np.uint8)
        bgr = np.ascontiguousarray(pixels[::-1].transpose(1, 2, 0))
        side = bgr.shape[0]
        masks = [
            cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST) > 0
            for mask in target["masks"].cpu().numpy()
        ]
        texts = [_name(config.class_names, label) for label in target["labels"].tolist()]
        pictures.append(draw_objects(bgr, masks, target["boxes"].cpu().numpy() * side, texts, range(len(texts))))
    return sheet(pictures, [str(image_id) for image_id in batch.image_ids[:LARGEST]])


def comparison_sheet(predictor: Predictor, dataset: CocoDataset, count: int = 8, score: float = 0.3) -> np.ndarray:
    """The first photos of a data set, each twice: its ground truth, and what is predicted with at least `score`."""
    pictures, captions = [], []
    for index in range(min(count, len(dataset))):
        try:
            sample = dataset[index]
        except UserError:
            continue  # named by the evaluation
        found = predictor(sample.image)
        found = found[found.scores >= score]
        pictures += [truth_picture(sample, dataset.class_names), found.draw(sample.image)]
        captions += [f"{dataset.image_ids[index]}: truth", f"{len(found)} predicted"]
    return sheet(pictures, captions)


def sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], side: int = 360, columns: int = 4) -> np.ndarray:
    """Pictures of any size side by side, each in a square of `side` pixels under its caption; a white one if none."""
    if not pictures:
        pictures, captions = [np.full((side, side, 3), 255, np.uint8)], ["no photo can be read"]
    tiles = []
    for picture, caption in zip(pictures, captions, strict=True):
        tile = np.full((side + 22, side, 3), 255, np.uint8)
        scale = (side - 4) / max(picture.shape[:2])
        height, width = (max(1, round(v * scale)) for v in picture.shape[:2])
        small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        x, y = (side - width) // 2, 20 + (side - height) // 2
        tile[y : y + height, x : x + width] = small
        cv2.putText(tile, caption[:48], (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        tiles.append(tile)
    columns = min(columns, len(tiles))
    blank = np.full_like(tiles[0], 255)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    return np.vstack([np.hstack(row + [blank] * (columns - len(row))) for row in rows])
