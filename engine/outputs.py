"""Results out: overlays, COCO JSON, instance maps, polygons, prototypes. Each file whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.errors import UserError, nearest
from engine.checkpoint import atomic_write
from engine.draw import color_of
from engine.media import marked
from engine.predictor import Detections

KINDS = ("overlay", "json", "masks", "polygons", "prototypes")


def parse_kinds(text: str) -> tuple[str, ...]:
    """ "overlay,json" -> ("overlay", "json"); UserError for an unknown one."""
    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--save {kind}: unknown kind of output{nearest(kind, KINDS)}")
    if not kinds:
        raise UserError(f"--save: name at least one of {', '.join(KINDS)}")
    return kinds


def write_image(path: Path, image: np.ndarray, result: bool = True) -> None:
    """Encode by the path's suffix and write, with a comment that says who made it if it is a `result`."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if path.suffix.lower() in (".jpg", ".jpeg") else []
    done, data = cv2.imencode(path.suffix, image, options)
    if not done:
        raise UserError(f"{path}: OpenCV cannot write pictures of this kind")
    _write_bytes(path, marked(data.tobytes()) if result else data.tobytes())


def write_json(path: Path, content: Any) -> None:
    _write_bytes(path, json.dumps(content, indent=1 if isinstance(content, dict) else None).encode() + b"\n")


def _write_bytes(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as out:
            out.write(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def write_results(
    image: np.ndarray, detections: Detections, output: Path, kinds: tuple[str, ...], origin: dict[str, Any], suffix: str
) -> list[Path]:
    """Write what `kinds` asks for, beside each other under the name `output`; the paths written.

    `origin` says where the picture came from ("file_name", or "video" and "frame") and goes into the JSON files;
    `suffix` is the overlay's.
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
        beside = output.parent.resolve()  # LabelMe looks for the picture from where the JSON lies
        given = origin.get("file_name")
        picture = os.path.relpath(Path(given).resolve(), beside) if given else output.name
        write_json(path(".polygons.json"), labelme(detections, picture))
    if "prototypes" in kinds:
        write_image(path(".prototypes.png"), prototype_sheet(detections))
    return written


def instance_map(detections: Detections) -> np.ndarray:
    """uint16 [H, W]: 0, or the number of the best detection at each pixel, counted from 1."""
    out = np.zeros(detections.size, np.uint16)
    number = 0
    for chunk in detections.iter_masks(budget=64 * 2**20):
        for mask in chunk.cpu().numpy():
            number += 1
            out[mask & (out == 0)] = number
    return out


def instance_table(detections: Detections) -> list[dict[str, Any]]:
    """What the numbers of the instance map stand for."""
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
    """The outlines of a bool mask [H, W] as points [n, 2] (x, y), and whether each is a hole."""
    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    found = []
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0] if hierarchy is not None else (), strict=True):
        points = contour[:, 0]
        if len(points) < 3:  # a single pixel or a line: its outline as a square, so that it keeps an area
            x, y, w, h = cv2.boundingRect(contour)
            points = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
        found.append((points, parent >= 0))
    return found


def labelme(detections: Detections, image_path: str) -> dict[str, Any]:
    """The detections as LabelMe reads them: one group an instance, holes as rings of their own with a flag."""
    shapes = []
    labels, scores = detections.labels.tolist(), detections.scores.tolist()
    index = 0
    for chunk in detections.iter_masks(budget=64 * 2**20):
        for mask in chunk.cpu().numpy():
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
            index += 1
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
    """The prototypes side by side, and how the coefficients of the best detections add up to masks (paper, figure 5).

    A row a detection: the sum after its 1, 2, 4, 8, 16 and all strongest prototypes, then the mask cropped to its box.
    Blue is negative, red positive. Tiles have the picture's proportions, up to 2:1.
    """
    tile = (height, round(height * min(max(detections.size[1] / detections.size[0], 0.5), 2)))
    prototypes = detections.prototypes.float().cpu().numpy()
    count = prototypes.shape[2]
    tiles = [_tile(prototypes[..., k] / max(prototypes[..., k].max(), 1e-6), tile, f"{k}") for k in range(count)]
    sheet = [tiles[i : i + 8] for i in range(0, count, 8)]
    for i in range(min(best, len(detections))):
        weights = detections.coefficients[i].float().cpu().numpy()
        order = np.argsort(-np.abs(weights))
        row = []
        for n in (1, 2, 4, 8, 16, count):
            total = prototypes[..., order[:n]] @ weights[order[:n]]
            row.append(_tile(total / max(np.abs(total).max(), 1e-6), tile, f"sum of {n}"))
        soft = 1 / (1 + np.exp(-np.clip(prototypes @ weights, -50, 50)))
        row.append(_tile(soft, tile, "sigmoid"))
        mask = next(detections[i].iter_masks())[0].cpu().numpy().astype(np.float32)
        name = detections.class_names[int(detections.labels[i])]
        row.append(_tile(mask, tile, f"{name} {float(detections.scores[i]):.2f}", color_of(i)))
        sheet.append(row)
    blank = np.full((*tile, 3), 255, np.uint8)
    return np.vstack([np.hstack(row + [blank] * (8 - len(row))) for row in sheet])


def _tile(
    values: np.ndarray, size: tuple[int, int], text: str, color: tuple[int, int, int] = (40, 40, 200)
) -> np.ndarray:
    """Values -1..1 [h, w] as a tile of `size` (height, width) with a caption: white is 0, `color` 1, blue -1."""
    values = cv2.resize(values.astype(np.float32), size[::-1])[..., None]
    ink = np.where(values > 0, np.array(color), np.array((200, 90, 30)))
    out = (255 + (ink - 255) * np.abs(values).clip(0, 1)).astype(np.uint8)
    cv2.rectangle(out, (0, 0), (size[1] - 1, size[0] - 1), (210, 210, 210), 1)
    cv2.putText(out, text, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return out
