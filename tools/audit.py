"""Check a data set for problems before training.

python -m tools.audit --annotations train.json --image_dir images [--config yolact_r50 --set max_size=400]
python -m tools.audit --annotations train.json --image_dir images --val_annotations val.json --val_images images

Every image is read and every object measured at the network's size. The command prints a table of the classes and the
findings, writes `audit.json` and `sheet.jpg` (ground truth drawn on images) into the folder of --output, and exits with
1 if there is an error. train.py refuses to start if there are errors; warnings do not prevent training.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from config import CONFIGS, Config, get_config, parse_overrides
from data.annotation import Annotation, exact_copies, parse_annotation, to_rle
from data.augment import Window, draw_mask
from data.coco import CocoDataset, read_coco_json
from data.image import input_size, write_image
from layers.anchors import prototype_size
from tools.findings import EXAMPLES_PER_FINDING, FINDING_KINDS, Finding, too_many_crowds
from tools.formats.readers import open_coco
from tools.formats.structures import image_sizes, lost_parts
from tools.sheets import truth_sheet
from utils.device import configure_process
from utils.errors import ArgumentParser, UserError, count, run_main
from utils.files import write_json

SAMPLE = 100  # `quick_audit` reads at most this many images
NEAR_COPY_BITS = 12  # of 256: the fingerprints of two unrelated images differ in about half


@dataclass
class ImageReport:
    """Measurements of one image. `sides` are the (width, height) of its boxes in pixels of the network's input."""

    digest: str = ""
    fingerprint: np.ndarray | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)  # kind, example
    labels: list[int] = field(default_factory=list)
    sides: list[tuple[float, float]] = field(default_factory=list)
    annotations: int = 0
    crowds: int = 0


@dataclass
class Report:
    """The result of an audit."""

    basis: str  # the configuration and the input size for which objects were measured
    findings: list[Finding]
    classes: list[dict[str, Any]]  # name, id, objects, images, median_side
    images: int
    negatives: int  # images without objects
    objects: int
    crowds: int

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_error]

    def __str__(self) -> str:
        lines = [
            f"measured for {self.basis}",
            f"{count(self.images, 'image')} ({self.negatives} without objects), {count(self.objects, 'object')}, "
            f"{count(self.crowds, 'crowd')}",
            f"{'class':<24}{'id':>8}{'objects':>9}{'share':>8}{'images':>8}{'median side':>13}",
        ]
        for row in self.classes:
            share, side = row["objects"] / max(1, self.objects), row["median_side"]
            lines.append(
                f"{row['name'][:23]:<24}{row['id']:>8}{row['objects']:>9}{share:>8.1%}{row['images']:>8}"
                f"{f'{side:.0f} px' if side else '-':>13}"
            )
        return "\n".join([*lines, "", *(map(str, self.findings) if self.findings else ["no problems found"])])

    def as_dict(self) -> dict[str, Any]:
        findings = [dataclasses.asdict(finding) | {"error": finding.is_error} for finding in self.findings]
        return {**dataclasses.asdict(self), "findings": findings}


def audit(
    dataset: CocoDataset,
    config: Config,
    sample: Sequence[int] | None = None,
    val: CocoDataset | None = None,
    progress: bool = False,
) -> Report:
    """Check whether a data set is suitable for training with `config`.

    Args:
        dataset: the data set to check.
        config: gives the input and prototype sizes at which objects are measured.
        sample: indices of the images to read. Default: all images.
        val: a validation set, which must have the same classes and share no images with `dataset`.
        progress: show a progress bar if the output is a terminal.
    """
    indices = range(len(dataset)) if sample is None else sample
    reports = _inspect_all(dataset, indices, config, progress)
    problems: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        for kind, example in report.problems:
            problems[kind].append(example)
    names = [dataset.file_name(i) for i in indices]
    problems["same_image"] = _same_images(names, reports)
    _check_index(dataset, reports, problems, sampled=sample is not None)
    if val is not None:
        _compare(dataset, reports, val, config, problems, progress)
    totals = _totals(dataset, reports, val)
    findings = [
        Finding(name, len(problems[name]), totals[kind.of], problems[name][:EXAMPLES_PER_FINDING])
        for name, kind in FINDING_KINDS.items()
        if problems[name]
    ]
    return Report(
        f"{config.name} at {config.model.max_size} px",
        findings,
        _class_rows(dataset, reports),
        len(reports),
        sum(not report.labels for report in reports),
        totals["objects"],
        sum(report.crowds for report in reports),
    )


