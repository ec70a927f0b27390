"""What is wrong with a data set, before training finds out.

python -m data.audit --annotations train.json --image_dir photos [--config yolact_r50 --set max_size=400]

Every photo is read and every object measured at the network's size. Prints a table of the classes and what was found,
writes `audit/audit.json` and `audit/sheet.jpg`, ground truth drawn on photos, and exits with 1 when training would go
wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from data.annotation import is_crowd, normalise_segmentation, to_rle
from data.augment import Window, draw_mask
from data.coco import CocoDataset
from data.config import Config, get_config, parse_overrides
from data.errors import UserError, run_main
from layers.anchors import feature_sizes

SAMPLE = 100  # photos that the quick form looks at
EXAMPLES = 5


@dataclass
class Kind:
    """Something that can be wrong. It is an error when it concerns more than `limit` of what there is."""

    text: str
    advice: str
    limit: float  # 0: one case is an error already, 1: never more than a warning
    of: str  # photos, annotations, objects: of those looked at; listed photos and annotations, classes: of all


KINDS = {
    "photo": Kind("photos are missing, unreadable or not of the stated size", "mend or remove them", 0.0, "photos"),
    "listed_twice": Kind("photos are listed more than once", "remove the copies", 1.0, "listed photos"),
    "same_photo": Kind("photos are byte for byte the same as another", "remove the copies", 1.0, "photos"),
    "orphan": Kind("annotations belong to photos that are not listed", "check image_id", 0.1, "listed annotations"),
    "unusable": Kind(
        "annotations have neither a usable box nor mask (outside the photo, no area, fewer than three points)",
        "they are left out", 0.2, "annotations",
    ),
    "no_mask": Kind(
        "annotations have a box and no usable mask", "their region counts neither as object nor background", 0.2,
        "annotations",
    ),
    "same_annotation": Kind("annotations repeat another of the same photo", "remove the copies", 0.05, "annotations"),
    "box_and_mask": Kind(
        "objects have a box that is not their mask's (IoU under 0.5)",
        "look for swapped x and y, or masks made for another size", 0.02, "objects",
    ),
    "empty_mask": Kind("objects have a mask without a single pixel", "draw them again or remove them", 0.02, "objects"),
    "vanishing_mask": Kind(
        "objects have a mask that vanishes at the prototypes' size", "raise max_size, or remove such objects", 0.3,
        "objects",
    ),
    "tiny": Kind(
        "objects are under 4 px wide or high at the network's size", "raise max_size, or cut photos into tiles", 1.0,
        "objects",
    ),
    "unused_class": Kind("classes have no object", "fine if other files have some", 1.0, "classes"),
    "same_name": Kind("classes have a name that another has too", "give each a name of its own", 1.0, "classes"),
    "no_object": Kind("photos, and no object in any of them", "check image_id and segmentation", 0.0, "listed photos"),
}  # fmt: skip


@dataclass
class Finding:
    """How often a kind of problem was met, with examples."""

    kind: str
    count: int
    total: int
    examples: list[str]

    @property
    def is_error(self) -> bool:
        return self.count > KINDS[self.kind].limit * self.total

    def __str__(self) -> str:
        kind = KINDS[self.kind]
        shown = ", ".join(self.examples) + (", ..." if self.count > len(self.examples) else "")
        share = f"{self.count} of {self.total}" if self.total != self.count else f"all {self.total}"
        return f"{'error' if self.is_error else 'warning'}: {share} {kind.text}: {shown}. {kind.advice.capitalize()}"


@dataclass
class Photo:
    """What was measured in one photo. Sides are those of the boxes, in pixels at the network's size."""

    digest: str = ""
    problems: list[tuple[str, str]] = field(default_factory=list)  # kind, example
    labels: list[int] = field(default_factory=list)
    sides: list[tuple[float, float]] = field(default_factory=list)
    annotations: int = 0
    crowds: int = 0


