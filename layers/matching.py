"""Assignment of anchors to objects for the training loss: by fixed IoU thresholds, ATSS, or task-aligned."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from layers.boxes import box_iou, decode, to_corners
from layers.structures import Target

# An anchor is positive if its IoU is at least the first value, negative if it is below the second, and otherwise
# ignored (released code; SSD uses 0.5 for both).
POSITIVE_IOU, NEGATIVE_IOU = 0.5, 0.4
ATSS_POSITIONS = 9  # candidates per level and object (Zhang et al., CVPR 2020, section 4.2)
# Task alignment: t = score ** ALPHA * IoU ** BETA, and the best TOP_K anchors inside a box are positive (Feng et al.,
# "TOOD", ICCV 2021, section 3.2; TOP_K is 13 there).
ALPHA, BETA, TOP_K = 0.5, 6.0, 10

IGNORED, BACKGROUND = -1, 0  # values of Matches.classes


class Matches(NamedTuple):
    """The training targets of every anchor."""

    objects: Tensor  # [B, A] index of the matched object in the image's target
    classes: Tensor  # [B, A] label + 1, 0 for background, -1 for ignored anchors
    boxes: Tensor  # [B, A, 4] the matched boxes in corner form, relative; meaningful for positive anchors only

    @property
    def positive(self) -> Tensor:
        return self.classes > 0


class Grid(NamedTuple):
    """The anchors of an input size, and how many of them each level has."""

    anchors: Tensor  # [A, 4] in centre form, relative to the image
    level_sizes: list[int]

    @property
    def corners(self) -> Tensor:
        return to_corners(self.anchors)


def match_max_iou(target: Target, grid: Grid, _offsets: Tensor | None, _logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Match by fixed thresholds of the IoU of anchor and box (paper, section 5; SSD).

    Returns:
        The index of each anchor's object [A], and its class [A] as in `Matches`.
    """
    overlaps = box_iou(target["boxes"], grid.corners)  # [n, A]
    best, objects = overlaps.max(dim=0)
    # Every object gets at least one positive anchor, even if none reaches POSITIVE_IOU. Changes `best` and `objects`
    # in place.
    force_matches(overlaps, best, objects)
    classes = target["labels"][objects] + 1
    # Anchors between the two thresholds are ignored.
    return objects, classes.masked_fill(best < POSITIVE_IOU, IGNORED).masked_fill(best < NEGATIVE_IOU, BACKGROUND)


