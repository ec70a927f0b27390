from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import make_dataset, spawn
from pycocotools import mask as rle

from config import get_config, override
from data.annotation import Sample, normalise_segmentation, to_rle
from data.augment import Augment, Distortion, Window, copy_paste, distort, draw_mask, sample_crop
from data.coco import CocoDataset, PackedList
from data.image import read_image
from data.loader import TrainingSet, endless_shuffle, training_batches
from utils.errors import UserError


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_classes_come_from_the_file(dataset):
    data = CocoDataset(dataset, dataset.parent / "images")
    assert data.class_names == ("disc", "tile")
    assert data.category_ids == (7, 3)
    assert len(data) == 8
    assert len(data[7].boxes) == 0
    sample = data[0]
    assert sample.image.shape == (96, 128, 3)
    assert set(sample.labels.tolist()) <= {0, 1}
    assert len(sample.boxes) == len(sample.segmentations) == 2


def test_ids_may_be_text_and_sizes_missing(dataset):
    def change(content):
        for image in content["images"]:
            image["id"] = str(image["id"])
            del image["height"], image["width"]
        for annotation in content["annotations"]:
            annotation["image_id"] = str(annotation["image_id"])
            annotation["category_id"] = str(annotation["category_id"])

    before = CocoDataset(dataset, dataset.parent / "images")[0]
    after = CocoDataset(edit(dataset, change), dataset.parent / "images")[0]
    assert np.array_equal(before.boxes, after.boxes)


def test_odd_annotations(dataset):
    """Crowds, uncompressed RLE, too few points, boxes outside, no box."""

    def change(content):
        first = [a for a in content["annotations"] if a["image_id"] == 10]
        first[0] |= {"iscrowd": 1}
        first[1].pop("bbox")
        shared = {"image_id": 10, "category_id": 3, "iscrowd": 0}
        counts = [96 * 10, 96 * 5, 96 * 113]
        content["annotations"] += [
            shared | {"id": 90, "bbox": [10, 0, 5, 96], "segmentation": {"size": [96, 128], "counts": counts}},
            shared | {"id": 91, "bbox": [1, 1, 8, 8], "segmentation": [[1, 1, 9, 9]]},
            shared | {"id": 92, "bbox": [500, 1, 8, 8], "segmentation": [[500, 1, 508, 1, 508, 9]]},
            shared | {"id": 93, "bbox": [5, 5, 0, 9], "segmentation": [[5, 5, 5, 9, 5, 14]]},
            shared | {"id": 94, "bbox": [-5, -5, 20, 20], "segmentation": [-5, -5, 15, -5, 15, 15, -5, 15]},
        ]

    sample = CocoDataset(edit(dataset, change), dataset.parent / "images")[0]
    assert len(sample.crowds) == 1
    assert [segmentation is None for segmentation in sample.segmentations] == [False, False, True, False]
    assert rle.decode(sample.segmentations[1]).sum() == 96 * 5
    assert sample.boxes[3].tolist() == [0, 0, 15, 15]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("categories"), ["categories"]),
        (lambda c: c["images"].clear(), ["no images"]),
        (lambda c: c["categories"].clear(), ["categories", "empty"]),
        (lambda c: c["images"][0].pop("file_name"), ["entry 0", "'file_name'"]),
        (lambda c: c["images"][1].update(id=10), ["image id 10", "more than once"]),
        (lambda c: c["annotations"][0].update(category_id=99), ["annotation 1", "99"]),
        (lambda c: c["images"][0].update(id="x1"), ["'x1'"]),
        (lambda c: c.update(images="all"), ["'images'", "list"]),
    ],
)
def test_broken_files(dataset, change, words):
    with pytest.raises(UserError) as error:
        CocoDataset(edit(dataset, change), dataset.parent / "images")
    assert str(dataset) in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_stated_size_is_checked(dataset):
    def swap(content):
        image = content["images"][0]
        image["width"], image["height"] = image["height"], image["width"]
        content["images"][1]["width"] = 127

    data = CocoDataset(edit(dataset, swap), dataset.parent / "images")
    with pytest.raises(UserError, match=r"image 10 .*is 96x128 in the file and 128x96 on disk: .*swapped"):
        data[0]
    with pytest.raises(UserError, match=r"127x96 in the file and 128x96 on disk$"):
        data[1]


