"""Prediction: Predictor, Detections, and eval.py with every kind of image, result and mistake."""

from __future__ import annotations

import io
import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, random_image, run, spawn
from pycocotools import mask as rle

import eval as eval_script
from config import get_config, override
from data.coco import CocoDataset
from data.image import input_size, write_image
from inference import Detections, Predictor
from inference.polygons import polygon_iou, rings
from layers.masks import soft_masks
from layers.nms import NMS
from layers.structures import Selected
from tools.outputs import instance_map
from tools.prototypes import prototype_sheet
from utils.draw import _free_place as free
from utils.draw import draw_label, draw_objects, find_font
from utils.errors import UserError
from weights import load_model
from weights.checkpoint import save_checkpoint
from yolact import Yolact


def disc_detections(height=301, width=203, count=2):
    """Detections whose true masks are known: prototypes are discs at a sixteenth of nothing in particular."""
    y, x = np.mgrid[0:64, 0:48]
    centres = [(0.3, 0.4), (0.7, 0.6)][:count]
    prototypes, boxes = [], []
    for cx, cy in centres:
        inside = ((x + 0.5) / 48 - cx) ** 2 / 0.2**2 + ((y + 0.5) / 64 - cy) ** 2 / 0.15**2 < 1
        prototypes.append(np.where(inside, 1.0, -1.0))
        boxes.append([cx - 0.2, cy - 0.15, cx + 0.2, cy + 0.15])
    relative = torch.tensor(boxes, dtype=torch.float32)
    return Detections(
        boxes=relative * torch.tensor([width, height, width, height]),
        scores=torch.tensor([0.9, 0.6][:count]),
        mask_scores=torch.tensor([0.9, 0.6][:count]),
        labels=torch.tensor([0, 1][:count]),
        class_names=("disc", "tile"),
        category_ids=(7, 3),
        size=(height, width),
        coefficients=10 * torch.eye(count),
        prototypes=torch.from_numpy(np.stack(prototypes, axis=-1)).float(),
        relative_boxes=relative,
    )


@pytest.mark.parametrize("size", [(301, 203), (64, 48), (37, 911), (1, 1)])
def test_masks_land_where_they_belong(size):
    found = disc_detections(*size)
    assert found.masks.shape == (2, *size)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    for mask, (cx, cy) in zip(found.masks.numpy(), [(0.3, 0.4), (0.7, 0.6)], strict=True):
        true = ((x + 0.5) / size[1] - cx) ** 2 / 0.2**2 + ((y + 0.5) / size[0] - cy) ** 2 / 0.15**2 < 1
        if true.sum() > 100:
            assert (mask & true).sum() / (mask | true).sum() > 0.93


def test_detections_behave_like_a_list():
    some = disc_detections(90, 130)
    assert some[::-1].scores.tolist() == some.scores.tolist()[::-1]
    found = disc_detections()
    assert len(found) == 2
    assert [len(d) for d in (found[0], found[:1], found[[True, False]], found[torch.tensor([1, 0])])] == [1, 1, 1, 2]
    assert found[-1].scores.tolist() == pytest.approx([0.6])
    assert len(found[found.scores.argmax()]) == len(found[np.int64(1)]) == 1
    assert torch.equal(found[1].masks[0], found.masks[1])
    assert len(list(found)) == 2
    with pytest.raises(IndexError):
        found[2]
    empty = found[:0]
    assert len(empty) == 0
    assert empty.masks.shape == (0, 301, 203)
    assert empty.to_coco() == []
    assert empty.draw(random_image(301, 203)).shape == (301, 203, 3)


def test_coco_results_hold_the_masks():
    found = disc_detections()
    results = found.to_coco(image_id=5)
    assert [r["category_id"] for r in results] == [7, 3]
    assert {r["image_id"] for r in results} == {5}
    for result, mask in zip(json.loads(json.dumps(results)), found.masks, strict=True):
        assert np.array_equal(rle.decode(result["segmentation"]), mask.numpy())
        assert result["bbox"][2] > 0


def test_instance_map_and_polygons():
    found = disc_detections()
    numbers = instance_map(found)
    assert numbers.dtype == np.uint16
    assert np.array_equal(numbers == 1, found.masks[0].numpy())
    shapes = found.to_labelme("a.jpg", tolerance=0)["shapes"]
    assert [s["label"] for s in shapes] == ["disc", "tile"]
    for shape, mask in zip(shapes, found.masks.numpy(), strict=True):
        assert drawn_iou(mask, [shape["points"]]) > 0.99


