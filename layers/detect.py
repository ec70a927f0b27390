"""Postprocessing of raw predictions: score threshold, box decoding and NMS, with a fixed number of detections."""

from __future__ import annotations

import torch
from torch import Tensor

from config import DetectionConfig
from layers.anchors import level_sizes
from layers.boxes import decode
from layers.nms import find_nms
from layers.structures import Candidates, Predictions


def detect(
    predictions: Predictions, anchors: Tensor, config: DetectionConfig, drop_weak_anchors: bool = False
) -> Candidates:
    """Select anchors by their scores, decode their boxes and suppress duplicates.

    An anchor is selected if its best class scores above `config.score_threshold`. As in the authors' code, NMS then
    receives the scores of all its classes. With `config.strict`, scores below the threshold are removed as well.

    Args:
        predictions: raw outputs of B images.
        anchors: [A, 4] in centre form, relative to the image.
        config: thresholds, NMS and limits.
        drop_weak_anchors: remove anchors below the threshold before decoding, as the authors' code does. Same result,
            with data-dependent shapes, so for the CPU only, where it is faster.

    Returns:
        Candidates with at most `config.top_k` slots per image.
    """
    offsets, coefficients = predictions.boxes, predictions.coefficients
    scores = predictions.logits.float().softmax(dim=-1)[..., 1:]  # [B, A, C]
    if config.pre_nms_top_k:
        # MMDetection keeps the best anchors of each level. From here on, `anchors` is [B, M, 4] instead of [A, 4].
        chosen = _best_per_level(scores.amax(dim=-1), level_sizes(predictions), config.pre_nms_top_k)
        scores, offsets, coefficients = (_take(x, chosen) for x in (scores, offsets, coefficients))
        anchors = anchors[chosen]
    if drop_weak_anchors:
        # The images of a batch share the anchor dimension, so an anchor is kept if any image selects it.
        used = (scores.amax(dim=-1) > config.score_threshold).any(dim=0).nonzero()[:, 0]
        # Keep at least one anchor, because NMS cannot reduce over an empty dimension; its scores become -1 below.
        used = used if len(used) else used.new_zeros(1)
        scores, offsets, coefficients = (x[:, used] for x in (scores, offsets, coefficients))
        anchors = anchors[..., used, :]
    boxes = decode(offsets, anchors)
    if config.clip_boxes:
        boxes = boxes.clamp(0, 1)
    min_score = config.score_threshold if config.strict else 0.0
    # -1 marks entries that are not candidates. They stay in place, so that all shapes are fixed.
    weak = (scores.amax(dim=-1, keepdim=True) <= config.score_threshold) | (scores < min_score)
    scores = scores.masked_fill(weak, -1.0).transpose(1, 2)  # [B, C, A]
    kept = find_nms(config.nms)(boxes, scores, config.nms_threshold, config.nms_top_k, config.top_k)
    return Candidates(
        _take(boxes, kept.indices),
        # Cluster-NMS with the score penalty lowers scores, so the threshold is applied again.
        kept.scores.masked_fill(kept.scores < min_score, -1.0),
        kept.labels,
        _take(coefficients, kept.indices),
    )


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Select values [B, A, D] at index [B, M] -> [B, M, D]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _best_per_level(best: Tensor, sizes: list[int], count: int) -> Tensor:
    """Return the indices [B, M] of the `count` highest scores within each level, for scores `best` [B, A]."""
    chosen, start = [], 0
    for size, level in zip(sizes, best.split(sizes, dim=1), strict=True):
        chosen.append(level.topk(min(count, size), dim=1).indices + start)
        start += size
    return torch.cat(chosen, dim=1)
