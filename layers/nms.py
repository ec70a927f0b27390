"""Non-maximum suppression as matrix operations on fixed shapes, and sequential NMS for comparison.

Every function takes boxes [B, N, 4] in corner form and scores [B, C, N], in which -1 marks entries that are not
candidates, and returns an NMSResult with M = min(max_detections, ...) slots per image. To add one, write a function
with this signature and enter it in NMS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from layers.boxes import box_iou
from utils.errors import UserError, nearest


class NMSResult(NamedTuple):
    """The detections that remain, best first."""

    indices: Tensor  # [B, M] into the N boxes
    scores: Tensor  # [B, M], -1 where the slot is unused
    labels: Tensor  # [B, M], 0..C-1


def fast_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 100
) -> NMSResult:
    """Fast NMS within each class (paper, section 4.1, equation 4).

    Of the `top_k` best boxes of a class, one is suppressed if any better box overlaps it by more than
    `iou_threshold`, even if that box is itself suppressed. This is what makes a single matrix operation possible: no
    decision depends on another one.
    """
    scores, index, overlaps = _candidates(boxes, scores, top_k)
    suppressed = overlaps.amax(dim=2) > iou_threshold
    return _best(scores.masked_fill(suppressed, -1.0), index, max_detections)


def cross_class_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 100
) -> NMSResult:
    """Fast NMS with the best class of each box only, so that boxes of different classes suppress each other."""
    best, labels = scores.max(dim=1, keepdim=True)
    kept = fast_nms(boxes, best, iou_threshold, top_k, max_detections)
    return kept._replace(labels=labels[:, 0].gather(1, kept.indices))


def cluster_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.5,
    top_k: int = 200,
    max_detections: int = 100,
    penalty: bool = False,
) -> NMSResult:
    """Cluster-NMS (Zheng et al. 2020): Fast NMS repeated until nothing changes, which equals sequential NMS.

    A box that is suppressed in one round no longer suppresses others in the next. With `penalty`, its variant with
    the score penalty mechanism, no box is dropped: a score decays with the overlaps with better boxes that remain.
    """
    scores, index, overlaps = _candidates(boxes, scores, top_k)
    keep = torch.ones_like(scores, dtype=torch.bool)
    for _ in range(overlaps.shape[-1]):
        before, keep = keep, (overlaps * keep[..., None]).amax(dim=2) <= iou_threshold
        if torch.equal(before, keep):  # synchronises with the device: the price of being exact
            break
    if penalty:
        decay = (-((overlaps * keep[..., None]) ** 2) / 0.2).sum(dim=2).exp()
        scores = torch.where(scores > 0, scores * decay, scores)
    else:
        scores = scores.masked_fill(~keep, -1.0)
    return _best(scores, index, max_detections)


def cluster_penalty_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 100
) -> NMSResult:
    """`cluster_nms` with its score penalty."""
    return cluster_nms(boxes, scores, iou_threshold, top_k, max_detections, penalty=True)


def standard_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 100
) -> NMSResult:
    """Sequential NMS within each class, by torchvision, one image at a time."""
    scores, index = scores.topk(min(top_k, scores.shape[2]), dim=2)
    labels = torch.arange(scores.shape[1], device=scores.device).repeat_interleave(scores.shape[2])
    kept = torch.full_like(scores.flatten(1), -1.0)
    for b in range(len(scores)):
        stay = batched_nms(boxes[b][index[b].flatten()], scores[b].flatten(), labels, iou_threshold)
        kept[b, stay] = scores[b].flatten()[stay]
    return _best(kept.view_as(scores), index, max_detections)


def _candidates(boxes: Tensor, scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `top_k` best of each class, best first.

    Returns their scores and index [B, C, K], and overlaps [B, C, K, K] of which only those with better boxes, the
    upper triangle, are not zero.
    """
    scores, index = scores.topk(min(top_k, scores.shape[2]), dim=2)
    chosen = boxes[:, None].expand(-1, scores.shape[1], -1, -1).gather(2, index[..., None].expand(-1, -1, -1, 4))
    return scores, index, box_iou(chosen, chosen).triu(diagonal=1)


def _best(scores: Tensor, index: Tensor, max_detections: int) -> NMSResult:
    """The best of all classes, from scores and index [B, C, K]."""
    top_k = scores.shape[2]
    scores, order = scores.flatten(1).topk(min(max_detections, scores[0].numel()), dim=1)
    labels = torch.div(order, top_k, rounding_mode="floor")
    return NMSResult(index.flatten(1).gather(1, order), scores, labels)


NMS: dict[str, Callable[..., NMSResult]] = {
    "fast": fast_nms,
    "cross_class": cross_class_nms,
    "cluster": cluster_nms,
    "cluster_penalty": cluster_penalty_nms,
    "standard": standard_nms,
}


def find_nms(name: str) -> Callable[..., NMSResult]:
    """Return the function called `name`, a key of NMS; UserError for an unknown name."""
    if name not in NMS:
        raise UserError(f"unknown nms {name!r}{nearest(name, NMS)}")
    return NMS[name]
