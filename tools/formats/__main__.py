"""Convert annotations of other tools to COCO JSON.

python -m tools.formats data.yaml --output coco.json              # YOLO: coco_train.json and coco_val.json
python -m tools.formats labelme_folder --output coco.json
python -m tools.formats via_project.json --images images --output coco.json
python -m tools.formats VOCdevkit/VOC2012 --output coco.json
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as rle
from tqdm import tqdm

from data.annotation import to_rle
from tools.formats.readers import find_reader
from tools.formats.structures import NOT_FOUND, LabelledImage, Problems
from utils.device import configure_process
from utils.errors import ArgumentParser, UserError, run_main
from utils.files import write_json


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Convert YOLO, LabelMe, VIA, Pascal VOC or COCO exports to COCO JSON.")
    parser.add_argument(
        "source", type=Path, help="a data.yaml, a VIA or COCO file, or a folder of YOLO, LabelMe or VOC"
    )
    parser.add_argument("--images", type=Path, help="folder of the images, if they are not where the source says")
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write; splits get names of their own")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    configure_process()
    if args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: the suffix must be .json")
    if args.images is not None and not args.images.is_dir():
        raise UserError(f"--images {args.images}: no such folder")
    problems = Problems()
    labels = find_reader(args.source).read(args.source, args.images, problems)
    converted = {
        split: list(tqdm(images, f"reading {split or labels.format}", disable=None))
        for split, images in labels.splits.items()
    }
    used = [item.class_name for images in converted.values() for image in images for item in image.objects]
    names = list(dict.fromkeys([*labels.class_names, *used]))  # those of the source first
    if not used:
        details = "; ".join(problems.lines()) or "it has no images"
        if not args.images and (NOT_FOUND in problems.counts or not problems.lines()):
            details += "; --images DIR names the folder of the images"
        raise UserError(f"{args.source}: no object could be used ({details})")
    for split, images in converted.items():
        output = args.output.with_name(f"{args.output.stem}_{split}.json") if split else args.output
        root = common_folder(images)
        content = to_coco(images, names, root)
        write_json(output, content)
        count = len(content["annotations"])
        print(f"{labels.format}: {len(images)} images, {count} objects, {len(names)} classes -> {output}")
        print(f"  check it: python -m tools.audit --annotations {output} --image_dir {root}")
    for line in problems.lines():
        print(line)
    return 0


def common_folder(images: list[LabelledImage]) -> Path:
    """Return the deepest folder that contains all images."""
    return Path(os.path.commonpath([image.path.resolve().parent for image in images])) if images else Path(".")


def plain(segmentation: Any) -> Any:
    """Return a segmentation as JSON has it: the run lengths of an RLE as text."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
        return {**segmentation, "counts": segmentation["counts"].decode()}
    return segmentation


def to_coco(images: list[LabelledImage], names: list[str], root: Path) -> dict[str, Any]:
    """Return COCO JSON; ids count from 1, and file names are relative to `root`."""
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids = {name: number for number, name in enumerate(names, 1)}
    for image_id, image in enumerate(images, 1):
        height, width = image.size
        name = image.path.resolve().relative_to(root).as_posix()
        entries.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for item in image.objects:
            code = to_rle(item.segmentation, height, width)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[item.class_name],
                    "segmentation": plain(item.segmentation),
                    "bbox": [float(value) for value in rle.toBbox(code)],
                    "area": float(rle.area(code)),
                    "iscrowd": int(item.crowd),
                }
            )
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}


if __name__ == "__main__":
    run_main(main)
