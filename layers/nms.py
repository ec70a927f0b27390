"""Non-maximum suppression by matrix operations, on fixed shapes; sequential NMS to compare with.

Every function takes boxes [B, N, 4] in corner form and scores [B, C, N], where an entry that does not count is -1, and
returns what is left as `Kept`: M = min(max_detections, ...) slots a picture, best first, unused slots with score -1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

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
    scores, index, overlaps = _candidates(boxes, scores, top_k)
    suppressed = overlaps.amax(dim=2) > iou_threshold
    return _best(scores.masked_fill(suppressed, -1.0), index, max_detections)


def cross_class_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 200
) -> Kept:
    """Fast NMS with one class a box, its best, so that boxes of different classes suppress each other."""
    best, labels = scores.max(dim=1, keepdim=True)
    kept = fast_nms(boxes, best, iou_threshold, top_k, max_detections)
    return kept._replace(labels=labels[:, 0].gather(1, kept.index))


def cluster_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.5,
    top_k: int = 200,
    max_detections: int = 100,
    penalty: bool = False,
) -> Kept:
    """Cluster-NMS (Zheng et al. 2020): Fast NMS repeated until nothing changes, which is what sequential NMS keeps.

    A suppressed box no longer suppresses others in the next round. With `penalty` (its variant with the score penalty
    mechanism) nothing is dropped: each box's score falls with its overlaps with the better boxes that stay.
    """
    scores, index, overlaps = _candidates(boxes, scores, top_k)
    keep = torch.ones_like(scores, dtype=torch.bool)
    for _ in range(overlaps.shape[-1]):
        before, keep = keep, (overlaps * keep[..., None]).amax(dim=2) <= iou_threshold
        if torch.equal(before, keep):  # waits for the device: the price of being exact
            break
    if penalty:
        fall = (-((overlaps * keep[..., None]) ** 2) / 0.2).sum(dim=2).exp()
        scores = torch.where(scores > 0, scores * fall, scores)
    else:
        scores = scores.masked_fill(~keep, -1.0)
    return _best(scores, index, max_detections)


def cluster_penalty_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 100
) -> Kept:
    """`cluster_nms` with its score penalty."""
    return cluster_nms(boxes, scores, iou_threshold, top_k, max_detections, penalty=True)


def standard_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 100
) -> Kept:
    """Sequential NMS within each class, torchvision's, picture by picture."""
    scores, index = scores.topk(min(top_k, scores.shape[2]), dim=2)
    labels = torch.arange(scores.shape[1], device=scores.device).repeat_interleave(scores.shape[2])
    kept = torch.full_like(scores.flatten(1), -1.0)
    for b in range(len(scores)):
        stay = batched_nms(boxes[b][index[b].flatten()], scores[b].flatten(), labels, iou_threshold)
        kept[b, stay] = scores[b].flatten()[stay]
    return _best(kept.view_as(scores), index, max_detections)


def _candidates(boxes: Tensor, scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `top_k` best of each class, best first: scores and index [B, C, K], overlap with better ones [B, C, K, K]."""
    scores, index = scores.topk(min(top_k, scores.shape[2]), dim=2)
    chosen = boxes[:, None].expand(-1, scores.shape[1], -1, -1).gather(2, index[..., None].expand(-1, -1, -1, 4))
    return scores, index, box_iou(chosen, chosen).triu(diagonal=1)


def _best(scores: Tensor, index: Tensor, max_detections: int) -> Kept:
    """The best of all classes: scores and index are [B, C, K]."""
    top_k = scores.shape[2]
    scores, order = scores.flatten(1).topk(min(max_detections, scores[0].numel()), dim=1)
    labels = torch.div(order, top_k, rounding_mode="floor")
    return Kept(index.flatten(1).gather(1, order), scores, labels)


def trimmed_nms(
    nms: Callable[..., Kept], boxes: Tensor, scores: Tensor, iou_threshold: float, top_k: int, max_detections: int
) -> Kept:
    """What `nms` keeps, found from no more boxes and classes than that takes: where looking at values costs nothing.

    A box is suppressed by better ones alone. So when the best entries fill all slots with scores that no other entry
    has, the others do not matter. Of exactly equal scores it may keep others than `nms`.
    """
    kept = [_trimmed_one(nms, *one, iou_threshold, top_k, max_detections) for one in zip(boxes, scores, strict=True)]
    return Kept(*(torch.stack(x) for x in zip(*kept, strict=True)))


def _trimmed_one(
    nms: Callable[..., Kept], boxes: Tensor, scores: Tensor, iou_threshold: float, top_k: int, max_detections: int
) -> Kept:
    """For one picture: boxes [N, 4], scores [C, N] -> all of `max_detections` slots, without the batch's dimension."""
    result = Kept(
        torch.zeros(max_detections, dtype=torch.long, device=boxes.device),
        scores.new_full((max_detections,), -1.0),
        torch.zeros(max_detections, dtype=torch.long, device=boxes.device),
    )
    total, enough = int((scores >= 0).sum()), False
    count = min(total, 4 * max_detections)
    while count and not enough:
        least = scores.flatten().topk(count).values[-1]
        entries = scores.masked_fill(scores < least, -1.0)
        labels, index = (entries >= 0).any(dim=1).nonzero()[:, 0], (entries >= 0).any(dim=0).nonzero()[:, 0]
        kept = nms(boxes[index][None], entries[labels][:, index][None], iou_threshold, top_k, max_detections)
        enough = count == total or int((kept.scores >= least).sum()) == max_detections
        count = min(total, 4 * count)
    if enough:
        for slots, found in zip(result, (index[kept.index[0]], kept.scores[0], labels[kept.labels[0]]), strict=True):
            slots[: len(found)] = found
    return result


NMS = {
    "fast": fast_nms,
    "cross_class": cross_class_nms,
    "cluster": cluster_nms,
    "cluster_penalty": cluster_penalty_nms,
    "standard": standard_nms,
}