@pytest.mark.parametrize("stored", [False, True])
def test_orientation_is_the_one_that_was_annotated(dataset, stored):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: 128x96 as stored, 96x128 as seen
    Image.new("RGB", (128, 96)).save(dataset.parent / "images" / "image_0.jpg", exif=exif)

    def change(content):
        width, height = (128, 96) if stored else (96, 128)
        content["images"][0] |= {"file_name": "image_0.jpg", "width": width, "height": height}

    image = CocoDataset(edit(dataset, change), dataset.parent / "images").read_image(0)
    assert image.shape[:2] == ((96, 128) if stored else (128, 96))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png"])
def test_names_may_not_leave_the_folder(dataset, name):
    data = CocoDataset(edit(dataset, lambda c: c["images"][0].update(file_name=name)), dataset.parent / "images")
    with pytest.raises(UserError, match="leads out of"):
        data.image_path(0)


def test_missing_things(dataset, tmp_path):
    with pytest.raises(UserError, match="no such annotation file"):
        CocoDataset(tmp_path / "none.json", tmp_path)
    with pytest.raises(UserError, match="no such image folder"):
        CocoDataset(dataset, tmp_path / "none")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(UserError, match="not a JSON file"):
        CocoDataset(tmp_path / "text.json", tmp_path)
    (dataset.parent / "images" / "image_0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read"):
        CocoDataset(dataset, dataset.parent / "images")[0]


def shapes(image, color):
    """Where a BGR image has about this colour."""
    return (np.abs(image.astype(int) - color) < 45).all(axis=2)


@pytest.mark.parametrize("seed", range(12))
def test_masks_and_boxes_stay_on_the_picture(tmp_path, seed):
    """What the augmented masks and boxes say is compared with the colours that the objects were drawn in."""
    path = make_dataset(tmp_path, 1, size=(300, 400), seed=seed)
    sample = CocoDataset(path, tmp_path / "images")[0]
    config = get_config("yolact_resnet50", max_size=256, augment_photometric=False)
    image, _, target = Augment(config)(sample, np.random.default_rng(seed))
    boxes, masks = target["boxes"].numpy(), target["masks"].numpy()
    drawn = image.numpy()
    seen = np.zeros((256, 256), bool)
    for color in ((40, 60, 230), (220, 160, 40)):
        seen |= shapes(drawn, color)
    assert masks.shape[1:] == (64, 64)
    for box, mask in zip(boxes, masks, strict=True):
        large = cv2.resize(mask, (256, 256), interpolation=cv2.INTER_LINEAR) > 0
        x1, y1, x2, y2 = (box * 256).round().astype(int)
        assert seen[large].mean() > 0.85  # the mask lies on the object
        rows, columns = np.nonzero(large)
        assert abs(columns.min() - x1) <= 5
        assert abs(columns.max() + 1 - x2) <= 5
        assert abs(rows.min() - y1) <= 5
        assert abs(rows.max() + 1 - y2) <= 5
        inside = np.zeros_like(seen)
        inside[y1:y2, x1:x2] = True
        assert large[seen & inside].mean() > 0.85  # and covers it


def test_polygon_and_rle_give_the_same_mask():
    polygon = [10.0, 20.0, 200.0, 40.0, 180.0, 150.0, 30.0, 170.0]
    code = rle.merge(rle.frPyObjects([polygon], 200, 300))
    for window in (Window(0, 0, 300, 200), Window(-50, -20, 350, 260, mirror=True), Window(40, 30, 160, 140)):
        a = draw_mask([polygon], window, (100, 120))
        b = draw_mask(code, window, (100, 120))
        assert (a & b).sum() / (a | b).sum() > 0.97


def test_window_turns_points_as_it_turns_pixels():
    image = np.zeros((40, 60), np.float32)
    image[10, 50] = 1
    for window in (Window(20, 4, 60, 36), Window(20, 4, 60, 36, mirror=True)):
        warped = cv2.warpAffine(image, window.matrix(160, 128), (160, 128))
        y, x = np.unravel_index(warped.argmax(), warped.shape)
        px, py = window.points(np.array([50.5, 10.5]), 160, 128)
        assert abs(x + 0.5 - px) <= 1
        assert abs(y + 0.5 - py) <= 1


def distorted(image, **changes):
    """The result of a distortion of the whole image, BGR as `image`."""
    whole = Distortion(**changes, x2=image.shape[1], y2=image.shape[0])
    result = distort(torch.from_numpy(image.astype(np.uint8))[None], torch.tensor([whole]))
    return result[0].permute(1, 2, 0).numpy()


