"""Mask assembly from prototypes and coefficients, in bounded memory (paper, section 3.3, equation 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from config import DetectionConfig
from utils.device import to_device, to_host
from utils.windows import MaskWindow

MASK_BUDGET = 256 * 2**20  # bytes for one chunk of masks
MaskIoU = Callable[[Tensor], Tensor]


def mask_logits(prototypes: Tensor, coefficients: Tensor) -> Tensor:
    """Prototypes [..., h, w, K] and coefficients [..., N, K] -> logits [..., N, h, w], always float32 (equation 1)."""
    height, width = prototypes.shape[-3:-1]
    planes = prototypes.float().flatten(-3, -2).transpose(-2, -1)
    return (coefficients.float() @ planes).unflatten(-1, (height, width))


def crop_limits(boxes: Tensor, height: int, width: int, padding: int = 1) -> Tensor:
    """Scale relative boxes [..., N, 4] in corner form to pixels, and widen them by `padding` pixels on each side.

    Corners in the wrong order are swapped. A box contains the pixels with x1 <= x < x2 and y1 <= y < y2. As in the
    released code, the limits are not rounded; they are also not clipped to the image.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    low = torch.minimum(x1, x2) * width - padding, torch.minimum(y1, y2) * height - padding
    high = torch.maximum(x1, x2) * width + padding, torch.maximum(y1, y2) * height + padding
    return torch.stack((*low, *high), dim=-1)


def crop_window(boxes: Tensor, height: int, width: int, padding: int = 1) -> Tensor:
    """Return a bool tensor [..., N, height, width] that is true for the pixels inside each box, see `crop_limits`.

    The authors' code pads by one pixel, so that a box narrower than a prototype pixel still contains some pixels.
    """
    x1, y1, x2, y2 = crop_limits(boxes, height, width, padding)[..., None].unbind(-2)
    x = torch.arange(width, device=boxes.device, dtype=boxes.dtype)
    y = torch.arange(height, device=boxes.device, dtype=boxes.dtype)
    columns, rows = (x >= x1) & (x < x2), (y >= y1) & (y < y2)
    return rows[..., :, None] & columns[..., None, :]


def soft_masks(prototypes: Tensor, coefficients: Tensor, boxes: Tensor | None = None) -> Tensor:
    """Prototypes [..., h, w, K] and coefficients [..., N, K] -> soft masks [..., N, h, w] with values in 0..1.

    If `boxes` are given, [..., N, 4], relative and in corner form, each mask is 0 outside its box.
    """
    masks = mask_logits(prototypes, coefficients).sigmoid()
    return masks if boxes is None else masks * crop_window(boxes, *masks.shape[-2:])


def maskness(masks: Tensor, threshold: float = 0.5) -> Tensor:
    """Return the mean [..., N] of each soft mask [..., N, h, w] over its pixels above `threshold`, or 0 without any.

    It measures the quality of a mask, which the class score does not (Wang et al., "SOLO: A Simple Framework for
    Instance Segmentation", 2021). All values are in 0..1.
    """
    inside = masks > threshold
    return (masks * inside).sum(dim=(-2, -1)) / inside.sum(dim=(-2, -1)).clamp(min=1)


def mask_scores(
    scores: Tensor, labels: Tensor, masks: Tensor, config: DetectionConfig, mask_iou: MaskIoU | None
) -> Tensor:
    """Multiply class scores [..., N] by the mask IoU that YOLACT++ predicts, and by `maskness` if configured.

    `labels` are [..., N], `masks` soft masks [..., N, h, w], cropped to their boxes, and `mask_iou` is the mask
    re-scoring network, from masks [M, h, w] to IoUs [M, C], or None.
    """
    if mask_iou is not None:
        predicted = mask_iou(masks.flatten(0, -3))
        scores = scores * predicted.gather(1, labels.reshape(-1, 1)).view_as(scores)
    return scores * maskness(masks, config.mask_threshold) if config.maskness else scores


