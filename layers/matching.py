"""Assignment of anchors to objects for the training loss: by fixed IoU thresholds, or adaptive ones (ATSS)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from layers.boxes import box_iou
from layers.structures import Target
from utils.errors import UserError, suggestion

# An anchor is positive if its IoU is at least the first value, negative if it is below the second, and otherwise
# ignored (released code; SSD uses 0.5 for both).
POSITIVE_IOU, NEGATIVE_IOU = 0.5, 0.4
ATSS_CANDIDATES = 9  # positions per level and object (Zhang et al., CVPR 2020, section 4.2)

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
    """The anchors of an input size."""

    anchors: Tensor  # [A, 4] in centre form, relative to the image
    corners: Tensor  # [A, 4] the same in corner form
    positions: list[int]  # the number of positions of each level

    @property
    def per_position(self) -> int:
        return len(self.anchors) // sum(self.positions)


def match_max_iou(target: Target, grid: Grid) -> tuple[Tensor, Tensor]:
    """Match by fixed thresholds of the IoU of anchor and box (paper, section 5; SSD).

    Args:
        target: at least one object.
        grid: the anchors.


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


def match_atss(target: Target, grid: Grid) -> tuple[Tensor, Tensor]:
    """Match by adaptive training sample selection (Zhang et al., CVPR 2020, algorithm 1).

    For each object, the anchors at the positions nearest to its centre on each level are candidates. A candidate is
    positive if its IoU is at least the mean plus the standard deviation of the candidates' IoUs, and its centre is
    inside the box. Unlike in the paper, every object also gets its best anchor: objects between the centres would
    otherwise have none.

    Arguments and results are those of `match_max_iou`; no anchor is ignored.
    """
    boxes = target["boxes"]
    overlaps = box_iou(boxes, grid.corners)
    distances = torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, grid.anchors[:, :2])
    candidates, start = [], 0
    for count in grid.positions:
        level = distances[:, start : start + count * grid.per_position]
        nearest = level.topk(min(ATSS_CANDIDATES, count) * grid.per_position, dim=1, largest=False).indices
        candidates.append(nearest + start)
        start += count * grid.per_position
    chosen = torch.cat(candidates, dim=1)
    ious = overlaps.gather(1, chosen)
    threshold = ious.mean(dim=1, keepdim=True) + ious.std(dim=1, keepdim=True)
    positive = torch.zeros_like(overlaps, dtype=torch.bool).scatter_(1, chosen, ious >= threshold)
    positive &= _centre_inside(boxes, grid.anchors)
    # An anchor that is positive for several objects goes to the one with the highest IoU.
    best, objects = overlaps.masked_fill(~positive, -1).max(dim=0)
    force_matches(overlaps, best, objects)
    return objects, (target["labels"][objects] + 1).masked_fill(best < 0, BACKGROUND)


def _centre_inside(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return a bool tensor [n, A]: whether the anchor's centre is inside the box."""
    centres = anchors[:, :2]
    return ((centres > boxes[:, None, :2]) & (centres < boxes[:, None, 2:])).all(dim=-1)


def force_matches(overlaps: Tensor, best: Tensor, objects: Tensor) -> None:
    """Assign to each object its best anchor that is not taken yet, in order of decreasing overlap.

    Modifies two tensors in place: in `best` [A] the assigned anchors get the value 2, which exceeds any threshold, and
    in `objects` [A] the index of their object. `overlaps` is [n, A]. At most n - 1 anchors are taken by other objects,
    so only the n best of each object are considered. No operation synchronises with the device.

    Ties are common, because all anchors of one size inside an object have the same IoU. The anchor with the lowest
    index is taken, as in the released code. `topk` does not define an order for ties, so the sort key is made unique:
    the bit pattern of a non-negative float, which has the order of the floats, followed by the reversed index.
    """
    count, num_anchors = min(overlaps.shape), overlaps.shape[1]
    order = torch.arange(num_anchors, 0, -1, device=overlaps.device)
    anchors = (overlaps.view(torch.int32).long() * 2**32 + order).topk(count, dim=1).indices
    values = overlaps.gather(1, anchors)
    for _ in range(count):
        # The best remaining pair, as an index into the flattened [n, count]; stays on the device, unlike `.item()`.
        pair = values.argmax().reshape(1)
        row, anchor = torch.div(pair, count, rounding_mode="floor"), anchors.flatten()[pair]
        best.index_fill_(0, anchor, 2.0)
        objects.index_copy_(0, anchor, row)
        # Neither the anchor nor the object can be chosen again.
        values.masked_fill_(anchors == anchor, -1.0)
        values.index_fill_(0, row, -1.0)


Assigner = Callable[[Target, Grid], tuple[Tensor, Tensor]]
ASSIGNERS: dict[str, Assigner] = {"max_iou": match_max_iou, "atss": match_atss}


def find_assigner(name: str) -> Assigner:
    """Return the assigner called `name`, a key of ASSIGNERS. Raises UserError for an unknown name."""
    if name not in ASSIGNERS:
        raise UserError(f"unknown assigner {name!r}{suggestion(name, ASSIGNERS)}")
    return ASSIGNERS[name]