def _check_index(
    dataset: CocoDataset, reports: list[ImageReport], problems: dict[str, list[str]], sampled: bool
) -> None:
    """Add the problems of the annotation file as a whole; with `sampled`, `reports` covers only some of its images."""
    listed = [dataset.annotations(i) for i in range(len(dataset))]
    ids = [a.get("id") for some in listed for a in some] + [orphan["id"] for orphan in dataset.orphans]
    used = {label for report in reports for label in report.labels}
    if sampled:  # a class is unused only if no image of the file has it, read or not
        used |= {dataset.labels[a["category_id"]] for some in listed for a in some if not a["iscrowd"]}
    problems["listed_twice"] = _repeated([dataset.file_name(i) for i in range(len(dataset))])
    problems["orphan"] = [f"annotation {orphan['id']} of image {orphan['image_id']}" for orphan in dataset.orphans]
    problems["same_id"] = [str(key) for key, n in Counter(map(str, ids)).items() for _ in range(n - 1)]
    odd_ids = [f"annotation id {key!r}" for key in ids if not isinstance(key, (int, str))]
    problems["text_id"] = odd_ids if sampled else _text_ids(dataset.path) + odd_ids
    problems["unused_class"] = [name for label, name in enumerate(dataset.class_names) if label not in used]
    problems["same_name"] = _repeated(list(dataset.class_names))
    crowds = [f"annotation {a.get('id')}" for some in listed for a in some if a["iscrowd"]]
    if too_many_crowds(len(crowds), sum(map(len, listed))):
        problems["crowds"] = crowds
    elif not used:
        problems["no_object"] = [dataset.path.name]
    with_masks = any(a.get("segmentation") for some in listed for a in some)
    if any(listed) and not with_masks:
        # A detection data set, whose masks are not damaged: it never had any.
        problems["detection_only"] = problems.pop("no_mask", [])


def _text_ids(path: Path) -> list[str]:
    """List the ids that are strings instead of integers. They are accepted here, but not by all other tools."""
    content = read_coco_json(path)
    fields = {"images": ("id",), "categories": ("id",), "annotations": ("id", "image_id", "category_id")}
    return [
        f"{key} of {section} {entry[key]!r}"
        for section, keys in fields.items()
        for entry in content.get(section, [])
        for key in keys
        if isinstance(entry.get(key), str)
    ]


def _totals(dataset: CocoDataset, reports: list[ImageReport], val: CocoDataset | None) -> dict[str, int]:
    """Return the totals that findings are counted out of, see `of` in tools.findings."""
    annotations = dataset.num_annotations + len(dataset.orphans)
    return {
        "images": len(reports),
        "listed images": len(dataset),
        "annotations": sum(report.annotations for report in reports),
        "listed annotations": annotations,
        "objects": sum(len(report.labels) for report in reports),
        "classes": len(dataset.class_names),
        "files": 1,
        "ids": len(dataset) + len(dataset.class_names) + 3 * annotations,  # id, image_id, category_id
        "classes of both files": len(set(dataset.class_names) | set(() if val is None else val.class_names)),
        "val images": 0 if val is None else len(val),
    }


def _inspect_all(dataset: CocoDataset, indices: Sequence[int], config: Config, progress: bool) -> list[ImageReport]:
    with ThreadPoolExecutor() as pool:
        work = pool.map(lambda index: inspect_image(dataset, index, config), indices)
        return list(tqdm(work, "auditing", len(indices), disable=None if progress else True))


def inspect_image(dataset: CocoDataset, index: int, config: Config) -> ImageReport:
    """Read an image, measure its objects and return a report; an unreadable image is a problem, not an exception."""
    report, size = ImageReport(), dataset.stated_size(index)
    try:
        path = dataset.image_path(index)
        if not path.is_file():
            report.problems.append(("missing", str(path)))
        else:
            image = dataset.read_image(index)
            size = (image.shape[0], image.shape[1])
            report.digest = hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()  # of the pixels
            report.fingerprint = fingerprint(image)
            upright, stored, changed = image_sizes(path)
            if changed and dataset.stated_size(index) == stored:
                kind = "unsure_rotation" if upright == stored else "stored_pixels"
                report.problems.append((kind, dataset.file_name(index)))
    except UserError as error:
        outside = "out of the image folder" in str(error)
        report.problems.append(("missing" if outside else "unreadable", str(error)))
    annotations = dataset.annotations(index)
    report.annotations = len(annotations)
    where = f"image {dataset.image_ids[index]} ({dataset.file_name(index)})"
    report.problems += [("same_annotation", where)] * len(exact_copies(annotations))
    for entry in annotations if size is not None else ():
        assert size is not None
        annotation = parse_annotation(entry, dataset.labels[entry["category_id"]], *size)
        for kind in _inspect_annotation(report, entry, annotation, config, size):
            report.problems.append((kind, f"annotation {entry.get('id')} of {where}"))
    return report


