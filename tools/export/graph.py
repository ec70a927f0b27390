"""The complete pipeline from 8-bit images to masks as a single exportable module."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import DetectionConfig, ModelConfig
from data.image import INPUT_STEP, resize_float, resize_like_opencv
from inference.optimize import fold_batch_norm
from inference.runtime import MASK_IOUS, NORMALISED, RAW, SOFT_MASKS
from layers.anchors import make_anchors
from layers.detect import detect
from layers.masks import crop_window, mask_scores, soft_masks
from yolact import Yolact


class RawNetwork(nn.Module):
    """The network alone: normalised RGB [B, 3, h, w] -> the four raw outputs, named in inference.runtime.RAW."""

    def __init__(self, model: Yolact):
        super().__init__()
        self.model = _prepared(model)

    def forward(self, normalised: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(normalised))[:4]


class DetectionGraph(nn.Module):
    """uint8 RGB images [B, 3, H, W] of any size -> detections, computed as `inference.Predictor` does.

    Only one dimension is data-dependent: the number of slots N, which is the largest number of detections in an image
    of the batch after NMS, and at least 1. Slots after an image's `count` are unused.

    Args:
        model: the network.
        size: height and width of the network's input, to which images are resized; or one number, the side of a square
            whose area an input with the aspect ratio of the images has, see data.image.input_size.
        detection: thresholds, NMS and limits. The NMS must have fixed shapes: any but "standard".
        expose: also return the intermediate tensors at which the graph can be cut, see `cut_points`.
        cropped: also return masks_cropped, see `forward`.
    """

    def __init__(
        self,
        model: Yolact,
        size: int | tuple[int, int],
        detection: DetectionConfig,
        expose: bool = False,
        cropped: bool = False,
    ):
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.model = _prepared(model)
        self.settings: ModelConfig = model.config.model
        self.size, self.detection, self.expose, self.cropped = size, detection, expose, cropped
        self.register_buffer("mean", torch.tensor(self.settings.mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(self.settings.std, dtype=torch.float32).view(3, 1, 1))

    @property
    def rescores(self) -> bool:
        """Whether masks are scored separately, so that the graph has a sixth output, mask_scores."""
        return self.detection.maskness or self.model.mask_iou is not None

    def output_names(self) -> tuple[str, ...]:
        """Return the names of what `forward` returns, in order."""
        names: tuple[str, ...] = ("boxes", "scores", "labels", "masks", "count")
        names += ("mask_scores",) * self.rescores + ("masks_cropped",) * self.cropped
        return names + self.cut_points() * self.expose

    def cut_points(self) -> tuple[str, ...]:
        """Return the names of the intermediate tensors at which the graph can be cut to extract the network."""
        names = (NORMALISED, *RAW)
        return names if self.model.mask_iou is None else (*names, SOFT_MASKS, MASK_IOUS)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return, for B images, N slots and images of H x W pixels:

        boxes [B, N, 4], x1, y1, x2, y2 in pixels of the image; scores [B, N], 0..1; labels [B, N], 0..C-1;
        masks [B, N, H, W], bool; count [B], the number of used slots per image; for models that score masks,
        mask_scores [B, N], by which detections are sorted with `strict_threshold`; and if `cropped`, masks_cropped
        [B, N, h, w], the masks inside their boxes, see `_inside_boxes`.
        """
        height, width = image.shape[2:]
        size = _input_size(height, width, self.size) if isinstance(self.size, int) else self.size
        normalised = self._preprocess(image, size)
        predictions = self.model(_with_own_sizes(normalised) if isinstance(self.size, int) else normalised)
        candidates = detect(predictions, make_anchors(*size, self.settings), self.detection)
        inside: dict[str, Tensor] = {NORMALISED: normalised, **dict(zip(RAW, predictions, strict=False))}

        boxes, scores, labels, coefficients = _used_slots(*candidates)
        soft = soft_masks(predictions.prototypes, coefficients, boxes if self.detection.crop else None)
        ranking = scores
        if self.rescores:
            ranking = self._mask_scores(scores, labels, soft, inside)
            if self.detection.strict_threshold:  # as Predictor does
                weak = ranking < self.detection.score_threshold
                scores, ranking = scores.masked_fill(weak, -1.0), ranking.masked_fill(weak, -1.0)
                order = ranking.argsort(dim=1, descending=True)
                boxes, soft = _reorder(boxes, order), _reorder(soft, order)
                scores, labels, ranking = (x.gather(1, order) for x in (scores, labels, ranking))
        count = (scores > 0).sum(dim=1)
        masks = F.interpolate(soft, (height, width), mode="bilinear", align_corners=False)
        masks = masks > self.detection.mask_threshold
        if self.detection.crop and self.detection.crop_after_resize:
            masks = masks & crop_window(boxes, height, width, padding=0)
        boxes = _to_pixels(boxes, height, width)
        outputs = [boxes, scores, labels, masks, count]
        if self.rescores:
            outputs.append(ranking)
        if self.cropped:
            corners = boxes.ceil().long().where((scores > 0)[..., None], 0)
            outputs.append(_inside_boxes(soft, corners, (width, height)) > self.detection.mask_threshold)
        if self.expose:
            outputs += [inside[name] for name in self.cut_points()]
        return tuple(outputs)

    def _preprocess(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 RGB [B, 3, H, W] -> normalised float32 [B, 3, h, w]; the tensor form of data.image's functions."""
        resized = (resize_like_opencv if self.settings.resize_uint8 else resize_float)(image, size)
        return (resized - self.mean) / self.std

    def _mask_scores(self, scores: Tensor, labels: Tensor, soft: Tensor, inside: dict[str, Tensor]) -> Tensor:
        def mask_iou(masks: Tensor) -> Tensor:
            inside[SOFT_MASKS], inside[MASK_IOUS] = masks, self.model.mask_iou(masks)
            return inside[MASK_IOUS]

        return mask_scores(scores, labels, soft, self.detection, mask_iou if self.model.mask_iou is not None else None)


def _input_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return what `data.image.input_size` returns, computed in the graph from the traced size of the images."""
    thinnest = side / INPUT_STEP
    root = (torch.full((), width, dtype=torch.float64) / height).sqrt().clamp(1 / thinnest, thinnest)
    steps: list[Any] = []
    for length in (side / root, side * root):
        steps.append((length / INPUT_STEP).round().clamp(min=1).long().item())
        torch._check(steps[-1] >= 1)  # torch.export cannot know the range of a value
        torch._check(steps[-1] <= side)
    return steps[0] * INPUT_STEP, steps[1] * INPUT_STEP


def _with_own_sizes(batch: Tensor) -> Tensor:
    """Return normalised images [B, 3, h, w] unchanged, with sizes that the graph counts in them.

    Otherwise all shapes in the network would be computed from the size of the images, and `inference.runtime` could not
    cut the network out of the graph.
    """
    counts: list[Any] = []
    lines = (batch[:, :1, :1, :1], 1), (batch[:1, :1, :, :1], INPUT_STEP), (batch[:1, :1, :1], INPUT_STEP)
    for values, step in lines:
        counts.append((values.isfinite().sum() // step).item())
        torch._check(counts[-1] >= 1)
        torch._check(counts[-1] * step <= values.numel())
    images, rows, columns = counts
    return batch[:images, :, : rows * INPUT_STEP, : columns * INPUT_STEP]


def _prepared(model: Yolact) -> Any:
    """Return a copy for inference, on the CPU, with batch norm folded into the convolutions."""
    model = copy.deepcopy(model).eval().cpu().requires_grad_(False)
    fold_batch_norm(model)
    return model


def _used_slots(boxes: Tensor, scores: Tensor, labels: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
    """Drop the slots that no image of the batch uses, and keep at least one."""
    used: Any = (scores > 0).sum(dim=1).max().clamp(min=1).item()  # no int(), which a traced value does not allow
    torch._check(used >= 1)  # torch.export cannot know the range of a value
    torch._check(used <= scores.shape[1])
    return boxes[:, :used], scores[:, :used], labels[:, :used], coefficients[:, :used]


def _inside_boxes(soft: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample soft masks [B, N, h', w'] to an image of `size` (W, H) inside their boxes only, to [B, N, h, w].

    `corners` [B, N, 4] are the boxes' x1, y1, x2, y2 in pixels, rounded up; h and w are the height and width of the
    largest box. The first pixel of a mask is that of the image at (x1, y1); pixels beyond x2 and y2 are 0.
    """
    matrices = []
    for axis, length in enumerate(size):
        pixels = soft.shape[3 - axis]
        first, end = corners[..., axis, None], corners[..., axis + 2, None]
        longest: Any = (end - first).max().clamp(min=1).item()
        torch._check(longest >= 1)  # torch.export cannot know the range of a value
        torch._check(longest <= length)
        position = first + torch.arange(longest)
        # Bilinear interpolation: the weight of a prototype pixel falls linearly to 0 over the distance of one pixel.
        source = ((position + 0.5) * (pixels / length) - 0.5).clamp(0, pixels - 1)
        weights = (1 - (source[..., None] - torch.arange(pixels)).abs()).clamp(min=0)
        matrices.append(weights * (position < end)[..., None])
    columns, rows = matrices
    return rows @ soft @ columns.transpose(-1, -2)


def _reorder(values: Tensor, order: Tensor) -> Tensor:
    """values [B, N, ...] at order [B, N]."""
    index = order.view(*order.shape, *(1,) * (values.ndim - 2)).expand_as(values)
    return values.gather(1, index)


def _to_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """Relative boxes [B, N, 4] -> pixels, clipped to the image."""
    x1, y1, x2, y2 = boxes.clamp(0, 1).unbind(-1)
    return torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), dim=-1)