@dataclass
class Report:
    """The result of an audit."""

    findings: list[Finding]
    classes: list[dict[str, Any]]  # name, id, objects, photos, median_side
    photos: int
    negatives: int  # photos without objects
    objects: int
    crowds: int

    @property
    def has_errors(self) -> bool:
        return any(finding.is_error for finding in self.findings)

    def __str__(self) -> str:
        lines = [
            f"{self.photos} photos ({self.negatives} without objects), {self.objects} objects, {self.crowds} crowds",
            f"{'class':<24}{'id':>8}{'objects':>9}{'share':>8}{'photos':>8}{'median side':>13}",
        ]
        for row in self.classes:
            share, side = row["objects"] / max(1, self.objects), row["median_side"]
            lines.append(
                f"{row['name'][:23]:<24}{row['id']:>8}{row['objects']:>9}{share:>8.1%}{row['photos']:>8}"
                f"{f'{side:.0f} px' if side else '-':>13}"
            )
        return "\n".join([*lines, "", *(map(str, self.findings) if self.findings else ["nothing is wrong"])])

    def as_dict(self) -> dict[str, Any]:
        findings = [dataclasses.asdict(finding) | {"error": finding.is_error} for finding in self.findings]
        return {**dataclasses.asdict(self), "findings": findings}


def audit(dataset: CocoDataset, config: Config, sample: Sequence[int] | None = None, progress: bool = False) -> Report:
    """Measure the photos with the indices in `sample`, by default all, and their objects at `config`'s size."""
    indices = range(len(dataset)) if sample is None else sample
    with ThreadPoolExecutor() as pool:
        work = pool.map(lambda index: inspect(dataset, index, config), indices)
        photos = list(tqdm(work, "auditing", len(indices), disable=None if progress else True))
    problems: dict[str, list[str]] = defaultdict(list)
    for photo in photos:
        for kind, example in photo.problems:
            problems[kind].append(example)
    problems["listed_twice"] = _repeated([str(image["file_name"]) for image in dataset.images])
    first: dict[str, str] = {}
    for index, photo in zip(indices, photos, strict=True):
        name = str(dataset.images[index]["file_name"])
        if photo.digest and first.setdefault(photo.digest, name) != name:
            problems["same_photo"].append(f"{name} and {first[photo.digest]}")
    listed = [dataset.annotations(i) for i in range(len(dataset))]
    used = {label for photo in photos for label in photo.labels}
    if sample is not None:
        used |= {dataset.label_of(a) for some in listed for a in some if not is_crowd(a)}
    problems["orphan"] = [f"annotation {a.get('id')} of image {a['image_id']}" for a in dataset.orphans]
    problems["unused_class"] = [name for label, name in enumerate(dataset.class_names) if label not in used]
    problems["same_name"] = _repeated(list(dataset.class_names))
    if not used:
        problems["no_object"] = [dataset.path.name] * len(dataset)
    objects = sum(len(photo.labels) for photo in photos)
    totals = {
        "photos": len(photos),
        "listed photos": len(dataset),
        "annotations": sum(photo.annotations for photo in photos),
        "listed annotations": sum(map(len, listed)) + len(dataset.orphans),
        "objects": objects,
        "classes": len(dataset.class_names),
    }
    findings = [
        Finding(name, len(problems[name]), totals[kind.of], problems[name][:EXAMPLES])
        for name, kind in KINDS.items()
        if problems[name]
    ]
    return Report(
        findings,
        _class_rows(dataset, photos),
        len(photos),
        sum(not photo.labels for photo in photos),
        objects,
        sum(photo.crowds for photo in photos),
    )


