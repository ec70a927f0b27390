"""The readers of all formats, and how to find the one for a source."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from data.coco import CocoDataset, read_coco_json
from tools.formats import coco, cvat, labelme, masks, via, voc, yolo
from tools.formats.structures import read_text, visible_files
from utils.errors import UserError

# In the order in which they are tried: a folder of VOC or YOLO may contain JSON files.
READERS: dict[str, ModuleType] = {
    "Pascal VOC": voc, "YOLO": yolo, "COCO": coco, "VIA": via, "CVAT": cvat, "LabelMe": labelme, "masks": masks,
}  # fmt: skip
# What to do about formats that are not read.
ZIP = "a zip archive; unpack it and give the folder or file inside"
VIA_CSV = "a CSV file of VIA; export the annotations as JSON instead"
VIA_3 = "a project of VIA 3; annotate in VIA 2, or convert it with VIA's own tools, to a JSON of VIA 2 or COCO"
SUPERVISELY = 'in the format of Supervisely; run its app "Export to COCO" instead'
DATUMARO = "in the format of Datumaro; run: datum convert -i FOLDER -if datumaro -f coco_instances -o coco"
LABEL_STUDIO = 'the JSON of Label Studio; export as "COCO" or "YOLO" instead'
LABELME_XML = "the XML of the old LabelMe web tool; convert it to JSON with labelme 5 or newer, or trace it again"
CVAT_VIDEO = 'the format "CVAT for video"; export as "CVAT for images" or "COCO" instead'
VOC_BOXES = "a Pascal VOC detection file, which has boxes and no masks"
YOLO_LABELS = "a YOLO label file; give its data.yaml, or the folder above, to python -m tools.formats"


def find_reader(source: Path) -> ModuleType:
    """Return the module that reads `source`. Raises UserError if none does."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    for reader in READERS.values():
        if reader.recognise(source):
            return reader
    known = describe(source)
    if known:
        raise UserError(f"{source}: {known}")
    if source.suffix.lower() == ".json":
        read_coco_json(source)  # says what it lacks
    raise UserError(
        f"{source}: not a known format; expected a data.yaml, a COCO, VIA, LabelMe or ISAT JSON, CVAT's "
        "annotations.xml, or a folder of YOLO, COCO (with annotations), LabelMe, ISAT, Pascal VOC (with "
        "SegmentationObject) or masks"
    )


def open_coco(annotations: str | Path, image_dir: str | Path) -> CocoDataset:
    """Open a data set. For a file that is not COCO's, the UserError says which command converts it."""
    try:
        return CocoDataset(annotations, image_dir)
    except UserError as error:
        raise UserError(f"{error}{conversion_hint(Path(annotations))}") from None


def conversion_hint(source: Path) -> str:
    """Return which command converts a source that is not a COCO file, or "" if its format is unknown."""
    if not source.exists():
        return ""
    for name, reader in READERS.items():
        if reader is not coco and reader.recognise(source):
            return f"; it is in the format of {name}, convert it: python -m tools.formats {source} --output coco.json"
    known = describe(source)
    return f"; it is {known}" if known else ""


def describe(source: Path) -> str:
    """Say which format that is not read here a source has, and what to do about it; "" if it is unknown."""
    if source.is_dir():
        if (source / "meta.json").is_file() and any(source.glob("*/ann/*.json")):
            return SUPERVISELY
        files = visible_files(source, {".json", ".xml", ".zip", ".csv"})[:20]
        return next(filter(None, map(describe, files)), "")
    with source.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PK\x03\x04"):
        return ZIP
    try:
        text = read_text(source) if source.suffix.lower() == ".json" else head.decode("utf-8", "replace")
    except UserError as error:
        return str(error).removeprefix(f"{source}: ")
    if source.suffix.lower() == ".json":
        try:
            return _describe_json(json.loads(text))
        except (ValueError, RecursionError):
            return ""
    if "region_shape_attributes" in text:
        return VIA_CSV
    if "<track " in text:
        return CVAT_VIDEO
    if "<annotation>" in text:
        return LABELME_XML if "<polygon>" in text or "<imagesize>" in text else VOC_BOXES
    lines = [line.split() for line in text.splitlines()[:5] if line.strip()]
    return YOLO_LABELS if lines and all(len(line) >= 5 and all(map(_is_number, line)) for line in lines) else ""


def _describe_json(content: Any) -> str:
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, dict) and "data" in first and ("annotations" in first or "completions" in first):
        return LABEL_STUDIO
    keys = content.keys() if isinstance(content, dict) else set()
    if {"project", "metadata", "file"} <= keys:
        return VIA_3
    if {"items", "categories"} <= keys:
        return DATUMARO
    if ("objects" in keys and "size" in keys) or {"classes", "tags"} <= keys:
        return SUPERVISELY
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