def test_distortion_is_what_its_definition_says():
    """Each change alone, on values computed by hand."""
    grey = np.full((3, 3, 3), 100)
    assert np.allclose(distorted(grey, brightness=-120), -20)  # not clipped
    assert np.allclose(distorted(grey, contrast=1.5), 150)
    assert np.allclose(distorted(grey, brightness=10, contrast=2), 220)
    image = np.full((1, 1, 3), (50, 100, 200))  # blue, green, red
    # Saturation scales the distance from the largest channel.
    assert np.allclose(distorted(image, saturation=0.5)[0, 0], (125, 150, 200), atol=1e-3)
    # Of (-50, 0, 100): negative values keep their meaning.
    assert np.allclose(distorted(image, brightness=-100, saturation=0.5)[0, 0], (25, 50, 100), atol=1e-3)
    assert np.allclose(distorted(image, contrast=0.5, contrast_first=0), image / 2)
    # Contrast before the hue also scales the brightness.
    assert np.allclose(distorted(image, brightness=20, contrast=0.5, contrast_first=0)[0, 0], (35, 60, 110), atol=1e-3)
    # A third of the circle moves red to green, green to blue and blue to red.
    assert np.allclose(distorted(image, hue=120)[0, 0], (100, 200, 50), atol=1e-3)
    assert np.allclose(distorted(image, hue=-120)[0, 0], (200, 50, 100), atol=1e-3)


def test_colours_turn_as_in_opencv():
    rng = np.random.default_rng(0)
    colourful = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    nearly_grey = (rng.integers(0, 250, (64, 64, 1)) + rng.integers(0, 3, (64, 64, 3))).astype(np.uint8)
    for image in (colourful, nearly_grey):
        for hue, saturation, contrast in ((18, 1, 1), (-17.5, 0.5, 1), (3, 1.5, 0.5)):
            hsv = cv2.cvtColor(image * np.float32(contrast), cv2.COLOR_BGR2HSV)  # hue in degrees
            hsv[..., 0] = (hsv[..., 0] + hue) % 360
            hsv[..., 1] *= saturation
            wanted = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
            found = distorted(image, contrast=contrast, contrast_first=1, hue=hue, saturation=saturation)
            assert np.abs(found - wanted).max() < 0.05


def test_only_the_region_is_distorted():
    image = torch.randint(256, (1, 8, 8, 3), dtype=torch.uint8)
    region = Distortion(brightness=30, x1=2, y1=-3, x2=5, y2=4)
    change = distort(image, torch.tensor([region]))[0] - image[0].permute(2, 0, 1)
    wanted = torch.zeros(3, 8, 8)
    wanted[:, :4, 2:5] = 30
    assert torch.allclose(change, wanted, atol=1e-3)


def test_each_change_is_made_in_half_of_the_cases():
    rng = np.random.default_rng(0)
    drawn = [Distortion.draw(rng) for _ in range(2000)]
    for name, neutral in (("brightness", 0), ("contrast", 1), ("saturation", 1), ("hue", 0)):
        assert sum(getattr(d, name) == neutral for d in drawn) / 2000 == pytest.approx(0.5, abs=0.05)
    assert max(abs(d.hue) for d in drawn) <= 18


def test_a_crowd_of_which_a_crop_shows_a_part_is_ignored_there(small_config):
    sample = Sample(np.zeros((100, 200, 3), np.uint8), np.array([[10, 10, 40, 40]], np.float32), np.array([0]), [None])
    sample.crowds = np.array([[60, 0, 200, 100]], np.float32)
    augment = Augment(override(small_config, augment_mirror=False, augment_expand=1))
    augment.choose_window = lambda *_: Window(0, 0, 100, 100, False)
    target = augment(sample, np.random.default_rng(0))[2]
    assert target["crowds"].numpy() == pytest.approx(np.array([[0.6, 0, 1, 1]]))
    assert target["boxes"].numpy() == pytest.approx(np.array([[0.1, 0.1, 0.4, 0.4]]))
    augment.choose_window = lambda *_: Window(0, 0, 50, 50, False)
    assert augment(sample, np.random.default_rng(0))[2]["crowds"].shape == (0, 4)


