"""Draw the prototypes of an image, and how coefficients combine them to masks (paper, figure 5)."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from inference.detections import Detections
from layers.masks import mask_logits
from utils.draw import color_of

COLUMNS = 11  # tiles in a row of the sheet: three rows for the image and 32 prototypes


def prototype_sheet(detections: Detections, image: np.ndarray, height: int = 138, best: int = 4) -> np.ndarray:
    """Draw the image, the prototypes, and how the coefficients of the `best` detections combine them (paper, figure 5).

    The caption of a prototype states its coefficient for the best detection, and each detection has a row of
    `composition_tiles`. Tiles are `height` pixels high. Returns uint8 BGR.
    """
    tiles = prototype_tiles(detections, image, height)
    rows = [tiles[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)]
    rows += [composition_tiles(detections, i, height) for i in range(min(best, len(detections)))]
    return arrange(rows)


def arrange(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Return one image of rows of tiles of the same size; shorter rows end with white tiles."""
    columns = max(map(len, rows))
    blank = np.full_like(rows[0][0], 255)
    return np.vstack([np.hstack(row + [blank] * (columns - len(row))) for row in rows])


def prototype_tiles(detections: Detections, image: np.ndarray, height: int = 138) -> list[np.ndarray]:
    """Return tiles of the image and of each prototype, captioned with its coefficient for the best detection.

    Red is positive, blue negative. A tile is `height` pixels high and has the image's aspect ratio, limited to 1/2..2.
    """
    size = _tile_size(detections, height)
    planes = detections.prototypes.float().cpu().permute(2, 0, 1).numpy()
    weights = [f" x {value:+.2f}" for value in detections.coefficients[0].tolist()] if len(detections) else []
    weights = weights or [""] * len(planes)
    tiles = [_tile(plane / max(np.abs(plane).max(), 1e-6), size, f"{k}{weights[k]}") for k, plane in enumerate(planes)]
    return [cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), *tiles]


def composition_tiles(detections: Detections, i: int, height: int = 138) -> list[np.ndarray]:
    """Return tiles that show how detection `i` combines the prototypes to its mask (paper, figure 5).

    They are the weighted sums of the 1, 2, 4, 8, 16 and all prototypes with the largest absolute coefficients, the
    sigmoid of the full sum, and the final mask.
    """
    size = _tile_size(detections, height)
    prototypes, coefficients = detections.prototypes.float().cpu(), detections.coefficients[i].float().cpu()
    order = coefficients.abs().argsort(descending=True)
    row = []
    for n in (1, 2, 4, 8, 16, len(coefficients)):
        strongest = torch.zeros_like(coefficients)
        strongest[order[:n]] = coefficients[order[:n]]
        total = mask_logits(prototypes, strongest[None])[0].numpy()
        row.append(_tile(total / max(np.abs(total).max(), 1e-6), size, f"sum of {n}"))
    row.append(_tile(mask_logits(prototypes, coefficients[None])[0].sigmoid().numpy(), size, "sigmoid"))
    mask = next(detections[i].iter_masks()).astype(np.float32)
    name = detections.class_names[int(detections.labels[i])]
    row.append(_tile(mask, size, f"{name} {float(detections.mask_scores[i]):.2f}", color_of(i)))
    return row


def _tile_size(detections: Detections, height: int) -> tuple[int, int]:
    return height, round(height * min(max(detections.size[1] / detections.size[0], 0.5), 2))


def _tile(
    values: np.ndarray, size: tuple[int, int], text: str, color: tuple[int, int, int] = (40, 40, 200)
) -> np.ndarray:
    """Draw values -1..1 [h, w] as a tile of `size` (H, W) with a caption: white is 0, `color` is 1, blue is -1."""
    levels = np.linspace(-1, 1, 255)[:, None]
    table = (255 + (np.where(levels > 0, color, (200, 90, 30)) - 255) * np.abs(levels)).astype(np.uint8)
    values = cv2.resize(values.astype(np.float32), size[::-1]).clip(-1, 1)
    out = table[np.rint(values * 127 + 127).astype(np.uint8)]
    cv2.rectangle(out, (0, 0), (size[1] - 1, size[0] - 1), (210, 210, 210), 1)
    cv2.putText(out, text, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return out
