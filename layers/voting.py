"""Box voting: detections are refined by the other boxes that were predicted for the same object."""

from __future__ import annotations

import torch
from torch import Tensor

from layers.boxes import box_iou

# Selected by the AP of the bundled weights on their validation images, see docs/experiments.md.
VOTER_SCORE = 0.05  # boxes that score above this, whatever the score threshold is, vote
VOTING_IOU = 0.75  # boxes that overlap a detection by more than this vote
FULL_SUPPORT = 30.0  # votes, each of them a score, that leave the score of a detection unchanged


def vote(
    boxes: Tensor, scores: Tensor, labels: Tensor, voters: Tensor, voter_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Refine the boxes and scores of detections.

    A detection's box becomes the mean of the boxes that overlap it, weighted by their scores for its class (Gidaris and
    Komodakis, "Object detection via a multi-region & semantic segmentation-aware CNN model", ICCV 2015).
    Its score is multiplied by the square root of the sum of these weights divided by FULL_SUPPORT, or by 1 if that is
    smaller. An object that many anchors agree on is thus ranked above a single anchor that happens to score high; in
    the same way, weighted boxes fusion (Solovyev et al. 2021) lowers the scores of boxes that few models agree on.

    The detections of B images are boxes [B, M, 4] in corner form, scores [B, M], -1 for unused slots, and labels
    [B, M]. `voters` are boxes before NMS [B, V, 4], and `voter_scores` [B, C, V] is 0 for boxes that do not vote.
    Returns the boxes; the scores, none higher than before; and the order [B, M] of decreasing scores, in which the two
    are returned, as indices into the arguments.
    """
    count = voters.shape[1]
    votes = voter_scores.gather(1, labels[..., None].expand(-1, -1, count))  # [B, M, V]
    votes = votes * (box_iou(boxes, voters) > VOTING_IOU)
    total = votes.sum(dim=2)
    mean = votes @ voters / total.clamp(min=1e-6)[..., None]
    boxes = torch.where((total > 0)[..., None], mean, boxes)
    # A detection votes for itself, even if there are too many voters and it is not among them.
    support = torch.maximum(total, scores.clamp(min=0)) / FULL_SUPPORT
    scores = torch.where(scores > 0, scores * support.clamp(max=1).sqrt(), scores)
    scores, order = scores.sort(dim=1, descending=True)
    return boxes.gather(1, order[..., None].expand_as(boxes)), scores, order
