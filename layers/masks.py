"""Prototypes and coefficients -> masks, in bounded memory (paper, section 3.2, equation 1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_window(boxes: Tensor, height: int, width: int, padding: int = 1) -> Tensor:
    """[N, height, width] bool: the pixels inside each box, which is widened by `padding` pixels.

    boxes [N, 4] in corner form, relative; corners in the wrong order are put right.
    """
    scale = boxes.new_tensor((width, height))
    low = torch.minimum(boxes[:, :2], boxes[:, 2:]) * scale - padding
    high = torch.maximum(boxes[:, :2], boxes[:, 2:]) * scale + padding
    x = torch.arange(width, device=boxes.device, dtype=boxes.dtype)
    y = torch.arange(height, device=boxes.device, dtype=boxes.dtype)
    columns = (x >= low[:, :1]) & (x < high[:, :1])
    rows = (y >= low[:, 1:]) & (y < high[:, 1:])
    return rows[:, :, None] & columns[:, None, :]


def combine(prototypes: Tensor, coefficients: Tensor, boxes: Tensor | None = None) -> Tensor:
    """Soft masks [N, h, w], 0..1: sigmoid of prototypes [h, w, K] times coefficients [N, K], always in float32.

    With `boxes` [N, 4] (corner form, relative) each mask is 0 outside of its box.
    """
    masks = torch.einsum("hwk,nk->nhw", prototypes.float(), coefficients.float()).sigmoid()
    if boxes is not None:
        masks = masks * crop_window(boxes, *prototypes.shape[:2])
    return masks


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Soft masks [N, h, w] -> bool [N, H, W]: enlarged bilinearly, then cut at a half."""
    return F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0] > 0.5


def assemble_masks(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    crop: bool = True,
    crop_after_resize: bool = False,
    budget: int = 256 * 2**20,
) -> Iterator[Tensor]:
    """The masks of one picture of `size` (H, W) as bool chunks [n, H, W], each made with about `budget` bytes.

    prototypes [h, w, K], coefficients [N, K], boxes [N, 4] (corner form, relative). Masks are cropped to their boxes
    at the prototypes' resolution and then enlarged, as the published numbers were made; `crop_after_resize` crops the
    enlarged ones too, so that nothing leaks past a box.
    """
    height, width = size
    chunk = max(1, budget // (height * width * 5))  # a float32 and a bool for every pixel
    for start in range(0, len(boxes), chunk):
        part = slice(start, start + chunk)
        masks = combine(prototypes, coefficients[part], boxes[part] if crop else None)
        masks = resize_masks(masks, size)
        if crop and crop_after_resize:
            masks &= crop_window(boxes[part], height, width, padding=0)
        yield masks