def drawn_iou(mask, polygons):
    """The IoU of a mask with polygons as pycocotools draws them."""
    flat = [np.ravel(points).astype(float).tolist() for points in polygons]
    code = rle.merge(rle.frPyObjects(flat, *mask.shape))
    return float(rle.iou([code], [rle.encode(np.asfortranarray(mask, np.uint8))], [0])[0, 0])


@pytest.mark.parametrize("side", [1, 4, 6, 10, 20, 50])
def test_polygons_follow_the_edges_of_pixels(side):
    """Not their centres, between which a square of 4 pixels has only 9 of its 16."""
    mask = np.zeros((80, 90), bool)
    mask[10 : 10 + side, 20 : 20 + side] = True
    ((points, hole),) = rings(mask)
    assert not hole
    assert sorted(points.tolist()) == [[20, 10], [20, 10 + side], [20 + side, 10], [20 + side, 10 + side]]
    assert drawn_iou(mask, [points]) == 1


def test_polygons_of_any_mask_have_its_area():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((20, 30)) > rng.uniform(0.3, 0.7)
        areas = [cv2.contourArea(points.astype(np.float32)) * (-1 if hole else 1) for points, hole in rings(mask)]
        assert sum(areas) == mask.sum()
        assert polygon_iou(mask, rings(mask)) > 0.97


def test_holes_are_rings_of_their_own():
    mask = np.zeros((50, 60), bool)
    mask[10:40, 10:50] = True
    mask[20:30, 20:30] = False
    mask[2, 2] = True
    found = rings(mask)
    assert sorted(hole for _, hole in found) == [False, False, True]
    assert all(len(points) >= 3 for points, _ in found)


def test_a_list_gives_the_same_as_one_by_one(predictor):
    images = [random_image(90, 130), random_image(200, 64, seed=1)]
    together = predictor(images)
    for image, found in zip(images, together, strict=True):
        alone = predictor(image)
        assert len(alone) == len(found) > 0
        assert torch.allclose(alone.scores, found.scores, atol=1e-5)
        # Scores that are equal up to rounding may change places.
        one, other = (x.boxes[x.boxes.sum(dim=1).argsort()] for x in (alone, found))
        assert torch.allclose(one, other, atol=1e-2)
        assert found.size == image.shape[:2]
    assert predictor([]) == []


def test_the_same_frame_twice_gives_the_same_masks(predictor):
    first, second = predictor(random_image()), predictor(random_image())
    assert torch.equal(first.masks, second.masks)


@pytest.mark.parametrize("nms", NMS)
def test_every_nms_and_threshold(weights, nms):
    found = Predictor(load_model(weights), "cpu", nms=nms, score_threshold=0.4, top_k=7)(random_image())
    assert 0 < len(found) <= 7
    assert (found.scores >= 0.4).all()
    assert (found.scores.diff() <= 0).all()


def test_the_configuration_says_how_to_detect(weights):
    model = load_model(weights)
    plain = Predictor(model, "cpu")(random_image())
    model.config = override(model.config, mask_threshold=0.3, crop_after_resize=True)
    found = Predictor(model, "cpu")(random_image())
    leaky = Predictor(model, "cpu", crop_after_resize=False)(random_image())
    assert torch.equal(found.boxes, plain.boxes)
    assert not (found.masks & ~leaky.masks).any()
    assert (leaky.masks & ~found.masks).any()
    assert not (plain.masks & ~leaky.masks).any()
    assert (leaky.masks & ~plain.masks).any()
    model.config = override(model.config, top_k=7)
    assert len(Predictor(model, "cpu")(random_image())) == 7 < len(plain)
    assert len(Predictor(model, "cpu", top_k=9)(random_image())) == 9


def test_maskness_ranks_masks_and_leaves_boxes(weights):
    model = load_model(weights)
    plain = Predictor(model, "cpu").published()(random_image())
    found = Predictor(model, "cpu", maskness=True).published()(random_image())
    model.config = override(model.config, maskness=True)
    assert torch.equal(Predictor(model, "cpu").published()(random_image()).mask_scores, found.mask_scores)
    assert torch.equal(Predictor(model, "cpu", maskness=False).published()(random_image()).mask_scores, plain.scores)
    assert torch.equal(found.scores, plain.scores)
    assert torch.equal(found.masks, plain.masks)
    soft = soft_masks(found.prototypes, found.coefficients, found.relative_boxes)
    sure = [float(m[m > 0.5].mean()) if (m > 0.5).any() else 0.0 for m in soft]
    assert len(set(sure)) > 1
    assert found.mask_scores.tolist() == pytest.approx(
        [a * b for a, b in zip(found.scores.tolist(), sure, strict=True)]
    )
    shown = Predictor(model, "cpu", score_threshold=0.3)(random_image())
    assert 1 < len(shown) < len(plain)
    assert (shown.mask_scores >= 0.3).all()
    assert (shown.mask_scores.diff() <= 0).all()


