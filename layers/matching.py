"""Assignment of anchors to objects for the training loss: by fixed IoU thresholds, or adaptive ones (ATSS)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.boxes import box_iou

# An anchor is positive if its IoU is at least the first value, negative if it is below the second, and otherwise
# ignored (released code; SSD uses 0.5 for both).
POSITIVE_IOU, NEGATIVE_IOU = 0.5, 0.4
ATSS_CANDIDATES = 9  # positions per level and object (Zhang et al., CVPR 2020, section 4.2)
FORCED_ROUNDS = (
    24  # on a GPU, see `force_matches`; 600 photos of people needed 3, 225 equal objects in a regular grid 21
)

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


def match_max_iou(boxes: Tensor, valid: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Match by fixed thresholds of the IoU of anchor and box (paper, section 5; SSD).

    Args:
        boxes: [B, n, 4] in corner form, padded to the same number for each image.
        valid: [B, n], false for padding.
        grid: the anchors.

    Returns:
        The index of each anchor's object [B, A], and how it is used [B, A]: 1 positive, 0 background, -1 ignored.
    """
    overlaps = _overlaps(boxes, valid, grid)
    best, objects = overlaps.max(dim=1)
    # Every object gets at least one positive anchor, even if none reaches POSITIVE_IOU. Changes `best` and `objects`
    # in place.
    force_matches(overlaps, best, objects)
    # Anchors between the two thresholds are ignored.
    return objects, (best >= POSITIVE_IOU).long() - ((best >= NEGATIVE_IOU) & (best < POSITIVE_IOU)).long()


def match_atss(boxes: Tensor, valid: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Match by adaptive training sample selection (Zhang et al., CVPR 2020, algorithm 1).

    For each object, the anchors at the positions nearest to its centre on each level are candidates. A candidate is
    positive if its IoU is at least the mean plus the standard deviation of the candidates' IoUs, and its centre is
    inside the box. Unlike in the paper, every object also gets its best anchor: objects between the centres would
    otherwise have none.

    Arguments and results are those of `match_max_iou`; no anchor is ignored.
    """
    overlaps = _overlaps(boxes, valid, grid)
    centres = grid.anchors[:, :2]
    distances = torch.cdist((boxes[..., :2] + boxes[..., 2:]) / 2, centres)  # [B, n, A]
    candidates, start = [], 0
    for count in grid.positions:
        level = distances[..., start : start + count * grid.per_position]
        nearest = level.topk(min(ATSS_CANDIDATES, count) * grid.per_position, dim=2, largest=False).indices
        candidates.append(nearest + start)
        start += count * grid.per_position
    chosen = torch.cat(candidates, dim=2)
    ious = overlaps.gather(2, chosen)
    threshold = ious.mean(dim=2, keepdim=True) + ious.std(dim=2, keepdim=True)
    positive = torch.zeros_like(overlaps, dtype=torch.bool).scatter_(2, chosen, ious >= threshold)
    inside = (centres > boxes[:, :, None, :2]) & (centres < boxes[:, :, None, 2:])  # [B, n, A, 2]
    positive &= inside.all(dim=-1) & valid[..., None]
    # An anchor that is positive for several objects goes to the one with the highest IoU.
    best, objects = overlaps.masked_fill(~positive, -1).max(dim=1)
    force_matches(overlaps, best, objects)
    return objects, (best >= 0).long()


def _overlaps(boxes: Tensor, valid: Tensor, grid: Grid) -> Tensor:
    """Return the IoU [B, n, A] of boxes and anchors, -1 for padding."""
    return box_iou(boxes, grid.corners.expand(len(boxes), -1, -1)).masked_fill(~valid[..., None], -1)


def force_matches(overlaps: Tensor, best: Tensor, objects: Tensor) -> None:
    """Assign to each object its best anchor that is not taken yet, in order of decreasing overlap.

    Modifies two tensors in place: in `best` [B, A] the assigned anchors get the value 2, which exceeds any threshold,
    and in `objects` [B, A] the index of their object. `overlaps` is [B, n, A], -1 for padding. At most n - 1 anchors
    are taken by other objects, so only the n best of each object are considered.

    A pair that is the best one of its object and of its anchor is a match, whatever the other pairs are. Each round
    finds all such pairs at once; then their objects and anchors are out. On a GPU, where asking whether any are left
    would synchronise with the device, FORCED_ROUNDS are taken; objects that need more get no anchor of their own.

    Ties are common, because all anchors of one size inside an object have the same IoU. The object and then the anchor
    with the lowest index comes first, as in the released code. `topk` does not define an order for ties, so the sort
    key is made unique: the bit pattern of a non-negative float, which has the order of the floats, followed by the
    reversed index.
    """
    number, num_anchors = overlaps.shape[1:]
    order = torch.arange(number * num_anchors, 0, -1, device=overlaps.device).view(number, num_anchors)
    keys = (overlaps.clamp(min=0).view(torch.int32).long() * 2**33 + order).masked_fill(overlaps < 0, 0)
    keys, anchors = keys.topk(min(number, num_anchors), dim=2)  # [B, n, count]; a key of 0 is out
    places = anchors.flatten(1)

    def best_of_anchor(values: Tensor) -> Tensor:
        """For each pair, the largest value among the pairs with the same anchor."""
        largest = torch.zeros_like(objects).scatter_reduce(1, places, values.flatten(1), "amax")
        return largest.gather(1, places).view_as(values)

    matched = torch.zeros_like(keys, dtype=torch.bool)
    on_cpu = overlaps.device.type == "cpu"
    for _ in range(number if on_cpu else FORCED_ROUNDS):
        found = (keys > 0) & (keys == keys.amax(dim=2, keepdim=True)) & (keys == best_of_anchor(keys))
        matched |= found
        keys = keys.masked_fill(found.any(dim=2, keepdim=True) | (best_of_anchor(keys * found) > 0), 0)
        if on_cpu and not keys.any():
            break
    # Pairs that do not match are written to a column that is cut off.
    columns = anchors.masked_fill(~matched, num_anchors).flatten(1)
    rows = torch.arange(number, device=overlaps.device)[:, None].expand_as(anchors).flatten(1)
    best.copy_(F.pad(best, (0, 1)).scatter(1, columns, 2.0)[:, :-1])
    objects.copy_(F.pad(objects, (0, 1)).scatter(1, columns, rows)[:, :-1])


Assigner = Callable[[Tensor, Tensor, Grid], tuple[Tensor, Tensor]]
ASSIGNERS: dict[str, Assigner] = {"max_iou": match_max_iou, "atss": match_atss}
