"""Convert annotations of other tools to COCO JSON.

python -m tools.formats data.yaml --output coco.json              # YOLO: coco_train.json and coco_val.json
python -m tools.formats labelme_folder --output coco.json
python -m tools.formats via_project.json --images images --output coco.json
python -m tools.formats VOCdevkit/VOC2012 --output coco.json
python -m tools.formats labelme_folder --split 0.2 --output coco.json    # coco_train.json; a fifth in coco_val.json
python -m tools.formats labelme_val --like coco_train.json --output coco_val.json    # with the same order of classes
"""

from __future__ import annotations

import argparse
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as rle
from tqdm import tqdm

from data.annotation import to_rle
from data.coco import read_coco_json
from tools.formats import coco
from tools.formats.readers import find_reader
from tools.formats.split import split_images
from tools.formats.structures import NOT_FOUND, LabelledImage, LabelledObject, Problems
from utils.device import configure_process
from utils.errors import ArgumentParser, UserError, count, fraction, join_names, run_main
from utils.files import write_json


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m tools.formats",
        description="Convert YOLO, LabelMe, ISAT, VIA, CVAT, Pascal VOC, masks or COCO exports to COCO JSON.",
    )
    parser.add_argument("source", type=Path, help="a data.yaml, a JSON or XML file, or the folder of an export")
    parser.add_argument("--images", type=Path, help="folder of the images, if they are not where the source says")
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write; splits get names of their own")
    parser.add_argument(
        "--split", type=fraction, metavar="SHARE", help="put this share of the images in a file for val"
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--classes", help="the classes in their order, comma-separated; others are an error")
    order.add_argument("--like", type=Path, help="a COCO file whose classes to use, in their order")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    configure_process()
    if args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: the suffix must be .json")
    if args.split is not None and not 0 < args.split < 1:
        raise UserError(f"--split {args.split:g}: must be more than 0 and less than 1")
    if args.images is not None and not args.images.is_dir():
        raise UserError(f"--images {args.images}: no such folder")
    problems = Problems()
    labels = find_reader(args.source).read(args.source, args.images, problems)
    converted = {
        split: list(tqdm(images, f"reading {split or labels.format}", disable=None))
        for split, images in labels.splits.items()
    }
    if args.split is not None:
        if len(converted) > 1:
            raise UserError(f"--split {args.split:g}: the source has splits of its own: {', '.join(converted)}")
        (images,) = converted.values()
        converted = split_images(images, args.split)
    for split, images in converted.items():
        converted[split] = named_once(images, problems)
    used = [item.class_name for images in converted.values() for image in images for item in image.objects]
    names = ordered_names(args, [*labels.class_names, *used])
    if not used:
        number = sum(map(len, converted.values()))
        nothing = f"none of its {count(number, 'image')} has an object" if number else "it has no images"
        details = "; ".join(problems.lines()) or nothing
        if not args.images and (NOT_FOUND in problems.counts or not number):
            details += "; --images DIR names the folder of the images"
        raise UserError(f"{args.source}: no object could be used ({details})")
    outputs = {
        split: args.output.with_name(f"{args.output.stem}_{split}.json") if split else args.output
        for split in converted
    }
    for output in outputs.values():
        check_output(output, args, labels.format)
    for split, images in converted.items():
        output, root = outputs[split], common_folder(images)
        content = to_coco(images, names, root, problems)
        write_json(output, content)
        objects = count(len(content["annotations"]), "object")
        classes = count(len(names), "class")
        print(f"{labels.format}: {count(len(images), 'image')}, {objects}, {classes} -> {output}")
        print(f"  check it: python -m tools.audit --annotations {output} --image_dir {root}")
    for line in problems.lines() + similar_names(names):
        print(line)
    return 0


def check_output(output: Path, args: argparse.Namespace, format: str) -> None:
    """Raise UserError if `output` exists and was read, or is not a COCO file: only results may be replaced."""
    if not output.exists():
        return
    inside = coco.files_of(args.source).values() if format == "COCO" and args.source.is_dir() else ()
    read = any(path and path.exists() and output.samefile(path) for path in (args.source, args.like, *inside))
    if read or not coco.recognise(output):
        what = "was read" if read else "is not a COCO file"
        raise UserError(f"--output {output}: exists and {what}; choose another name")


def ordered_names(args: argparse.Namespace, found: list[str]) -> list[str]:
    """Return the class names in the order of --classes or --like, or else in that of the source.

    Raises UserError if the source has other classes.
    """
    names = plain_names(found)
    if args.classes is not None:
        wanted = plain_names(name.strip() for name in args.classes.split(",") if name.strip())
    elif args.like is not None:
        wanted = plain_names(str(entry.get("name", entry["id"])) for entry in read_coco_json(args.like)["categories"])
    else:
        return names
    other = [name for name in names if name not in wanted]
    if other:
        raise UserError(f"{args.source}: has other classes: {join_names(other)}; wanted: {join_names(wanted)}")
    return wanted


def plain_names(names: Iterable[str]) -> list[str]:
    """Return each name once, in the Unicode form of `LabelledObject.class_name`."""
    return list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in names))