@pytest.mark.parametrize("size", [(64, 160), (128, 48)])
def test_any_network_size(weights, size):
    found = Predictor(load_model(weights), "cpu", size=size)(random_image(120, 300))
    assert len(found) > 0
    assert (found.boxes[:, 2:] <= torch.tensor([300, 120])).all()
    assert (found.boxes[:, :2] >= 0).all()
    assert all(min(r["bbox"]) >= 0 for r in found.to_coco())


@pytest.mark.parametrize(
    ("image", "side", "expected"),
    [((312, 416), 640, (544, 736)), ((416, 312), 640, (736, 544)), ((99, 99), 640, (640, 640)),
     ((2000, 3000), 550, (448, 672)), ((10, 5000), 96, (32, 288)), ((1, 1), 32, (32, 32))],
)  # fmt: skip
def test_input_sizes_preserve_the_aspect_ratio(image, side, expected):
    assert input_size(image, side) == expected


def test_the_input_follows_the_image(weights):
    """Images of several shapes in one list: each gets its own input, and results come in the order of the list."""
    predictor = Predictor(load_model(weights), "cpu", "fp32")
    images = [random_image(90, 130), random_image(130, 90, seed=1), random_image(90, 130, seed=2)]
    assert [predictor.input_size(image) for image in images] == [(64, 128), (128, 64), (64, 128)]
    for image, found in zip(images, predictor(images), strict=True):
        size = predictor.input_size(image)
        exact = Predictor(load_model(weights), "cpu", "fp32", size=size)(image)
        assert len(exact) == len(found) > 0
        assert torch.allclose(exact.scores, found.scores, atol=1e-5)
        assert torch.allclose(exact.boxes.sum(dim=0), found.boxes.sum(dim=0), rtol=1e-4)  # in any order: scores tie
    square = Predictor(load_model(weights), "cpu", "fp32", size=(96, 96))
    assert {square.input_size(image) for image in images} == {(96, 96)}
    assert Predictor(load_model(weights), "cpu", "fp32", size=[64, 160]).input_size(images[1]) == (64, 160)
    larger = Predictor(load_model(weights), "cpu", "fp32", size=192)
    assert larger.input_size(images[0]) == (160, 224)
    published = Predictor(Yolact(get_config("yolact_resnet50", max_size=96)), "cpu", "fp32")
    assert published.input_size(images[0]) == (96, 96)


def test_predictor_refuses(weights):
    model = load_model(weights)
    for options, words in (
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"precision": "int8"}, "unknown precision"),
        ({"precision": "fp16"}, "for GPUs"),
        ({"nms": "fats"}, "did you mean 'fast'"),
        ({"size": (16, 64)}, "at least 32"),
        ({"score_threshold": 30}, "at most 1"),
        ({"top_k": 0}, "top_k"),
    ):
        with pytest.raises(UserError, match=words):
            Predictor(model, **({"device": "cpu"} | options))
    for wrong in (None, [None], 5):
        with pytest.raises(TypeError, match=r"cv2\.imread"):
            Predictor(model, "cpu")(wrong)
    with pytest.raises(ValueError, match="uint8"):
        Predictor(model, "cpu")(np.zeros((5, 5)))


@pytest.mark.parametrize("threshold", [0.01, 0.6, 0.99])
def test_the_threshold_of_the_configuration_counts(weights, threshold):
    """It used to be ignored: 0.6 changed nothing, and 0.01 removed detections."""
    model = load_model(weights)
    plain = Predictor(model, "cpu", "fp32", top_k=1000)(random_image())
    model.config = override(model.config, score_threshold=threshold)
    found = Predictor(model, "cpu", "fp32", top_k=1000)(random_image())
    given = Predictor(load_model(weights), "cpu", "fp32", top_k=1000, score_threshold=threshold)(random_image())
    assert torch.equal(found.scores, given.scores)
    if threshold < 0.05:
        assert len(found) >= len(plain)
    else:
        assert len(found) == int((plain.scores >= threshold).sum()) < len(plain)


def test_detections_are_ordinary_objects(predictor):
    found, other = predictor([random_image(), random_image(seed=1)])
    found.boxes += 1  # tensors made in inference mode cannot be changed
    found.prototypes.mul_(2)
    assert found != other
    assert found == found
    assert len({found, other}) == 2
    for value in (found.prototypes, found.boxes, found.scores, found.coefficients):
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()  # nothing else is kept alive


