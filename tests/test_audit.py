from __future__ import annotations

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from conftest import make_dataset, random_image, run, train_args
from test_data import edit

from config import get_config
from data.coco import CocoDataset
from evaluation.evaluator import GroundTruth
from tools.audit import audit, quick_audit


def findings(path, **settings):
    dataset = CocoDataset(path, path.parent / "images")
    report = audit(dataset, get_config("yolact_r50", **settings))
    return {finding.kind: finding for finding in report.findings}


def test_nothing_is_wrong(dataset):
    assert findings(dataset) == {}
    report = audit(CocoDataset(dataset, dataset.parent / "images"), get_config("yolact_r50"))
    assert not report.errors
    assert (report.images, report.negatives, report.objects) == (8, 1, 14)
    assert sum(row["objects"] for row in report.classes) == 14


def swap_sizes(content):
    for image in content["images"]:
        image["width"], image["height"] = image["height"], image["width"]


def shift_polygons(content):
    for annotation in content["annotations"][::2]:
        annotation["segmentation"] = [[v + 40 for v in annotation["segmentation"][0]]]


def shrink_objects(content):
    for annotation in content["annotations"]:
        x, y = annotation["bbox"][:2]
        annotation |= {"bbox": [x, y, 2, 2], "segmentation": [[x, y, x + 2, y, x + 2, y + 2, x, y + 2]]}


def empty_masks(content):
    x, y = content["annotations"][0]["bbox"][:2]
    content["annotations"][0]["segmentation"] = [[x, y, x + 5, y, x + 9, y]]


def outside(content):
    content["annotations"][0] |= {"bbox": [500, 500, 9, 9], "segmentation": [[500, 500, 509, 500, 509, 509]]}


@pytest.mark.parametrize(
    ("change", "kind", "is_error"),
    [
        (swap_sizes, "unreadable", True),
        (shift_polygons, "box_and_mask", True),
        (empty_masks, "empty_mask", False),
        (outside, "unusable", False),
        (lambda c: c["annotations"].append(c["annotations"][0] | {"id": 99}), "same_annotation", False),
        (lambda c: c["annotations"][0].pop("segmentation"), "no_mask", False),
        (lambda c: c["categories"].append({"id": 50, "name": "ghost"}), "unused_class", False),
        (lambda c: c["categories"].append({"id": 50, "name": "disc"}), "same_name", False),
        (lambda c: c["images"].append(c["images"][0] | {"id": 999}), "listed_twice", False),
        (lambda c: c["annotations"].clear(), "no_object", True),
        (lambda c: c["images"].pop(0), "orphan", True),
        (lambda c: c["images"][0].update(file_name="../image_0.png"), "missing", True),
    ],
)
def test_each_defect_is_found(dataset, change, kind, is_error):
    found = findings(edit(dataset, change))
    assert kind in found
    assert found[kind].is_error == is_error
    assert found[kind].examples


def test_size_of_objects_counts_at_the_networks_input(dataset):
    path = edit(dataset, shrink_objects)
    assert set(findings(path)) == {"area"}  # 2 of 128 pixels are 8 of 550
    small = findings(path, max_size=96)
    assert small["tiny"].count == 14
    assert 5 < small["vanishing_mask"].count < 14  # it depends on where they lie


def test_photos_that_are_broken_missing_or_copies(dataset):
    images = dataset.parent / "images"
    (images / "image_0.png").unlink()
    (images / "image_1.png").write_bytes(b"no image")
    shutil.copy(images / "image_2.png", images / "image_3.png")
    found = findings(dataset)
    assert found["missing"].count == found["unreadable"].count == 1
    assert found["missing"].is_error  # train.py refuses to start
    assert not found["unreadable"].is_error  # one is tolerated
    assert found["same_image"].count == 1
    assert "image_2.png" in found["same_image"].examples[0]