def inspect(dataset: CocoDataset, index: int, config: Config) -> Photo:
    """Read a photo and measure its objects."""
    photo, size = Photo(), dataset.stated_size(index)
    try:
        size = dataset.read_image(index).shape[:2]
        path = dataset.image_path(index)
        content = path.read_bytes()
        photo.digest = hashlib.sha256(content).hexdigest()
        # OpenCV fills what is missing with grey. The end mark is looked for late: previews inside have theirs.
        if content[:2] == b"\xff\xd8" and content.find(b"\xff\xd9", len(content) // 2) < 0:
            photo.problems.append(("photo", f"{path}: the end of the file is missing"))
    except UserError as error:
        photo.problems.append(("photo", str(error)))
    annotations = dataset.annotations(index)
    photo.annotations = len(annotations)
    keys = [json.dumps([a["category_id"], a.get("bbox"), a.get("segmentation")], sort_keys=True) for a in annotations]
    where = f"image {dataset.image_ids[index]} ({dataset.images[index]['file_name']})"
    photo.problems += [("same_annotation", where)] * (len(keys) - len(set(keys)))
    for annotation in annotations if size is not None else ():
        example = f"annotation {annotation.get('id')} of {where}"
        for kind in _inspect_object(photo, dataset, annotation, config, size):
            photo.problems.append((kind, example))
    return photo


def _inspect_object(
    photo: Photo, dataset: CocoDataset, annotation: dict[str, Any], config: Config, size: tuple[int, int]
) -> Iterator[str]:
    """Measure one annotation of a photo of `size`; the kinds of what is wrong with it."""
    height, width = size
    segmentation = normalise_segmentation(annotation.get("segmentation"), height, width)
    box = dataset.box_of(annotation, segmentation, height, width)
    if box is None:
        yield "unusable"
        return
    if is_crowd(annotation):
        photo.crowds += 1
        return
    if segmentation is None:
        yield "no_mask"
        return
    sides = (box[2] - box[0]) * config.max_size / width, (box[3] - box[1]) * config.max_size / height
    photo.labels.append(dataset.label_of(annotation))
    photo.sides.append(sides)
    code = to_rle(segmentation, height, width)
    if rle.area(code) == 0:
        yield "empty_mask"
        return
    x, y, w, h = rle.toBbox(code).tolist()
    # Masks are made of whole pixels: a pixel more on each side lets very small objects pass.
    stated, drawn = [box[0] - 1, box[1] - 1, box[2] - box[0] + 2, box[3] - box[1] + 2], [x - 1, y - 1, w + 2, h + 2]
    if rle.iou([stated], [drawn], [0])[0, 0] < 0.5:
        yield "box_and_mask"
    if min(sides) < 4:
        yield "tiny"
    rows, columns = feature_sizes(config.max_size, config.max_size)[0]
    if not draw_mask(segmentation, Window(0, 0, width, height), (2 * rows, 2 * columns)).any():
        yield "vanishing_mask"


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _class_rows(dataset: CocoDataset, photos: list[Photo]) -> list[dict[str, Any]]:
    """How many objects and photos of each class, and the median of the square root of the boxes' areas."""
    sides: dict[int, list[float]] = defaultdict(list)
    seen: Counter[int] = Counter()
    for photo in photos:
        for label, (w, h) in zip(photo.labels, photo.sides, strict=True):
            sides[label].append((w * h) ** 0.5)
        seen.update(set(photo.labels))
    return [
        {
            "name": name,
            "id": dataset.category_ids[label],
            "objects": len(sides[label]),
            "photos": seen[label],
            "median_side": float(np.median(sides[label])) if sides[label] else None,
        }
        for label, name in enumerate(dataset.class_names)
    ]


def quick_audit(dataset: CocoDataset, config: Config) -> None:
    """Print what is wrong with the annotations and with a sample of the photos, for the start of a training.

    Raises UserError when more than 1 % of the photos looked at cannot be used.
    """
    sample = range(0, len(dataset), -(-len(dataset) // SAMPLE))
    report = audit(dataset, config, sample)
    for finding in report.findings:
        if finding.kind == "photo" and finding.count > max(1, len(sample) // 100):
            raise UserError(
                f"{finding.examples[0]}; {finding.count} of the {len(sample)} photos looked at cannot be used: "
                "python -m data.audit lists them"
            )
        if finding.is_error or finding.kind == "unused_class":
            print(finding)
    if report.has_errors:
        print(f"python -m data.audit --annotations {dataset.path} --image_dir {dataset.image_dir} tells more")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find out what is wrong with a data set.", allow_abbrev=False)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO JSON")
    parser.add_argument("--image_dir", type=Path, required=True, help="the folder of its photos")
    parser.add_argument("--config", default="yolact_r50", help="whose input and prototype size counts")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value", help="as in train.py")
    parser.add_argument("--output", type=Path, default=Path("audit"), help="folder for audit.json and sheet.jpg")
    return parser.parse_args()


def main() -> int:
    from engine.outputs import write_image, write_json  # what runs a model is not needed by who reads data
    from engine.sheets import truth_sheet

    args = parse_args()
    dataset = CocoDataset(args.annotations, args.image_dir)
    report = audit(dataset, get_config(args.config, **parse_overrides(args.set)), progress=True)
    print(report)
    write_json(args.output / "audit.json", report.as_dict())
    write_image(args.output / "sheet.jpg", truth_sheet(dataset))
    print(f"\nreport -> {args.output / 'audit.json'}, drawn ground truth -> {args.output / 'sheet.jpg'}")
    return int(report.has_errors)


if __name__ == "__main__":
    run_main(main)