def assemble_masks(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    config: DetectionConfig,
    budget: int = MASK_BUDGET,
) -> Iterator[Tensor]:
    """Yield the masks of one image in chunks, bool [n, H, W], using about `budget` bytes at a time.

    Soft masks are cropped to their boxes at the prototypes' resolution, upsampled, and then thresholded, as for the
    published results. A mask can therefore exceed its box by up to two prototype pixels (2/138 of the image for an
    input of 550 pixels): one from the padding of the crop, one from the interpolation. With `config.crop_after_resize`,
    the upsampled masks are cropped as well, so that no pixel lies outside a box.

    `prototypes` are [h, w, K], `coefficients` [N, K], `boxes` [N, 4] in corner form, relative to the image and on the
    CPU, and `size` is the height and width of the image. The masks are on the device of the prototypes.
    """
    height, width = size
    chunk = max(1, budget // (height * width * 5))  # a float32 and a bool per pixel
    for start in range(0, len(boxes), chunk):
        part = slice(start, start + chunk)
        if config.crop and prototypes.device.type == "cpu":  # the same masks, faster
            masks = torch.zeros((len(boxes[part]), height, width), dtype=torch.bool)
            windows = mask_windows(prototypes, coefficients[part], boxes[part], size, config)
            for mask, window in zip(masks.numpy(), windows, strict=True):
                mask[window.place] = window.pixels
            yield masks
            continue
        corners = to_device(boxes[part], prototypes.device)
        soft = soft_masks(prototypes, coefficients[part], corners if config.crop else None)
        masks = F.interpolate(soft[None], size, mode="bilinear", align_corners=False)[0] > config.mask_threshold
        if config.crop and config.crop_after_resize:
            masks &= crop_window(corners, height, width, padding=0)
        yield masks


def mask_windows(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    config: DetectionConfig,
    budget: int = MASK_BUDGET // 4,
) -> Iterator[MaskWindow]:
    """Yield the masks of `assemble_masks`, cropped to their boxes, as windows: only the pixels that each box affects.

    Bilinear upsampling is the matrix product R @ mask @ C. A window of the result needs only some rows of R and columns
    of C, and the result is the same as for whole masks.

    `boxes` are on the CPU, so that no device has to be waited for to read them. On a GPU, one product computes as many
    windows as `budget` bytes allow, and they come to the host in one copy.
    """
    height, width = prototypes.shape[:2]
    rows, columns = (_upsampling_matrix(*pair, prototypes.device) for pair in zip((height, width), size, strict=True))
    # For integers p, x1 <= p < x2 is the same as ceil(x1) <= p < ceil(x2), so ceil turns the limits into slices.
    inner = _slices(crop_limits(boxes, height, width), (height, width))
    outer = _slices(crop_limits(boxes, *size, padding=0), size)
    reaches = []
    for (x1, y1, x2, y2), limits in zip(inner, outer, strict=True):
        top, bottom = _reach(y1, y2, size[0] / height, size[0])
        left, right = _reach(x1, x2, size[1] / width, size[1])
        if config.crop_after_resize:
            left, top = max(left, limits[0]), max(top, limits[1])
            right, bottom = max(left, min(right, limits[2])), max(top, min(bottom, limits[3]))
        reaches.append((left, top, right, bottom))
    logits = mask_logits(prototypes, coefficients)
    if prototypes.device.type == "cpu":
        columns = columns.T.contiguous()
        for logit, (x1, y1, x2, y2), (left, top, right, bottom) in zip(logits, inner, reaches, strict=True):
            soft = logit[y1:y2, x1:x2].sigmoid()
            upsampled = rows[top:bottom, y1:y2] @ soft @ columns[x1:x2, left:right]
            yield MaskWindow(left, top, upsampled.numpy() > config.mask_threshold)
        return
    soft = logits.sigmoid() * crop_window(to_device(boxes, prototypes.device), height, width)
    for part, (rows_high, columns_wide) in _chunks(reaches, budget):
        # Every window of a chunk is computed in the size of the largest, and cut to its own below.
        corners = to_device(torch.tensor(reaches[part]), prototypes.device)
        y = (corners[:, 1:2] + torch.arange(rows_high, device=corners.device)).clamp(max=size[0] - 1)
        x = (corners[:, 0:1] + torch.arange(columns_wide, device=corners.device)).clamp(max=size[1] - 1)
        upsampled = rows[y] @ soft[part] @ columns[x].transpose(1, 2)
        inside = to_host(upsampled > config.mask_threshold).numpy()
        for pixels, (left, top, right, bottom) in zip(inside, reaches[part], strict=True):
            yield MaskWindow(left, top, pixels[: bottom - top, : right - left])


def _chunks(windows: list[tuple[int, int, int, int]], budget: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Split windows (x1, y1, x2, y2) into slices, each with its largest height and width.

    As float32 and bool of that size, the windows of a slice take at most `budget` bytes, unless there is only one.
    """
    start, height, width = 0, 0, 0
    for index, (x1, y1, x2, y2) in enumerate(windows):
        larger = max(height, y2 - y1), max(width, x2 - x1)
        if index > start and (index + 1 - start) * larger[0] * larger[1] * 5 > budget:
            yield slice(start, index), (height, width)
            start, larger = index, (y2 - y1, x2 - x1)
        height, width = larger
    if windows:
        yield slice(start, len(windows)), (height, width)


def _slices(limits: Tensor, size: tuple[int, int]) -> list[list[int]]:
    """Round limits [N, 4] up to whole pixels (x1, y1, x2, y2) inside an image of `size` (H, W)."""
    return limits.ceil().clamp(min=0).minimum(limits.new_tensor((size[1], size[0]) * 2)).int().tolist()


def _upsampling_matrix(size: int, target: int, device: torch.device) -> Tensor:
    """Return the matrix [target, size] that upsamples a line of `size` pixels to `target` pixels bilinearly."""
    return F.interpolate(torch.eye(size, device=device)[None], target, mode="linear", align_corners=False)[0].T


def _reach(first: int, end: int, scale: float, size: int) -> tuple[int, int]:
    """Return the range of upsampled pixels that depend on the pixels `first` to `end` - 1.

    Interpolation extends it by one pixel of the original resolution on each side.
    """
    return max(0, int((first - 1) * scale)), min(size, int((end + 1) * scale) + 1)
