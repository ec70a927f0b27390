"""Non-maximum suppression as matrix operations on fixed shapes, and sequential NMS for comparison.

Every function takes boxes [B, N, 4] in corner form and scores [B, C, N], where -1 marks entries that are not
candidates. It returns an NMSResult with M = min(max_detections, C * min(top_k, N)) slots per image; `cross_class` has
C = 1. To add a method, write a function with this signature and register it in `NMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from layers.boxes import box_iou

# Iterations of Cluster-NMS where it cannot stop when its result is stable. On 200 images with up to 1000 candidates
# each, 13 were enough.
MAX_ITERATIONS = 16
MATRIX_BUDGET = 32 * 2**20  # bytes for one matrix of overlaps; computing it takes several of that size


class NMSResult(NamedTuple):
    """The detections of B images that are not suppressed, highest score first."""

    indices: Tensor  # [B, M] indices into the N boxes
    scores: Tensor  # [B, M], -1 where the slot is unused
    labels: Tensor  # [B, M], 0..C-1


def fast_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 100
) -> NMSResult:
    """Fast NMS within each class (paper, section 5).

    Only the `top_k` best boxes of a class are considered. A box is suppressed if its IoU with any box of a higher score
    exceeds `iou_threshold`, even if that box is itself suppressed. No decision depends on another one, so all of them
    are a single matrix operation.
    """

    def decide(scores: Tensor, overlaps: Tensor) -> Tensor:
        # Column j holds the overlaps of box j with all better boxes. Entries with a score of -1 sort last, so they
        # never suppress a candidate.
        return scores.masked_fill(overlaps.amax(dim=-2) > iou_threshold, -1.0)

    return _matrix_nms(decide, boxes, scores, top_k, max_detections)


def cross_class_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 100
) -> NMSResult:
    """Fast NMS across classes: each box has only its best class, and classes suppress each other."""
    best, labels = scores.max(dim=1, keepdim=True)
    kept = fast_nms(boxes, best, iou_threshold, top_k, max_detections)
    return NMSResult(kept.indices, kept.scores, labels[:, 0].gather(1, kept.indices))


def cluster_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.5,
    top_k: int = 200,
    max_detections: int = 100,
    penalty: bool = False,
) -> NMSResult:
    """Cluster-NMS (Zheng et al. 2020): repeat Fast NMS until its result is stable and equals that of sequential NMS.

    A box that is suppressed in one iteration does not suppress others in the next. With `penalty` (the score penalty
    mechanism), no box is removed; instead, scores decay with the IoU with better boxes that are not suppressed.

    On a GPU and in an exported graph, MAX_ITERATIONS are taken, so the result may differ from the CPU's where a longer
    chain of boxes overlaps.
    """

    def decide(scores: Tensor, overlaps: Tensor) -> Tensor:
        near = (overlaps > iou_threshold).float()
        keep = torch.ones_like(scores)
        # On a GPU, the comparison below would synchronise with the device in every iteration.
        fixed = scores.device.type != "cpu" or torch.compiler.is_compiling()
        # Each iteration settles at least one more box, so N iterations always suffice for N boxes.
        for _ in range(min(near.shape[-1], MAX_ITERATIONS) if fixed else near.shape[-1]):
            before = keep
            # Entry j of the product is the number of better boxes that remain and suppress box j.
            keep = ((keep[..., None, :] @ near)[..., 0, :] == 0).float()
            if not fixed and torch.equal(before, keep):
                break
        if not penalty:
            return scores.masked_fill(keep == 0, -1.0)
        # The product of exp(-IoU^2 / 0.2) over the remaining better boxes, with the published constant.
        decay = (-((overlaps * keep[..., None]) ** 2) / 0.2).sum(dim=-2).exp()
        return torch.where(scores > 0, scores * decay, scores)

    return _matrix_nms(decide, boxes, scores, top_k, max_detections)


def standard_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5, top_k: int = 200, max_detections: int = 100
) -> NMSResult:
    """Sequential NMS within each class with torchvision's `batched_nms`, one image at a time."""
    scores, index = scores.topk(min(top_k, scores.shape[2]), dim=2)
    labels = torch.arange(scores.shape[1], device=scores.device).repeat_interleave(scores.shape[2])
    kept = torch.full_like(scores.flatten(1), -1.0)
    for b in range(len(scores)):
        stay = batched_nms(boxes[b][index[b].flatten()], scores[b].flatten(), labels, iou_threshold)
        kept[b, stay] = scores[b].flatten()[stay]
    return _best(kept.view_as(scores), index, max_detections)


def _matrix_nms(
    decide: Callable[[Tensor, Tensor], Tensor], boxes: Tensor, scores: Tensor, top_k: int, max_detections: int
) -> NMSResult:
    """Select the `top_k` best boxes of each class, let `decide` suppress some, and select the best of all classes.

    `decide` gets scores [B, c, K] in descending order, and IoU [B, c, K, K] of box i with box j where i is ranked
    before j, and 0 elsewhere; it returns new scores. Classes are processed in groups, which bounds the memory.
    """
    scores, index = scores.topk(min(top_k, scores.shape[2]), dim=2)
    batch, classes, count = scores.shape
    # An exported graph takes any batch size, so the number of groups must not depend on it.
    group = classes if torch.compiler.is_compiling() else max(1, MATRIX_BUDGET // (4 * batch * count**2))
    decided = []
    for part, chosen in zip(scores.split(group, dim=1), index.split(group, dim=1), strict=True):
        expanded = boxes[:, None].expand(-1, chosen.shape[1], -1, -1)
        candidates = expanded.gather(2, chosen[..., None].expand(-1, -1, -1, 4))
        decided.append(decide(part, box_iou(candidates, candidates).triu(diagonal=1)))
    return _best(torch.cat(decided, dim=1), index, max_detections)


def _best(scores: Tensor, index: Tensor, max_detections: int) -> NMSResult:
    """Select the `max_detections` best boxes of all classes, from scores and indices [B, C, K]."""
    top_k = scores.shape[2]
    scores, order = scores.flatten(1).topk(min(max_detections, scores[0].numel()), dim=1)
    labels = torch.div(order, top_k, rounding_mode="floor")
    return NMSResult(index.flatten(1).gather(1, order), scores, labels)


NMS: dict[str, Callable[..., NMSResult]] = {
    "fast": fast_nms,
    "cross_class": cross_class_nms,
    "cluster": cluster_nms,
    "cluster_penalty": partial(cluster_nms, penalty=True),
    "standard": standard_nms,
}
