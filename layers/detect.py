"""Raw predictions -> a fixed number of detections a picture.

Without `trim`, and with an NMS that allows it, no shape here depends on a value and nothing waits for one: the same
code runs eagerly, inside a CUDA graph and in an exported model.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from layers.boxes import decode
from layers.nms import NMS, trimmed_nms


class Candidates(NamedTuple):
    """M detections a picture, best first. Slots with a score of -1 are unused."""

    boxes: Tensor  # [B, M, 4] corner form, relative to the picture
    scores: Tensor  # [B, M] 0..1, or -1
    labels: Tensor  # [B, M] 0..C-1
    coefficients: Tensor  # [B, M, K]


def detect(
    offsets: Tensor,
    logits: Tensor,
    coefficients: Tensor,
    anchors: Tensor,
    *,
    score_threshold: float = 0.05,
    min_score: float = 0.0,
    iou_threshold: float = 0.5,
    nms: str = "fast",
    nms_top_k: int = 200,
    max_detections: int = 100,
    level_sizes: list[int] | None = None,
    pre_nms_top_k: int = 0,
    clip_boxes: bool = False,
    trim: bool = False,
) -> Candidates:
    """Decode, choose and suppress.

    offsets [B, A, 4], logits [B, A, C + 1] with the background first, coefficients [B, A, K], anchors [A, 4].
    An anchor takes part when its best class scores over `score_threshold`, and then with all of its classes: what it
    scores for the others may come out too, unless it is under `min_score`. With `pre_nms_top_k`, only so many anchors
    of each level (their numbers are `level_sizes`) take part. `nms` is a key of layers.nms.NMS. `trim` leaves out early
    what cannot come out: the same result but for exact ties, sooner on a CPU; but shapes depend on values then.
    """
    scores = logits.float().softmax(dim=-1)[..., 1:]  # [B, A, C]
    if pre_nms_top_k and level_sizes:
        chosen = _best_per_level(scores.amax(dim=-1), level_sizes, pre_nms_top_k)
        scores, offsets, coefficients = (_take(x, chosen) for x in (scores, offsets, coefficients))
        anchors = anchors[chosen]
    if trim:
        counting = (scores.amax(dim=-1) > score_threshold).any(dim=0).nonzero()[:, 0]
        counting = counting if len(counting) else counting.new_zeros(1)
        scores, offsets, coefficients = (x[:, counting] for x in (scores, offsets, coefficients))
        anchors = anchors[..., counting, :]
    boxes = decode(offsets, anchors)
    if clip_boxes:
        boxes = boxes.clamp(0, 1)
    weak = (scores.amax(dim=-1, keepdim=True) <= score_threshold) | (scores < min_score)
    scores = scores.masked_fill(weak, -1.0).transpose(1, 2)  # [B, C, A]
    suppress = partial(trimmed_nms, NMS[nms]) if trim else NMS[nms]
    kept = suppress(boxes, scores, iou_threshold, nms_top_k, max_detections)
    return Candidates(
        _take(boxes, kept.index),
        kept.scores.masked_fill(kept.scores < min_score, -1.0),
        kept.labels,
        _take(coefficients, kept.index),
    )


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values [B, A, D] at index [B, M] -> [B, M, D]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _best_per_level(best: Tensor, level_sizes: list[int], count: int) -> Tensor:
    """Indices [B, M] of the `count` highest of `best` [B, A] within each level."""
    chosen, start = [], 0
    for size, level in zip(level_sizes, best.split(level_sizes, dim=1), strict=True):
        chosen.append(level.topk(min(count, size), dim=1).indices + start)
        start += size
    return torch.cat(chosen, dim=1)
