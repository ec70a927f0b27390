"""SSD's augmentation as YOLACT uses it (paper, section 5; Liu et al. 2016): photometric, expand, crop, mirror, resize.

The geometry is settled first, on boxes alone. Then the part of the photo that is left is brought to the network's size
in one step, and the masks are drawn at the size at which the loss compares them with the prototypes. Nothing is
computed for what the crop throws away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from pycocotools import mask as rle

from data.annotation import to_rle
from data.config import Config
from layers.anchors import feature_sizes

if TYPE_CHECKING:
    from data.coco import Sample


CANVAS_BGR = (103.94, 116.78, 123.68)  # the mean colour of COCO's photos, around those that were made smaller


@dataclass
class Augmented:
    """What the network and the loss take, as arrays."""

    image: np.ndarray  # float32 [3, S, S], RGB, normalised
    boxes: np.ndarray  # float32 [n, 4], corner form, relative
    labels: np.ndarray  # int64 [n]
    masks: np.ndarray  # uint8 [n, h, w], 0 or 1, at the prototypes' size
    crowds: np.ndarray  # float32 [m, 4], corner form, relative
    seed: np.ndarray  # int64 [], for what the loss draws at random


@dataclass(frozen=True)
class Window:
    """The part of the plane that becomes the network's input, in pixels of the photo; mirrored or not."""

    x1: float
    y1: float
    x2: float
    y2: float
    mirror: bool = False

    def points(self, xy: np.ndarray, width: float, height: float) -> np.ndarray:
        """Points [..., 2] of the photo in an input of width x height. Pixels lie between whole coordinates."""
        out = (xy - (self.x1, self.y1)) * (width / (self.x2 - self.x1), height / (self.y2 - self.y1))
        if self.mirror:
            out[..., 0] = width - out[..., 0]
        return out

    def matrix(self, width: int, height: int) -> np.ndarray:
        """The same as a 2 x 3 matrix for cv2.warpAffine, which counts from the centres of the pixels."""
        sx, sy = width / (self.x2 - self.x1), height / (self.y2 - self.y1)
        tx, ty = (0.5 - self.x1) * sx - 0.5, (0.5 - self.y1) * sy - 0.5
        if self.mirror:
            sx, tx = -sx, width - 1 - tx
        return np.array([[sx, 0, tx], [0, sy, ty]])