def test_boxes_outside_of_the_image_are_empty_and_not_inverted(predictor):
    boxes = torch.tensor([[[1.2, 0.2, 1.5, 0.4], [-0.5, -0.5, -0.1, 1.4], [0.2, 0.2, 0.4, 0.4]]])
    candidates = Selected(boxes, torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.long), torch.rand(1, 3, 32))
    found = predictor.postprocess(candidates, torch.rand(1, 24, 24, 32), [(100, 200)])[0]
    assert found.boxes.tolist() == [[200, 20, 200, 40], [0, 0, 0, 100], pytest.approx([40, 20, 80, 40])]
    assert all(min(result["bbox"]) >= 0 for result in found.to_coco())


def test_unknown_options_offer_the_nearest(weights):
    with pytest.raises(
        UserError,
        match="unknown option 'score_treshold', not a field of DetectionConfig, did you mean 'score_threshold'",
    ):
        Predictor.from_weights(weights, device="cpu", score_treshold=0.3)
    assert Predictor.from_weights(weights, device="cpu", size=(64, 64)).backend.size == (64, 64)
    assert Predictor.from_weights(weights, device=torch.device("cpu"), precision=torch.float32).dtype == torch.float32


# Files


def outside_pixels(results):
    """Pixels of the masks that lie outside of their boxes."""
    total = 0
    for result in results:
        mask = rle.decode(result["segmentation"]).astype(bool)
        x, y, w, h = result["bbox"]
        rows, columns = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]]
        inside = (columns >= x) & (columns < x + w) & (rows >= y) & (rows < y + h)
        total += int((mask & ~inside).sum())
    return total


def test_masks_of_images_end_at_their_boxes_and_those_for_ap_are_the_published_ones(weights, dataset, tmp_path):
    """Cropping at the prototypes' resolution leaks, which people take for a bug; AP keeps it."""
    cv2.imwrite(str(tmp_path / "large.png"), random_image(900, 1300))
    common = ["eval.py", "--weights", weights, "--device", "cpu", "--precision", "fp32", "--image"]
    run(*common, tmp_path / "large.png", "--output", tmp_path / "a", "--save", "json")
    leaky = ["--set", "crop_after_resize=false", "--output", tmp_path / "b"]
    run(*common, tmp_path / "large.png", *leaky, "--save", "json")
    tight, leaking = (json.loads((tmp_path / name / "large.json").read_text()) for name in ("a", "b"))
    assert len(tight) == len(leaking) > 0
    assert outside_pixels(tight) == 0 < outside_pixels(leaking)
    run("eval.py", "--weights", weights, "--device", "cpu", "--precision", "fp32", "--annotations", dataset,
        "--image_dir", dataset.parent / "images", "--output", tmp_path / "ap.json")  # fmt: skip
    published = Predictor(load_model(weights), "cpu", "fp32").published()
    image = cv2.imread(str(dataset.parent / "images/image_0.png"))
    wanted = [r["segmentation"] for r in published(image).to_coco()]
    results = json.loads((tmp_path / "ap.segm.json").read_text())
    assert [r["segmentation"] for r in results if r["image_id"] == 10] == wanted


def test_people_and_evaluations_get_their_own_setting(weights):
    """What is given counts in both; a threshold of one's own applies to every detection."""
    model = load_model(weights)
    shown = Predictor(model, "cpu").config.detection
    assert (shown.score_threshold, shown.strict_threshold, shown.crop_after_resize) == (0.3, True, True)
    own = Predictor(model, "cpu").published().config.detection
    assert (own.score_threshold, own.strict_threshold, own.crop_after_resize) == (0.05, False, False)
    for given, strict in ((0.05, False), (0.04, True), (0.5, True)):
        predictor = Predictor(model, "cpu", score_threshold=given, crop_after_resize=False, top_k=7)
        for detection in (predictor.config.detection, predictor.published().config.detection):
            assert (detection.score_threshold, detection.strict_threshold) == (given, strict)
            assert (detection.crop_after_resize, detection.top_k) == (False, 7)
    with pytest.raises(UserError, match="none is stored"):
        Predictor(model, "cpu", score_threshold="best")
    model.config = override(model.config, best_score_threshold=0.4)
    assert Predictor(model, "cpu", score_threshold="best").config.detection.score_threshold == 0.4