def named_once(images: list[LabelledImage], problems: Problems) -> list[LabelledImage]:
    """Return the images that one entry of the source names, or several with equal objects. Others are a problem."""
    entries: dict[Path, list[LabelledImage]] = {}
    for image in images:
        entries.setdefault(_absolute(image.path), []).append(image)
    kept = []
    for path, same in entries.items():
        if any(image.objects != same[0].objects for image in same):
            problems.add("images that several entries of the source name, with different objects", path.name)
        else:
            kept.append(same[0])
    return kept


def similar_names(names: list[str]) -> list[str]:
    """Return lines about class names that differ in case, spaces or punctuation only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(filter(str.isalnum, name.casefold())), []).append(name)
    return [f"nearly equal class names: {', '.join(map(repr, group))}" for group in groups.values() if len(group) > 1]


def common_folder(images: list[LabelledImage]) -> Path:
    """Return the deepest folder that contains all images."""
    return Path(os.path.commonpath([_absolute(image.path).parent for image in images])) if images else Path(".")


def _absolute(path: Path) -> Path:
    """Return the absolute path without following links, which may lead to a cache with other names."""
    return Path(os.path.abspath(path))


def geometry(item: LabelledObject, height: int, width: int) -> dict[str, Any]:
    """Return the fields "bbox", "area" and, unless only the box is known, "segmentation" of an annotation."""
    if item.box is not None:
        x1, y1, x2, y2 = item.box
        return {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
    segmentation, code = item.segmentation, to_rle(item.segmentation, height, width)
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
        segmentation = {**segmentation, "counts": segmentation["counts"].decode()}  # JSON has no bytes
    box = [float(value) for value in rle.toBbox(code)]
    return {"bbox": box, "area": float(rle.area(code)), "segmentation": segmentation}


def to_coco(images: list[LabelledImage], names: list[str], root: Path, problems: Problems) -> dict[str, Any]:
    """Return COCO JSON; ids count from 1, and file names are relative to `root`. Exact copies are left out."""
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids = {name: number for number, name in enumerate(names, 1)}
    for image_id, image in enumerate(images, 1):
        height, width = image.size
        name = _absolute(image.path).relative_to(root).as_posix()
        entries.append({"id": image_id, "file_name": name, "height": height, "width": width})
        seen = set()
        for item in image.objects:
            key = item.class_name, item.crowd, item.box or to_rle(item.segmentation, height, width)["counts"]
            if key in seen:
                problems.add("exact copies of another object of their image", name)
                continue
            seen.add(key)
            shape = geometry(item, height, width)
            if shape["area"] <= 0:
                problems.add("objects without an area inside their image", name)
                continue
            common = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[item.class_name]}
            annotations.append(common | shape | {"iscrowd": int(item.crowd)})
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}


if __name__ == "__main__":
    run_main(main)