def test_truncated_jpeg_is_found(dataset):
    def change(content):
        content["images"][0]["file_name"] = "cut.jpg"

    images = dataset.parent / "images"
    data = cv2.imencode(".jpg", cv2.imread(str(images / "image_0.png")))[1].tobytes()
    (images / "cut.jpg").write_bytes(data)
    assert "unreadable" not in findings(edit(dataset, change))
    (images / "cut.jpg").write_bytes(data[: len(data) * 2 // 3])
    assert findings(dataset)["unreadable"].count == 1


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"bbox": None}, None),  # the mask has one
        ({"bbox": [None, 1, 2, 3]}, "bad_box"),
        ({"bbox": {"x": 1, "y": 2, "w": 3, "h": 4}}, "bad_box"),
        ({"bbox": 7}, "bad_box"),
        ({"segmentation": [[1, 2, 3], None]}, "no_mask"),
        ({"segmentation": {"size": None, "counts": [5]}}, "no_mask"),
        ({"segmentation": {"size": [96, 128], "counts": [5, 7]}}, "no_mask"),
        ({"segmentation": {"size": [96, 128], "counts": None}}, "no_mask"),
        ({"segmentation": "polygon"}, "no_mask"),
        ({"segmentation": [["a", "b", "c", "d", "e", "f"]]}, "no_mask"),
        ({"segmentation": None, "bbox": None}, "unusable"),
        ({"iscrowd": "0"}, None),
    ],
)
def test_malformed_annotations_are_named_and_nothing_crashes(dataset, changed, kind):
    path = edit(dataset, lambda c: c["annotations"][0].update(changed))
    assert set(findings(path)) <= {kind}
    if kind is not None:
        assert findings(path)[kind].count == 1
    data = CocoDataset(path, path.parent / "images")
    assert len(data[0].boxes) == (1 if kind == "unusable" else 2)
    assert len(GroundTruth(data, {}).to_coco("bbox").anns) == (13 if kind == "unusable" else 14)


def test_polygons_as_points(dataset):
    def change(content):
        first = content["annotations"][0]
        first["segmentation"] = [np.reshape(first["segmentation"][0], (-1, 2)).tolist()]

    before = CocoDataset(dataset, dataset.parent / "images")[0].segmentations
    path = edit(dataset, change)
    assert CocoDataset(path, path.parent / "images")[0].segmentations == before


def test_swapped_sides_are_said_before_training(dataset):
    path = edit(dataset, swap_sizes)
    (error, *_) = quick_audit(CocoDataset(path, path.parent / "images"), get_config("yolact_r50"))
    assert re.search("images are unreadable.*8 of 8.*width and height are swapped", str(error))
    assert "are swapped" in run(*train_args(path), code=2)


def test_quick_form_is_silent_about_good_data_and_names_unused_classes(dataset, capsys):
    quick_audit(CocoDataset(dataset, dataset.parent / "images"), get_config("yolact_r50"))
    assert capsys.readouterr().out == ""
    path = edit(dataset, lambda c: c["categories"].append({"id": 50, "name": "ghost"}))
    quick_audit(CocoDataset(path, path.parent / "images"), get_config("yolact_r50"))
    assert "ghost" in capsys.readouterr().out


def test_command_line(tmp_path):
    path = make_dataset(tmp_path / "data", 6)
    args = [
        "-m",
        "tools.audit",
        "--annotations",
        path,
        "--image_dir",
        path.parent / "images",
        "--output",
        tmp_path / "a",
    ]
    assert "no problems found" in run(*args)
    assert cv2.imread(str(tmp_path / "a/sheet.jpg")).std() > 20
    report = json.loads((tmp_path / "a/audit.json").read_text())
    assert report["objects"] == 12
    edit(path, swap_sizes)
    out = run(*args, code=1)
    assert re.search(r"error: images are unreadable or not of the stated size \(6 of 6\)", out)
    assert "no such annotation file" in run(
        "-m", "tools.audit", "--annotations", "none.json", "--image_dir", ".", code=2
    )


def test_sheet_shows_the_truth(dataset):
    """The drawn objects lie where the image has them."""
    from tools.sheets import draw_truth

    sample = CocoDataset(dataset, dataset.parent / "images")[0]
    drawn = draw_truth(sample, ("disc", "tile"))
    changed = np.abs(drawn.astype(int) - sample.image).sum(axis=2) > 0
    for x1, y1, x2, y2 in sample.boxes.round().astype(int):
        assert changed[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].mean() > 0.6
    assert not changed[:4, :4].any()


def corners(content):
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]


def relative(content):
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x / 128, y / 96, w / 128, h / 96]
        annotation["segmentation"] = [[0.1, 0.1, 0.5, 0.1, 0.5, 0.55]]


def boxes_only(content):
    for annotation in content["annotations"]:
        del annotation["segmentation"]


def odd_boxes(content):
    content["annotations"][0]["bbox"] = [float("nan"), 1, 2, 3]
    content["annotations"][1]["bbox"] = [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "kind", "count", "is_error"),
    [
        (corners, "corner_box", 14, True),
        (lambda c: [boxes_only(c), corners(c)], "corner_box", None, True),
        (relative, "relative", 14, True),
        (boxes_only, "detection_only", 14, False),
        (odd_boxes, "bad_box", 2, False),
        (lambda c: [a.update(id=1) for a in c["annotations"]], "same_id", 13, False),
        (lambda c: [a.update(id=str(a["id"])) for a in c["annotations"]], "text_id", 14, False),
        (lambda c: [a.update(id=a["id"] + 0.5) for a in c["annotations"]], "text_id", 14, False),
        (lambda c: [i.update(id=str(i["id"])) for i in c["images"]], "text_id", 8, False),
        (lambda c: [a.update(area=a["area"] / 14) for a in c["annotations"]], "area", 14, False),
    ],
)
def test_defects_of_data_sets_as_downloaded(dataset, change, kind, count, is_error):
    """Each was "no problems found" once."""
    found = findings(edit(dataset, change))
    assert kind in found
    assert count is None or found[kind].count == count
    assert found[kind].is_error == is_error
    assert findings_are_complete(found[kind])


