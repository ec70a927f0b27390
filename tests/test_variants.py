"""Variants of files that tools and people write, which conversion got wrong or refused without need."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from conftest import random_image, run
from PIL import Image

from data.annotation import to_mask
from data.coco import CocoDataset

HEIGHT, WIDTH = 40, 60
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]  # 400 pixels
OTHER = [40, 5, 50, 5, 50, 15, 40, 15]  # 100 pixels


def photo(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_image(HEIGHT, WIDTH, seed)).save(path, **options)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")


def yolo(label, polygon=SQUARE):
    return f"{label} " + " ".join(f"{v / (HEIGHT if i % 2 else WIDTH):.6f}" for i, v in enumerate(polygon)) + "\n"


def convert(folder, source, *more, code=0):
    return run("tools.formats", folder / source, "--output", folder / "out.json", *more, code=code)


def objects(path, folder):
    """Map each image to the classes and areas of its objects, as training sees them."""
    dataset = CocoDataset(path, folder)
    dataset.check_images()
    found = {}
    for i in range(len(dataset)):
        sample = dataset[i]
        areas = [int(to_mask(s, *sample.image.shape[:2]).sum()) for s in sample.segmentations]
        names = [dataset.class_names[k] for k in sample.labels]
        found[dataset.file_name(i)] = sorted(zip(names, areas, strict=True))
    return found


def coco_file(images=None, annotations=None, categories=None):
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [SQUARE], "bbox": [10, 10, 20, 20]}
    return {
        "images": images or [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [annotation | change for change in annotations or [{}]],
        "categories": categories or [{"id": 1, "name": "cat"}],
    }


@pytest.mark.parametrize("line", ["images/{}/1.jpg", "/home/bob/set/images/{}/1.jpg", "C:\\set\\images\\{}\\1.jpg"])
def test_yolo_lists_of_images_with_equal_names(tmp_path, line):
    for split, label in (("train", 0), ("val", 1)):
        photo(tmp_path / f"images/{split}/1.jpg")
        write(tmp_path / f"labels/{split}/1.txt", yolo(label))
        write(tmp_path / f"{split}.txt", line.format(split))
    write(tmp_path / "data.yaml", "train: train.txt\nval: val.txt\nnames: [cat, dog]")
    write(tmp_path / "args.yaml", "epochs: 3")
    (tmp_path / "._data.yaml").write_bytes(b"\x00\x05\x16\x07")
    convert(tmp_path, ".")
    assert objects(tmp_path / "out_train.json", tmp_path / "images/train") == {"1.jpg": [("cat", 400)]}
    assert objects(tmp_path / "out_val.json", tmp_path / "images/val") == {"1.jpg": [("dog", 400)]}


def test_yolo_folders_of_another_computer(tmp_path):
    for split, label in (("train", 0), ("val", 1)):
        photo(tmp_path / f"{split}/images/{split}.jpg")
        write(tmp_path / f"{split}/labels/{split}.txt", yolo(label))
    content = "train: {0}train{1}images\nval: {0}val{1}images\ntest: ../test/images\nnames: [cat, dog]"
    for start, separator in (("/content/x/", "/"), ("C:\\x\\", "\\"), ("../", "/")):
        write(tmp_path / "data.yaml", content.format(start, separator))
        convert(tmp_path, "data.yaml", "--images", tmp_path)
        assert objects(tmp_path / "out_val.json", tmp_path / "val/images") == {"val.jpg": [("dog", 400)]}
    write(tmp_path / "data.yaml", "train: /x/a\nval: /x/b\nnames: [cat, dog]")
    assert "val and train would both be" in convert(tmp_path, "data.yaml", "--images", tmp_path, code=2)
    write(tmp_path / "data.yaml", "train: train/images\nnames: [cat]\nkpt_shape: [4, 2]")
    assert "poses" in convert(tmp_path, "data.yaml", code=2)
    (tmp_path / "data.yaml").write_bytes("names: [cat]".encode("utf-16"))
    assert "not UTF-8 text" in convert(tmp_path, ".", code=2)
    write(tmp_path / "data.yaml", "train: train/images\nnames:\n  - 0: cat")
    assert "`names` must be texts" in convert(tmp_path, "data.yaml", code=2)


def test_a_name_that_fits_exactly_is_taken(tmp_path):
    for name in ("images/a.jpg", "images/thumbs/a.jpg", "images/__MACOSX/a.jpg"):
        photo(tmp_path / name)
    write(tmp_path / "coco.json", coco_file())
    assert "fits several" not in convert(tmp_path, "coco.json", "--images", tmp_path / "images")
    assert objects(tmp_path / "out.json", tmp_path / "images") == {"a.jpg": [("cat", 400)]}
    photo(tmp_path / "photos/my a.jpg")
    sized = {"id": 1, "file_name": "/data/local-files/?d=photos%2Fmy%20a.jpg", "height": 0, "width": -1}
    write(tmp_path / "coco.json", coco_file([sized]))
    convert(tmp_path, "coco.json")
    assert objects(tmp_path / "out.json", tmp_path / "photos") == {"my a.jpg": [("cat", 400)]}


def test_several_entries_of_one_image_are_not_guessed(tmp_path):
    photo(tmp_path / "siteA/1.jpg")
    photo(tmp_path / "siteA/2.jpg", seed=1)
    names = ("siteA/1.jpg", "siteB/1.jpg", "siteA/2.jpg")
    images = [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in enumerate(names)]
    write(
        tmp_path / "c.json",
        coco_file(images, [{"image_id": 0}, {"image_id": 1, "segmentation": [OTHER]}, {"image_id": 2}]),
    )
    text = convert(tmp_path, "c.json")
    assert "not used: images that several entries of the source name, with different objects (1): 1.jpg" in text
    assert objects(tmp_path / "out.json", tmp_path / "siteA") == {"2.jpg": [("cat", 400)]}


def test_coco_entries(tmp_path):
    photo(tmp_path / "a.jpg")
    code = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * 2, HEIGHT * (WIDTH - 2)]}
    later = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * 3, HEIGHT, HEIGHT * (WIDTH - 4)]}
    changes = [
        {"bbox": [0, 0, 0, 0]},
        {"segmentation": [code, later], "bbox": None},
        {"iscrowd": "yes"},
        {"segmentation": [[100, 100, 110, 100, 110, 110]]},
        {"attributes": 5, "segmentation": [OTHER]},
    ]
    write(tmp_path / "c.JSON", coco_file(annotations=changes))
    text = convert(tmp_path, "c.JSON")
    assert "annotations whose iscrowd is 'yes', but it must be 0 or 1 (1)" in text
    assert "objects without an area inside their image (1)" in text
    assert objects(tmp_path / "out.json", tmp_path) == {"a.jpg": [("cat", 100), ("cat", 120), ("cat", 400)]}
    both = [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]
    write(tmp_path / "c.json", coco_file(categories=both))
    assert "category id 1 is used more than once" in convert(tmp_path, "c.json", code=2)
    write(tmp_path / "c.json", coco_file() | {"annotations": []})
    assert "none of its 1 image has an object" in convert(tmp_path, "c.json", code=2)
    write(tmp_path / "c.json", "<html>")
    assert "not a JSON file" in convert(tmp_path, "c.json", code=2)


def test_a_damaged_split_is_not_left_out_silently(tmp_path):
    photo(tmp_path / "images/a.jpg")
    write(tmp_path / "annotations/instances_train.json", coco_file())
    write(tmp_path / "annotations/instances_val.json", '{"images": [')
    assert "instances_val.json: not a COCO" in convert(tmp_path, ".", code=2)


def test_class_names_in_two_unicode_forms_are_one(tmp_path):
    photo(tmp_path / "a.jpg")
    categories = [{"id": 1, "name": "caf\u00e9"}, {"id": 2, "name": "cafe\u0301"}]
    write(
        tmp_path / "c.json",
        coco_file(annotations=[{}, {"category_id": 2, "segmentation": [OTHER]}], categories=categories),
    )
    assert "1 class" in convert(tmp_path, "c.json")
    convert(tmp_path, "c.json", "--classes", "cafe\u0301")


def smooth(mask):
    return cv2.GaussianBlur(mask, (5, 5), 0)


@pytest.mark.parametrize(("name", "change", "areas"), [
    ("train/1.png", lambda mask: mask.astype(np.uint16) * 3, [100, 200]),  # ids of up to 600
    ("train/1.png", lambda mask: mask.astype(np.uint8), [100, 200]),
    ("train/1.png", lambda mask: np.dstack([mask * 0, mask * 0, mask * 0, mask]).astype(np.uint8), [100, 200]),
    ("train/1.png", lambda mask: smooth((mask > 0).astype(np.uint8) * 255), "masks with smoothed edges"),
    ("train/1.jpg", lambda mask: mask.astype(np.uint8), "format that changes values"),
])  # fmt: skip
def test_folders_of_masks(tmp_path, name, change, areas):
    mask = np.zeros((HEIGHT, WIDTH), np.int32)
    mask[10:20, 10:20], mask[10:20, 20:40] = 100, 200
    for split in ("train", "val"):
        photo(tmp_path / f"images/{split}/1.jpg")
    (tmp_path / "masks/train").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "masks" / name), change(mask))
    cv2.imwrite(str(tmp_path / "masks/other.png"), np.zeros((7, 7), np.uint8))
    if isinstance(areas, str):
        assert areas in convert(tmp_path, ".", code=2)
        return
    assert "images without a usable mask (1): 1.jpg" in convert(tmp_path, ".")
    assert objects(tmp_path / "out.json", tmp_path / "images/train") == {"1.jpg": [("object", v) for v in areas]}


@pytest.mark.parametrize(("names", "expected"), [("__ignore__\n_background_\ncat\n", "cat"), (None, "aeroplane")])
def test_voc_of_labelme(tmp_path, names, expected):
    photo(tmp_path / "JPEGImages/a.jpg")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:20, 10:30] = 1
    for folder in ("SegmentationObject", "SegmentationClass"):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "a.png"), mask)
    if names:
        write(tmp_path / "class_names.txt", names)
    assert ("assumed to be Pascal VOC's" in convert(tmp_path, ".")) == (names is None)
    assert objects(tmp_path / "out.json", tmp_path / "JPEGImages") == {"a.jpg": [(expected, 200)]}
    write(tmp_path / "ImageSets/Segmentation/train.txt", "b\n")
    assert "masks that no split lists (1): a.png" in convert(tmp_path, ".", code=2)


def test_cvat_shapes(tmp_path):
    photo(tmp_path / "images/a.jpg")
    shapes = (
        '<box label="dog" xtl="30" ytl="10" xbr="50" ybr="14" rotation="90.00"/>'
        '<ellipse label="cat" cx="30" cy="20" rx="15" ry="4" rotation="90"/>'
        '<polygon points="1,1;9,1;9,9"/><skeleton label="pose"/>'
    )
    image = f'<image id="0" name="a.jpg" width="{WIDTH}" height="{HEIGHT}">{shapes}</image>'
    write(tmp_path / "annotations.XML", f"<annotations>{image}</annotations>")
    text = convert(tmp_path, "annotations.XML")
    assert "shapes without a label (1)" in text
    assert "shapes of the type skeleton without an area (1)" in text
    boxes = {a["category_id"]: a["bbox"] for a in json.loads((tmp_path / "out.json").read_text())["annotations"]}
    assert boxes[1] == [38, 2, 4, 20]
    assert boxes[2] == pytest.approx([26, 5, 8, 30], abs=1)
    write(tmp_path / "annotations.XML", '<?xml version="1.0" encoding="gbk"?><annotations/>')
    assert "not a known format" in convert(tmp_path, "annotations.XML", code=2)
    write(tmp_path / "annotations.xml", '<annotations><track id="0" label="cat"></track></annotations>')
    assert "CVAT for video" in convert(tmp_path, "annotations.xml", code=2)


def test_labelme_fields(tmp_path):
    photo(tmp_path / "a.jpg")
    points = np.reshape(SQUARE, (-1, 2)).tolist(), np.reshape(OTHER, (-1, 2)).tolist()
    shapes = [
        {"label": 1, "points": points[0], "group_id": "", "flags": ["hole"]},
        {"label": 1, "points": points[1], "group_id": ""},
        {"label": "cat", "points": points[0], "group_id": [1]},
    ]
    write(tmp_path / "a.json", {"imagePath": "a.jpg", "shapes": shapes})
    write(tmp_path / "b.json", {"imagePath": "x" * 300, "shapes": shapes, "imageData": "AAAA"})
    assert "stored inside the JSON" in convert(tmp_path, ".")
    assert objects(tmp_path / "out.json", tmp_path) == {"a.jpg": [("1", 100), ("1", 400), ("cat", 400)]}


def test_via_fields(tmp_path):
    photo(tmp_path / "a.jpg")
    shape = {"name": "polygon", "all_points_x": SQUARE[::2], "all_points_y": SQUARE[1::2]}
    regions = [
        {"shape_attributes": shape, "region_attributes": {"class": {"cat": True, "dog": False}}},
        {"shape_attributes": shape, "region_attributes": {"class": {"cat": True, "dog": True}}},
        {"shape_attributes": "polygon", "region_attributes": "cat"},
    ]
    write(tmp_path / "via.json", {"a.jpg1": {"filename": "a.jpg", "regions": regions}})
    assert "regions with several classes (1)" in convert(tmp_path, "via.json")
    assert objects(tmp_path / "out.json", tmp_path) == {"a.jpg": [("cat", 400)]}


def test_turned_tiff(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "images/a.tif", exif=exif)
    write(
        tmp_path / "labels/a.txt",
        "0 " + " ".join(f"{v / s:.6f}" for v, s in zip(SQUARE, (HEIGHT, WIDTH) * 4, strict=True)),
    )
    convert(tmp_path, ".")
    assert objects(tmp_path / "out.json", tmp_path / "images") == {"a.tif": [("class_0", 400)]}


@pytest.mark.parametrize(("orientation", "side"), [(3, None), (6, HEIGHT)])
def test_photos_whose_size_does_not_tell_their_rotation_are_said(tmp_path, orientation, side):
    """Turned by 180 degrees, or square: the stated size fits both readings of the coordinates."""
    exif = Image.Exif()
    exif[0x112] = orientation
    image = random_image(HEIGHT, side or WIDTH, 0)
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif)
    size = {"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": side or WIDTH}
    write(tmp_path / "coco.json", coco_file([size]))
    assert "labels refer to them upright, which is assumed (1): a.jpg" in convert(tmp_path, "coco.json")
    args = "--annotations", tmp_path / "coco.json", "--image_dir", tmp_path, "--output", tmp_path / "audit"
    assert "warning: photos are turned or mirrored by EXIF" in run("-m", "tools.audit", *args)
    Image.fromarray(image).save(tmp_path / "a.jpg")
    assert "EXIF" not in convert(tmp_path, "coco.json") + run("-m", "tools.audit", *args)


def test_the_audit_says_that_labels_refer_to_the_pixels_as_they_are_stored(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(random_image(HEIGHT, WIDTH, 0)).save(tmp_path / "a.jpg", exif=exif)
    write(tmp_path / "coco.json", coco_file())
    args = "--annotations", tmp_path / "coco.json", "--image_dir", tmp_path, "--output", tmp_path / "audit"
    printed = run("-m", "tools.audit", *args)
    assert "warning: rotated photos have the size of their pixels as they are stored (1 of 1)" in printed


def test_a_damaged_outline_beside_good_ones_is_said(tmp_path):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "coco.json", coco_file(annotations=[{"segmentation": [SQUARE, [40, 5, 50, 5]]}]))
    printed = convert(tmp_path, "coco.json")
    assert "note: objects of several outlines, of which a damaged one is left out (1): a.jpg" in printed
    assert objects(tmp_path / "out.json", tmp_path) == {"a.jpg": [("cat", 400)]}
    args = "--annotations", tmp_path / "coco.json", "--image_dir", tmp_path, "--output", tmp_path / "audit"
    assert "warning: objects have several outlines, of which some are damaged" in run("-m", "tools.audit", *args)
    write(tmp_path / "coco.json", coco_file(annotations=[{"segmentation": [SQUARE, OTHER], "bbox": [10, 5, 40, 25]}]))
    assert "outlines" not in convert(tmp_path, "coco.json") + run("-m", "tools.audit", *args)


def test_a_background_image_does_not_get_the_labels_of_another_split(tmp_path):
    for split in ("train", "val"):
        photo(tmp_path / f"images/{split}/1.jpg", seed=len(split))
    photo(tmp_path / "images/train/2.jpg", seed=7)
    write(tmp_path / "labels/train/2.txt", yolo(0))
    write(tmp_path / "labels/train/gone.txt", yolo(0))
    write(tmp_path / "labels/val/1.txt", yolo(1))
    write(tmp_path / "data.yaml", "train: images/train\nValid: images/val\nnames: [cat, dog]")
    text = convert(tmp_path, "data.yaml")
    assert objects(tmp_path / "out_train.json", tmp_path / "images/train") == {"1.jpg": [], "2.jpg": [("cat", 400)]}
    assert objects(tmp_path / "out_val.json", tmp_path / "images/val") == {"1.jpg": [("dog", 400)]}
    assert "not used: label files that belong to no image of the source (1): gone.txt" in text


def test_yolo_classes_are_the_lines_of_classes_txt(tmp_path):
    photo(tmp_path / "images/a.jpg")
    write(tmp_path / "labels/a.txt", yolo(2))
    write(tmp_path / "classes.txt", "cat\n\ndog\nbird\n")
    convert(tmp_path, ".")
    assert objects(tmp_path / "out.json", tmp_path / "images") == {"a.jpg": [("dog", 400)]}
    (tmp_path / "classes.txt").unlink()
    write(tmp_path / "labels/README.txt", "12.05.2024 exported by Bob\n20240105 1 2 x\n20240105 1 2 3 4\n")
    convert(tmp_path, ".")
    assert objects(tmp_path / "out.json", tmp_path / "images") == {"a.jpg": [("class_2", 400)]}
    write(tmp_path / "data.yaml", "train: images/a.jpg\nval: images\nnames: {2: cat, 3: }")
    assert "that of class 3 is not" in convert(tmp_path, "data.yaml", code=2)
    write(tmp_path / "data.yaml", "train: images/a.jpg\nval: images\nnames: {2: cat}")
    convert(tmp_path, "data.yaml")
    assert objects(tmp_path / "out_train.json", tmp_path / "images") == {"a.jpg": [("cat", 400)]}


def test_images_found_in_another_folder_are_said(tmp_path):
    photo(tmp_path / "images/cam1/1.jpg")
    listed = {"id": 1, "file_name": "cam2/1.jpg", "height": HEIGHT, "width": WIDTH}
    write(tmp_path / "a.json", coco_file([listed]))
    text = convert(tmp_path, "a.json", "--images", tmp_path / "images")
    assert "note: images found by their name alone, in another folder than the source says (1): cam2/1.jpg" in text
    photo(tmp_path / "flat/1.jpg")
    assert "by their name alone" not in convert(tmp_path, "a.json", "--images", tmp_path / "flat")


def test_what_was_read_is_not_replaced(tmp_path):
    photo(tmp_path / "a.jpg")
    region = {"name": "polygon", "all_points_x": SQUARE[::2], "all_points_y": SQUARE[1::2]}
    regions = [{"shape_attributes": region, "region_attributes": {"class": name}} for name in ("cat", None)]
    write(tmp_path / "via.json", {"a": {"filename": "a.jpg", "size": 1, "regions": regions}})
    before = (tmp_path / "via.json").read_bytes()
    run("tools.formats", tmp_path / "via.json", "--output", tmp_path / "via.json", code=2)
    assert before == (tmp_path / "via.json").read_bytes()
    text = convert(tmp_path, "via.json", "--classes", "cat,dog,")
    assert "regions without a class (1)" in text
    assert [c["name"] for c in json.loads((tmp_path / "out.json").read_text())["categories"]] == ["cat", "dog"]
    assert "--split 0: must be" in convert(tmp_path, "via.json", "--split", "0", code=2)
    shape = {"label": "cat", "points": np.reshape(SQUARE, (-1, 2)).tolist(), "shape_type": "polygon"}
    folder = tmp_path / "labelme"
    photo(folder / "b.jpg")
    write(folder / "b.json", {"shapes": [shape], "imagePath": "b.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH})
    message = run("tools.formats", folder, "--output", folder / "b.json", code=2)
    assert "b.json: exists and is not a COCO file" in message
    for _ in range(2):  # the result of an earlier conversion is replaced
        run("tools.formats", folder, "--output", folder / "coco.json")


def test_numbers_as_names_of_coco_categories(tmp_path):
    photo(tmp_path / "a.jpg")
    categories = [{"id": 1, "name": 0}, {"id": 2, "name": 1}, {"id": 3}]
    write(tmp_path / "a.json", coco_file(annotations=[{}, {"id": 2, "category_id": 2}], categories=categories))
    convert(tmp_path, "a.json", "--images", tmp_path)
    assert objects(tmp_path / "out.json", tmp_path) == {"a.jpg": [("0", 400), ("1", 400)]}


def test_voc_masks_in_folders_and_other_names_of_splits(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:30, 10:30] = 1
    for stem, suffix in (("a", ".PNG"), ("cam1/b", ".png")):
        photo(tmp_path / f"JPEGImages/{stem}.jpg", seed=len(stem))
        for kind, value in (("Object", 1), ("Class", 8)):
            path = tmp_path / f"Segmentation{kind}/{stem}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask * value).save(path)
    images = tmp_path / "JPEGImages"
    write(tmp_path / "ImageSets/Segmentation/default.txt", "a\ncam1/b\n")
    convert(tmp_path, ".")
    assert objects(tmp_path / "out.json", images) == {"a.jpg": [("cat", 400)], "cam1/b.jpg": [("cat", 400)]}
    write(tmp_path / "ImageSets/Segmentation/Train.txt", "a\n")
    write(tmp_path / "ImageSets/Segmentation/Validation.txt", "cam1/b\n")
    convert(tmp_path, ".")
    assert objects(tmp_path / "out_train.json", images) == {"a.jpg": [("cat", 400)]}
    assert objects(tmp_path / "out_val.json", images / "cam1") == {"b.jpg": [("cat", 400)]}


def test_masks_that_are_small_or_on_white(tmp_path):
    photo(tmp_path / "images/a.jpg")
    photo(tmp_path / "images/b.jpg", seed=1)
    small = np.zeros((HEIGHT, WIDTH), np.uint8)
    small[10:30, 10:30], small[2:5, 2:5], small[2:5, 20:22] = 1, 2, 3
    white = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    white[5:15, 40:50] = (200, 0, 0)
    for name, mask in (("a", small), ("b", white)):
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"masks/{name}.png")
    text = convert(tmp_path, ".", "--images", tmp_path)
    assert objects(tmp_path / "out.json", tmp_path / "images") == {
        "a.jpg": [("object", 400)],
        "b.jpg": [("object", 100)],
    }
    assert "not used: objects of fewer than 10 pixels (2): a.png" in text
    assert "the value of the corners is taken as background (1): b.png" in text


def test_crowds_of_isat(tmp_path):
    photo(tmp_path / "a.jpg")
    points = np.reshape(SQUARE, (-1, 2)).tolist()
    listed = [{"category": "cat", "segmentation": points, "group": i, "iscrowd": i == 2} for i in (1, 2)]
    info = {"name": "a.jpg", "height": HEIGHT, "width": WIDTH}
    write(tmp_path / "a.json", {"info": info, "objects": listed})
    convert(tmp_path, "a.json")
    assert [entry["iscrowd"] for entry in json.loads((tmp_path / "out.json").read_text())["annotations"]] == [0, 1]


def test_yolo_labels_in_other_folders_than_images(tmp_path):
    """Labels in folders by split beside images in one, and a validation set without a single label."""
    for name in ("a", "b", "c"):
        photo(tmp_path / f"images/{name}.jpg", seed=ord(name))
    write(tmp_path / "labels/train/a.txt", yolo(0))
    write(tmp_path / "labels/val/b.txt", yolo(1))
    write(tmp_path / "labels/val/gone.txt", yolo(1))
    write(tmp_path / "data.yaml", "train: images\nval: images\nnames: [cat, dog]")
    text = convert(tmp_path, "data.yaml")
    wanted = {"a.jpg": [("cat", 400)], "b.jpg": [("dog", 400)], "c.jpg": []}
    assert objects(tmp_path / "out_train.json", tmp_path / "images") == wanted
    assert "label files that belong to no image of the source (1): gone.txt" in text
    assert "by their name alone" not in text
    other = tmp_path / "other"
    for split in ("train", "val"):
        photo(other / f"images/{split}/1.jpg")
    write(other / "labels/train/1.txt", yolo(0))
    write(other / "data.yaml", "train: images/train\nval: images/val\nnames: [cat]")
    run("tools.formats", other / "data.yaml", "--output", other / "out.json")
    assert objects(other / "out_val.json", other / "images/val") == {"1.jpg": []}


def test_a_mask_of_the_whole_image_is_an_object(tmp_path):
    photo(tmp_path / "images/a.jpg")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, np.uint8)).save(tmp_path / "masks/a.png")
    convert(tmp_path, ".")
    assert objects(tmp_path / "out.json", tmp_path / "images") == {"a.jpg": [("object", HEIGHT * WIDTH)]}


def test_links_to_a_cache_keep_their_names(tmp_path):
    """As DVC stores images; two names may even lead to the same file."""
    photo(tmp_path / "cache/0f/a1b2.jpg")
    for name in ("a", "b"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{name}.jpg").symlink_to(tmp_path / "cache/0f/a1b2.jpg")
    write(tmp_path / "labels/a.txt", yolo(0))
    write(tmp_path / "classes.txt", "cat")
    convert(tmp_path, ".")
    assert objects(tmp_path / "out.json", tmp_path / "images") == {"a.jpg": [("cat", 400)], "b.jpg": []}


def test_boxes_of_yolo_are_kept_and_rectangles_of_labelme_said(tmp_path):
    photo(tmp_path / "images/a.jpg")
    write(tmp_path / "labels/a.txt", f"0 0.5 0.5 0.5 0.5\n1 0.9 0.9 0.4 0.4\n0 2 2 0.1 0.1\n{yolo(1)}")
    write(tmp_path / "classes.txt", "cat\ndog")
    text = convert(tmp_path, ".")
    assert "note: objects without a mask, of which only the box is kept (3)" in text
    assert "not used: boxes without an area inside their image (1): a.txt line 3" in text
    listed = json.loads((tmp_path / "out.json").read_text())["annotations"]
    assert [(entry["bbox"], "segmentation" in entry) for entry in listed] == [
        ([15, 10, 30, 20], False),
        (pytest.approx([42, 28, 18, 12]), False),
        ([10, 10, 20, 20], True),
    ]
    shape = {"label": "cat", "points": [[10, 10], [30, 30]], "shape_type": "rectangle"}
    photo(tmp_path / "labelme/b.jpg")
    write(tmp_path / "labelme/b.json", {"shapes": [shape], "imagePath": "b.jpg"})
    assert "note: rectangles, which are taken as masks" in convert(tmp_path, "labelme")
