"""Anchor boxes for inputs of any size (paper, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from config import ModelConfig
from layers.structures import Predictions

LEVELS = (3, 4, 5, 6, 7)  # P3..P7, of strides 8..128


def feature_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return (height, width) of P3..P7 for an input of `height` x `width` pixels. Every stride-2 layer rounds up."""
    # Not -(-height // 2**level): in an exported graph, the quotient of negative numbers is rounded towards zero.
    return [tuple((side + 2**level - 1) // 2**level for side in (height, width)) for level in LEVELS]


def prototype_size(height: int, width: int) -> tuple[int, int]:
    """Return (height, width) of the prototypes for an input of `height` x `width` pixels: twice the size of P3."""
    rows, columns = feature_sizes(height, width)[0]
    return 2 * rows, 2 * columns


def make_anchors(height: int, width: int, config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Return [A, 4] anchors (cx, cy, w, h), relative to an input of `height` x `width` pixels.

    They are ordered by level, row, column, size and ratio, as the head's outputs are. An anchor of size s is
    s * sqrt(ratio) pixels wide and s / sqrt(ratio) pixels high. The published weights need other heights and centres,
    see `square_anchors` and `even_anchors` in the configuration.
    """
    levels = []
    for level, (rows, columns), sides in zip(LEVELS, feature_sizes(height, width), config.anchor_sizes, strict=True):
        shapes = [(side, ratio**0.5) for side in sides for ratio in config.aspect_ratios]
        widths = torch.tensor([side * root for side, root in shapes], dtype=torch.float64)
        heights = torch.tensor([side / root for side, root in shapes], dtype=torch.float64)
        if config.square_anchors:
            heights = widths
        # The centres in units of the stride, and how many of these units the image has. For centres at multiples of the
        # stride they are not whole if a side was rounded up: 550 / 8 = 68.75 instead of 69.
        count = (rows, columns) if config.even_anchors else (height / 2**level, width / 2**level)
        y, x = torch.meshgrid(
            (torch.arange(rows, dtype=torch.float64) + 0.5) / count[0],
            (torch.arange(columns, dtype=torch.float64) + 0.5) / count[1],
            indexing="ij",
        )
        centres = torch.stack((x, y), dim=-1)[:, :, None].expand(rows, columns, len(widths), 2)
        sizes = torch.stack((widths / width, heights / height), dim=-1).expand(rows, columns, len(widths), 2)
        levels.append(torch.cat((centres, sizes), dim=-1).reshape(-1, 4))
    # Computed in float64 and rounded once, so that the values are the same on every device.
    return torch.cat(levels).to(device=device, dtype=torch.float32)


def positions_per_level(predictions: Predictions) -> list[int]:
    """Return the number of positions of each level P3..P7. They follow from that of P3, half the prototypes' size."""
    # ceil(H / 2^k) depends on ceil(H / 8) only, so 8 * rows can replace the height H of the input.
    rows, columns = predictions.prototypes.shape[1] // 2, predictions.prototypes.shape[2] // 2
    return [height * width for height, width in feature_sizes(8 * rows, 8 * columns)]