def match_atss(target: Target, grid: Grid, _offsets: Tensor | None, _logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Match by adaptive training sample selection (Zhang et al., CVPR 2020, algorithm 1).

    For each object, the anchors nearest to its centre on each level are candidates. A candidate is positive if its IoU
    is at least the mean plus the standard deviation of the candidates' IoUs, and its centre is inside the box.
    """
    boxes = target["boxes"]
    overlaps = box_iou(boxes, grid.corners)
    distances = torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, grid.anchors[:, :2])
    candidates, start = [], 0
    for size, level in zip(grid.level_sizes, distances.split(grid.level_sizes, dim=1), strict=True):
        candidates.append(level.topk(min(ATSS_POSITIONS, size), dim=1, largest=False).indices + start)
        start += size
    nearest = torch.cat(candidates, dim=1)
    ious = overlaps.gather(1, nearest)
    threshold = ious.mean(dim=1, keepdim=True) + ious.std(dim=1, keepdim=True)
    positive = torch.zeros_like(overlaps, dtype=torch.bool).scatter_(1, nearest, ious >= threshold)
    return _resolve(target, overlaps, overlaps, positive & _centre_inside(boxes, grid.anchors))


def match_task_aligned(
    target: Target, grid: Grid, offsets: Tensor | None, logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Match the anchors whose present predictions are best for an object (Feng et al., "TOOD", ICCV 2021, section 3.2).

    Args:
        offsets: [A, 4] predicted by the network.
        logits: [A, C + 1]
    """
    assert offsets is not None and logits is not None
    boxes = target["boxes"]
    overlaps = box_iou(boxes, decode(offsets.detach(), grid.anchors))
    scores = logits.detach().softmax(dim=-1)[:, target["labels"] + 1].T
    inside = _centre_inside(boxes, grid.anchors)
    alignment = (scores**ALPHA * overlaps**BETA).masked_fill(~inside, -1)
    best = alignment.topk(min(TOP_K, alignment.shape[1]), dim=1).indices
    positive = torch.zeros_like(inside).scatter_(1, best, True) & inside
    return _resolve(target, overlaps, box_iou(boxes, grid.corners), positive)


def _centre_inside(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return a bool tensor [n, A]: whether the anchor's centre is inside the box."""
    centres = anchors[:, :2]
    return ((centres > boxes[:, None, :2]) & (centres < boxes[:, None, 2:])).all(dim=-1)


def _resolve(target: Target, overlaps: Tensor, anchor_overlaps: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Give anchors that are positive for several objects to the one with the highest overlap, and objects without a
    positive anchor the one with the highest anchor overlap. All tensors are [n, A]."""
    best, objects = overlaps.masked_fill(~positive, -1).max(dim=0)
    left_out = ~positive.any(dim=1, keepdim=True)
    # `force_matches` sorts non-negative values only; 0 for the others keeps them behind every real overlap.
    force_matches(anchor_overlaps * left_out, best, objects, left_out[:, 0])
    return objects, (target["labels"][objects] + 1).masked_fill(best < 0, BACKGROUND)


def force_matches(overlaps: Tensor, best: Tensor, objects: Tensor, rows: Tensor | None = None) -> None:
    """Assign to each object its best anchor that is not taken yet, in order of decreasing overlap.

    Modifies two tensors in place: in `best` [A] the assigned anchors get the value 2, which exceeds any threshold, and
    in `objects` [A] the index of their object. `overlaps` is [n, A]. At most n - 1 anchors are taken by other objects,
    so only the n best of each object are considered. No operation synchronises with the device.

    Ties are common, because all anchors of one size inside an object have the same IoU. The anchor with the lowest
    index is taken, as in the released code. `topk` does not define an order for ties, so the sort key is made unique:
    the bit pattern of a non-negative float, which has the order of the floats, followed by the reversed index.
    """
    if rows is not None:
        index = rows.nonzero()[:, 0]
        if not len(index):
            return
        overlaps = overlaps[index]
    count, num_anchors = min(overlaps.shape), overlaps.shape[1]
    order = torch.arange(num_anchors, 0, -1, device=overlaps.device)
    anchors = (overlaps.view(torch.int32).long() * 2**32 + order).topk(count, dim=1).indices
    values = overlaps.gather(1, anchors)
    for _ in range(count):
        # The best remaining pair, as an index into the flattened [n, count]; stays on the device, unlike `.item()`.
        pair = values.argmax().reshape(1)
        row, anchor = torch.div(pair, count, rounding_mode="floor"), anchors.flatten()[pair]
        best.index_fill_(0, anchor, 2.0)
        objects.index_copy_(0, anchor, row if rows is None else index[row])
        # Neither the anchor nor the object can be chosen again.
        values.masked_fill_(anchors == anchor, -1.0)
        values.index_fill_(0, row, -1.0)


Assigner = Callable[[Target, Grid, "Tensor | None", "Tensor | None"], tuple[Tensor, Tensor]]
ASSIGNERS: dict[str, Assigner] = {
    "max_iou": match_max_iou,
    "atss": match_atss,
    "task_aligned": match_task_aligned,
}


def unmatched(grid: Grid) -> tuple[Tensor, Tensor]:
    """Return objects and classes of an image without objects: every anchor is background."""
    objects = torch.zeros(len(grid.anchors), dtype=torch.long, device=grid.anchors.device)
    return objects, objects.clone()
