"""The readers of all formats, and how to find the one for a source."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from data.coco import CocoDataset
from tools.formats import coco, labelme, via, voc, yolo
from utils.errors import UserError

# In the order in which they are tried: a folder of VOC or YOLO may contain JSON files.
READERS: dict[str, ModuleType] = {"Pascal VOC": voc, "YOLO": yolo, "COCO": coco, "VIA": via, "LabelMe": labelme}


def find_reader(source: Path) -> ModuleType:
    """Return the module that reads `source`. Raises UserError if none does."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    for reader in READERS.values():
        if reader.recognise(source):
            return reader
    raise UserError(
        f"{source}: not a known format; expected a data.yaml, a VIA or COCO JSON file, or a folder of YOLO, LabelMe, "
        "COCO (with annotations) or Pascal VOC (with SegmentationObject)"
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
    if source.is_dir():
        return ""
    head = source.open("rb").read(4096).decode("utf-8", "replace")
    if "<annotation" in head:
        return "; it looks like a Pascal VOC detection file, which has boxes and no masks"
    lines = [line.split() for line in head.splitlines()[:5] if line.strip()]
    if lines and all(len(words) >= 5 and all(_is_number(word) for word in words) for words in lines):
        return "; it looks like a YOLO label file: give its data.yaml or the folder above to python -m tools.formats"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
