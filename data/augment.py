"""SSD's augmentation as YOLACT uses it (paper, section 5; Liu et al. 2016): photometric, expand, crop, mirror, resize;
and Simple Copy-Paste (Ghiasi et al., CVPR 2021).

The geometry is sampled first, from the boxes alone, as a single window of the image. That window is then resized to
the network's input in one step, and the masks are rasterised at the resolution of the mask loss. No pixels are
computed for regions that the crop removes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from config import AugmentationConfig, Config
from data.annotation import Sample, to_mask
from layers.anchors import prototype_size
from layers.structures import Target

MIN_VISIBLE = 0.2  # objects with a smaller visible fraction of their area are dropped
CANVAS_BGR = (103.94, 116.78, 123.68)  # COCO's mean colour; fills the canvas around an expanded image


@dataclass(frozen=True)
class Window:
    """A rectangle, in pixels of the image, that is resized to the network's input and mirrored if `mirror` is set.

    It may extend beyond the image.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    mirror: bool = False

    def points(self, xy: np.ndarray, width: float, height: float) -> np.ndarray:
        """Map points [..., 2] (x, y) of the image to an input of `width` x `height` pixels.

        Pixel i covers the coordinates from i to i + 1, so its centre is at i + 0.5.
        """
        out = (xy - (self.x1, self.y1)) * (width / (self.x2 - self.x1), height / (self.y2 - self.y1))
        if self.mirror:
            out[..., 0] = width - out[..., 0]
        return out

    def matrix(self, width: int, height: int) -> np.ndarray:
        """Return the same mapping as a 2 x 3 matrix for cv2.warpAffine, in which pixel i has its centre at i."""
        sx, sy = width / (self.x2 - self.x1), height / (self.y2 - self.y1)
        # To pixel edges (+ 0.5), through the mapping of `points`, and back to pixel centres (- 0.5).
        tx, ty = (0.5 - self.x1) * sx - 0.5, (0.5 - self.y1) * sy - 0.5
        if self.mirror:
            sx, tx = -sx, width - 1 - tx
        return np.array([[sx, 0, tx], [0, sy, ty]])