def test_an_image_that_opencv_cannot_warp_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "strip.png"), np.zeros((8, 33000, 3), np.uint8))
    image = {"id": 1, "file_name": "strip.png"}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    sample, image_id, problems = TrainingSet(CocoDataset(tmp_path / "a.json", tmp_path), get_config("yolact_lite"), 0)[
        0, 0
    ]
    assert (sample, image_id) == (None, -1)
    assert "strip.png: a side of more than 32766 pixels" in problems[0]


def test_crop_holds_a_centre():
    rng = np.random.default_rng(0)
    boxes = np.array([[10, 10, 30, 40], [70, 50, 90, 90]], np.float32)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    whole = 0
    for _ in range(300):
        x1, y1, x2, y2 = sample_crop((0, 0, 100, 100), boxes, rng)
        assert ((centres > (x1, y1)) & (centres < (x2, y2))).all(axis=1).any()
        assert 0.4 < (y2 - y1) / (x2 - x1) < 2.2
        assert 0 <= x1 < x2 <= 100
        assert 0 <= y1 < y2 <= 100
        whole += (x1, y1, x2, y2) == (0, 0, 100, 100)
    assert 25 < whole < 80  # one in six
    for _ in range(100):
        x1, y1, x2, y2 = sample_crop((0, 0, 100, 100), boxes, rng, min_side=0.8)
        assert min(x2 - x1, y2 - y1) >= 79


