"""Write overlays, COCO JSON, instance maps, polygons and prototypes. Files are written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from data.image import write_image
from inference.detections import Detections
from layers.masks import mask_logits
from utils.draw import color_of
from utils.errors import UserError, nearest
from utils.files import write_json

KINDS = ("overlay", "json", "masks", "polygons", "prototypes")


def parse_kinds(text: str) -> tuple[str, ...]:
    """Split "overlay,json" into ("overlay", "json"). Raises UserError if a kind is unknown or none is given."""
    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--save {kind}: unknown kind of output{nearest(kind, KINDS)}")
    if not kinds:
        raise UserError(f"--save: name at least one of {', '.join(KINDS)}")
    return kinds


def write_results(
    image: np.ndarray, detections: Detections, output: Path, kinds: tuple[str, ...], origin: dict[str, Any], suffix: str
) -> list[Path]:
    """Write the results of one image and return their paths.

    Args:
        image: uint8 BGR [H, W, 3].
        detections: the detections of this image.
        output: the path of all results without their suffixes.
        kinds: a subset of KINDS.
        origin: the source of the image ("file_name", or "video" and "frame"), which is added to the JSON files.
        suffix: suffix of the overlay, for example ".jpg".
    """
    written = []

    def path(ending: str) -> Path:
        written.append(output.with_name(output.name + ending))
        return written[-1]

    if "overlay" in kinds:
        write_image(path(suffix), detections.draw(image))
    if "json" in kinds:
        image_id = origin.get("image_id", origin.get("frame", 0))
        write_json(path(".json"), [origin | result for result in detections.to_coco(image_id)])
    if "masks" in kinds:
        write_image(path(".masks.png"), instance_map(detections))
        write_json(path(".masks.json"), origin | {"instances": instance_table(detections)})
    if "polygons" in kinds:
        beside = output.parent.resolve()  # LabelMe resolves the image's path from the JSON's folder
        given = origin.get("file_name")
        image_path = os.path.relpath(Path(given).resolve(), beside) if given else output.name
        write_json(path(".polygons.json"), labelme(detections, image_path))
    if "prototypes" in kinds:
        write_image(path(".prototypes.png"), prototype_sheet(detections))
    return written


def instance_map(detections: Detections) -> np.ndarray:
    """Return a uint16 map [H, W] with the number (from 1) of the best detection at each pixel; 0 is background."""
    out = np.zeros(detections.size, np.uint16)
    for number, mask in enumerate(detections.iter_masks(), start=1):
        out[mask & (out == 0)] = number
    return out


def instance_table(detections: Detections) -> list[dict[str, Any]]:
    """Return class, scores and box (x1, y1, x2, y2 in pixels) for each value of the instance map."""
    rows = zip(
        detections.labels.tolist(),
        detections.scores.tolist(),
        detections.mask_scores.tolist(),
        detections.boxes.tolist(),
        strict=True,
    )
    return [
        {
            "value": i + 1,
            "category_id": detections.category_ids[label],
            "category_name": detections.class_names[label],
            "score": score,
            "mask_score": mask_score,
            "box": box,
        }
        for i, (label, score, mask_score, box) in enumerate(rows)
    ]


def rings(mask: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """Return the contours of a bool mask [H, W] as pairs: points [n, 2] (x, y) in pixels, and whether it is a hole."""
    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    found = []
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0] if hierarchy is not None else (), strict=True):
        points = contour[:, 0]
        if len(points) < 3:  # a single pixel or a line becomes a rectangle, so that it keeps an area
            x, y, w, h = cv2.boundingRect(contour)
            points = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
        found.append((points, parent >= 0))
    return found


def labelme(detections: Detections, image_path: str) -> dict[str, Any]:
    """Return the detections in LabelMe's format. The polygons of an instance share a group_id; holes have a flag."""
    shapes = []
    labels, scores = detections.labels.tolist(), detections.scores.tolist()
    for index, mask in enumerate(detections.iter_masks()):
        for points, hole in rings(mask):
            shapes.append(
                {
                    "label": detections.class_names[labels[index]],
                    "points": points.astype(float).tolist(),
                    "group_id": index + 1,
                    "shape_type": "polygon",
                    "flags": {"hole": bool(hole)},
                    "description": f"score {scores[index]:.4f}",
                }
            )
    height, width = detections.size
    return {
        "version": "5.0.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def prototype_sheet(detections: Detections, height: int = 138, best: int = 4) -> np.ndarray:
    """Draw the prototypes, and how the coefficients of the `best` detections combine them (paper, figure 5).

    Each detection has a row: the weighted sums of the 1, 2, 4, 8, 16 and all prototypes with the largest absolute
    coefficients, the sigmoid of the full sum, and the final mask. Red is positive, blue negative. Tiles are `height`
    pixels high and have the image's aspect ratio, limited to 1/2..2. Returns uint8 BGR.
    """
    tile = (height, round(height * min(max(detections.size[1] / detections.size[0], 0.5), 2)))
    prototypes = detections.prototypes.float().cpu()
    count = prototypes.shape[2]
    planes = prototypes.permute(2, 0, 1).numpy()
    tiles = [_tile(plane / max(plane.max(), 1e-6), tile, f"{k}") for k, plane in enumerate(planes)]
    sheet = [tiles[i : i + 8] for i in range(0, count, 8)]
    for i in range(min(best, len(detections))):
        coefficients = detections.coefficients[i].float().cpu()
        order = coefficients.abs().argsort(descending=True)
        row = []
        for n in (1, 2, 4, 8, 16, count):
            strongest = torch.zeros_like(coefficients)
            strongest[order[:n]] = coefficients[order[:n]]
            total = mask_logits(prototypes, strongest[None])[0].numpy()
            row.append(_tile(total / max(np.abs(total).max(), 1e-6), tile, f"sum of {n}"))
        row.append(_tile(mask_logits(prototypes, coefficients[None])[0].sigmoid().numpy(), tile, "sigmoid"))
        mask = next(detections[i].iter_masks()).astype(np.float32)
        name = detections.class_names[int(detections.labels[i])]
        row.append(_tile(mask, tile, f"{name} {float(detections.scores[i]):.2f}", color_of(i)))
        sheet.append(row)
    blank = np.full((*tile, 3), 255, np.uint8)
    return np.vstack([np.hstack(row + [blank] * (8 - len(row))) for row in sheet])


def _tile(
    values: np.ndarray, size: tuple[int, int], text: str, color: tuple[int, int, int] = (40, 40, 200)
) -> np.ndarray:
    """Draw values -1..1 [h, w] as a tile of `size` (H, W) with a caption: white is 0, `color` is 1, blue is -1."""
    values = cv2.resize(values.astype(np.float32), size[::-1])[..., None]
    ink = np.where(values > 0, np.array(color), np.array((200, 90, 30)))
    out = (255 + (ink - 255) * np.abs(values).clip(0, 1)).astype(np.uint8)
    cv2.rectangle(out, (0, 0), (size[1] - 1, size[0] - 1), (210, 210, 210), 1)
    cv2.putText(out, text, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return out
