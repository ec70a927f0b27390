"""Write overlays, COCO JSON, instance maps and polygons. Files are written completely or not at all."""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from pycocotools import mask as rle

from config import Config
from data.image import write_image
from inference.detections import Detections
from tools.images import is_result
from tools.prototypes import prototype_sheet
from utils.errors import UserError, suggestion
from utils.files import atomic_write, write_error, write_json

OUTPUT_KINDS = ("overlay", "json", "masks", "polygons", "prototypes", "cutout", "blur")


def parse_kinds(text: str) -> tuple[str, ...]:
    """Split "overlay,json" into ("overlay", "json"). Raises UserError if a kind is unknown or none is given."""
    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    for kind in kinds:
        if kind not in OUTPUT_KINDS:
            raise UserError(f"--save {kind}: unknown kind of output{suggestion(kind, OUTPUT_KINDS)}")
    if not kinds:
        raise UserError(f"--save: name at least one of {', '.join(OUTPUT_KINDS)}")
    return kinds


def write_results(
    image: np.ndarray, detections: Detections, output: Path, kinds: Sequence[str], origin: dict[str, Any], suffix: str
) -> list[Path]:
    """Write the results of one image and return their paths.

    Args:
        image: uint8 BGR [H, W, 3].
        detections: the detections of this image.
        output: the path of all results without their suffixes.
        kinds: what to write, from OUTPUT_KINDS.
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
        write_json(path(".polygons.json"), detections.to_labelme(image_path))
    if "cutout" in kinds:
        for left in earlier_cutouts(output):  # an earlier run may have found more instances
            left.unlink()
        for number, crop in enumerate(detections.crops(image), 1):
            if crop.size:
                write_image(path(f".cutout_{number}.png"), crop)
    if "prototypes" in kinds:
        write_image(path(".prototypes.png"), prototype_sheet(detections, image))
    if "blur" in kinds:
        write_image(path(f".blur{suffix}"), detections.blur(image))
    return written


def earlier_cutouts(output: Path) -> list[Path]:
    """Return the cut-outs that an earlier run wrote for `output`."""
    pattern = f"{glob.escape(output.name)}.cutout_*.png"
    return [path for path in output.parent.glob(pattern) if is_result(path)]


class MergedCoco:
    """One COCO file for several images: `images`, `annotations` (with scores) and `categories`."""

    def __init__(self, path: Path, file: IO[bytes], config: Config, root: str):
        self.path, self.file, self.root, self.count = path, file, root, 0
        self.images: list[dict[str, Any]] = []
        pairs = zip(config.category_ids, config.class_names, strict=True)
        self.categories = [{"id": i, "name": name} for i, name in pairs]

    def add(self, image_id: int, path: Path, detections: Detections) -> None:
        """Write the detections of the next image. They do not stay in memory."""
        height, width = detections.size
        name = os.path.relpath(os.path.realpath(path), self.root)
        self.images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for result in detections.to_coco(image_id):
            self.count += 1
            area = int(rle.area(result["segmentation"]))
            line = json.dumps({"id": self.count, **result, "area": area, "iscrowd": 0}, allow_nan=False)
            self.file.write((",\n" if self.count > 1 else "\n").encode() + line.encode())


@contextmanager
def merged_coco(
    images: Sequence[Path], outputs: Sequence[Path], base: Path, config: Config
) -> Iterator[MergedCoco | None]:
    """Open a MergedCoco for several images, or return None for a single one.

    It is written to the folder `base` if one of `outputs` is below it, or else to the folder that contains all of them;
    there is none if they are in several folders. It is complete when the block ends, and not written if the block
    raises. Its file names are relative to the common folder of `images`. Raises UserError if it cannot be written.
    """
    folders = {Path(os.path.realpath(output.parent)) for output in outputs}
    below = any(Path(os.path.realpath(base)) in (folder, *folder.parents) for folder in folders)
    if len(images) < 2 or not (below or len(folders) == 1):
        yield None
        return
    folder = base if below else outputs[0].parent
    taken = {os.path.realpath(output) for output in outputs}
    names = (f"coco{number or ''}" for number in itertools.count())
    paths = (folder / f"{name}.json" for name in names if os.path.realpath(folder / name) not in taken)
    path = next(path for path in paths if not path.exists() or is_result(path))
    root = os.path.commonpath([os.path.dirname(os.path.realpath(image)) for image in images])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(b'{"annotations": [')
            merged = MergedCoco(path, file, config, root)
            yield merged
            rest = {"images": merged.images, "categories": merged.categories}
            file.write(b"\n],\n" + json.dumps(rest)[1:].encode() + b"\n")
    except OSError as error:
        raise write_error(path, error) from None


def instance_map(detections: Detections) -> np.ndarray:
    """Return a uint16 map [H, W] with the number (from 1) of the best detection at each pixel; 0 is background."""
    out = np.zeros(detections.size, np.uint16)
    for number, window in enumerate(detections.windows(), start=1):
        part = out[window.place]
        part[window.pixels & (part == 0)] = number
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
