"""Data sets that the annotation tools write themselves, where their packages are installed, keep their masks.

datumaro, labelme and ultralytics are no requirements of this project; without its package, a test is skipped.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
from conftest import run
from pycocotools import mask as rle

from data.annotation import to_rle
from data.coco import CocoDataset


@pytest.fixture
def source(dataset):
    """The data set with polygons only, because not every format has run lengths, and with an image folder."""
    content = json.loads(dataset.read_text())
    masks = [a for a in content["annotations"] if isinstance(a["segmentation"], dict)]
    content["annotations"] = [a for a in content["annotations"] if a not in masks]
    assert len(content["annotations"]) >= 8
    dataset.write_text(json.dumps(content))
    return CocoDataset(dataset, dataset.parent / "images")


def objects(dataset):
    """The run lengths of all objects, by the name of the image and the class."""
    found = {}
    for index in range(len(dataset)):
        size = dataset.read_image(index).shape[:2]
        for item in dataset.parsed(index, size):
            key = dataset.image_path(index).stem, dataset.class_names[item.label]
            found.setdefault(key, []).append(to_rle(item.segmentation, *size))
    return found


def assert_same(source, folder, tmp_path, *more, least=0.97):
    """After conversion, every object of the source is there with nearly the same mask, and there are no others."""
    out = run("tools.formats", folder, "--output", tmp_path / "back.json", *more)
    annotations, root = re.search(r"--annotations (.*) --image_dir (.*)$", out, re.MULTILINE).groups()
    ours, theirs = objects(source), objects(CocoDataset(annotations, root))
    assert ours.keys() == theirs.keys()
    for key, masks in ours.items():
        ious = rle.iou(masks, theirs[key], [0] * len(theirs[key]))
        assert ious.shape[0] == ious.shape[1]
        assert ious.max(axis=1).min() > least, (key, ious)


def test_supervision(source, tmp_path):
    supervision = pytest.importorskip("supervision", reason="needs supervision")
    images, out = source.image_dir, tmp_path / "yolo"
    known = supervision.DetectionDataset.from_coco(str(images), str(source.path), force_masks=True)
    known.as_yolo(str(out / "images"), str(out / "labels"), str(out / "data.yaml"))
    assert_same(source, out, tmp_path, least=0.9)  # its polygons join the centres of the pixels
    known.as_coco(str(tmp_path / "coco/images"), str(tmp_path / "coco/all.json"))
    assert_same(source, tmp_path / "coco/all.json", tmp_path, "--images", images, least=0.9)


@pytest.mark.parametrize("kind", ["coco_instances", "cvat", "voc_instance_segmentation"])
def test_datumaro(source, tmp_path, kind):
    datumaro = pytest.importorskip("datumaro", reason="needs datumaro")
    home = tmp_path / "in"
    (home / "annotations").mkdir(parents=True)
    shutil.copytree(source.image_dir, home / "images/train")
    shutil.copy(source.path, home / "annotations/instances_train.json")
    known = datumaro.Dataset.import_from(str(home), "coco_instances")
    if kind.startswith("voc"):
        known.transform("polygons_to_masks")
    known.export(str(tmp_path / kind), kind, save_media=True)
    assert_same(source, tmp_path / kind, tmp_path)


def test_labelme(source, tmp_path):
    labelme = pytest.importorskip("labelme._label_file", reason="needs labelme")
    out = tmp_path / "labelme"
    shutil.copytree(source.image_dir, out)
    for index in range(len(source)):
        height, width = source.read_image(index).shape[:2]
        name = source.file_name(index)
        shapes = [
            {
                "label": source.class_names[source.labels[entry["category_id"]]],
                "points": [[p[i], p[i + 1]] for i in range(0, len(p), 2)],
                "shape_type": "polygon",
                "group_id": None,
                "flags": {},
                "description": "",
            }
            for entry in source.annotations(index)
            for p in entry["segmentation"]
        ]
        labelme.LabelFile().save(str(out / name.replace(".png", ".json")), shapes, name, height, width)
    assert_same(source, out, tmp_path)


def test_ultralytics(source, tmp_path):
    converter = pytest.importorskip("ultralytics.data.converter", reason="needs ultralytics")
    (tmp_path / "in").mkdir()
    shutil.copy(source.path, tmp_path / "in/instances_train.json")
    out = tmp_path / "out"
    converter.convert_coco(str(tmp_path / "in"), str(out), use_segments=True, cls91to80=False)
    shutil.copytree(source.image_dir, out / "images/train", dirs_exist_ok=True)
    # It numbers the classes by their ids, counted from 0.
    named = sorted(zip(source.category_ids, source.class_names, strict=True))
    names = "".join(f"  {number - 1}: {name}\n" for number, name in named)
    (out / "data.yaml").write_text(f"train: images/train\nnames:\n{names}")
    assert_same(source, out, tmp_path)