class Augment:
    """`augment(sample, rng)` -> Augmented, by the configuration's augmentation settings."""

    def __init__(self, config: Config):
        self.config = config
        self.size = config.max_size
        rows, columns = feature_sizes(self.size, self.size)[0]
        # Prototypes have twice the size of P3.
        self.mask_size = (2 * rows * config.mask_supersample, 2 * columns * config.mask_supersample)
        self.scratch = Scratch()

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Augmented:
        window = self.choose_window(sample, rng)
        boxes, kept = self._boxes(sample.boxes, window)
        crowds, _ = self._boxes(sample.crowds, window)
        masks = [draw_mask(sample.segmentations[i], window, self.mask_size) for i in np.flatnonzero(kept)]
        return Augmented(
            self._image(sample.image, window, rng),
            boxes,
            sample.labels[kept],
            np.stack(masks) if masks else np.zeros((0, *self.mask_size), np.uint8),
            crowds,
            np.array(rng.integers(2**62)),
        )

    def choose_window(self, sample: Sample, rng: np.random.Generator) -> Window:
        """Expand, crop and mirror, as a window."""
        height, width = sample.image.shape[:2]
        x1, y1, x2, y2 = 0, 0, width, height
        if self.config.augment_expand > 1 and rng.random() < 0.5:
            ratio = rng.uniform(1, self.config.augment_expand)
            x1, y1 = -int(rng.uniform(0, width * ratio - width)), -int(rng.uniform(0, height * ratio - height))
            x2, y2 = x1 + int(width * ratio), y1 + int(height * ratio)
        if self.config.augment_crop:
            x1, y1, x2, y2 = sample_crop((x1, y1, x2, y2), sample.boxes, rng, self.config.crop_min_side)
        return Window(x1, y1, x2, y2, self.config.augment_mirror and rng.random() < 0.5)

    def _boxes(self, boxes: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """The boxes whose centre lies in the window, clipped to it, relative; and which they are [n]."""
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = (centres > (window.x1, window.y1)).all(axis=1) & (centres < (window.x2, window.y2)).all(axis=1)
        corners = window.points(boxes.reshape(-1, 2, 2).astype(np.float64), 1, 1)
        low, high = corners.min(axis=1).clip(0, 1), corners.max(axis=1).clip(0, 1)
        # Thinner boxes than this have no encoding that means anything.
        smallest = max(self.config.min_box_size, 0.01) / self.size
        kept = inside & ((high - low) > smallest).all(axis=1)
        return np.concatenate((low, high), axis=1)[kept].astype(np.float32), kept

    def _image(self, image: np.ndarray, window: Window, rng: np.random.Generator) -> np.ndarray:
        size, config = self.size, self.config
        height, width = image.shape[:2]
        pixels = cv2.warpAffine(
            image,
            window.matrix(size, size),
            (size, size),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=CANVAS_BGR,
        )
        if not config.augment_photometric:
            return normalise(pixels, config)
        # The canvas around the photo keeps the mean colour.
        corners = window.points(np.array([[0.0, 0.0], [width, height]]), size, size)
        (x1, y1), (x2, y2) = np.floor(corners.min(axis=0)).clip(0), np.ceil(corners.max(axis=0)).clip(0)
        inside = np.s_[int(y1) : int(y2), int(x1) : int(x2)]
        out = np.empty((3, size, size), np.float32)
        if (x1, y1) != (0, 0) or x2 < size or y2 < size:
            colour = (np.array(CANVAS_BGR[::-1]) - config.mean) / config.std
            out[:] = colour.astype(np.float32)[:, None, None]
        Distortion.draw(rng).apply(pixels[inside], out[:, inside[0], inside[1]], config, self.scratch)
        return out


def normalise(image: np.ndarray, config: Config) -> np.ndarray:
    """BGR [H, W, 3] of values 0..255 -> normalised RGB, float32 [3, H, W]."""
    out = np.empty((3, *image.shape[:2]), np.float32)
    for channel, plane in enumerate(reversed(cv2.split(image))):
        mean, std = config.mean[channel], config.std[channel]
        np.multiply(plane, np.float32(1 / std), out=out[channel])
        out[channel] -= np.float32(mean / std)
    return out


def sample_crop(
    area: tuple[int, int, int, int], boxes: np.ndarray, rng: np.random.Generator, min_side: float = 0.3
) -> tuple[int, int, int, int]:
    """A random part (x1, y1, x2, y2) of `area` that holds the centre of at least one box, or all of it.

    SSD asks for a smallest overlap of the part with some box, but in its released code, and in YOLACT's, that test
    never fails; with it mended YOLACT was reported to lose half its AP. So there is none here. What remains: the whole
    in one of six cases, else a part with sides of `min_side` to 1 and an aspect ratio of 1/2 to 2, in 50 tries a case.
    Photos without objects are cropped freely.
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


@dataclass(frozen=True)
class Distortion:
    """A change of brightness, contrast, saturation and hue, as SSD has it, of values that are not cut at 0 and 255."""

    brightness: float = 0.0  # added
    contrast: float = 1.0  # times
    contrast_first: bool = True  # before the colours change, or after
    saturation: float = 1.0  # times
    hue: float = 0.0  # degrees

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Distortion:
        """Each of the four in half of the cases."""
        brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
        contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
        contrast_first = rng.random() < 0.5
        saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
        hue = rng.uniform(-18, 18) if rng.random() < 0.5 else 0.0
        return cls(brightness, contrast, contrast_first, saturation, hue)

    def apply(self, image: np.ndarray, out: np.ndarray, config: Config, scratch: Scratch) -> None:
        """Change `image`, uint8 BGR [h, w, 3], and write it normalised as RGB planes to `out`, float32 [3, h, w].

        All that depends on one byte is looked up. Saturation needs no other colour space: a channel's distance from
        the largest of the three is what it scales.
        """
        if image.size == 0:
            return
        first, last = (self.contrast, 1.0) if self.contrast_first else (1.0, self.contrast)
        table = (np.arange(256) + self.brightness) * first
        scales, shifts = last / np.array(config.std), np.array(config.mean) / config.std
        if self.hue:
            pixels = cv2.LUT(image, table.astype(np.float32), dst=scratch.get(0, image.shape))
            hsv = cv2.cvtColor(pixels, cv2.COLOR_BGR2HSV, dst=scratch.get(1, image.shape))
            hue = hsv[..., 0]
            hue += np.float32(self.hue % 360)
            hue -= np.float32(360) * (hue >= 360)
            hsv[..., 1] *= np.float32(self.saturation)
            cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR, dst=pixels)
            for channel in range(3):
                np.multiply(pixels[..., 2 - channel], np.float32(scales[channel]), out=out[channel])
                out[channel] -= np.float32(shifts[channel])
            return
        planes = cv2.split(image)[::-1]
        if self.saturation == 1:
            for channel, plane in enumerate(planes):
                out[channel] = cv2.LUT(plane, (table * scales[channel] - shifts[channel]).astype(np.float32))
            return
        shape, kept = image.shape[:2], self.saturation
        for channel, plane in enumerate(planes):
            out[channel] = cv2.LUT(plane, table.astype(np.float32), dst=scratch.get(0, shape))
        largest = np.maximum(out[0], out[1], out=scratch.get(0, shape))
        np.maximum(largest, out[2], out=largest)
        for channel in range(3):
            out[channel] *= np.float32(kept * scales[channel])
            out[channel] += np.multiply(largest, np.float32((1 - kept) * scales[channel]), out=scratch.get(1, shape))
            out[channel] -= np.float32(shifts[channel])


class Scratch:
    """Memory for intermediate results, used again: fresh memory for each picture costs more than the arithmetic."""

    def __init__(self) -> None:
        self.buffers: dict[int, np.ndarray] = {}

    def get(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of `shape`, with whatever was left in it; what `get` gave for this number before is overwritten."""
        size = int(np.prod(shape))
        if number not in self.buffers or self.buffers[number].size < size:
            self.buffers[number] = np.empty(size, np.float32)
        return self.buffers[number][:size].reshape(shape)


def draw_mask(segmentation: Any, window: Window, size: tuple[int, int]) -> np.ndarray:
    """The part of an object inside the window, uint8 0 or 1 at `size` (h, w)."""
    height, width = size
    if isinstance(segmentation, list):
        polygons = [window.points(np.asarray(p, np.float64).reshape(-1, 2), width, height) for p in segmentation]
        return rle.decode(to_rle([p.ravel().tolist() for p in polygons], height, width))
    mask = rle.decode(segmentation) * np.uint8(255)
    return (cv2.warpAffine(mask, window.matrix(width, height), (width, height), flags=cv2.INTER_LINEAR) > 127).view(
        np.uint8
    )