def _inspect_annotation(
    report: ImageReport, entry: dict[str, Any], annotation: Annotation, config: Config, size: tuple[int, int]
) -> Iterator[str]:
    """Add the measurements of one annotation to `report`; yield the kinds (keys of FINDING_KINDS) of its problems.

    `size` is the (height, width) of the image in pixels.
    """
    height, width = size
    if entry.get("bbox") is not None and annotation.stated_box is None:
        yield "bad_box"
    if annotation.box is None:
        yield "unusable"
        return
    coordinates = np.array(annotation.stated_box or annotation.box)
    # Integral boxes such as (0, 0, 1, 1) may be real objects of one pixel.
    if coordinates.max() <= 1 and (coordinates != coordinates.round()).any():
        yield "relative"
        return
    if annotation.crowd:
        report.crowds += 1
        return
    x1, y1, x2, y2 = annotation.box
    side = config.model.max_size
    network = input_size((height, width), side) if config.model.preserve_aspect_ratio else (side, side)
    sides = (x2 - x1) * network[1] / width, (y2 - y1) * network[0] / height
    report.labels.append(annotation.label)
    report.sides.append(sides)
    if min(sides) < 4:
        yield "tiny"
    if annotation.segmentation is None:
        if annotation.stated_box is not None and _looks_like_corners(annotation.stated_box, size):
            yield "corner_box"
        yield "no_mask"
        return
    if lost_parts(entry["segmentation"], annotation.segmentation):
        yield "lost_part"
    code = to_rle(annotation.segmentation, height, width)
    if rle.area(code) == 0:
        yield "empty_mask"
        return
    if annotation.area(height, width)[1]:
        yield "area"
    drawn = rle.toBbox(code).tolist()
    # A box that matches its mask only when its values are read as x1, y1, x2, y2 was stored in that form.
    if _iou([x1, y1, x2 - x1, y2 - y1], drawn) < 0.5:
        a, b, c, d = annotation.stated_box or (0, 0, 0, 0)
        yield "corner_box" if _iou([a, b, c - a, d - b], drawn) > 0.7 else "box_and_mask"
    if not draw_mask(annotation.segmentation, Window(0, 0, width, height), prototype_size(*network)).any():
        yield "vanishing_mask"


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the IoU of two boxes (x, y, w, h), each padded by one pixel on every side.

    Boxes of masks are rounded to whole pixels, which would dominate the IoU of tiny objects.
    """
    if min(a[2], a[3], b[2], b[3]) < 0:
        return 0.0
    grown = [[x - 1, y - 1, w + 2, h + 2] for x, y, w, h in (a, b)]
    return float(rle.iou([grown[0]], [grown[1]], [0])[0, 0])


def _looks_like_corners(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Return whether a box exceeds the image if read as (x, y, w, h), but lies within it as (x1, y1, x2, y2)."""
    (a, b, c, d), (height, width) = box, size
    return (a + c > width + 1 or b + d > height + 1) and c > a and d > b and c <= width + 1 and d <= height + 1


def fingerprint(image: np.ndarray) -> np.ndarray | None:
    """Return a difference hash, bool [256], that is robust to resizing and compression.

    Each bit says whether a cell of a 16x17 thumbnail is brighter than its left neighbour. Returns None for an image
    without contrast, whose bits would be noise.
    """
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (17, 16), interpolation=cv2.INTER_AREA).astype(int)
    return (grey[:, 1:] > grey[:, :-1]).ravel() if grey.std() > 4 else None


def _compare(
    train: CocoDataset,
    reports: list[ImageReport],
    val: CocoDataset,
    config: Config,
    problems: dict[str, list[str]],
    progress: bool,
) -> None:
    """Compare a training and a validation set; add class mismatches and shared images to `problems`.

    `reports` are those of all images of `train`, in order.
    """
    problems["other_classes"] = sorted(set(val.class_names) - set(train.class_names))
    if not problems["other_classes"] and train.class_names != val.class_names:
        problems["class_order"] = [f"{', '.join(train.class_names)} and {', '.join(val.class_names)}"]
    others = _inspect_all(val, range(len(val)), config, progress)
    unusable = [example for report in others for kind, example in report.problems if kind in ("missing", "unreadable")]
    problems["val_unusable"] = unusable
    names = {report.digest: train.file_name(i) for i, report in enumerate(reports) if report.digest}
    known = [(i, report.fingerprint) for i, report in enumerate(reports) if report.fingerprint is not None]
    bits = np.array([b for _, b in known], bool).reshape(-1, 256)
    for index, report in enumerate(others):
        name = val.file_name(index)
        if report.digest in names:
            problems["shared_image"].append(f"{name} is identical to {names[report.digest]}")
        elif report.fingerprint is not None and len(bits):
            distance = (bits ^ report.fingerprint).sum(axis=1)
            if distance.min() <= NEAR_COPY_BITS:
                problems["near_copy"].append(f"{name} and {train.file_name(known[int(distance.argmin())][0])}")


