"""The kinds of problems that an audit reports, and the conditions under which they are errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

EXAMPLES_PER_FINDING = 5  # number of examples in a finding
MANY_CROWDS = 1 / 3  # of the annotations; COCO itself has 1.2 %


def too_many_crowds(crowds: int, annotations: int) -> bool:
    """Whether so many annotations are crowd regions that a tool must have set the flag, as for each RLE mask."""
    return crowds > MANY_CROWDS * annotations


@dataclass(frozen=True)
class Kind:
    """A kind of problem: its description, the advice, and the condition under which it is an error.

    It is an error if its count exceeds both `tolerated` and `limit` times the number of items of type `of`.
    Otherwise, it is a warning.
    """

    text: str
    advice: str
    limit: float = math.inf  # fraction, 0..1; with infinity it is always a warning
    of: str = "objects"  # a key of `_totals` in tools.audit
    tolerated: int = 0


FINDING_KINDS = {
    "missing": Kind("images are missing or outside the image folder", "check --image_dir and file_name", 0, "images"),
    "unreadable": Kind(
        "images are unreadable or not of the stated size", "repair or remove them", 0.01, "images", tolerated=1
    ),
    "stored_pixels": Kind(
        "rotated photos have the size of their pixels as they are stored",
        "annotations are taken to refer to these; look at sheet.jpg", of="images",
    ),
    "unsure_rotation": Kind(
        "photos are turned or mirrored by EXIF, and their size does not show whether annotations refer to them upright",
        "this is assumed; look at sheet.jpg", of="images",
    ),
    "listed_twice": Kind("images are listed more than once", "remove the copies", of="listed images"),
    "same_image": Kind("images have exactly the same pixels as another image", "remove the copies", of="images"),
    "orphan": Kind("annotations belong to images that are not listed", "check image_id", 0.1, "listed annotations"),
    "same_id": Kind(
        "annotation ids occur more than once",
        "the ids are not used, so all annotations are kept", of="listed annotations",
    ),
    "text_id": Kind("ids are not whole numbers", "write them as integers, which other tools require", of="ids"),
    "unusable": Kind(
        "annotations have neither a usable box nor mask (outside the image, no area, fewer than three points)",
        "they are ignored", 0.5, "annotations",
    ),
    "no_mask": Kind(
        "annotations have a box and no usable mask",
        "they train boxes and classes only; mask AP ignores their regions, and box AP counts them", of="annotations",
    ),
    "lost_part": Kind(
        "objects have several outlines, of which some are damaged or outside the image", "the others are used",
        of="annotations",
    ),
    "detection_only": Kind(
        "annotations have no segmentation at all",
        "training can teach boxes and classes, but no masks", of="annotations",
    ),
    "bad_box": Kind("boxes are not four finite numbers", "the box of the mask is used instead", of="annotations"),
    "corner_box": Kind(
        "boxes appear to be (x1, y1, x2, y2)", "convert them to COCO's (x, y, width, height)", 0.1, "annotations"
    ),
    "relative": Kind(
        "annotations have normalised coordinates (0 to 1)", "multiply them by the image size", 0.1, "annotations"
    ),
    "same_annotation": Kind(
        "annotations are exact duplicates of another one in the same image",
        "training drops them; AP counts each one", of="annotations",
    ),
    "area": Kind(
        "areas differ from the mask's by more than a factor of two",
        "the mask's own is used for AP of small, medium and large objects", of="objects",
    ),
    "box_and_mask": Kind(
        "objects have a box that does not match their mask (IoU under 0.5)",
        "look for swapped x and y, or masks made for another image size", 0.1, "objects",
    ),
    "empty_mask": Kind(
        "objects have an empty mask", "training ignores them; they count as false negatives in AP", 0.5
    ),
    "vanishing_mask": Kind(
        "objects have a mask that is too small to cover a pixel of the prototypes",
        "raise max_size, or remove such objects",
    ),
    "tiny": Kind(
        "objects are under 4 px wide or high at the network's size", "raise max_size, and predict with --tile"
    ),
    "unused_class": Kind(
        "classes have no object", "ignore this if another annotation file contains objects of them", of="classes"
    ),
    "same_name": Kind("classes share their name with another", "give each class a unique name", of="classes"),
    "crowds": Kind(
        "annotations are crowd regions (iscrowd 1), which training and AP ignore",
        "supervision and CVAT mark each RLE mask so; if these are objects, python -m tools.formats clears the flag",
        of="listed annotations",
    ),
    "no_object": Kind("files have no object in any image", "check image_id and segmentation", 0, "files"),
    "other_classes": Kind(
        "classes are in the validation set only", "give both the same categories", 0, "classes of both files"
    ),
    "class_order": Kind("files list other classes, or in another order", "they are matched by name", of="files"),
    "val_unusable": Kind(
        "images of the validation set are missing or unreadable", "check --val_images and file_name", 0, "val images"
    ),
    "shared_image": Kind(
        "images of the validation set are also in the training set", "remove them: they inflate AP", 0.01, "val images"
    ),
    "near_copy": Kind(
        "images of the validation set are near-duplicates of training images",
        "inspect them, and keep all frames of a video in one set", of="val images",
    ),
}  # fmt: skip


@dataclass
class Finding:
    """The number of occurrences of one kind of problem among `total` items, with examples."""

    kind: str
    count: int
    total: int
    examples: list[str]

    @property
    def is_error(self) -> bool:
        kind = FINDING_KINDS[self.kind]
        return self.count > kind.limit * self.total and self.count > kind.tolerated

    def __str__(self) -> str:
        kind = FINDING_KINDS[self.kind]
        examples = ", ".join(self.examples) + (", ..." if self.count > len(self.examples) else "")
        level = "error" if self.is_error else "warning"
        advice = kind.advice[0].upper() + kind.advice[1:]
        return f"{level}: {kind.text} ({self.count} of {self.total}): {examples}. {advice}"