def test_every_object_has_its_label(monkeypatch):
    """Also of forty small ones, whose labels are wider than their boxes."""
    boxes = np.array([(x, y, x + 60, y + 50) for x in range(20, 860, 105) for y in range(30, 560, 105)][:40], float)
    image, none = np.zeros((600, 900, 3), np.uint8), [np.zeros((600, 900), bool)] * 40
    texts = [f"person 0.{i}" for i in range(40)]
    drawn = []
    monkeypatch.setattr("utils.draw._free_place", lambda *given: drawn.append(free(*given)) or drawn[-1])
    draw_objects(image, none, boxes, texts, range(40))
    assert sum(place is not None for place in drawn) >= 36


@pytest.mark.parametrize(("width", "shown"), [(0.45, False), (0.55, True)])
def test_a_label_of_more_than_twice_the_width_of_its_box_is_left_out(width, shown):
    image, mask = np.zeros((750, 750, 3), np.uint8), np.zeros((750, 750), bool)
    wide = width * draw_label("person 0.50", 16, (0, 0, 0)).shape[1]
    box = np.array([[100, 200, 100 + wide, 300]])
    outlined = draw_objects(image, [mask], box, [""], [0])
    assert (draw_objects(image, [mask], box, ["person 0.50"], [0]) != outlined).any() == shown


def test_the_gallery_has_twelve_cells(tmp_path):
    spawn("-m", "examples.gallery", tmp_path / "gallery.png")
    image = cv2.imread(str(tmp_path / "gallery.png"))
    assert image.shape == (3 * 510, 4 * 488, 3)


def test_labels_have_letters_of_other_languages():
    """A character that no font has is a question mark; others are not."""
    unknown = draw_label("?", 20, (0, 0, 0))
    for letter in ("B", "ä", "ж"):
        label = draw_label(letter, 20, (0, 0, 0))
        if find_font(letter, 20) is not None:
            assert label.max() == 255
            assert label.shape != unknown.shape or (label != unknown).any()
    assert np.array_equal(draw_label("\U0010fffd", 20, (0, 0, 0)), unknown) or find_font("\U0010fffd", 20) is not None


def test_detections_are_printed_saved_and_moved(predictor, tmp_path):
    image = random_image()
    found = predictor(image)
    text = repr(found)
    assert text.startswith(f"Detections({len(found)}: ")
    assert text.endswith("; 130x90)")
    assert repr(found[:0]) == "Detections(0; 130x90)"
    found.save(tmp_path / "out.png")
    assert np.array_equal(cv2.imread(str(tmp_path / "out.png")), found.draw(image))
    with pytest.raises(UserError, match="cannot write this image format"):
        found.save(tmp_path / "out.xyz", image)
    with pytest.raises(ValueError, match="do not have their image"):
        replace(found, image=None).draw()
    moved = found.cpu()
    assert moved.scores.device.type == "cpu"
    assert torch.equal(moved.masks, found.masks)