def _same_images(names: list[str], reports: list[ImageReport]) -> list[str]:
    first: dict[str, str] = {}
    return [
        f"{name} and {first[report.digest]}"
        for name, report in zip(names, reports, strict=True)
        if report.digest and first.setdefault(report.digest, name) != name
    ]


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _class_rows(dataset: CocoDataset, reports: list[ImageReport]) -> list[dict[str, Any]]:
    """Count the objects and images of each class; `median_side` is the median of sqrt(w * h) over its boxes."""
    sides: dict[int, list[float]] = defaultdict(list)
    seen: Counter[int] = Counter()
    for report in reports:
        for label, (w, h) in zip(report.labels, report.sides, strict=True):
            sides[label].append((w * h) ** 0.5)
        seen.update(set(report.labels))
    return [
        {
            "name": name,
            "id": dataset.category_ids[label],
            "objects": len(sides[label]),
            "images": seen[label],
            "median_side": float(np.median(sides[label])) if sides[label] else None,
        }
        for label, name in enumerate(dataset.class_names)
    ]


def quick_audit(dataset: CocoDataset, config: Config) -> list[Finding]:
    """Audit a sample of the images with their annotations, and all ids and classes, when a script starts.

    Prints errors and warnings except those about small objects, repeated images and ids, which only the full audit
    reports. Returns the errors.
    """
    sample = range(0, len(dataset), -(-len(dataset) // SAMPLE))
    report = audit(dataset, config, sample)
    quiet = ("tiny", "vanishing_mask", "same_image", "same_id", "text_id")
    shown = [finding for finding in report.findings if finding.is_error or finding.kind not in quiet]
    for finding in shown:
        print(f"{dataset.path}: {finding}")
    if shown:
        command = f"python -m tools.audit --annotations {dataset.path} --image_dir {dataset.image_dir}"
        command += f" --config {config.name}" if config.name in CONFIGS else ""
        print(f"for the full report, run: {command}")
    return report.errors


def default_output(annotations: Path) -> Path:
    """Return a folder under `audit` named after the file, with a number appended if that folder exists."""
    base = Path("audit") / annotations.stem
    candidates = [base, *(base.with_name(f"{base.name}_{n}") for n in range(2, 1000))]
    return next((path for path in candidates if not path.exists()), base)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Check a data set for problems before training.", allow_abbrev=False)
    parser.add_argument("--annotations", type=Path, required=True, help="annotation file (COCO JSON)")
    parser.add_argument("--image_dir", type=Path, required=True, help="the folder of its images")
    parser.add_argument("--val_annotations", type=Path, help="annotation file of the validation set to compare with")
    parser.add_argument("--val_images", type=Path, help="image folder of the validation set (default: --image_dir)")
    parser.add_argument(
        "--config", default="yolact_r50", help="configuration that defines the input size (default: %(default)s)"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value", help="as in train.py")
    parser.add_argument("--output", type=Path, help="folder for audit.json and sheet.jpg, by default audit/NAME")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args: argparse.Namespace = build_parser().parse_args(argv)
    configure_process()
    if args.val_images and not args.val_annotations:
        raise UserError("--val_images has no effect without --val_annotations")
    dataset = open_coco(args.annotations, args.image_dir)
    dataset.check_folder()
    val = None
    if args.val_annotations:
        val = open_coco(args.val_annotations, args.val_images or args.image_dir)
        val.check_folder()
    report = audit(dataset, get_config(args.config, **parse_overrides(args.set)), val=val, progress=True)
    print(report)
    output = args.output or default_output(args.annotations)
    write_json(output / "audit.json", report.as_dict())
    write_image(output / "sheet.jpg", truth_sheet(dataset))
    print(f"\nreport -> {output / 'audit.json'}, ground truth -> {output / 'sheet.jpg'}")
    return int(bool(report.errors))


if __name__ == "__main__":
    run_main(main)
