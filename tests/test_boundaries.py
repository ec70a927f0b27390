"""Values exactly at a threshold, ties and defaults, as the definitions have them.

Faults that were seeded one at a time into layers/, data/ and training/ showed what the other tests did not notice.
"""

from __future__ import annotations

import inspect
import itertools
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import random_image, to_centres

from config import DetectionConfig, LossConfig, get_config, override
from data import coco
from data.annotation import Sample, as_id, is_crowd, normalise_segmentation, parse_annotation
from data.augment import CANVAS_BGR, Augment, Distortion, Window, _placement, distort, sample_crop
from data.coco import CocoDataset
from data.image import MARK, PNG_SIGNATURE, _to_uint8, input_size, read_image, resize, resize_like_opencv, write_image
from data.loader import Batch, TrainingSet, _collate, check_shared_memory, report_unusable
from layers.boxes import box_iou
from layers.detect import detect
from layers.loss import MultiBoxLoss, _mask_iou_term
from layers.matching import IGNORED
from layers.nms import NMS, cluster_nms, standard_nms
from layers.structures import Predictions
from layers.voting import VOTING_IOU, vote
from tools.images import is_result
from utils.distributed import ALONE
from utils.errors import UserError

METHODS = sorted(set(NMS) - {"cluster_penalty"})  # which removes no box


@pytest.mark.parametrize("name", METHODS)
def test_only_an_iou_above_the_threshold_suppresses(name):
    """The paper, section 5: a box is removed if its IoU with a better one is greater than t. Here it is 1/2 exactly."""
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.25]]])
    assert float(box_iou(boxes, boxes)[0, 0, 1]) == 0.5
    scores = torch.tensor([[[0.9, 0.8]]])
    assert NMS[name](boxes, scores, 0.5).scores.tolist() == scores[0].tolist()
    below = NMS[name](boxes, scores, 0.4999).scores[0]
    assert below.tolist() == [scores[0, 0, 0], -1]  # a slot that is not used is marked by -1


@pytest.mark.parametrize("name", sorted(NMS))
def test_defaults_are_those_of_the_configuration(name):
    defaults = {key: value.default for key, value in inspect.signature(NMS[name]).parameters.items()}
    wanted = DetectionConfig()
    assert defaults["iou_threshold"] == wanted.nms_threshold
    assert defaults["top_k"] == wanted.nms_top_k
    assert defaults["max_detections"] == wanted.top_k


def test_long_chains_are_resolved_on_the_cpu():
    """Each box suppresses the next only, so sequential NMS keeps every second one."""
    left = torch.arange(60) * 0.01
    boxes = torch.stack((left, torch.zeros(60), left + 0.03, torch.ones(60)), dim=1)[None]
    scores = torch.linspace(0.9, 0.3, 60)[None, None]
    ours, wanted = (method(boxes, scores, 0.4, 60, 60) for method in (cluster_nms, standard_nms))
    assert ours.indices[ours.scores > 0].tolist() == wanted.indices[wanted.scores > 0].tolist() == list(range(0, 60, 2))


def matched(boxes, anchors, assigner="max_iou", positions=None):
    """The classes of the anchors, given in corner form, for one image with objects of class 0."""
    target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.long), "crowds": torch.zeros(0, 4)}
    loss = MultiBoxLoss(LossConfig(assigner=assigner))
    return loss.match(to_centres(anchors), [target], positions).classes[0].tolist()


def test_anchors_exactly_at_the_thresholds_of_the_iou():
    """The released code: positive from 0.5 on, background below 0.4."""
    box = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    whole, half, four_tenths, less = (torch.tensor([0.0, 0.0, 0.5, side]) for side in (0.5, 0.25, 0.2, 0.19))
    anchors = torch.stack((whole, half, four_tenths, less))
    assert box_iou(box, anchors)[0].tolist()[:3] == pytest.approx([1, 0.5, 0.4])
    assert matched(box, anchors) == [1, 1, IGNORED, 0]


