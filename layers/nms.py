"""Non-maximum suppression by matrix operations, on fixed shapes.

Every function takes boxes [B, N, 4] in corner form and scores [B, C, N], where an entry that does not count is -1, and
returns what is left as `Kept`: M = min(max_detections, ...) slots a picture, best first, unused slots with score -1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layers.boxes import box_iou


class Kept(NamedTuple):
    index: Tensor  # [B, M] into the N boxes
    scores: Tensor  # [B, M], -1 where the slot is unused
    labels: Tensor  # [B, M], 0..C-1


def fast_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 100
) -> Kept:
    """Fast NMS within each class (paper, section 4.1, equation 4).

    Of the `top_k` best boxes of a class, one is dropped if any better one overlaps it by more than `iou_threshold`,
    be that one dropped itself or not: this is what lets all be decided at once.
    """
    scores, index = scores.topk(min(top_k, scores.shape[2]), dim=2)  # [B, C, K]
    candidates = boxes[:, None].expand(-1, scores.shape[1], -1, -1)
    candidates = candidates.gather(2, index[..., None].expand(-1, -1, -1, 4))
    overlap = box_iou(candidates, candidates).triu(diagonal=1).amax(dim=2)  # with any better box
    scores = scores.masked_fill(overlap > iou_threshold, -1.0)
    return _best(scores, index, max_detections)


def cross_class_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 200
) -> Kept:
    """Fast NMS with one class a box, its best, so that boxes of different classes suppress each other."""
    best, labels = scores.max(dim=1, keepdim=True)
    kept = fast_nms(boxes, best, iou_threshold, top_k, max_detections)
    return kept._replace(labels=labels[:, 0].gather(1, kept.index))


def _best(scores: Tensor, index: Tensor, max_detections: int) -> Kept:
    """The best of all classes: scores and index are [B, C, K]."""
    top_k = scores.shape[2]
    scores, order = scores.flatten(1).topk(min(max_detections, scores[0].numel()), dim=1)
    labels = torch.div(order, top_k, rounding_mode="floor")
    return Kept(index.flatten(1).gather(1, order), scores, labels)


NMS = {"fast": fast_nms, "cross_class": cross_class_nms}
