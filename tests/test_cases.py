"""Inputs as people have them: each gives the right result, or a line that says what is wrong and what to do."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import unicodedata
import zipfile

import cv2
import numpy as np
import PIL.Image
import pytest
from conftest import ROOT, make_dataset, run, train_args
from pycocotools import mask as rle

from data.coco import CocoDataset
from data.image import as_image, read_image
from evaluation.evaluator import check_classes

SQUARE = [10, 10, 90, 10, 90, 70, 10, 70]
SHAPES = [{"label": "cat", "points": np.reshape(SQUARE, (-1, 2)).tolist()}]


def photo(path, size=(240, 320), orientation=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = PIL.Image.Exif()
    exif[0x112] = orientation
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (*size, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path, "JPEG", exif=exif)
    return path


def coco(path, images, annotations=None, categories=None):
    """A COCO file of `images` (id, file name, height, width), with one square in each."""
    keys = ("id", "file_name", "height", "width")
    if annotations is None:
        annotations = [annotation(number, image[0]) for number, image in enumerate(images, 1)]
    content = {
        "images": [dict(zip(keys, image, strict=True)) for image in images],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}] if categories is None else categories,
    }
    path.write_text(json.dumps(content))
    return path


def annotation(number, image, **others):
    """The square, moved a little for every further annotation."""
    moved = (np.array(SQUARE) + max(0, number - 1)).tolist()
    return {"id": number, "image_id": image, "category_id": 1, "segmentation": [moved], "iscrowd": 0} | others


def convert(source, *args, code=0):
    """Convert; return what is printed, and the file that was written."""
    out = source.parent / "converted.json"
    text = run("tools.formats", source, "--output", out, *args, code=code)
    return text, json.loads(out.read_text()) if out.exists() else None


def mask_of(content, index=0):
    entry = content["annotations"][index]
    image = next(image for image in content["images"] if image["id"] == entry["image_id"])
    code = entry["segmentation"]
    if isinstance(code, list):
        code = rle.merge(rle.frPyObjects(code, image["height"], image["width"]))
    return rle.decode(code).astype(bool)


@pytest.mark.parametrize("size", [(240, 320), (320, 240)])
def test_the_stated_size_decides_how_a_rotated_photo_was_annotated(tmp_path, size):
    photo(tmp_path / "images/phone.jpg", (240, 320), orientation=6)  # upright it is 240 wide and 320 high
    source = coco(tmp_path / "a.json", [(1, "phone.jpg", *size)])
    text, found = convert(source, "--images", tmp_path / "images")
    assert (found["images"][0]["height"], found["images"][0]["width"]) == size
    assert mask_of(found)[10:70, 10:90].mean() > 0.95
    assert ("refer to the pixels as they are stored (1): phone.jpg" in text) == (size == (240, 320))
    (tmp_path / "converted.json").rename(tmp_path / "c.json")
    assert CocoDataset(tmp_path / "c.json", tmp_path / "images")[0].image.shape[:2] == size


def test_coco_files_that_contradict_themselves(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.jpg")
    first, second = (1, "a.jpg", 240, 320), (2, "b.jpg", 240, 320)
    for images, listed, categories, words in (
        ([first, (1, "b.jpg", 240, 320)], None, None, "image id 1 is used more than once"),
        ([first, (51, "a.jpg", 240, 320)], None, None, "a.jpg is the file_name of 2 image ids (1, 51), perhaps frames"),
        ([(1, "a.jpg", 960, 1280)], None, None, "a.jpg (1280x960 in the labels, 320x240 on disk)"),
        ([first], None, ["cat"], "'categories' must be a list of objects"),
        ([first], [annotation(1, 1, segmentation=[[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]])], None, "relative (0 to 1)"),
    ):
        text, found = convert(coco(tmp_path / "x.json", images, listed, categories), code=2)
        assert words in text
        assert found is None
    text, found = convert(
        coco(tmp_path / "x.json", [first, second], [annotation(1, "1"), annotation(2, 2.0), annotation(3, 9)])
    )
    assert [a["image_id"] for a in found["annotations"]] == [1, 2]
    assert "not used: annotations of images that are not listed (1): image_id 9" in text


def test_the_longest_common_end_of_a_path_decides(tmp_path):
    for site in "AB":
        photo(tmp_path / f"photos/site{site}/0001.jpg")
    names = [f"/label-studio/data/fields/site{site}/0001.jpg" for site in "BA"]
    source = coco(tmp_path / "x.json", [(i, name, 240, 320) for i, name in enumerate(names)])
    _, found = convert(source, "--images", tmp_path / "photos")
    assert [image["file_name"] for image in found["images"]] == ["siteB/0001.jpg", "siteA/0001.jpg"]
    text, _ = convert(coco(tmp_path / "x.json", [(1, "0001.jpg", 240, 320)]), "--images", tmp_path / "photos", code=2)
    assert "images whose name fits several files (1): 0001.jpg (siteA/0001.jpg and siteB/0001.jpg)" in text


@pytest.mark.parametrize(
    "name",
    [
        "https://bucket.example/x/street%20a.jpg?Signature=ab/cd",
        "x\\street a.jpg",
        "/data/upload/1/7a0b5f3c-street a.jpg",
        "street a.png",
        "STREET A.JPG",
    ],
)
def test_names_of_images_are_understood(tmp_path, name):
    photo(tmp_path / "images/street a.jpg")
    _, found = convert(coco(tmp_path / "x.json", [(1, name, 240, 320)]), "--images", tmp_path / "images")
    assert found["images"][0]["file_name"] == "street a.jpg"


def test_unicode_forms_of_names(tmp_path):
    photo(tmp_path / "images" / unicodedata.normalize("NFD", "Bär.jpg"))
    _, found = convert(coco(tmp_path / "x.json", [(1, "Bär.jpg", 240, 320)]), "--images", tmp_path / "images")
    assert len(found["annotations"]) == 1


def test_crowd_flags_that_a_tool_has_set(tmp_path):
    """supervision marks RLE masks so; one crowd among many objects, as in COCO, stays one."""
    photo(tmp_path / "images/a.jpg")
    image, crowd = [(1, "a.jpg", 240, 320)], {"iscrowd": 1}
    source = coco(tmp_path / "x.json", image, [annotation(1, 1, **crowd), annotation(2, 1, **crowd), annotation(3, 1)])
    text, found = convert(source, "--images", tmp_path / "images")
    assert "note: crowd flags cleared, which CVAT and supervision set for RLE masks (2)" in text
    assert [a["iscrowd"] for a in found["annotations"]] == [0, 0, 0]
    shown = run("tools.audit", "--annotations", source, "--image_dir", tmp_path / "images", "--output", tmp_path / "o")
    assert "annotations are crowd regions (iscrowd 1), which training and AP ignore (2 of 3)" in shown
    source = coco(tmp_path / "x.json", image, [annotation(i, 1, iscrowd=int(i == 0)) for i in range(8)])
    _, found = convert(source, "--images", tmp_path / "images")
    assert sum(a["iscrowd"] for a in found["annotations"]) == 1


def test_exact_copies_are_dropped_and_counted(tmp_path):
    photo(tmp_path / "a.jpg")
    listed = [annotation(1, 1), annotation(1, 1), annotation(1, 1, category_id=2), annotation(2, 1)]
    text, found = convert(coco(tmp_path / "x.json", [(1, "a.jpg", 240, 320)], listed))
    assert [a["category_id"] for a in found["annotations"]] == [1, 2, 1]
    assert "not used: exact copies of another object of their image (1): a.jpg" in text


def test_folders_of_coco_files(tmp_path):
    """Roboflow writes one per split; captions, panoptic segments and keypoints beside the instances are left out."""
    for split in ("train", "valid"):
        photo(tmp_path / f"roboflow/{split}/a.jpg")
        coco(tmp_path / f"roboflow/{split}/_annotations.coco.json", [(1, "a.jpg", 240, 320)])
    out = run("tools.formats", tmp_path / "roboflow", "--output", tmp_path / "r.json")
    assert "r_train.json" in out
    assert len(json.loads((tmp_path / "r_valid.json").read_text())["annotations"]) == 1
    photo(tmp_path / "coco/val/a.jpg")
    (tmp_path / "coco/annotations").mkdir()
    for name in ("instances_val", "person_keypoints_val"):
        coco(tmp_path / f"coco/annotations/{name}.json", [(1, "a.jpg", 240, 320)])
    caption = {"id": 1, "image_id": 1, "caption": "a cat"}
    coco(tmp_path / "coco/annotations/captions_val.json", [(1, "a.jpg", 240, 320)], [caption])
    run("tools.formats", tmp_path / "coco", "--output", tmp_path / "one.json")
    assert sorted(path.name for path in tmp_path.glob("one*.json")) == ["one.json"]
    for name in ("train", "val"):  # files beside the folder of images
        photo(tmp_path / f"plain/images/{name}.jpg")
        coco(tmp_path / f"plain/{name}.json", [(1, f"{name}.jpg", 240, 320)])
    run("tools.formats", tmp_path / "plain", "--output", tmp_path / "p.json")
    assert sorted(path.name for path in tmp_path.glob("p_*.json")) == ["p_train.json", "p_val.json"]


def yolo(folder, names="[cat]", label="0 0.1 0.1 0.5 0.1 0.5 0.5\n", image="images/a.jpg", target="labels/a.txt"):
    photo(folder / image)
    (folder / "data.yaml").write_text(f"path: .\ntrain: {image.rpartition('/')[0]}\nnames: {names}\n")
    (folder / target).parent.mkdir(parents=True, exist_ok=True)
    (folder / target).write_bytes(label if isinstance(label, bytes) else label.encode())
    return folder


def test_yolo_as_people_have_it(tmp_path):
    text, _ = convert(yolo(tmp_path / "conf", label="0 0.1 0.1 0.5 0.1 0.5 0.5 0.93\n"), code=2)
    assert "if predictions end with a confidence" in text
    text, _ = convert(yolo(tmp_path / "none", target="Other/a.txt"), code=2)
    assert "images without a label file (1): looked for " in text
    norway = yolo(tmp_path / "norway", names="[no, yes]", label="0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.1 0.1 0.5 0.1 0.5 0.5")
    run("tools.formats", norway, "--output", tmp_path / "n.json")
    names = [entry["name"] for entry in json.loads((tmp_path / "n_train.json").read_text())["categories"]]
    assert names == ["no", "yes"]
    chinese = yolo(tmp_path / "gbk", label="0 0.1 0.1 0.5 0.1 0.5 0.5 # 狗".encode("gbk"))
    text, _ = convert(chinese, code=2)
    assert "files that are not UTF-8 text; save them as UTF-8 (1): a.txt" in text
    (chinese / "data.yaml").unlink()
    (chinese / "classes.txt").write_bytes("狗".encode("gbk"))
    assert "classes.txt: not UTF-8 text" in convert(chinese, code=2)[0]


def test_yolo_labels_without_their_images(tmp_path):
    """CVAT exports a list of images and no images; Label Studio puts a prefix before their names."""
    photo(tmp_path / "photos/a.jpg")
    cvat = yolo(tmp_path / "cvat", target="labels/train/a.txt", image="gone/x.jpg")
    (cvat / "data.yaml").write_text("names: {0: cat}\npath: .\ntrain: train.txt\n")
    (cvat / "train.txt").write_text("images/train/a.jpg\n")
    studio = yolo(tmp_path / "studio", target="labels/7a0b5f3c-a.txt", image="gone/x.jpg")
    (studio / "data.yaml").unlink()
    (studio / "classes.txt").write_text("cat\n")
    (studio / "notes.json").write_text("{}")
    for source in (cvat, studio):
        run("tools.formats", source, "--images", tmp_path / "photos", "--output", tmp_path / "y.json")
        content = json.loads(next(tmp_path.glob("y*.json")).read_text())
        assert [image["file_name"] for image in content["images"]] == ["a.jpg"]
        assert len(content["annotations"]) == 1
        next(tmp_path.glob("y*.json")).unlink()


def test_hidden_files_are_skipped_and_jfif_is_read(tmp_path):
    folder = yolo(tmp_path / "x")
    photo(folder / "images/b.jfif")
    photo(folder / "images/.ipynb_checkpoints/a-checkpoint.jpg")
    (folder / "images/._a.jpg").write_bytes(b"\0" * 40)
    (folder / "labels/._a.txt").write_bytes(b"\xff" * 40)
    run("tools.formats", folder, "--output", tmp_path / "y.json")
    content = json.loads((tmp_path / "y_train.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.jfif"]
    out = run("eval.py", "--images", folder / "images", "--size", 64, "--output", tmp_path / "out", "--device", "cpu")
    assert "2 images" in out
    assert "could not be read" not in out


def labelme(path, shapes, name="a.jpg", **others):
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {"imageHeight": 240, "imageWidth": 320}
    path.write_text(json.dumps({"shapes": shapes, "imagePath": name, "imageData": None, **size, **others}))


def test_labelme_groups_with_masks_and_holes(tmp_path):
    photo(tmp_path / "x/a.jpg")
    code = base64.b64encode(cv2.imencode(".png", np.ones((50, 60), np.uint8))[1].tobytes()).decode()
    whole = {"label": "cat", "shape_type": "mask", "points": [[10, 20], [69, 69]], "mask": code, "group_id": 1}
    hole = {"label": "cat", "points": [[20, 30], [40, 30], [40, 45], [20, 45]], "group_id": 1, "flags": {"hole": True}}
    outside = {"label": "dog", "shape_type": "mask", "points": [[-0.6, 0], [59, 49]], "mask": code}
    labelme(tmp_path / "x/a.json", [whole, hole, outside, hole | {"label": "fox", "group_id": 2}])
    text, found = convert(tmp_path / "x")
    assert mask_of(found, 0).sum() == 50 * 60 - 20 * 15
    assert mask_of(found, 1).sum() == 50 * 59
    assert "not used: holes without the object that they are in (1): a.json" in text


def test_labels_that_are_nearly_equal_or_reserved(tmp_path):
    photo(tmp_path / "x/a.jpg")
    names = ("cat", "cat ", "Cat", "__ignore__", "_background_")
    labelme(tmp_path / "x/a.json", [SHAPES[0] | {"label": name} for name in names])
    text, found = convert(tmp_path / "x")
    run("tools.formats", tmp_path / "x", "--output", tmp_path / "x/coco.json")
    assert convert(tmp_path / "x")[0].startswith("LabelMe: 1 image, 2 objects")  # not the file in the folder
    assert [entry["name"] for entry in found["categories"]] == ["cat", "Cat"]
    assert "nearly equal class names: 'cat', 'Cat'" in text
    assert "reserved label __ignore__" in text
    labelme(tmp_path / "y/b.json", SHAPES, "gone.jpg", imageData="abc")
    assert "stored inside the JSON (imageData)" in convert(tmp_path / "y", code=2)[0]


def test_isat_cvat_and_masks_are_read(tmp_path):
    points = np.reshape(SQUARE, (-1, 2)).tolist()
    photo(tmp_path / "isat/a.jpg")
    item = {"category": "cat", "group": 1, "segmentation": points, "iscrowd": False}
    info = {"description": "ISAT", "name": "a.jpg", "width": 320, "height": 240}
    (tmp_path / "isat/a.json").write_text(json.dumps({"info": info, "objects": [item]}))
    photo(tmp_path / "cvat/a.jpg")
    text = ";".join(f"{x},{y}" for x, y in points)
    shapes = (
        f'<polygon label="cat" points="{text}"/><mask label="dog" rle="2,3,5" left="-1" top="5" width="5" height="2"/>'
    )
    label = "<meta><task><labels><label><name>cat</name></label></labels></task></meta>"
    image = f'<image id="0" name="a.jpg" width="320" height="240">{shapes}</image>'
    (tmp_path / "cvat/annotations.xml").write_text(f"<annotations>{label}{image}</annotations>")
    photo(tmp_path / "masks/images/a.jpg")
    mask = np.zeros((240, 320), np.uint8)
    mask[10:70, 10:90], mask[100:150, 10:90] = 1, 2
    (tmp_path / "masks/masks").mkdir()
    PIL.Image.fromarray(mask).save(tmp_path / "masks/masks/a.png")
    for name, count in (("isat", 1), ("cvat", 2), ("masks", 2)):
        _, found = convert(tmp_path / name)
        assert len(found["annotations"]) == count
        assert abs(int(mask_of(found).sum()) - 60 * 80) <= 60 + 80  # a polygon rounds its border
        (tmp_path / "converted.json").unlink()
    assert [entry["name"] for entry in found["categories"]] == ["object"]
    mask[mask > 0] = 255  # one value: parts that do not touch are objects
    PIL.Image.fromarray(mask).save(tmp_path / "masks/masks/a.png")
    assert len(convert(tmp_path / "masks")[1]["annotations"]) == 2


def test_formats_that_are_not_read_are_named(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("result.json", "{}")
    shape = '"{""name"":""polygon""}"'
    for name, content, words in (
        ("a.zip", archive.getvalue(), "unpack it"),
        ("annotations.json", archive.getvalue(), "unpack it"),
        ("via.csv", f"filename,region_shape_attributes\na.jpg,{shape}".encode(), "export the annotations as JSON"),
        ("via3.json", b'{"project": {}, "metadata": {}, "file": {}}', "VIA 3"),
        ("datumaro.json", b'{"info": {}, "categories": {}, "items": []}', "datum convert"),
        ("studio.json", b'[{"data": {"image": "a"}, "annotations": []}]', "Label Studio"),
        ("a.xml", b"<annotation><object><polygon></polygon></object></annotation>", "old LabelMe web tool"),
        ("voc.xml", b"<annotation><object><bndbox/></object></annotation>", "boxes and no masks"),
        ("gbk.json", "{'狗'}".encode("gbk"), "not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        text, _ = convert(tmp_path / name, code=2)
        assert words in text
    (tmp_path / "sly/ds0/ann").mkdir(parents=True)
    (tmp_path / "sly/meta.json").write_text('{"classes": [], "tags": []}')
    (tmp_path / "sly/ds0/ann/a.jpg.json").write_text("{}")
    assert "Supervisely" in convert(tmp_path / "sly", code=2)[0]


def test_classes_are_matched_by_name(tmp_path, small_config):
    train = make_dataset(tmp_path / "train", 4)
    val = make_dataset(tmp_path / "val", 2)
    content = json.loads(val.read_text())
    content["categories"].reverse()
    val.write_text(json.dumps(content))
    args = train_args(train, "--max_iter", "1", "--batch_size", "2", "--output_dir", tmp_path / "run")
    args[args.index("--val_annotations") + 1 : args.index("--val_annotations") + 2] = [val]
    if "--val_images" in args:
        args[args.index("--val_images") + 1] = val.parent / "images"
    else:
        args += ["--val_images", val.parent / "images"]
    assert "are matched by name with the 2 in training" in run(*args)
    dataset = CocoDataset(val, val.parent / "images")
    before = [dataset.category_ids[label] for label in dataset[0].labels]
    check_classes(dataset, small_config)
    assert dataset.class_names == small_config.class_names
    assert [dataset.category_ids[label] for label in dataset[0].labels] == before
    content["categories"][0]["name"] = "other"
    val.write_text(json.dumps(content))
    assert "its classes differ from those in training" in run(*args, "--output_dir", tmp_path / "r2", code=2)


def test_a_file_with_some_of_the_classes(tmp_path, small_config):
    path = make_dataset(tmp_path / "d", 2)
    content = json.loads(path.read_text())
    kept = content["categories"][1]["id"]
    content["categories"] = content["categories"][1:]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == kept]
    path.write_text(json.dumps(content))
    dataset = CocoDataset(path, path.parent / "images")
    assert "matched by name with the 2" in check_classes(dataset, small_config)
    assert dataset.class_names == small_config.class_names
    assert len(set(dataset.category_ids)) == 2
    assert {dataset.labels[a["category_id"]] for a in dataset.annotations(0)} <= {1}


def test_the_order_of_classes_can_be_given(tmp_path):
    for split, label in (("train", "cat"), ("val", "dog")):
        photo(tmp_path / split / "a.jpg")
        labelme(tmp_path / split / "a.json", [SHAPES[0] | {"label": label}])
    run("tools.formats", tmp_path / "train", "--classes", "dog, cat", "--output", tmp_path / "t.json")
    run("tools.formats", tmp_path / "val", "--like", tmp_path / "t.json", "--output", tmp_path / "v.json")
    names = [[c["name"] for c in json.loads((tmp_path / f).read_text())["categories"]] for f in ("t.json", "v.json")]
    assert names == [["dog", "cat"]] * 2
    text = run("tools.formats", tmp_path / "val", "--classes", "cat", "--output", tmp_path / "v.json", code=2)
    assert "has other classes: dog; wanted: cat" in text


def test_deep_pil_images_are_what_their_files_are(tmp_path):
    values = np.random.default_rng(0).integers(0, 65535, (40, 50), np.uint16)
    PIL.Image.fromarray(values).save(tmp_path / "deep.png")
    PIL.Image.fromarray(values).save(tmp_path / "deep.tif")
    PIL.Image.fromarray(values.astype(np.float32) / 65535).save(tmp_path / "float.tif")
    wanted = np.repeat((values / 257).round().astype(np.uint8)[..., None], 3, axis=2)
    for name in ("deep.png", "deep.tif", "float.tif"):
        for found in (read_image(tmp_path / name), as_image(PIL.Image.open(tmp_path / name))):
            assert np.abs(found.astype(int) - wanted).max() <= 1, name
    assert np.abs(as_image(PIL.Image.fromarray(values)).astype(int) - wanted).max() <= 1  # without a file
    PIL.Image.fromarray(values.astype(np.int32)).save(tmp_path / "int.tif")
    with pytest.raises(Exception, match="int32 pixels are not supported"):
        as_image(PIL.Image.open(tmp_path / "int.tif"))


def test_narrow_encodings_and_opencv_without_its_libraries(tmp_path):
    image = photo(tmp_path / "北京.jpg")
    command = [sys.executable, ROOT / "eval.py", "--image", image, "--size", "64", "--output", tmp_path / "out"]

    def output(**variables):
        env = {**os.environ, **variables}
        done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = output(PYTHONIOENCODING="cp1252")
    assert code == 0, text
    assert "\\u5317\\u4eac.jpg" in text
    (tmp_path / "fake/cv2").mkdir(parents=True)
    (tmp_path / "fake/cv2/__init__.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    code, text = output(PYTHONPATH=str(tmp_path / "fake"))
    assert code == 2
    assert len(text.strip().splitlines()) == 1
    assert "opencv-python-headless" in text