def test_atss_takes_candidates_at_its_threshold():
    """Algorithm 1 of the ATSS paper: IoU >= mean + deviation. Here all are equal, so each is at the threshold."""
    size = 0.25
    centres = [(0.5 + dx * 0.125, 0.5 + dy * 0.125) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    anchors = torch.tensor([[x - size / 2, y - size / 2, x + size / 2, y + size / 2] for x, y in centres])
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    assert set(box_iou(box, anchors)[0].tolist()) == {0.25}
    assert matched(box, anchors, "atss", [9]) == [1] * 9


@pytest.mark.parametrize("swap", [False, True])
def test_atss_takes_anchors_with_their_centres_strictly_inside(swap):
    """All anchors contain the box and are of one size, so their IoU is the same: their centres alone decide."""
    box = torch.tensor([[0.375, 0.25, 0.5, 0.75]])
    inside, outside = [(0.4375, 0.5)], [(0.375, 0.5), (0.5, 0.5), (0.5625, 0.5), (0.4375, 0.25), (0.4375, 0.75)]
    centres = torch.tensor([*inside, *outside, (0.3125, 0.5), (0.4375, 0.1875), (0.4375, 0.8125)])
    if swap:
        box, centres = box[:, [1, 0, 3, 2]], centres.flip(1)
    anchors = torch.cat((centres - 1, centres + 1), dim=1)
    assert len(set(box_iou(box, anchors)[0].tolist())) == 1
    assert matched(box, anchors, "atss", [9]) == [1] + [0] * 8


def test_objects_belong_to_a_window_that_holds_their_centres(small_config):
    """SSD: the centre has to lie in the crop; on its edge it does not."""
    augment = Augment(override(small_config, min_box_size=0))
    boxes = [[0, 10, 20, 30], [0, 10, 20.5, 30], [40, 10, 60, 30], [39.5, 10, 60, 30], [20, -5, 30, 5]]
    _, kept = augment._boxes(np.array(boxes, np.float32), Window(10, 0, 50, 50))
    assert kept.tolist() == [False, True, False, True, False]


def test_every_pixel_of_the_image_is_distorted(small_config):
    config = override(small_config, augment_crop=False, augment_expand=1.0, augment_mirror=False)
    augment, side = Augment(config), config.train_size
    grey = Sample(np.full((side, side, 3), 128, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    pixels, distortions, _ = zip(*(augment(grey, np.random.default_rng(seed)) for seed in range(8)), strict=True)
    images = distort(torch.stack(pixels), torch.tensor(distortions)).numpy()
    assert len({image[:, 0, 0].tobytes() for image in images}) > 4
    assert max(np.ptp(image.reshape(3, -1), axis=1).max() for image in images) < 1e-3


def test_a_crop_needs_one_centre_only():
    boxes = np.array([[0, 0, 10, 10], [90, 90, 100, 100]], np.float32)
    seen = set()
    for seed in range(200):
        x1, y1, x2, y2 = sample_crop((0, 0, 100, 100), boxes, np.random.default_rng(seed))
        seen.add((x1 < 5 and y1 < 5, x2 > 95 and y2 > 95))
    assert {(True, False), (False, True)} <= seen
    assert (False, False) not in seen


def test_pasted_objects_have_their_centres_in_the_image():
    box, size = np.array([30.0, 50.0, 70.0, 60.0]), (80, 120)
    centres = np.array([_placement(box, size, np.random.default_rng(seed), 0.5) @ (50, 55, 1) for seed in range(300)])
    assert centres.min() >= 0
    assert (centres <= (120, 80)).all()
    assert centres.mean(axis=0) == pytest.approx((60, 40), abs=5)


def test_distortions_have_the_ranges_of_the_released_code():
    """SSD: each of the four with probability 1/2; brightness and hue are symmetrical."""
    drawn = [Distortion.draw(np.random.default_rng(seed)) for seed in range(2000)]
    limits = {"brightness": (-32, 32, 0), "contrast": (0.5, 1.5, 1), "saturation": (0.5, 1.5, 1), "hue": (-18, 18, 0)}
    for name, (low, high, neutral) in limits.items():
        values = np.array([getattr(distortion, name) for distortion in drawn])
        assert np.mean(values == neutral) == pytest.approx(0.5, abs=0.05), name
        assert [values.min(), values.max()] == pytest.approx([low, high], abs=0.02 * (high - low)), name
        assert low <= values.min() <= values.max() <= high, name
    assert np.mean([distortion.contrast_first for distortion in drawn]) == pytest.approx(0.5, abs=0.05)


def test_the_thinnest_inputs():
    assert input_size((1, 10**4), 640) == (32, 20 * 640)
    assert input_size((10**4, 1), 640) == (20 * 640, 32)
    assert input_size((480, 640), 640) == (544, 736)


def test_a_white_image_of_floats_is_white():
    assert (_to_uint8(np.ones((2, 2, 3), np.float32), b"", "a.tif") == 255).all()
    with pytest.raises(UserError, match="values of 0 to 1"):
        _to_uint8(np.full((2, 2, 3), 1.001, np.float32), b"", "a.tif")


def test_a_webp_without_its_last_bytes_is_truncated(tmp_path):
    path = tmp_path / "a.webp"
    cv2.imwrite(str(path), random_image())
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="the end of the file is missing"):
        read_image(path)


@pytest.mark.parametrize("size", [(37, 91), (150, 40), (60, 80), (1, 1)])
def test_resizing_as_opencv_does(size):
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    ours = resize_like_opencv(torch.from_numpy(image).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0).numpy()
    difference = np.abs(ours - cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01  # of noise; rounding in floating point would give 0.1


def test_resizing_floats_has_half_pixel_centres():
    """The definition: output pixel i lies at (i + 1/2) * n / m - 1/2 of the input, and edges are repeated."""
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    out = resize(image, (9, 5), uint8=False)
    for (row, n, m), (column, k, j) in itertools.product([(i, 6, 9) for i in range(9)], [(i, 8, 5) for i in range(5)]):
        y, x = (np.clip((i + 0.5) * a / b - 0.5, 0, a - 1) for i, a, b in ((row, n, m), (column, k, j)))
        (top, left), (v, u) = (int(y), int(x)), (y - int(y), x - int(x))
        bottom, right = min(top + 1, 5), min(left + 1, 7)
        upper = image[top, left] * (1 - u) + image[top, right] * u
        lower = image[bottom, left] * (1 - u) + image[bottom, right] * u
        assert out[row, column] == pytest.approx(upper * (1 - v) + lower * v, abs=1e-3)


def test_values_of_floats_that_are_no_numbers():
    image = np.array([[[np.nan, np.inf, -np.inf], [-0.5, 0.5, 1.5]]], np.float32)
    assert _to_uint8(image, b"", "a.tif").tolist() == [[[0, 255, 0], [0, 128, 255]]]


@pytest.mark.parametrize(("side", "stated", "used"), [(10, 199, True), (10, 250, False), (4, 79, True), (4, 85, False)])
def test_stated_areas_agree_within_a_factor_of_two_or_64_pixels(side, stated, used):
    entry = {"segmentation": [[5, 5, 5 + side, 5, 5 + side, 5 + side, 5, 5 + side]], "area": stated}
    area, rejected = parse_annotation(entry, 0, 50, 50).area(50, 50)
    assert (area, rejected) == ((stated, False) if used else (side**2, True))


def test_a_box_that_is_missing_is_that_of_all_polygons():
    entry = {"segmentation": [[1, 2, 11, 2, 11, 22], [30, 5, 40, 5, 40, 45, 30, 45]]}
    assert parse_annotation(entry, 0, 50, 50).box == (1, 2, 40, 45)


def test_the_bit_depth_that_a_png_states():
    data = PNG_SIGNATURE + b"\0\0\0\1sBIT" + bytes([8]) + b"\0\0\0\0\0\0\0\1IDAT"
    assert (_to_uint8(np.full((1, 1, 3), 255, np.uint16), data, "a.png") == 255).all()
    assert (_to_uint8(np.full((1, 1, 3), 65535, np.uint16), b"", "a.png") == 255).all()


@pytest.mark.parametrize(("share", "enough"), [(0.9, False), (1.1, True)])
def test_the_shared_memory_that_workers_need(small_config, monkeypatch, share, enough):
    """PyTorch reads two batches ahead with each worker: with two, five batches of images and as much for masks."""
    config = override(small_config, batch_size=4)
    free = int(share * 5 * 4 * (3 + 3) * config.train_size**2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with nullcontext() if enough else pytest.raises(UserError, match="MiB free"):
        check_shared_memory(config, 2, ALONE)


def test_the_canvas_around_an_expanded_image_is_the_mean_of_coco():
    """So that it is 0 for the network of the published configurations."""
    assert get_config("yolact_base").model.mean[::-1] == CANVAS_BGR


@pytest.mark.parametrize(("least", "kept"), [(4.0, [True, False]), (0.0, [True, True])])
def test_boxes_below_the_least_size_are_dropped(small_config, least, kept):
    """The sides are those in the network's input, here of 96 pixels: 5 and 3 of them."""
    augment = Augment(override(small_config, min_box_size=least))
    boxes = np.array([[10, 10, 15, 40], [50, 10, 53, 40]], np.float32)
    assert augment._boxes(boxes, Window(0, 0, 96, 96))[1].tolist() == kept


def test_a_single_negative_run_length_is_damage():
    """The sum is right, and pycocotools would read 2^32 - 2 pixels."""
    entry = {"category_id": 1, "segmentation": {"size": [4, 4], "counts": [4, 8, -2, 6]}}
    assert parse_annotation(entry, 0, 4, 4).segmentation is None


def test_the_area_of_an_object_without_a_mask_is_that_of_its_box():
    for width, area in ((5.0, 15.0), (0.1, 0.3), (-5.0, 0.0)):
        entry = {"category_id": 1, "bbox": [1.0, 1.0, width, 3.0]}
        assert parse_annotation(entry, 0, 20, 20).area(20, 20)[0] == pytest.approx(area)


@pytest.mark.parametrize(("clip", "found"), [(True, 1), (False, 2)])
def test_boxes_are_clipped_before_they_suppress_each_other(clip, found):
    """MMDetection's order. Two boxes that reach beyond the image by different lengths are the same box inside of it."""
    anchors = torch.tensor([[0.5, 0.5, 1.0, 0.5], [1.0, 0.5, 2.0, 0.5]])
    outputs = torch.zeros(1, 2, 4), torch.tensor([[[-9.0, 9.0], [-9.0, 8.0]]]), torch.zeros(1, 2, 1)
    config = DetectionConfig(clip_boxes=clip)
    selected = detect(Predictions(*outputs, torch.zeros(1, 2, 2, 1), None), anchors, config)
    assert int((selected.scores > 0).sum()) == found


def test_only_an_iou_above_the_threshold_votes():
    """Two boxes with an IoU of exactly VOTING_IOU, then slightly above it."""
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    scores, labels = torch.tensor([[0.5]]), torch.tensor([[0]])
    for side, votes in ((VOTING_IOU, False), (VOTING_IOU + 1e-3, True)):
        part = torch.tensor([[[0.0, 0.0, 1.0, side]]])
        assert (float(box_iou(whole, part)) > VOTING_IOU) == votes
        boxes, _, _ = vote(whole, scores, labels, torch.cat((whole, part), dim=1), torch.tensor([[[0.5, 0.5]]]))
        assert (float(boxes[0, 0, 3]) < 1) == votes


@pytest.mark.parametrize("part", ["end", "byte"])
def test_every_part_of_a_png_is_checked(tmp_path, part):
    """OpenCV fills what it cannot read, without an error."""
    data = bytearray(cv2.imencode(".png", random_image(60, 80))[1])
    if part == "end":
        del data[len(data) * 6 // 10 :]
    else:
        data[len(data) // 2] ^= 255
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.png: the end of the file is missing"):
        read_image(path)


SPELLINGS = {True: [1, "1", True, "true"], False: [0, "0", False, "False", None, ""]}


@pytest.mark.parametrize(
    ("crowd", "value"), [(crowd, value) for crowd, values in SPELLINGS.items() for value in values]
)
def test_spellings_of_iscrowd(crowd, value):
    assert is_crowd({"iscrowd": value}) is crowd


@pytest.mark.parametrize("value", [2, "yes", [1]])
def test_other_values_of_iscrowd_are_refused(value):
    with pytest.raises(ValueError, match="must be 0 or 1"):
        is_crowd({"iscrowd": value})


@pytest.mark.parametrize(("suffix", "key"), [(".jpg", "comment"), (".png", "Comment")])
def test_the_mark_of_results_is_a_comment_of_the_file(tmp_path, suffix, key):
    path, image = tmp_path / f"a{suffix}", random_image(40, 50)
    write_image(path, image)
    with PIL.Image.open(path) as file:
        found = file.info[key]
        file.load()
    assert (found if isinstance(found, bytes) else found.encode()) == MARK
    assert read_image(path).shape == image.shape
    assert is_result(path)
    write_image(path, image, mark=False)
    assert not is_result(path)


def test_ten_unusable_images_in_a_row_end_the_search(dataset, small_config):
    data = CocoDataset(dataset, dataset.parent / "images")
    for path in (dataset.parent / "images").iterdir():
        path.write_bytes(b"")
    sample, image_id, problems = TrainingSet(data, small_config, 0)[0, 0]
    assert (sample, image_id, len(problems)) == (None, -1, 10)


@pytest.mark.parametrize(("pixels", "counts"), [(25, False), (26, True)])
def test_masks_above_25_pixels_train_the_mask_iou(pixels, counts):
    """The authors' code leaves out masks of at most 25 pixels."""
    truth = torch.zeros(1, 8, 8)
    truth.view(-1)[:pixels] = 1
    loss = _mask_iou_term(lambda soft: soft.new_zeros(len(soft), 1), truth.clone(), truth, torch.tensor([0]))
    assert (float(loss) > 0) == counts


@pytest.mark.parametrize(("length", "fits"), [(255, True), (256, False)])
def test_the_longest_file_name(length, fits):
    name = "é" * ((length - 5) // 2) + "x" * ((length - 5) % 2 + 1) + ".png"  # "é" takes two bytes
    assert len(name.encode()) == length
    with nullcontext() if fits else pytest.raises(UserError, match="longer than file systems allow"):
        assert coco._text(f"folder/{name}", "file_name", file=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_id(sign):
    assert as_id(sign * (2**53 - 1), "id") == sign * (2**53 - 1)
    assert as_id(str(sign * (2**53 - 1)), "id") == sign * (2**53 - 1)
    for value in (sign * 2**53, str(sign * 2**53), float(sign * 2**53)):
        with pytest.raises(UserError, match="whole number"):
            as_id(value, "id")


@pytest.mark.parametrize(
    ("side", "stated", "used"),
    [
        (20, 800, 800), (20, 801, 400), (20, 200, 200), (20, 199, 400),  # a factor of two is agreement
        (3, 73, 73), (3, 74, 9), (10, 36, 36), (10, 35, 100),  # and so is a difference of 64 pixels
    ],
)  # fmt: skip
def test_areas_that_agree_with_the_mask(side, stated, used):
    square = [[0, 0, side, 0, side, side, 0, side]]
    entry = {"category_id": 1, "segmentation": square, "bbox": [0, 0, side, side], "area": stated}
    area, rejected = parse_annotation(entry, 0, 40, 40).area(40, 40)
    assert (area, rejected) == (used, used != stated)


def test_jpeg_is_written_in_quality_95(tmp_path):
    image = random_image(60, 80, 3)
    write_image(tmp_path / "a.jpg", image)
    wanted = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1], cv2.IMREAD_COLOR)
    assert np.array_equal(cv2.imread(str(tmp_path / "a.jpg")), wanted)
    write_image(tmp_path / "a.jpeg", image)
    assert np.array_equal(cv2.imread(str(tmp_path / "a.jpeg")), wanted)


def test_every_16_bit_value_of_8_bits_is_that_value():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.array_equal(_to_uint8(values * 257, b"", "a.png"), values)


def test_the_largest_side_that_is_believed():
    assert coco.valid_size(5, 10**6 - 1) == (5, 10**6 - 1)
    for width in (10**6, 0, -1):
        assert coco.valid_size(5, width) is None


def test_expansion_puts_the_image_on_a_larger_canvas_of_its_shape(small_config):
    augment = Augment(override(small_config, augment_crop=False, augment_expand=3.0))
    sample = Sample(np.zeros((40, 60, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    windows = [augment.choose_window(sample, np.random.default_rng(seed)) for seed in range(400)]
    ratios = np.array([(w.x2 - w.x1) / 60 for w in windows])
    assert all(w.x1 <= 0 and w.y1 <= 0 and w.x2 >= 59 and w.y2 >= 39 for w in windows)  # to a pixel: sides are rounded
    assert max(abs((w.y2 - w.y1) / 40 - ratio) for w, ratio in zip(windows, ratios, strict=True)) < 1 / 40
    assert (ratios == 1).mean() == pytest.approx(0.5, abs=0.1)
    assert 2.9 < ratios.max() <= 3
    assert min(w.x1 for w in windows) < -60  # anywhere on the canvas


def test_the_distorted_region_contains_every_pixel_of_the_image(small_config):
    region = Augment(small_config)._distortion((40, 60, 3), Window(-5, -5, 65, 45), np.random.default_rng(0))
    assert region[5:] == (6, 9, 90, 87)  # of 6.9, 9.6, 89.1 and 86.4 in an input of 96 pixels


def test_a_far_corner_is_cut_off_along_the_edges():
    """In an image of 40 pixels, polygons are kept up to 40 pixels beyond it."""
    (points,) = normalise_segmentation([[0, 10, 400, 110, 0, 110]], 40, 40)
    corners = {(x, y) for x, y in zip(points[::2], points[1::2], strict=True)}
    assert corners == {(0.0, 10.0), (80.0, 30.0), (80.0, 80.0), (0.0, 80.0)}


@pytest.mark.parametrize(
    ("images", "problems", "ends"), [(300, 3, False), (300, 4, True), (99, 1, False), (99, 2, True)]
)
def test_how_many_unusable_images_end_a_run(images, problems, ends):
    batch = Batch(torch.zeros(1, 8, 8, 3), torch.zeros(1, 9), [], [], [f"image {i}" for i in range(problems)])
    with pytest.raises(UserError, match="cannot be used") if ends else nullcontext():
        report_unusable(batch, set(), images)


def test_a_box_without_area_gives_way_to_the_mask():
    square = [[5, 5, 15, 5, 15, 15, 5, 15]]
    entry = {"category_id": 1, "segmentation": square}
    for box in ([5, 5, 0, 10], [5, 5, 10, 0], [0, 0, 0, 0]):
        assert parse_annotation(entry | {"bbox": box}, 0, 40, 40).box == (5, 5, 15, 15)
    assert parse_annotation(entry | {"bbox": [5, 5, 0.5, 0.5]}, 0, 40, 40).box == (5, 5, 5.5, 5.5)


def test_a_batch_without_usable_images_is_empty():
    batch = _collate([(None, -1, ["a.jpg is damaged"])])
    assert len(batch.images) == len(batch.targets) == 0
    with pytest.raises(UserError, match=r"a\.jpg is damaged"):
        report_unusable(batch, set(), 10**6)
