"""Write overlays, COCO JSON, instance maps, polygons and prototypes. Files are written completely or not at all."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch
from pycocotools import mask as rle

from data.image import is_result, write_image
from inference.detections import Detections
from inference.polygons import POLYGON_TOLERANCE
from layers.masks import mask_logits
from utils.draw import color_of
from utils.errors import UserError, nearest
from utils.files import atomic_write, write_error, write_json

KINDS = ("overlay", "json", "masks", "polygons", "prototypes", "cutout", "blur")
COLUMNS = 11  # tiles in a row of the prototype sheet: three rows for the image and 32 prototypes


@dataclass(frozen=True)
class Save:
    """What is saved: a subset of KINDS, and by how many pixels polygons may deviate from the outlines of masks."""

    kinds: tuple[str, ...]
    polygon_tolerance: float = POLYGON_TOLERANCE

    def __contains__(self, kind: str) -> bool:
        return kind in self.kinds

    def only(self, *kinds: str) -> Save:
        """Return the same without other kinds than these."""
        return replace(self, kinds=tuple(kind for kind in self.kinds if kind in kinds))


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
    image: np.ndarray, detections: Detections, output: Path, save: Save, origin: dict[str, Any], suffix: str
) -> list[Path]:
    """Write the results of one image and return their paths.

    Args:
        image: uint8 BGR [H, W, 3].
        detections: the detections of this image.
        output: the path of all results without their suffixes.
        save: what to write.
        origin: the source of the image ("file_name", or "video" and "frame"), which is added to the JSON files.
        suffix: suffix of the overlay, for example ".jpg".
    """
    written = []

    def path(ending: str) -> Path:
        written.append(output.with_name(output.name + ending))
        return written[-1]

    if "overlay" in save:
        write_image(path(suffix), detections.draw(image))
    if "json" in save:
        image_id = origin.get("image_id", origin.get("frame", 0))
        write_json(path(".json"), [origin | result for result in detections.to_coco(image_id)])
    if "masks" in save:
        write_image(path(".masks.png"), instance_map(detections))
        write_json(path(".masks.json"), origin | {"instances": instance_table(detections)})
    if "polygons" in save:
        beside = output.parent.resolve()  # LabelMe resolves the image's path from the JSON's folder
        given = origin.get("file_name")
        image_path = os.path.relpath(Path(given).resolve(), beside) if given else output.name
        write_json(path(".polygons.json"), detections.to_labelme(image_path, save.polygon_tolerance))
    if "cutout" in save:
        for left in earlier_cutouts(output):  # an earlier run may have found more instances
            left.unlink()
        for number, crop in enumerate(detections.crops(image), 1):
            if crop.size:
                write_image(path(f".cutout_{number}.png"), crop)
    if "blur" in save:
        write_image(path(f".blur{suffix}"), detections.blur(image))
    if "prototypes" in save:
        write_image(path(".prototypes.png"), prototype_sheet(detections, image))
    return written


def earlier_cutouts(output: Path) -> list[Path]:
    """Return the cut-outs that an earlier run wrote for `output`."""
    pattern = f"{glob.escape(output.name)}.cutout_*.png"
    return [path for path in output.parent.glob(pattern) if is_result(path)]


class FolderResults:
    """One COCO file for all images of a folder: `images`, `annotations` (with scores) and `categories`."""

    def __init__(self, file: IO[bytes], names: tuple[str, ...], ids: tuple[int, ...]):
        self.file, self.count = file, 0
        self.images: list[dict[str, Any]] = []
        self.categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]

    def add(self, file_name: str, detections: Detections) -> None:
        """Write the detections of the next image. They do not stay in memory."""
        height, width = detections.size
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for result in detections.to_coco(image_id):
            self.count += 1
            area = int(rle.area(result["segmentation"]))
            line = json.dumps({"id": self.count, **result, "area": area, "iscrowd": 0}, allow_nan=False)
            self.file.write((",\n" if self.count > 1 else "\n").encode() + line.encode())


@contextmanager
def folder_results(path: Path, names: tuple[str, ...], ids: tuple[int, ...]) -> Iterator[FolderResults]:
    """Open a FolderResults that is written to `path` when the block ends, and not at all if it raises.

    Raises UserError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(b'{"annotations": [')
            results = FolderResults(file, names, ids)
            yield results
            rest = {"images": results.images, "categories": results.categories}
            file.write(b"\n],\n" + json.dumps(rest)[1:].encode() + b"\n")
    except OSError as error:
        raise write_error(path, error) from None


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
    row.append(_tile(mask, size, f"{name} {float(detections.scores[i]):.2f}", color_of(i)))
    return row


def _tile_size(detections: Detections, height: int) -> tuple[int, int]:
    return height, round(height * min(max(detections.size[1] / detections.size[0], 0.5), 2))


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
