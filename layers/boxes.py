"""Offsets of boxes to anchors, and overlaps.

Corner form is (x1, y1, x2, y2), centre form is (cx, cy, w, h). All functions accept any leading dimensions and any
unit of length, as long as all boxes use the same one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import box_convert

VARIANCES = (0.1, 0.2)  # of centres and of sides, as in SSD (Liu et al. 2016)
# Limit on the logarithm of side / anchor side, so that the offsets of an untrained network do not overflow. The value
# is MMDetection's; trained networks do not reach it.
MAX_LOG_RATIO = math.log(1000 / 16)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the offsets [..., 4] of boxes [..., 4] to anchors [..., 4], the inverse of `decode` (SSD, section 2.2).

    Boxes are in corner form with positive sides, anchors in centre form.
    """
    boxes = box_convert(boxes, "xyxy", "cxcywh")
    centre = (boxes[..., :2] - anchors[..., :2]) / (VARIANCES[0] * anchors[..., 2:])
    size = (boxes[..., 2:] / anchors[..., 2:]).log() / VARIANCES[1]
    return torch.cat((centre, size), dim=-1)


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Offsets [..., A, 4] and anchors [A, 4] in centre form -> boxes [..., A, 4] in corner form, always float32."""
    offsets, anchors = offsets.float(), anchors.float()
    centre = anchors[..., :2] + offsets[..., :2] * VARIANCES[0] * anchors[..., 2:]
    size = anchors[..., 2:] * (offsets[..., 2:] * VARIANCES[1]).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low = centre - size / 2
    return torch.cat((low, low + size), dim=-1)


def area(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] in corner form -> areas [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Return the areas [..., N, M] of the intersections of boxes a [..., N, 4] and b [..., M, 4] in corner form."""
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    return width.clamp(min=0) * height.clamp(min=0)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over union [..., N, M] of boxes a [..., N, 4] and b [..., M, 4]; 0 if both are empty."""
    shared = intersection(a, b)
    union = area(a).unsqueeze(-1) + area(b).unsqueeze(-2) - shared
    return shared / union.clamp(min=1e-12)


def box_iof(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over foreground: the share [..., N, M] of each box of a [..., N, 4] inside each box of b
    [..., M, 4], with values in 0..1. Used for crowd regions."""
    return intersection(a, b) / area(a).unsqueeze(-1).clamp(min=1e-12)