def test_masks_are_drawn_as_large_as_the_loss_wants_them(dataset, small_config):
    sample, size = CocoDataset(dataset, dataset.parent / "images")[0], small_config.model.max_size
    for supersample in (1, 2):
        augment = Augment(override(small_config, mask_supersample=supersample))
        masks = augment(sample, np.random.default_rng(0))[2]["masks"]
        assert masks.shape[1:] == (size // 4 * supersample,) * 2


def decoded(segmentation, size):
    return rle.decode(to_rle(segmentation, *size)).astype(bool)


def test_copy_paste_moves_pixels_masks_boxes_and_labels_together(tmp_path):
    """Masks and labels are compared with the colours that the objects were drawn in."""
    size, colors = (200, 260), ((40, 60, 230), (220, 160, 40))
    paths = [make_dataset(tmp_path / name, 1, size=size, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    sample, source = (CocoDataset(path, path.parent / "images")[0] for path in paths)
    source = replace(source, image=source.image - 9)  # so that no pasted pixel is the one that it covers
    covered = grown = 0
    for seed in range(40):
        out = copy_paste(sample, source, np.random.default_rng(seed))
        assert out.image.shape == sample.image.shape
        masks = [decoded(segmentation, size) for segmentation in out.segmentations]
        assert len(masks) == len(out.labels) == len(out.boxes)
        for mask, label, box in zip(masks, out.labels, out.boxes, strict=True):
            assert shapes(out.image, colors[label])[mask].mean() > 0.85
            rows, columns = np.nonzero(mask)
            limits = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(box - limits).max() <= 1.5  # a polygon's box lies between pixels
        assert np.sum(masks, axis=0).max() == 1  # what lies below was cut away
        for segmentation in sample.segmentations:
            before = decoded(segmentation, size)
            shows = before & (out.image == sample.image).all(axis=2)
            covered += 0.1 < shows.sum() / before.sum() < 0.9
            if shows.sum() > 0.25 * before.sum():
                assert max((mask & shows).sum() for mask in masks) > 0.95 * shows.sum()
        grown += len(out.labels) > len(sample.labels)
    assert grown > 20
    assert covered > 5
    nothing = replace(source, boxes=source.boxes[:0], labels=source.labels[:0], segmentations=[])
    assert copy_paste(sample, nothing, np.random.default_rng(0)) is sample


def test_objects_without_a_mask_keep_their_boxes(dataset, small_config):
    """They train boxes and classes; copy-paste does not take them, and covers them as it covers others."""

    def change(content):
        for annotation in content["annotations"][::2]:
            del annotation["segmentation"]

    whole = CocoDataset(dataset, dataset.parent / "images")[0]
    data = CocoDataset(edit(dataset, change), dataset.parent / "images")
    sample, source = data[0], data[1]
    assert np.array_equal(sample.boxes, whole.boxes)
    assert [segmentation is None for segmentation in sample.segmentations] == [True, False]
    config = override(small_config, augment_crop=False, augment_expand=1.0, copy_paste=0)
    _, _, augmented = TrainingSet(data, config, seed=0)[(0, 0)][0]
    assert augmented["has_mask"].tolist() == [False, True]
    assert [bool(mask.any()) for mask in augmented["masks"]] == [False, True]
    height, width = source.image.shape[:2]
    everything = [[0, 0, width, 0, width, height, 0, height]]
    source = replace(source, segmentations=[None, everything])
    counts = set()
    for seed in range(40):
        out = copy_paste(sample, source, np.random.default_rng(seed))
        boxes_only = [box for box, mask in zip(out.boxes, out.segmentations, strict=True) if mask is None]
        assert all(np.array_equal(box, sample.boxes[0]) for box in boxes_only)
        counts.add(len(boxes_only))
    assert counts == {0, 1}  # in some images a pasted object covers it
    nothing = replace(source, segmentations=[None] * len(source.boxes))
    assert copy_paste(sample, nothing, np.random.default_rng(0)) is sample


def test_copy_paste_gives_the_photos_without_objects_some(dataset, small_config):
    data = CocoDataset(dataset, dataset.parent / "images")
    plain = override(small_config, augment_crop=False, augment_expand=1.0, copy_paste=0)
    pasted = TrainingSet(data, override(plain, copy_paste=1.0), seed=0)
    empty = len(data) - 1
    assert len(TrainingSet(data, plain, seed=0)[(0, empty)][0][2]["boxes"]) == 0
    found = [pasted[(epoch, empty)][0] for epoch in range(10)]
    assert sum(len(target["boxes"]) > 0 for _, _, target in found) >= 5
    assert torch.equal(found[3][0], pasted[(3, empty)][0][0])


def test_seed_and_key_decide_everything(dataset, small_config):
    data = CocoDataset(dataset, dataset.parent / "images")
    a, b = (TrainingSet(data, small_config, seed=3)[(2, 1)][0] for _ in range(2))
    assert torch.equal(a[0], b[0])
    other = TrainingSet(data, small_config, seed=4)[(2, 1)][0]
    assert not torch.equal(a[0], other[0])


def test_order_is_the_same_from_any_position_and_over_processes():
    def first(n, **options):
        return [key for _, key in zip(range(n), endless_shuffle(7, seed=1, **options), strict=False)]

    whole = first(30)
    assert sorted(i for _, i in whole[:7]) == list(range(7))
    assert first(20, start=10) == whole[10:]
    ranks = [first(10, rank=r, world_size=3) for r in range(3)]
    assert [ranks[i % 3][i // 3] for i in range(30)] == whole


def test_unreadable_photo_is_replaced_and_named(dataset, small_config):
    (dataset.parent / "images" / "image_2.png").unlink()
    data = CocoDataset(dataset, dataset.parent / "images")
    _, image_id, problems = TrainingSet(data, small_config, seed=0)[(0, 2)]
    assert image_id != 16
    assert "image_2.png" in problems[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(dataset, small_config, workers):
    cv2.setNumThreads(4)
    cv2.GaussianBlur(
        np.zeros((2000, 2000, 3), np.uint8), (9, 9), 2
    )  # OpenCV's threads run; processes fork all the same
    data = CocoDataset(dataset, dataset.parent / "images")
    with training_batches(data, override(small_config, batch_size=3), workers=workers) as batches:
        assert cv2.getNumThreads() == 4
        batch = next(batches)
    assert not multiprocessing.active_children()
    assert batch.images.shape == (3, 96, 96, 3)
    assert batch.normalised(small_config.model).shape == (3, 3, 96, 96)
    assert len(batch.targets) == len(batch.image_ids) == 3
    assert set(batch.targets[0]) == {"boxes", "labels", "masks", "has_mask", "crowds", "seed"}


def test_training_and_prediction_read_an_image_alike(dataset):
    """A 12-bit PNG had a mean of 7.5 in training and of 127.6 at --image."""
    path = dataset.parent / "images/image_0.png"
    cv2.imwrite(str(path), cv2.imread(str(path)).astype(np.uint16) * 16)
    data = CocoDataset(dataset, dataset.parent / "images")
    assert np.array_equal(data[0].image, read_image(path))


def test_a_packed_list_returns_what_was_put_in():
    items = [[], [{"a": 1.5}], list(range(1000)), None, "text"]
    packed = PackedList(items)
    assert len(packed) == 5
    assert [packed[i] for i in range(5)] == items
    with pytest.raises(IndexError):
        packed[5]


GROWTH = """
import gc, os, sys
from pathlib import Path
from data.coco import CocoDataset, PackedList

def private():
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty"))

dataset = CocoDataset(sys.argv[1], sys.argv[2])
gc.collect()
child = os.fork()
if child == 0:
    before = private()
    for index in range(len(dataset)):
        dataset.file_name(index), dataset.image_ids[index]
        for entry in dataset.annotations(index):
            list(entry["segmentation"][0]), list(entry.values())
    print((private() - before) / 1024)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux reports it")
@pytest.mark.slow
def test_a_forked_worker_does_not_copy_the_index(tmp_path):
    """20,000 images with 146,000 annotations; as Python objects a worker copied all of their 150 MiB in an epoch."""
    polygon = [[float(v) for v in range(40)]]
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(20_000)]
    annotations = [
        {"id": k, "image_id": k % 20_000, "category_id": 1, "bbox": [1, 2, 3, 4], "segmentation": polygon}
        for k in range(146_000)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert float(spawn("-c", GROWTH, tmp_path / "a.json", tmp_path)) < 15


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_links_are_followed_and_paths_may_not_leave_the_folder(dataset, tmp_path):
    images = dataset.parent / "images"
    (tmp_path / "outside.png").write_bytes((images / "image_0.png").read_bytes())
    (images / "image_0.png").unlink()
    (images / "image_0.png").symlink_to(tmp_path / "outside.png")
    assert CocoDataset(dataset, images)[0].image.shape == (96, 128, 3)
    content = json.loads(dataset.read_text())
    for name in ("../outside.png", str(tmp_path / "outside.png")):
        content["images"][0]["file_name"] = name
        dataset.write_text(json.dumps(content))
        with pytest.raises(UserError, match="leads out of the image folder"):
            CocoDataset(dataset, images)[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["images"][0].update(file_name="a\0b.png"), "file_name 'a\\x00b.png' is not a usable text"),
        (lambda c: c["images"][0].update(file_name="\ud800.png"), "file_name '\\ud800.png' is not a usable text"),
        (lambda c: c["images"][0].update(file_name="x" * 300), "is longer than file systems allow"),
        (lambda c: c["images"][0].update(file_name=["a"]), "file_name ['a'] is not a usable text"),
        (lambda c: c["categories"][0].update(name="\udfff"), "category name '\\udfff' is not a usable text"),
        (lambda c: c["categories"][0].update(name={}), "category name {} is not a usable text"),
        (lambda c: c["images"][0].update(id=3.9), "image id 3.9 is not a whole number"),
        (lambda c: c["images"][0].update(id=10**400), "is not a whole number"),
        (lambda c: c["annotations"][0].update(category_id=float("nan")), "category_id nan is not a whole number"),
        (lambda c: c["annotations"][0].update(image_id=float("inf")), "image_id inf is not a whole number"),
    ],
)
def test_values_that_no_file_should_have_are_named(dataset, change, words):
    """The message has the file, the field and the value; nothing reaches a library that would crash on it."""
    with pytest.raises(UserError) as error:
        CocoDataset(edit(dataset, change), dataset.parent / "images")
    assert words in str(error.value)
    assert str(dataset) in str(error.value)


@pytest.mark.parametrize("height", [2**63, -5, float("inf"), float("nan"), "tall", 10**400, None])
def test_unusable_sizes_are_read_from_the_image(dataset, height):
    path = edit(dataset, lambda c: c["images"][0].update(height=height))
    data = CocoDataset(path, path.parent / "images")
    assert data.stated_size(0) is None
    assert len(data[0].boxes) == 2


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" * 5000, '{"images": [' + "1" * 5000 + "]}", "\0", "{", '"\\ud800"']
)
def test_text_that_is_no_annotation_file_gets_one_line(dataset, text):
    dataset.write_text(text)
    with pytest.raises(UserError, match=r"not a JSON file|not a COCO annotation file|must be a list") as error:
        CocoDataset(dataset, dataset.parent / "images")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": ["96", "128"], "counts": [12288]},
        {"size": [96, 128], "counts": [True] * 12288},
        [["1", "2", "3", "4", "5", "6"]],
        [[10**400] * 6],
        [[1, 2, 3, 4, 5, float("inf")]],
        [[[[1, 2, 3]]], 5],
        {"size": [96, 128], "counts": {"a": 1}},
    ],
)
def test_strange_segmentations_are_no_mask(segmentation):
    assert normalise_segmentation(segmentation, 96, 128) is None
