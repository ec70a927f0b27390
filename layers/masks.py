"""Prototypes and coefficients -> masks, in bounded memory (paper, section 3.2, equation 1)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def crop_limits(boxes: Tensor, height: int, width: int, padding: int = 1) -> tuple[Tensor, Tensor]:
    """Boxes [N, 4] in corner form, relative -> low and high corners [N, 2] in pixels, widened by `padding` of them.

    Corners in the wrong order are put right. The pixels p of a box are those with low <= p < high.
    """
    scale = boxes.new_tensor((width, height))
    low = torch.minimum(boxes[:, :2], boxes[:, 2:]) * scale - padding
    high = torch.maximum(boxes[:, :2], boxes[:, 2:]) * scale + padding
    return low, high


def crop_window(boxes: Tensor, height: int, width: int, padding: int = 1) -> Tensor:
    """[N, height, width] bool: the pixels inside each box, see `crop_limits`."""
    low, high = crop_limits(boxes, height, width, padding)
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


def maskness(masks: Tensor, threshold: float = 0.5) -> Tensor:
    """Soft masks [N, h, w] -> [N], 0..1: the mean of each over its pixels above `threshold`, 0 where there is none.

    Wang et al., SOLO: A Simple Framework for Instance Segmentation (2021): a mask that is sure of its pixels is more
    often a good one, which the class score does not know.
    """
    inside = masks > threshold
    return (masks * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)


def resize_masks(masks: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Soft masks [N, h, w] -> bool [N, H, W]: enlarged bilinearly, then cut at `threshold`."""
    return F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0] > threshold


def enlargement(size: int, target: int, device: torch.device) -> Tensor:
    """[target, size]: the matrix that does to a line of `size` pixels what bilinear enlargement to `target` does."""
    return F.interpolate(torch.eye(size, device=device)[None], target, mode="linear", align_corners=False)[0].T


def masks_by_window(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Masks cropped to their boxes, bool [N, H, W]: what `combine` and `resize_masks` give, computed where a mask is.

    Box by box, and it waits for their values: for a CPU.
    """
    height, width = prototypes.shape[:2]
    rows, columns = (enlargement(n, m, boxes.device) for n, m in zip((height, width), size, strict=True))
    columns = columns.T.contiguous()
    limits = boxes.new_tensor((width, height))
    low, high = (x.ceil().clamp(min=0).minimum(limits).int() for x in crop_limits(boxes, height, width))
    masks = torch.zeros((len(boxes), *size), dtype=torch.bool, device=boxes.device)
    logits = (coefficients.float() @ prototypes.float().flatten(0, 1).T).view(-1, height, width)
    for mask, logit, (x1, y1), (x2, y2) in zip(masks, logits, low.tolist(), high.tolist(), strict=True):
        soft = logit[y1:y2, x1:x2].sigmoid()
        top, bottom = _reach(y1, y2, size[0] / height, size[0])
        left, right = _reach(x1, x2, size[1] / width, size[1])
        enlarged = rows[top:bottom, y1:y2] @ soft @ columns[x1:x2, left:right]
        # PyTorch takes three times as long to write into a part of a mask.
        np.greater(enlarged.numpy(), threshold, out=mask.numpy()[top:bottom, left:right])
    return masks


def _reach(first: int, end: int, scale: float, size: int) -> tuple[int, int]:
    """The enlarged pixels, of `size`, that pixels `first`..`end` - 1 have a part in: one more to each side does."""
    return max(0, int((first - 1) * scale)), min(size, int((end + 1) * scale) + 1)


def assemble_masks(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    crop: bool = True,
    crop_after_resize: bool = False,
    by_window: bool = False,
    threshold: float = 0.5,
    budget: int = 256 * 2**20,
) -> Iterator[Tensor]:
    """The masks of one picture of `size` (H, W) as bool chunks [n, H, W], each made with about `budget` bytes.

    prototypes [h, w, K], coefficients [N, K], boxes [N, 4] (corner form, relative). Masks are cropped to their boxes
    at the prototypes' resolution and then enlarged, as the published numbers were made; `crop_after_resize` crops the
    enlarged ones too, so that nothing leaks past a box. Soft masks count where they are over `threshold`. `by_window`
    takes `masks_by_window`, the faster way on a CPU.
    """
    height, width = size
    chunk = max(1, budget // (height * width * 5))  # a float32 and a bool for every pixel
    for start in range(0, len(boxes), chunk):
        part = slice(start, start + chunk)
        if crop and by_window:
            masks = masks_by_window(prototypes, coefficients[part], boxes[part], size, threshold)
        else:
            masks = combine(prototypes, coefficients[part], boxes[part] if crop else None)
            masks = resize_masks(masks, size, threshold)
        if crop and crop_after_resize:
            masks &= crop_window(boxes[part], height, width, padding=0)
        yield masks