class Augment:
    """Augment samples as `config.augmentation` says.

    `augment(sample, rng)` returns the input, uint8 BGR [S, S, 3], the `Distortion` of its colours, and a `Target`.
    """

    def __init__(self, config: Config):
        self.config: AugmentationConfig = config.augmentation
        self.size = config.train_size
        rows, columns = prototype_size(self.size, self.size)
        self.mask_size = (rows * config.loss.mask_supersample, columns * config.loss.mask_supersample)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Distortion, Target]:
        window = self.choose_window(sample, rng)
        boxes, kept = self._boxes(sample.boxes, window)
        crowds, _ = self._boxes(sample.crowds, window, partial=True)
        segmentations = [sample.segmentations[i] for i in np.flatnonzero(kept)]
        masks = [draw_mask(segmentation, window, self.mask_size) for segmentation in segmentations]
        image = cv2.warpAffine(
            sample.image,
            window.matrix(self.size, self.size),
            (self.size, self.size),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=CANVAS_BGR,
        )
        distortion = self._distortion(sample.image.shape, window, rng)
        target = {
            "boxes": boxes,
            "labels": sample.labels[kept],
            "masks": np.stack(masks) if masks else np.zeros((0, *self.mask_size), np.uint8),
            "has_mask": np.array([segmentation is not None for segmentation in segmentations], bool),
            "crowds": crowds,
            "seed": np.array(rng.integers(2**62)),
        }
        return torch.from_numpy(image), distortion, {key: torch.from_numpy(value) for key, value in target.items()}

    def choose_window(self, sample: Sample, rng: np.random.Generator) -> Window:
        """Sample the expansion, the crop and the mirroring, and return them as one window."""
        height, width = sample.image.shape[:2]
        x1, y1, x2, y2 = 0, 0, width, height
        if self.config.augment_expand > 1 and rng.random() < 0.5:
            ratio = rng.uniform(1, self.config.augment_expand)
            # Placing the image at random on a larger canvas is a window that extends beyond the image.
            x1, y1 = -int(rng.uniform(0, width * ratio - width)), -int(rng.uniform(0, height * ratio - height))
            x2, y2 = x1 + int(width * ratio), y1 + int(height * ratio)
        if self.config.augment_crop:
            x1, y1, x2, y2 = sample_crop((x1, y1, x2, y2), sample.boxes, rng, self.config.crop_min_side)
        return Window(x1, y1, x2, y2, self.config.augment_mirror and rng.random() < 0.5)

    def _boxes(self, boxes: np.ndarray, window: Window, partial: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes whose centres lie in the window, relative and clipped to it, and a bool mask [n] of them.

        With `partial`, boxes whose centres are outside are kept as well.
        """
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = (centres > (window.x1, window.y1)).all(axis=1) & (centres < (window.x2, window.y2)).all(axis=1)
        corners = window.points(boxes.reshape(-1, 2, 2).astype(np.float64), 1, 1)
        # Mirroring swaps left and right, so the corners are sorted again.
        low, high = corners.min(axis=1).clip(0, 1), corners.max(axis=1).clip(0, 1)
        # The encoding of a box takes the logarithm of its sides, so they must not be zero.
        smallest = max(self.config.min_box_size, 0.01) / self.size
        kept = (inside | partial) & ((high - low) > smallest).all(axis=1)
        return np.concatenate((low, high), axis=1)[kept].astype(np.float32), kept

    def _distortion(self, size: tuple[int, ...], window: Window, rng: np.random.Generator) -> Distortion:
        """Sample the distortion of an image of `size` (H, W)."""
        if not self.config.augment_photometric:
            return Distortion()
        # Only pixels of the image are distorted, so that the canvas around it keeps the mean colour.
        corners = window.points(np.array([[0.0, 0.0], [size[1], size[0]]]), self.size, self.size)
        (x1, y1), (x2, y2) = np.floor(corners.min(axis=0)), np.ceil(corners.max(axis=0))
        return Distortion.draw(rng)._replace(x1=x1, y1=y1, x2=x2, y2=y2)


def sample_crop(
    area: tuple[int, int, int, int], boxes: np.ndarray, rng: np.random.Generator, min_side: float = 0.3
) -> tuple[int, int, int, int]:
    """Return a random crop (x1, y1, x2, y2) of `area` that contains the centre of at least one box, or `area` itself.

    SSD also requires a minimum overlap of the crop with a box, but in its released code and in YOLACT's that check
    never fails, and fixing it was reported to halve YOLACT's AP. It is therefore omitted here. Each round returns the
    whole area with probability 1/6; otherwise it tries up to 50 crops with sides of `min_side` to 1 times those of the
    area and h / w of 1/2 to 2. Images without objects may be cropped anywhere. `area` and `boxes` [n, 4] are
    (x1, y1, x2, y2) in pixels of the image, which `area` exceeds after expansion.
    """
    x1, y1, x2, y2 = area
    width, height = x2 - x1, y2 - y1
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    while rng.integers(6) > 0:
        for _ in range(50):
            w, h = rng.uniform(min_side, 1) * width, rng.uniform(min_side, 1) * height
            if not 0.5 <= h / w <= 2:
                continue
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            low = np.array((x1 + int(left), y1 + int(top)))
            high = np.array((x1 + int(left + w), y1 + int(top + h)))
            if (high <= low).any():
                continue
            if len(boxes) == 0 or ((centres > low) & (centres < high)).all(axis=1).any():
                return (*low.tolist(), *high.tolist())
    return area


class Distortion(NamedTuple):
    """SSD's photometric distortion of the pixels in a region: brightness, contrast, saturation and hue."""

    brightness: float = 0.0  # added
    contrast: float = 1.0  # factor
    contrast_first: float = 1.0  # 1: before saturation and hue, 0: after them
    saturation: float = 1.0  # factor
    hue: float = 0.0  # degrees
    x1: float = 0.0  # the region, in pixels of the input; it may exceed it
    y1: float = 0.0
    x2: float = 0.0
    y2: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Distortion:
        """Sample a distortion. Each of the four parameters is changed with probability 0.5."""
        brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
        contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
        contrast_first = float(rng.random() < 0.5)
        saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
        hue = rng.uniform(-18, 18) if rng.random() < 0.5 else 0.0
        return cls(brightness, contrast, contrast_first, saturation, hue)


def distort(images: Tensor, distortions: Tensor) -> Tensor:
    """Apply a `Distortion` to each image, on the images' device: their values are floats, so workers pass the images
    on with 8 bits and the distortions beside them.

    Args:
        images: uint8 BGR [B, S, S, 3].
        distortions: float32 [B, 9].

    Returns:
        float32 BGR [B, 3, S, S]; values may exceed 0..255.
    """
    brightness, contrast, first, saturation, hue, x1, y1, x2, y2 = distortions[..., None, None].unbind(1)  # [B, 1, 1]
    original = images.permute(0, 3, 1, 2).float()
    blue, green, red = ((original + brightness[:, None]) * contrast.where(first > 0, 1)[:, None]).unbind(1)
    # Hue, saturation and value (Smith 1978) with the saturation times the value, which is also defined for negative
    # values, such as a lower brightness produces.
    largest = torch.maximum(torch.maximum(red, green), blue)
    chroma = largest - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp(min=1e-6)
    sixth = torch.where(green == largest, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixth = (green - blue).div(divisor).where(red == largest, sixth) + hue / 60
    scaled = chroma * saturation
    channels = []
    for shift in (1, 3, 5):  # blue, green, red
        position = (sixth + shift) % 6
        channels.append(largest - scaled * torch.minimum(position, 4 - position).clamp(0, 1))
    distorted = torch.stack(channels, dim=1) * contrast.where(first == 0, 1)[:, None]
    place = torch.arange(images.shape[1], device=images.device)
    rows, columns = (place >= y1[:, 0]) & (place < y2[:, 0]), (place >= x1[:, 0]) & (place < x2[:, 0])  # [B, S]
    inside = rows[:, :, None] & columns[:, None]
    return torch.where(inside[:, None], distorted, original)


def draw_mask(segmentation: Any, window: Window, size: tuple[int, int]) -> np.ndarray:
    """Rasterise the part of an object inside the window: uint8 [h, w] with values 0 and 1, for `size` (h, w).

    Polygons are mapped to `size` before they are rasterised, so that they stay sharp; an RLE is decoded and resized.
    The mask of an object that has none is empty.
    """
    height, width = size
    if segmentation is None:
        return np.zeros(size, np.uint8)
    if isinstance(segmentation, list):
        polygons = [window.points(np.asarray(p, np.float64).reshape(-1, 2), width, height) for p in segmentation]
        return to_mask([p.ravel().tolist() for p in polygons], height, width).view(np.uint8)
    mask = to_mask(segmentation, *segmentation["size"]).view(np.uint8) * np.uint8(255)
    resized = cv2.warpAffine(mask, window.matrix(width, height), (width, height), flags=cv2.INTER_LINEAR)
    return (resized > 127).view(np.uint8)


def copy_paste(sample: Sample, source: Sample, rng: np.random.Generator, smallest: float = 0.5) -> Sample:
    """Return a new Sample: `sample` with a random subset of the objects of `source` pasted over it.

    This shows existing objects in new contexts, overlaps and sizes, which helps most on small data sets.

    One transform is applied to all pasted objects, so they keep their arrangement: a scale drawn log-uniformly from
    `smallest` to 1 / `smallest`, mirroring with probability 0.5, and a translation that puts the centre of one of them
    inside the image. Masks and boxes of partly covered objects are reduced to their visible part. Crowd regions of
    `source`, and its objects without a mask, are not pasted.
    """
    candidates = np.array([i for i, segmentation in enumerate(source.segmentations) if segmentation is not None])
    if not len(candidates):
        return sample
    count = int(rng.integers(1, len(candidates) + 1))
    chosen = candidates[rng.permutation(len(candidates))[:count]]
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
            mask = np.zeros_like(cover)
            mask[y1:y2, x1:x2] = True  # of an object without a mask, its box
            if segmentation is not None:
                mask = to_mask(segmentation, height, width)
            visible = mask & ~cover
            if visible.sum() < MIN_VISIBLE * mask.sum() or not visible.any():
                continue
            if segmentation is not None:
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
