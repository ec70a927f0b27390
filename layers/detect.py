"""Postprocessing of raw predictions: score threshold, box decoding and NMS, with a fixed number of detections."""

from __future__ import annotations

import torch
from torch import Tensor

from config import DetectionConfig
from layers.anchors import positions_per_level
from layers.boxes import decode
from layers.nms import NMS
from layers.structures import Predictions, Selected
from layers.voting import VOTER_SCORE, vote
from utils.errors import look_up


def detect(
    predictions: Predictions, anchors: Tensor, config: DetectionConfig, drop_weak_anchors: bool = False
) -> Selected:
    """Select anchors by their scores, decode their boxes and suppress duplicates.

    An anchor is selected if its best class scores above `config.score_threshold`. As in the authors' code, NMS then
    receives the scores of all its classes. With `config.strict_threshold`, scores below the threshold are removed
    as well. With `config.box_voting`, the detections are then refined by boxes that were suppressed.

    Args:
        predictions: raw outputs of B images.
        anchors: [A, 4] in centre form, relative to the image.
        config: thresholds, NMS and limits.
        drop_weak_anchors: remove anchors below the threshold before decoding, as the authors' code does. Same result,
            with data-dependent shapes, so for the CPU only, where it is faster.

    Returns:
        `Selected` with at most `config.top_k` slots per image.
    """
    offsets, coefficients = predictions.boxes, predictions.coefficients
    scores = predictions.logits.float().softmax(dim=-1)[..., 1:]  # [B, A, C]
    if config.pre_nms_top_k:
        # MMDetection keeps the best anchors of each level. From here on, `anchors` is [B, M, 4] instead of [A, 4].
        chosen = _best_per_level(scores.amax(dim=-1), positions_per_level(predictions), config.pre_nms_top_k)
        scores, offsets, coefficients = (take(x, chosen) for x in (scores, offsets, coefficients))
        anchors = anchors[chosen]
    # Boxes above a fixed threshold vote, so that the score of a detection does not depend on the configured one.
    lowest = min(config.score_threshold, VOTER_SCORE) if config.box_voting else config.score_threshold
    if drop_weak_anchors:
        # The images of a batch share the anchor dimension, so an anchor is kept if any image selects it.
        used = (scores.amax(dim=-1) > lowest).any(dim=0).nonzero()[:, 0]
        # Keep at least one anchor, because NMS cannot reduce over an empty dimension; its scores become -1 below.
        used = used if len(used) else used.new_zeros(1)
        scores, offsets, coefficients = (x[:, used] for x in (scores, offsets, coefficients))
        anchors = anchors[..., used, :]
    boxes = decode(offsets, anchors)
    if config.clip_boxes:
        boxes = boxes.clamp(0, 1)
    min_score = config.score_threshold if config.strict_threshold else 0.0
    best = scores.amax(dim=-1, keepdim=True)
    # -1 marks entries that are not candidates. They stay in place, so that all shapes are fixed.
    weak = (best <= config.score_threshold) | (scores < min_score)
    candidates = scores.masked_fill(weak, -1.0).transpose(1, 2)  # [B, C, A]
    top_k = config.nms_top_k
    if drop_weak_anchors:
        # Candidates sort first, so NMS needs no more boxes than there are candidates. With 80 classes, a threshold of
        # 0.3 and 1000 boxes of each class, this changes the time from 0.85 s to 7 ms.
        top_k = min(top_k, int((~weak.all(dim=2)).sum(dim=1).amax().clamp(min=1)))
    kept = look_up("nms", config.nms, NMS)(boxes, candidates, config.nms_threshold, top_k, config.top_k)
    selected = Selected(take(boxes, kept.indices), kept.scores, kept.labels, take(coefficients, kept.indices))
    if config.box_voting:
        votes = scores.masked_fill(best <= VOTER_SCORE, 0.0)
        voters = votes.amax(dim=-1).topk(min(config.nms_top_k, votes.shape[1]), dim=1).indices
        by_class = take(votes, voters).transpose(1, 2)
        voted, rescored, order = vote(selected.boxes, selected.scores, selected.labels, take(boxes, voters), by_class)
        selected = Selected(voted, rescored, selected.labels.gather(1, order), take(selected.coefficients, order))
    # Voting and Cluster-NMS with the score penalty lower scores, so the threshold is applied again.
    boxes, scores, labels, coefficients = selected
    return Selected(boxes, scores.masked_fill(scores < min_score, -1.0), labels, coefficients)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Select values [B, A] or [B, A, D] at index [B, M] -> [B, M] or [B, M, D]."""
    if values.ndim == 2:
        return values.gather(1, index)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _best_per_level(best: Tensor, positions: list[int], count: int) -> Tensor:
    """Return the indices [B, M] of the `count` highest scores within each level, for scores `best` [B, A]."""
    sizes = [number * best.shape[1] // sum(positions) for number in positions]
    chosen, start = [], 0
    for size, level in zip(sizes, best.split(sizes, dim=1), strict=True):
        chosen.append(level.topk(min(count, size), dim=1).indices + start)
        start += size
    return torch.cat(chosen, dim=1)