def test_a_predictor_is_pickled_and_reads_lazily(predictor, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    cv2.imwrite(str(paths[0]), random_image())
    lazily = pickle.loads(pickle.dumps(predictor))(iter(paths))
    assert next(lazily).scores.tolist() == predictor(random_image()).scores.tolist()
    with pytest.raises(UserError, match="no such image"):
        next(lazily)


def test_a_threshold_of_the_configuration_counts_for_images(weights, tmp_path):
    """0.3 is for configurations that say nothing else; a flag counts in any case."""
    model = load_model(weights)
    model.config = override(model.config, score_threshold=0.6)
    save_checkpoint(tmp_path / "strict.pth", model)
    for name, flags, threshold in (
        (weights, [], 0.3),
        (tmp_path / "strict.pth", [], 0.6),
        (tmp_path / "strict.pth", ["--score_threshold", "0.4"], 0.4),
        (tmp_path / "strict.pth", ["--set", "score_threshold=0.2"], 0.2),
    ):
        args = eval_script.build_parser().parse_args(["--weights", str(name), *flags])
        predictor = eval_script.build_predictor(args)
        assert predictor.config.detection.score_threshold == threshold


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_a_dangling_link_is_reported(weights, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.jpg"), random_image())
    (folder / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    out = run("eval.py", "--weights", weights, "--images", folder, "--output", tmp_path / "out", "--device", "cpu",
              code=1)  # fmt: skip
    assert "b.jpg: no such image, skipped" in out
    assert "a.jpg: " in out


@pytest.mark.parametrize(("text", "size"), [("640", 640), ("480x640", (480, 640)), (None, None)])
def test_sizes(text, size):
    assert eval_script.parse_size(text) == size


def test_command_line_writes_every_kind(weights, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        cv2.imwrite(str(folder / f"p{i}.jpg"), random_image(seed=i))
    cv2.imwrite(str(folder / "p0.png"), random_image(seed=3))
    (folder / "broken.jpg").write_bytes(b"x")
    kinds = "overlay,json,masks,polygons,prototypes"
    out = run("eval.py", "--weights", weights, "--images", folder, "--output", tmp_path / "out", "--save", kinds,
              "--device", "cpu", code=1)  # fmt: skip
    assert "broken.jpg: cannot be read" in out
    out_2 = run("eval.py", "--weights", weights, "--image", "none.jpg", folder / "p1.jpg", "--output", tmp_path / "two",
                "--device", "cpu", code=1)  # fmt: skip
    assert "none.jpg: no such image" in out_2
    assert (tmp_path / "two/p1.jpg").is_file()
    assert "1 of 4 images could not be read" in out
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    endings = ("", ".json", ".masks.json", ".masks.png", ".polygons.json", ".prototypes.png")
    assert len(names) == 3 * len(endings) + 1  # and one COCO file for all
    results = json.loads((tmp_path / "out/p1.json").read_text())
    assert results[0]["file_name"].endswith("p1.jpg")
    assert {"image_id", "category_id", "category_name", "score", "bbox", "segmentation"} <= set(results[0])
    assert cv2.imread(str(tmp_path / "out/p1.jpg")).shape == (90, 130, 3)
    numbers = cv2.imread(str(tmp_path / "out/p1.masks.png"), cv2.IMREAD_UNCHANGED)
    table = json.loads((tmp_path / "out/p1.masks.json").read_text())["instances"]
    assert numbers.dtype == np.uint16
    assert numbers.max() <= len(table)


def test_command_line_places_of_results(weights, tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.jpg"), random_image())
    common = ["eval.py", "--device", "cpu", "--trained_model", weights]
    before = (tmp_path / "a.jpg").read_bytes()
    spawn(ROOT / "eval.py", *common[1:], "--image", "a.jpg", cwd=tmp_path)
    run(*common, "--image", f"{tmp_path}/a.jpg:{tmp_path}/deep/er/b.jpg")
    run(*common, "--image", tmp_path / "a.jpg", "--output", tmp_path / "c.png", "--set", "maskness=true")
    run(*common, "--image", f"{tmp_path}/*.jpg", "--output", tmp_path)
    run(*common, "--images", tmp_path, "--output", tmp_path / "results")  # finds the image, not the results
    names = "results/a.jpg results/a.json deep/er/b.jpg deep/er/b.json c.png c.json a.yolact.jpg a.yolact.json"
    for name in names.split():
        assert (tmp_path / name).is_file(), name
    assert (tmp_path / "a.jpg").read_bytes() == before
    plain, ranked = (json.loads((tmp_path / name).read_text()) for name in ("results/a.json", "c.json"))
    assert plain
    assert all(found["mask_score"] == found["score"] for found in plain)
    assert any(found["mask_score"] < found["score"] for found in ranked)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{tmp_path / 'a.jpg'}\n"))
    run(*common, "--image", "-", "--output", tmp_path / "listed")
    assert (tmp_path / "listed/a.jpg").is_file()


def test_json_files_of_others_stay(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.jpg", "b.jpg")):
        (tmp_path / "in").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "in" / name), random_image(seed=seed))
    mine = {name: f'{{"shapes": "{name}"}}' for name in ("coco.json", "out/a.json", "c.json")}
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    common = ["eval.py", "--weights", weights, "--device", "cpu"]
    for threshold in (0.3, 1):  # the results of the first time are replaced, and those without detections, too
        for _ in range(2):
            run(*common, "--image", "in/a.jpg:x.jpg", "in/b.jpg:y.jpg", "--score_threshold", threshold)
            run(*common, "--images", "in", "--output", "out", "--score_threshold", threshold)
    run(*common, "--image", "in/a.jpg:p/x.jpg", "in/b.jpg:q/y.jpg")  # no folder is named for a file of both
    assert "c.json beside it is not a result of an earlier run" in run(*common, "--image", "in/a.jpg:c.jpg", code=2)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "c.json",
        "coco.json",
        "coco1.json",
        "x.json",
        "y.json",
    ]
    names = ["a.json", "a.yolact.json", "b.json", "coco.json"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == names
    assert {name: (tmp_path / name).read_text() for name in mine} == mine


def test_command_line_mistakes(weights, dataset, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [
        (["--image", "none.jpg"], "none.jpg: no such image"),
        (["--images", tmp_path / "empty"], "no images in this folder"),
        (["--images", tmp_path / "none"], "no such folder"),
        (["--video", tmp_path / "none.mp4"], "no such video"),
        (["--annotations", dataset], "--image_dir"),
        (["--annotations", tmp_path / "none.json", "--image_dir", tmp_path], "no such annotation file"),
        ([], "nothing to do"),
        (["--image", weights, "--benchmark"], "at once"),
        (["--image", dataset, "--save", "overlays"], "did you mean 'overlay'"),
        (["--image", dataset, "--size", "400x"], "HxW"),
        (["--image", dataset, "--set", "size=400"], "unknown option 'size', not a field of DetectionConfig"),
        (["--image", dataset, "--set", "nms_treshold=0.6"], "did you mean 'nms_threshold'"),
        (["--image", dataset, "--set", "nms_threshold"], "for instance --set nms_threshold=0.6"),
        (["--image", dataset, "--config", "yolact_r55"], "did you mean 'yolact_r50"),
        (["--image", dataset, "--config", "yolact_r50"], "omit --config"),
        (["--image", dataset, "--weights", dataset], "not a PyTorch weights file"),
        (["--image", dataset, "--weights", "none.pth"], "no such weights file"),
    ]
    for args, words in cases:
        more = [] if "--weights" in args else ["--weights", weights]
        assert words in run("eval.py", *args, *more, code=2), args


def test_a_mistake_is_one_line_and_exit_code_2(weights):
    out = spawn("eval.py", "--weights", weights, "--image", "none.jpg", code=2)
    assert out.strip() == "error: none.jpg: no such image"


# Memory

MEASURE = """
import resource, sys, numpy as np, torch
sys.path.insert(0, {root!r})
from dataclasses import replace
from pathlib import Path
from tools.outputs import write_results
from inference import Detections

def detections(size, count):
    low = torch.rand(count, 2) * 0.6
    boxes = torch.cat((low, low + 0.05 + torch.rand(count, 2) * 0.3), dim=1)
    h, w = size
    return Detections(boxes * torch.tensor([w, h, w, h]), torch.rand(count), torch.rand(count),
        torch.zeros(count, dtype=torch.long), ("a",), (1,), size, torch.randn(count, 32),
        torch.rand(138, 138, 32), boxes)

torch.manual_seed(0)
image = np.zeros((3000, 4000, 3), np.uint8)
write_results(image[:64, :64], detections((64, 64), 2), Path({out!r}) / "warm", ({kind!r},), {{}}, ".jpg")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_results(image, detections((3000, 4000), 100), Path({out!r}) / "large", ({kind!r},), {{}}, ".jpg")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux reports it")
@pytest.mark.parametrize(("kind", "limit"), [("json", 600), ("overlay", 1000), ("masks", 600), ("polygons", 600)])
def test_memory_of_a_hundred_masks_on_twelve_megapixels(tmp_path, kind, limit):
    script = MEASURE.format(root=str(ROOT), out=str(tmp_path), kind=kind)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= limit, f"{done.stdout} MiB"


def test_prototype_sheet():
    sheet = prototype_sheet(disc_detections(200, 300), np.zeros((200, 300, 3), np.uint8))
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 8 * 207  # 2:3 as the image
    with pytest.raises(ValueError, match="of an image of"):
        disc_detections().draw(random_image())


def test_overlay_reads_on_small_and_large_pictures():
    for size in ((60, 80), (3000, 4000)):
        found = disc_detections(*size)
        out = found.draw(np.full((*size, 3), 100, np.uint8))
        assert (out != 100).any(axis=2).mean() > 0.1
        outside = ~found.masks.any(dim=0).numpy()
        assert (out[outside] == 100).all(axis=1).mean() > 0.5  # the rest is lines and letters


def test_names_of_neighbours_do_not_hide_each_other():
    """Boxes one beside the other, as in a crowd: every name finds a place of its own."""
    taken = []
    for shift in (0, 4, 8, 12):
        box = np.array([40 + shift, 60 + shift, 160 + shift, 200 + shift])
        taken.append(free((300, 300), (70, 18), box, taken))
    pairs = [(a, b) for i, a in enumerate(taken) for b in taken[:i]]
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in pairs)
    assert all(x1 >= 0 and y1 >= 0 and x2 <= 300 and y2 <= 300 for x1, y1, x2, y2 in taken)


def test_polygons_are_simplified_within_a_tolerance():
    found = disc_detections(200, 300)
    (exact,) = found[:1].to_labelme("a.jpg", 0.0)["shapes"]
    (simple,) = found[:1].to_labelme("a.jpg")["shapes"]
    assert len(simple["points"]) < 0.5 * len(exact["points"])
    assert exact["description"].endswith("IoU with the mask 1.000")
    stated = float(simple["description"].split()[-1])
    assert 0.95 < stated < 1
    assert stated == pytest.approx(drawn_iou(found.masks[0].numpy(), [simple["points"]]), abs=1e-3)


def test_polygons_with_holes_state_their_iou():
    mask = np.zeros((60, 60), bool)
    mask[10:50, 10:50] = True
    mask[20:30, 20:30] = False
    assert polygon_iou(mask, rings(mask)) == pytest.approx(1, abs=0.01)
    assert polygon_iou(mask, rings(mask)[:1]) < 0.95  # without its hole


def test_a_folder_has_one_coco_file(weights, tmp_path):
    for seed, name in enumerate(("a.png", "sub/b.png", "coco.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "in" / name), random_image(90, 130, seed))
    out = tmp_path / "out"
    text = run("eval.py", "--weights", weights, "--images", tmp_path / "in", "--output", out, "--precision", "fp32")
    assert "detections of 3 images" in text
    content = json.loads((out / "coco1.json").read_text())  # coco.json belongs to coco.png
    assert [image["file_name"] for image in content["images"]] == ["a.png", "coco.png", "sub/b.png"]
    assert content["categories"] == [{"id": 7, "name": "disc"}, {"id": 3, "name": "tile"}]
    alone = json.loads((out / "a.json").read_text())
    mine = [entry for entry in content["annotations"] if entry["image_id"] == 1]
    assert [entry["segmentation"] for entry in mine] == [entry["segmentation"] for entry in alone]
    assert len({entry["id"] for entry in content["annotations"]}) == len(content["annotations"]) > 3
    dataset = CocoDataset(out / "coco1.json", tmp_path / "in")  # it is a valid annotation file
    assert 0.9 * len(alone) < len(dataset[0].boxes) <= len(alone)  # those without a pixel are not objects


def test_the_prototype_sheet_shows_the_image_and_coefficients():
    image = np.full((200, 300, 3), (10, 200, 30), np.uint8)
    sheet = prototype_sheet(disc_detections(200, 300), image)
    assert (sheet[20:100, 20:150] == (10, 200, 30)).all()


def test_options_that_would_be_ignored_are_refused(weights, dataset, tmp_path):
    images = dataset.parent / "images"
    image = ["--weights", weights, "--image", images / "image_0.png"]
    evaluation = ["--weights", weights, "--annotations", dataset, "--image_dir", images]
    for words, message in (
        ([*image, "--per_class"], "--per_class has no effect with --image/--images; it is for --annotations"),
        ([*image, "--image_dir", images], "--image_dir has no effect"),
        ([*image, "--batch_size", 2], "--batch_size has no effect"),
        ([*evaluation, "--save", "json"], "--save has no effect with --annotations"),
        ([*image, "--score_treshold", 0.4], "did you mean --score_threshold?"),
        (["--weights", weights, "--video", images], "a folder, not a video"),
    ):
        text = run("eval.py", *words, "--output", tmp_path / "o", code=2)
        assert message in text, text
    text = run("eval.py", *evaluation, "--max_images", 3)
    assert "only the first 3 of 8 images were evaluated" in text


def test_unsupported_images_of_a_folder_are_named(weights, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), random_image())
    (tmp_path / "b.HEIC").write_bytes(b"x")
    text = run("eval.py", "--weights", weights, "--images", tmp_path, "--output", tmp_path / "out", code=1)
    assert "1 image in an unsupported format such as b.HEIC; convert to JPEG or PNG" in text
    assert (tmp_path / "out/a.png").is_file()


@pytest.mark.parametrize(
    ("labels", "text"), [((0, 0, 1), "2 persons, 1 bus"), ((1, 1), "2 bus"), ((2, 2, 2), "3 \u4eba"), ((), "nothing")]
)
def test_the_classes_are_counted(labels, text):
    found = replace(disc_detections(count=2), class_names=("person", "bus", "\u4eba"))
    found.labels = torch.tensor(labels, dtype=torch.long)
    assert found.summary() == text


def test_a_line_says_what_an_image_shows_and_where_it_is(weights, tmp_path):
    write_image(tmp_path / "a.png", random_image())
    args = ["eval.py", "--weights", weights, "--device", "cpu", "--image", tmp_path / "a.png"]
    args += ["--output", tmp_path / "o"]
    pattern = r"a\.png: \d+ (disc|tile)s?, .*\d+ ms -> "
    assert re.search(pattern + r".*a\.png, .*a\.json", run(*args))
    assert re.search(pattern + r".*o \(5 files\)", run(*args, "--save", "overlay,json,masks,polygons"))