def findings_are_complete(finding):
    """A finding says how many, of how many, gives an example and what to do."""
    return re.fullmatch(r"(error|warning): .+ \(\d+ of \d+\): .+\. [A-Z].+", str(finding))


def test_fractional_ids_of_images_are_refused(dataset):
    path = edit(dataset, lambda c: c["images"][0].update(id=10.5))
    out = run("tools.audit", "--annotations", path, "--image_dir", path.parent / "images", code=2)
    assert "image id 10.5 is not a whole number" in out


def test_train_and_val_are_compared(tmp_path):
    train, val = make_dataset(tmp_path / "train", 6, seed=1), make_dataset(tmp_path / "val", 6, seed=2)
    shutil.copy(train.parent / "images/image_0.png", val.parent / "images/image_3.png")
    near = random_image(96, 128, seed=5)
    cv2.imwrite(str(train.parent / "images/image_1.png"), near)
    compressed = cv2.imdecode(cv2.imencode(".jpg", near, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
    cv2.imwrite(str(val.parent / "images/image_4.png"), compressed)
    edit(val, lambda c: c["categories"][1].update(name="plate"))
    args = ["tools.audit", "--annotations", train, "--image_dir", train.parent / "images", "--val_annotations", val,
            "--val_images", val.parent / "images", "--output", tmp_path / "out"]  # fmt: skip
    out = run(*args, code=1)
    assert "image_3.png is identical to image_0.png" in out
    assert "image_4.png and image_1.png" in out
    assert "error: classes are in the validation set only (1 of 3): plate" in out
    assert "images of the validation set are near-duplicates of training images (1 of 6): " in out


def test_unusable_images_of_the_validation_set_are_found(tmp_path):
    train, val = (make_dataset(tmp_path / name, 4, seed=seed) for seed, name in enumerate(("train", "val")))
    args = ["tools.audit", "--annotations", train, "--image_dir", train.parent / "images", "--output", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    more = ["--val_annotations", val, "--val_images"]
    assert "none of the images of" in run(*args, *more, tmp_path / "empty", code=2)
    assert "--val_images has no effect" in run(*args, "--val_images", tmp_path, code=2)
    next((val.parent / "images").iterdir()).unlink()
    assert "images of the validation set are missing or unreadable (1 of 4)" in run(
        *args, *more, val.parent / "images", code=1
    )


def test_the_basis_is_stated_and_earlier_audits_are_kept(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["tools.audit", "--annotations", dataset, "--image_dir", dataset.parent / "images"]
    assert "measured for yolact_lite at 320 px" in run(*args, "--config", "yolact_lite", "--set", "max_size=320")
    run(*args)
    assert (tmp_path / "audit/annotations/audit.json").is_file()
    assert (tmp_path / "audit/annotations_2/sheet.jpg").is_file()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "0 0.5 0.5 0.2 0.3\n1 0.1 0.2 0.3 0.4 0.5 0.6 0.7\n", "it is a YOLO label file"),
        ("data.yaml", "train: images/train\nnames: [cat]\n", "it is in the format of YOLO"),
        ("a.xml", "<annotation><folder>x</folder></annotation>", "boxes and no masks"),
        ("a.json", '{"version": "5.0", "shapes": [], "imagePath": "a.jpg"}', "it is in the format of LabelMe"),
        ("via.json", '{"a.jpg123": {"filename": "a.jpg", "regions": []}}', "it is in the format of VIA"),
    ],
)
def test_other_formats_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    assert words in run("tools.audit", "--annotations", tmp_path / name, "--image_dir", tmp_path, code=2)


def test_a_folder_without_any_of_the_images_is_questioned(dataset, tmp_path):
    out = run("tools.audit", "--annotations", dataset, "--image_dir", tmp_path, code=2)
    assert "none of the images of" in out
    assert "is it the right folder?" in out
    common = ["--annotations", dataset, "--image_dir", tmp_path, "--device", "cpu"]
    assert "is it the right folder?" in run("eval.py", *common, code=2)
    args = train_args(dataset)
    args[args.index("--train_images") + 1] = tmp_path
    assert "is it the right folder?" in run(*args, code=2)
