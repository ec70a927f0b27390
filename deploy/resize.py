"""Resizing inside an exported graph, with the values of OpenCV's 8-bit resize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# OpenCV's INTER_LINEAR for 8-bit images computes in fixed point: weights have 11 bits, and bits are dropped after each
# of the two passes. Interpolating in floating point and rounding gives another value for 10 % of the pixels, which is
# enough to change detections; this gives another value, by 1, for less than 0.5 %.
WEIGHT_ONE = 2048


def resize_like_opencv(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as `cv2.resize(image, INTER_LINEAR)` does.

    Args:
        image: uint8 [B, 3, H, W].
        size: height and width of the result.

    Returns:
        float32 [B, 3, h, w] with whole values in 0..255.
    """
    height, width = image.shape[2:]
    low, high, weight = _taps(width, size[1])
    image = image.int()
    rows = image[..., low] * (WEIGHT_ONE - weight) + image[..., high] * weight
    rows = _shift(rows, 4)
    low, high, weight = _taps(height, size[0])
    weight = weight[:, None]
    total = _shift(rows[:, :, low] * (WEIGHT_ONE - weight), 16) + _shift(rows[:, :, high] * weight, 16)
    return _shift(total + 2, 2).float()


def resize_float(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [B, 3, H, W] bilinearly in floating point, as the authors do; return float32 [B, 3, h, w]."""
    return F.interpolate(image.float(), size, mode="bilinear", align_corners=False)


def _taps(length: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each of `target` output pixels, the two input pixels that it mixes, and the weight of the second.

    Output pixel i has its centre at (i + 1/2) * length / target - 1/2, computed here in whole numbers.
    """
    position = (2 * torch.arange(target) + 1) * length - target  # in units of 1 / (2 * target)
    low = torch.div(position, 2 * target, rounding_mode="floor")
    weight = torch.div(WEIGHT_ONE * (position - low * 2 * target) + target, 2 * target, rounding_mode="floor")
    outside = (low < 0) | (low >= length - 1)
    low = low.clamp(min=0).clamp(max=length - 1)
    return low, (low + 1).clamp(max=length - 1), weight.masked_fill(outside, 0).int()


def _shift(values: Tensor, bits: int) -> Tensor:
    """Shift non-negative whole numbers to the right."""
    return torch.div(values, 2**bits, rounding_mode="floor")
