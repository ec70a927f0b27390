"""Data structures that the network, the loss and the postprocessing exchange."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Predictions(NamedTuple):
    """The network's raw outputs for B images, A anchors, C classes and K prototypes."""

    boxes: Tensor  # [B, A, 4] offsets to the anchors, see layers.boxes.decode
    logits: Tensor  # [B, A, C + 1], background first
    coefficients: Tensor  # [B, A, K], -1..1
    prototypes: Tensor  # [B, h, w, K], non-negative; h and w are twice those of P3
    semantic: Tensor | None  # [B, C, h / 2, w / 2] logits at P3's size, in training mode only


# The ground truth of one image: boxes [n, 4] (x1, y1, x2, y2, relative to the image), labels [n] (0..C-1), masks
# [n, H, W] (0 or 1, any size), crowds [m, 4] (boxes of regions to ignore), and optionally
#   has_mask [n] (bool), false for objects of which only the box is known; their masks are empty (default: all true);
#   seed [] (int64), the seed for sampling masks, so that the sample is the same in every process and a resumed run.
Target = dict[str, Tensor]


class Selected(NamedTuple):
    """M detections per image after NMS, highest score first. Unused slots have a score of -1."""

    boxes: Tensor  # [B, M, 4] x1, y1, x2, y2 relative to the image
    scores: Tensor  # [B, M] 0..1, or -1
    labels: Tensor  # [B, M] 0..C-1
    coefficients: Tensor  # [B, M, K]
