"""Annotations of other tools, written as those tools write them, become COCO JSON with the same masks."""

from __future__ import annotations

import base64
import json
import shutil

import cv2
import numpy as np
import pytest
from conftest import random_image, run
from PIL import Image

from data.annotation import to_mask
from data.coco import CocoDataset
from inference import Predictor
from weights import load_model

HEIGHT, WIDTH = 90, 130
SQUARE = [[20, 10], [70, 10], [70, 60], [20, 60]]
HOLE = [[35, 25], [55, 25], [55, 45], [35, 45]]
SECOND = [[90, 20], [120, 20], [120, 70], [90, 70]]
NAMES = ("a b.jpg", "straße.jpg", "c.png")


def drawn(*polygons, holes=(), size=(HEIGHT, WIDTH)):
    mask = np.zeros(size, np.uint8)
    for value, group in ((1, polygons), (0, holes)):
        for polygon in group:
            cv2.fillPoly(mask, [np.array(polygon)], value)
    return mask > 0


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def write_images(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        cv2.imwrite(str(folder / name), random_image(HEIGHT, WIDTH, seed))


def rotate_by_exif(path):
    """Store the image turned, with the EXIF orientation that turns it back: viewers show it as before."""
    image = Image.open(path).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    image.save(path, exif=exif, quality=95)


def convert(source, output, *more):
    return run("tools.formats", source, "--output", output, *more)


def load(path, folder):
    """The masks of each image by its name, with class names, as training sees them."""
    dataset = CocoDataset(path, folder)
    dataset.check_images()
    found = {}
    for i in range(len(dataset)):
        sample = dataset[i]
        masks = [to_mask(s, *sample.image.shape[:2]) for s in sample.segmentations]
        found[dataset.file_name(i)] = list(zip([dataset.class_names[k] for k in sample.labels], masks, strict=True))
    return found


def check(found, name, *expected):
    """The objects of an image are these, up to the rasterisation of edges."""
    assert [label for label, _ in found[name]] == [label for label, _ in expected]
    for (_, mask), (_, wanted) in zip(found[name], expected, strict=True):
        assert iou(mask, wanted) > 0.93


def relative(polygon):
    return " ".join(f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in polygon)


@pytest.mark.parametrize("names", ["[person, car]", "{0: person, 1: car}", "\n  0: person\n  1: car"])
def test_yolo(tmp_path, names):
    for split, files in (("train", NAMES[:2]), ("val", NAMES[2:])):
        write_images(tmp_path / "images" / split, files)
        (tmp_path / "labels" / split).mkdir(parents=True)
    rotate_by_exif(tmp_path / "images/train/a b.jpg")
    labels = tmp_path / "labels"
    (labels / "train/a b.txt").write_text(f"0 {relative(SQUARE)}\n1 {relative(SECOND)}\n")
    lines = ["1 0.5 0.5 0.2 0.2 0.9", f"7 {relative(SQUARE)}", "0 nonsense", f"0 {relative(SECOND)}"]
    (labels / "train/straße.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {names}\n")
    text = convert(tmp_path / "data.yaml", tmp_path / "coco.json")
    assert "2 images, 3 objects, 2 classes" in text
    assert (
        "not used: outlines with half a point; if predictions end with a confidence, save them without (1): straße.txt"
        in text
    )
    assert "not used: lines that are not a class index (0 to 1) followed by numbers (2)" in text
    found = load(tmp_path / "coco_train.json", tmp_path / "images/train")
    check(found, "a b.jpg", ("person", drawn(SQUARE)), ("car", drawn(SECOND)))
    check(found, "straße.jpg", ("person", drawn(SECOND)))
    assert load(tmp_path / "coco_val.json", tmp_path / "images/val") == {"c.png": []}  # kept, without objects
    assert convert(tmp_path, tmp_path / "again.json")  # the folder means its data.yaml


def test_yolo_class_indices_may_have_gaps(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/c.txt").write_text(f"7 {relative(SQUARE)}\n1 {relative(SECOND)}\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: {0: person, 7: truck}\n")
    text = convert(tmp_path / "data.yaml", tmp_path / "coco.json")
    assert "not used: lines that are not a class index (0, 7) followed by numbers (1): c.txt line 2" in text
    check(load(tmp_path / "coco_train.json", tmp_path / "images"), "c.png", ("truck", drawn(SQUARE)))


def test_yolo_without_a_yaml(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/c.txt").write_text(f"1 {relative(SQUARE)}\n")
    convert(tmp_path, tmp_path / "coco.json")
    found = load(tmp_path / "coco.json", tmp_path / "images")
    check(found, "c.png", ("class_1", drawn(SQUARE)))


def test_yolo_paths_of_roboflow(tmp_path):
    write_images(tmp_path / "train/images", NAMES[:1])
    (tmp_path / "train/labels").mkdir()
    (tmp_path / "train/labels/a b.txt").write_text(f"0 {relative(SQUARE)}\n")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nnc: 1\nnames: ['thing']\n")
    convert(tmp_path / "data.yaml", tmp_path / "coco.json")
    check(load(tmp_path / "coco_train.json", tmp_path / "train/images"), "a b.jpg", ("thing", drawn(SQUARE)))


def labelme(path, image, shapes, size=(HEIGHT, WIDTH)):
    common = {"group_id": None, "shape_type": "polygon", "flags": {}}
    content = {
        "version": "5.4.1",
        "flags": {},
        "shapes": [common | shape for shape in shapes],
        "imagePath": image,
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    path.write_text(json.dumps(content))


def test_labelme(tmp_path):
    write_images(tmp_path)
    rotate_by_exif(tmp_path / "straße.jpg")
    piece = cv2.imencode(".png", np.full((51, 51), 1, np.uint8))[1].tobytes()
    labelme(
        tmp_path / "a b.json",
        "a b.jpg",
        [
            {"label": "ring", "points": SQUARE, "group_id": 4},
            {"label": "ring", "points": HOLE, "group_id": 4, "flags": {"hole": True}},
            {"label": "pair", "points": SQUARE, "group_id": 5},
            {"label": "pair", "points": SECOND, "group_id": 5},
            {"label": "ring", "points": [[20, 10], [70, 60]], "shape_type": "rectangle"},
            {"label": "ring", "points": [[45, 35], [45, 55]], "shape_type": "circle"},
            {"label": "ring", "points": [[1, 1], [5, 5]], "shape_type": "line"},
            {
                "label": "ring",
                "points": [[20, 10], [70, 60]],
                "shape_type": "mask",
                "mask": base64.b64encode(piece).decode(),
            },
        ],
    )
    labelme(tmp_path / "straße.json", "C:\\work\\straße.jpg", [{"label": "pair", "points": SQUARE}])
    labelme(tmp_path / "gone.json", "gone.jpg", [{"label": "pair", "points": SQUARE}])
    labelme(tmp_path / "other.json", "c.png", [{"label": "pair", "points": SQUARE}], size=(10, 10))
    text = convert(tmp_path, tmp_path / "out/coco.json")
    assert "not used: shapes of the type line without an area (1): a b.json" in text
    assert "not used: images that were not found (1): gone.jpg" in text
    assert "not used: images of another size than their labels were made for (1): c.png (10x10 in the labels" in text
    found = load(tmp_path / "out/coco.json", tmp_path)
    ring = drawn(SQUARE, holes=[HOLE])
    circle = cv2.circle(np.zeros((HEIGHT, WIDTH), np.uint8), (45, 35), 20, 1, -1) > 0
    pair = drawn(SQUARE, SECOND)
    expected = [("ring", ring), ("pair", pair), *(("ring", m) for m in (drawn(SQUARE), circle, drawn(SQUARE)))]
    check(found, "a b.jpg", *expected)
    check(found, "straße.jpg", ("pair", drawn(SQUARE)))


def test_our_own_polygons_come_back(tmp_path, predictor, weights):
    """`--save polygons` writes LabelMe files: converted, they have the masks that were predicted."""
    write_images(tmp_path / "images", NAMES[2:])
    out = tmp_path / "out"
    image = tmp_path / "images/c.png"
    options = ["--precision", "fp32", "--score_threshold", 0.5, "--top_k", 5]
    run("eval.py", "--weights", weights, "--image", image, "--output", out, "--save", "polygons", *options)
    convert(out, tmp_path / "coco.json", "--images", tmp_path / "images")
    found = load(tmp_path / "coco.json", tmp_path / "images")["c.png"]
    options = {"score_threshold": 0.5, "top_k": 5, "crop_after_resize": True}
    detections = Predictor(load_model(weights), "cpu", "fp32", **options)(cv2.imread(str(image)))
    predicted = [mask for mask in detections.masks.numpy() if mask.sum() > 20]
    assert predicted
    for mask in predicted:
        assert max(iou(mask, other) for _, other in found) > 0.6  # simplified by a pixel, and some are tiny


@pytest.mark.parametrize("version", [1, 2])
def test_via(tmp_path, version):
    write_images(tmp_path / "images")
    xs, ys = ([p[i] for p in SQUARE] for i in (0, 1))
    shapes = [
        ({"name": "polygon", "all_points_x": xs, "all_points_y": ys}, {"class": "cat", "quality": "good"}),
        ({"name": "rect", "x": 90, "y": 20, "width": 30, "height": 50}, {"class": "dog"}),
        ({"name": "ellipse", "cx": 45, "cy": 35, "rx": 30, "ry": 20, "theta": 0}, {"class": {"cat": True}}),
        ({"name": "point", "cx": 4, "cy": 5}, {"class": "cat"}),
        ({"name": "rect", "x": 1, "y": 2, "width": 30, "height": 5}, {}),
    ]
    regions = [{"shape_attributes": shape, "region_attributes": attributes} for shape, attributes in shapes]
    if version == 1:
        regions = {str(i): region for i, region in enumerate(regions)}
    files = {
        "a b.jpg1234": {"filename": "a b.jpg", "size": 1234, "regions": regions, "file_attributes": {}},
        "x.jpg1": {"filename": "x.jpg", "size": 1, "regions": [], "file_attributes": {}},
    }
    content = files if version == 1 else {"_via_settings": {}, "_via_img_metadata": files, "_via_attributes": {}}
    (tmp_path / "via.json").write_text(json.dumps(content))
    text = convert(tmp_path / "via.json", tmp_path / "coco.json", "--images", tmp_path / "images")
    assert "not used: regions of the shape point without an area (1): a b.jpg" in text
    assert "not used: regions without a class (1): a b.jpg" in text
    assert "not used: images that were not found (1): x.jpg" in text
    ellipse = cv2.ellipse(np.zeros((HEIGHT, WIDTH), np.uint8), (45, 35), (30, 20), 0, 0, 360, 1, -1) > 0
    found = load(tmp_path / "coco.json", tmp_path / "images")
    check(found, "a b.jpg", ("cat", drawn(SQUARE)), ("dog", drawn(SECOND)), ("cat", ellipse))


def test_options_of_a_via_project_are_named(tmp_path):
    """Regions store the id of an option; the project file has its name."""
    write_images(tmp_path / "images")
    shape = {"name": "rect", "x": 90, "y": 20, "width": 30, "height": 50}
    regions = [{"shape_attributes": shape, "region_attributes": {"class": "3"}}]
    files = {"c.png1": {"filename": "c.png", "size": 1, "regions": regions, "file_attributes": {}}}
    attributes = {"region": {"class": {"type": "dropdown", "options": {"1": "cat", "3": "dog"}}}}
    content = {"_via_settings": {}, "_via_img_metadata": files, "_via_attributes": attributes}
    (tmp_path / "via.json").write_text(json.dumps(content))
    convert(tmp_path / "via.json", tmp_path / "coco.json", "--images", tmp_path / "images")
    check(load(tmp_path / "coco.json", tmp_path / "images"), "c.png", ("dog", drawn(SECOND)))


def write_voc(folder, objects, classes, palette=None):
    for name, values in (("SegmentationObject", objects), ("SegmentationClass", classes)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(values)
        if palette is not None:
            image.putpalette(palette)
        image.save(folder / name / "one.png")


def test_voc(tmp_path):
    write_images(tmp_path / "JPEGImages", ["one.jpg", "two.jpg"])
    ring, second = drawn(SQUARE, holes=[HOLE]), drawn(SECOND)
    objects = (1 * ring + 2 * second).astype(np.uint8)
    objects[0] = 255  # void
    classes = (15 * ring + 7 * second).astype(np.uint8)
    write_voc(tmp_path, objects, classes, palette=list(range(256)) * 3)
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("one\n")
    (lists / "val.txt").write_text("two\n")
    text = convert(tmp_path, tmp_path / "coco.json")
    assert "not used: masks that are missing or cannot be read (1): two.png" in text
    found = load(tmp_path / "coco_train.json", tmp_path / "JPEGImages")
    check(found, "one.jpg", ("person", ring), ("car", second))


def test_voc_of_cvat(tmp_path):
    """Colours instead of indices, with a label map."""
    write_images(tmp_path / "JPEGImages", ["one.jpg"])
    square, second = drawn(SQUARE), drawn(SECOND)
    objects, classes = (np.zeros((HEIGHT, WIDTH, 3), np.uint8) for _ in range(2))
    objects[square], objects[second] = (128, 0, 0), (0, 128, 0)
    classes[square | second] = (250, 50, 83)
    write_voc(tmp_path, objects, classes)
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\nmug:250,50,83::\n")
    convert(tmp_path, tmp_path / "coco.json")
    found = load(tmp_path / "coco.json", tmp_path / "JPEGImages")
    assert sorted(mask.sum() for _, mask in found["one.jpg"]) == sorted((square.sum(), second.sum()))
    assert {name for name, _ in found["one.jpg"]} == {"mug"}


def test_voc_of_datumaro(tmp_path):
    """Colours of Pascal VOC's palette, and a label map that does not state them."""
    write_images(tmp_path / "JPEGImages", ["one.jpg"])
    square, second = drawn(SQUARE), drawn(SECOND)
    objects, classes = (np.zeros((HEIGHT, WIDTH, 3), np.uint8) for _ in range(2))
    objects[square], objects[second] = (128, 0, 0), (0, 128, 0)
    classes[square], classes[second] = (0, 128, 0), (128, 128, 0)  # the second and the third class
    write_voc(tmp_path, objects, classes)
    lines = ["# label:color_rgb:parts:actions", "background:::", "cup:::", "mug:::", "jug:::"]
    (tmp_path / "labelmap.txt").write_text("\n".join(lines))
    convert(tmp_path, tmp_path / "coco.json")
    check(load(tmp_path / "coco.json", tmp_path / "JPEGImages"), "one.jpg", ("jug", second), ("mug", square))


def test_coco_folders_of_annotation_tools(tmp_path):
    """CVAT and Datumaro export a folder with annotations/instances_*.json and images."""
    for split, file_name in (("train", "a b.jpg"), ("val", "c.png")):
        write_images(tmp_path / "images" / split, [file_name])
        content = {
            "images": [{"id": 1, "file_name": file_name, "height": HEIGHT, "width": WIDTH}],
            "categories": [{"id": 1, "name": "thing"}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[float(v) for p in SQUARE for v in p]]}
            ],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    convert(tmp_path, tmp_path / "coco.json")
    check(load(tmp_path / "coco_train.json", tmp_path / "images/train"), "a b.jpg", ("thing", drawn(SQUARE)))
    check(load(tmp_path / "coco_val.json", tmp_path / "images/val"), "c.png", ("thing", drawn(SQUARE)))
    (tmp_path / "annotations/instances_val.json").unlink()
    convert(tmp_path, tmp_path / "one.json")
    assert (tmp_path / "one.json").is_file()  # a single file has no split
    shutil.rmtree(tmp_path / "images")
    text = run("tools.formats", tmp_path, "--output", tmp_path / "two.json", code=2)
    assert "images that were not found" in text
    assert "--images DIR names the folder" in text


def test_coco_exports_of_annotation_tools(tmp_path):
    write_images(tmp_path / "images")
    square = [float(v) for point in SQUARE for v in point]
    columns = drawn(SECOND).ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(columns)) + 1
    counts = np.diff([0, *edges, columns.size]).tolist()
    common = {"category_id": 0, "attributes": {"occluded": False}, "iscrowd": 0}
    content = {
        "images": [
            {"id": 0, "file_name": "images\\/7a0b5f3c-a b.jpg", "height": HEIGHT, "width": WIDTH},  # Label Studio
            {"id": 1, "file_name": "/data/upload/straße.jpg", "height": HEIGHT, "width": WIDTH},
        ],
        "categories": [{"id": 0, "name": "thing"}],
        "annotations": [
            {"id": 0, "image_id": 0, "segmentation": [square], **common},
            # CVAT's brush: run lengths, and iscrowd
            {"id": 1, "image_id": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}
            | common
            | {"iscrowd": 1},
            {"id": 2, "image_id": 1, "segmentation": [], **common},
        ],
    }
    (tmp_path / "export.json").write_text(json.dumps(content))
    text = convert(tmp_path / "export.json", tmp_path / "coco.json", "--images", tmp_path / "images")
    assert "set for RLE masks (1)" in text
    assert "not used: annotations without a usable mask or box (1)" in text
    found = load(tmp_path / "coco.json", tmp_path / "images")
    check(found, "a b.jpg", ("thing", drawn(SQUARE)))
    check(found, "straße.jpg", ("thing", drawn(SECOND)))


def test_mistakes_get_one_line_and_no_file(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "no_names.yaml").write_text("train: images\n")
    (tmp_path / "wrong_path.yaml").write_text("train: elsewhere\nnames: [a]\n")
    (tmp_path / "broken.yaml").write_text("names: [a\n")
    region = {"shape_attributes": {}, "region_attributes": {"p": "1", "q": "2"}}
    (tmp_path / "many.json").write_text(json.dumps({"x": {"filename": "c.png", "regions": [region]}}))
    for source, message in (
        ("nothing", "no such file or folder"),
        ("text.txt", "not a known format"),
        ("images", "not a known format"),
        ("no_names.yaml", "has no list of class names"),
        ("wrong_path.yaml", "train is elsewhere, which does not exist"),
        ("broken.yaml", "not a YAML file"),
        ("many.json", "rename the one that holds the class"),
    ):
        text = run("tools.formats", tmp_path / source, "--output", tmp_path / "coco.json", code=2)
        assert message in text, text
        assert len(text.strip().splitlines()) == 1, text
    text = run("tools.formats", tmp_path / "images", "--output", tmp_path / "coco.txt", code=2)
    assert "the suffix must be .json" in text
    assert not list(tmp_path.glob("coco*"))


def test_pyyaml_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "data.yaml").write_text("names: [a]\n")
    text = run("tools.formats", tmp_path / "data.yaml", "--output", tmp_path / "coco.json", code=2)
    assert "pip install pyyaml" in text


@pytest.mark.parametrize("script", ["train", "eval", "audit"])
def test_scripts_name_the_command_that_converts(tmp_path, script):
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a]\n")
    labelme(tmp_path / "a.json", "a.jpg", [{"label": "x", "points": SQUARE}])
    for source in (tmp_path / "data.yaml", tmp_path / "a.json", tmp_path):
        words = {
            "train": ["train.py", "--config", "yolact_lite", "--train_annotations", source, "--train_images", tmp_path],
            "eval": ["eval.py", "--annotations", source, "--image_dir", tmp_path],
            "audit": ["tools.audit", "--annotations", source, "--image_dir", tmp_path],
        }[script]
        text = run(*words, code=2)
        assert f"python -m tools.formats {source}" in text, text


def test_boxes_without_masks_are_kept_and_said(dataset, tmp_path):
    content = json.loads(dataset.read_text())
    del content["annotations"][0]["segmentation"]
    content["annotations"].append(content["annotations"][0] | {"id": 99})
    dataset.write_text(json.dumps(content))
    out = run("tools.formats", dataset, "--images", dataset.parent / "images", "--output", tmp_path / "coco.json")
    assert "objects without a mask, of which only the box is kept (2)" in out
    assert "not used: exact copies of another object of their image (1)" in out
    first, *rest = json.loads((tmp_path / "coco.json").read_text())["annotations"]
    assert first["bbox"] == pytest.approx(content["annotations"][0]["bbox"])
    assert "segmentation" not in first
    assert all("segmentation" in other for other in rest)
