"""On a GPU the host waits once per batch and twice per training step, and no operation mixes devices.

The device is pretended, see pretended.py; tests/test_cuda.py checks the numbers of a real one.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
import recipe
import torch
from conftest import ROOT, make_dataset, noisy_model

from config import get_config
from data.augment import Distortion
from data.coco import CocoDataset
from data.image import read_image
from data.loader import Batch
from evaluation import evaluator
from inference import Predictor
from layers.anchors import make_anchors
from layers.detect import detect
from layers.loss import MultiBoxLoss
from layers.masks import mask_windows
from layers.nms import NMS
from layers.structures import Predictions
from tools.tiles import TiledPredictor
from training.trainer import Trainer
from utils.distributed import Ranks
from weights import load_model
from weights.released import BUNDLED
from yolact import Yolact

if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
    pytest.skip("needs a newer PyTorch", allow_module_level=True)
from pretended import CUDA, Pretended, pretended_cuda


def test_the_device_refuses_what_cuda_refuses_and_counts_waits():
    with pretended_cuda() as device:
        values = torch.arange(4.0).pin_memory().to("cuda", non_blocking=True)
        assert not device.waits
        with pytest.raises(RuntimeError, match="same device"):
            values + torch.ones(4)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(4)[values.long()]
        with pytest.raises(TypeError, match="numpy"):
            values.numpy()
        for waiting in (
            lambda: values[values > 1],
            lambda: values.nonzero(),
            lambda: values.sum().item(),
            lambda: bool(values[0] < 1),
            lambda: values.tolist(),
            lambda: values.cpu(),
            lambda: torch.ones(4).to("cuda"),
            lambda: torch.tensor([1.0, 2.0], device="cuda"),
            lambda: torch.equal(values, values),
        ):
            device.waits.clear()
            waiting()
            assert device.waits.total() == 1
        assert (values * 2 + 1).cpu().tolist() == [1, 3, 5, 7]


@pytest.fixture(scope="module")
def person():
    return load_model(BUNDLED), read_image(ROOT / "data/demo/camera.jpg")


def check_one_wait(model, image, **options):
    """The detections of the CPU, with one wait for a batch, and one for the masks of an image."""
    wanted = Predictor(model, "cpu", "fp32", **options)([image, image])
    with pretended_cuda() as device:
        predictor = Predictor(model, "cuda", "fp32", **options)
        predictor([image, image])  # the anchors of a new input size are copied once
        device.waits.clear()
        found = predictor([image, image])
        assert sum(device.waits.values()) == 1, device.waits
        device.waits.clear()
        coco = found[0].to_coco()
        assert sum(device.waits.values()) <= 1, device.waits
        assert isinstance(found[0].prototypes, Pretended)
        assert isinstance(found[0].masks, Pretended)
        masks = found[0].masks.cpu()
        device.waits.clear()
        windows = list(found[0].windows())
        assert sum(device.waits.values()) == 1, device.waits
        fields = found[0].prototypes, found[0].coefficients, found[0].relative_boxes
        chunked = list(mask_windows(*fields, found[0].size, found[0].config, budget=10**5))
        assert found[0].draw().shape == image.shape
    assert len(wanted[0]) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert torch.allclose(ours.boxes, theirs.boxes, atol=0.05)
        assert torch.allclose(ours.mask_scores, theirs.mask_scores, atol=1e-3)
    assert len(coco) == len(windows) == len(chunked) == len(wanted[0])
    assert float((masks != wanted[0].masks).float().mean()) < 1e-3
    for ours, again, theirs in zip(windows, chunked, wanted[0].windows(), strict=True):
        assert ours[:2] == again[:2] == theirs[:2]
        assert np.array_equal(ours.pixels, again.pixels)
        assert ours.pixels.shape == theirs.pixels.shape
        assert (ours.pixels != theirs.pixels).sum() <= 0.01 * ours.pixels.size


@pytest.mark.parametrize("nms", [name for name in NMS if name != "standard"])  # whose decisions are the host's
def test_one_wait_for_each_nms(person, nms):
    check_one_wait(*person, nms=nms)


@pytest.mark.parametrize("name", ["yolact_resnet50", "yolact_plus_resnet50", "yolact_r50", "yolact_darknet53"])
def test_one_wait_for_each_kind_of_network(name):
    check_one_wait(noisy_model(name, max_size=160), recipe.image(120, 160, 1), score_threshold=0.1)


def test_standard_nms_sizes_tiles_and_subsets(person):
    model, image = person
    small = image[:200, :150].copy()
    with pretended_cuda():
        predictor = Predictor(model, "cuda", "fp32")
        assert len(predictor.with_detection(nms="standard")(image)) > 0
        found = predictor([image, small, image])[2]
        assert len(found[found.scores > 0.9]) + len(found[found.scores <= 0.9]) == len(found)
        assert len(found[[0]].to_dicts()) == 1
        assert len(TiledPredictor(predictor, 320)(image).encode_masks()) > 0


def test_tracking_on_the_device(person):
    pytest.importorskip("trackers")
    from tools.track import Tracker

    model, image = person
    with pretended_cuda():
        predictor, tracker = Predictor(model, "cuda", "fp32"), Tracker(25)
        for _ in range(3):
            found = tracker(predictor(image), image)
            assert found.draw(image).shape == image.shape
    assert int(found.track_ids.max()) >= 0


def one_thread(_threads):
    """In place of a pool: the pretended device is that of a single thread."""
    return evaluator.InThisThread()


def test_videos_on_the_device(person, tmp_path, monkeypatch):
    pytest.importorskip("av")
    from tools import video

    model, image = person
    path = str(tmp_path / "clip.mp4")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 10, image.shape[1::-1])
    for _ in range(3):
        writer.write(image)
    writer.release()
    monkeypatch.setattr(video, "ThreadPoolExecutor", one_thread)
    with pretended_cuda() as device:
        predictor = Predictor(model, "cuda", "fp32")
        predictor(image)  # the anchors of a new input size are copied once
        device.waits.clear()
        report = video.process_video(predictor, path, tmp_path / "out", ("overlay", "json"))
        assert device.waits.total() <= 3 * 3, device.waits  # of each frame: detections, drawing, and its masks
    assert report.frames == 3
    assert len(json.loads((tmp_path / "out.json").read_text())) >= 3


def test_evaluation_on_the_device(person, tmp_path, monkeypatch):
    path = make_dataset(tmp_path / "data", 4)
    data = CocoDataset(path, path.parent / "images")
    data.image_path(2).write_bytes(b"no image")
    model = noisy_model("yolact_resnet50", max_size=96, class_names=data.class_names, category_ids=data.category_ids)
    monkeypatch.setattr(evaluator, "ThreadPoolExecutor", one_thread)
    wanted = evaluator.evaluate(Predictor(model, "cpu", "fp32"), data, progress=False)
    with pretended_cuda() as device:
        predictor = Predictor(model, "cuda", "fp32")
        predictor(data.read_image(0))
        device.waits.clear()
        found = evaluator.evaluate(predictor, data, progress=False)
        assert device.waits.total() <= 1 + 3, device.waits  # the detections of the batch, and the masks of each image
    assert len(found["results"]) == len(wanted["results"]) > 0
    assert len(found["problems"]) == 1
    assert len(found["sizes"]) == 3
    assert found["bbox"]["AP"] == pytest.approx(wanted["bbox"]["AP"], abs=1e-3)


def make_batch(config, objects, images):
    """Random targets with `objects` objects in each image, in pinned memory as a DataLoader gives them."""
    targets = []
    for seed in range(images):
        generator = torch.Generator().manual_seed(seed)
        low = torch.rand(objects, 2, generator=generator) * 0.6
        targets.append(
            {
                "boxes": torch.cat((low, low + 0.3), dim=1),
                "labels": torch.arange(objects) % config.num_classes,
                "masks": torch.ones(objects, 16, 16, dtype=torch.uint8),
                "has_mask": torch.ones(objects, dtype=torch.bool),
                "crowds": torch.tensor([[0.0, 0.0, 0.2, 0.2]]),
                "seed": torch.tensor(seed),
            }
        )
    size = config.train_size
    pixels = torch.randint(256, (images, size, size, 3), dtype=torch.uint8)
    distortions = torch.tensor([Distortion.draw(np.random.default_rng(seed)) for seed in range(images)])
    return Batch(pixels, distortions, targets, list(range(images)), []).pin_memory()


@pytest.mark.parametrize("name", ["yolact_resnet50", "yolact_plus_resnet50", "yolact_lite"])
def test_a_training_step_waits_twice_whatever_its_objects(name, tmp_path, monkeypatch):
    """Once to sample the masks, and once for the losses and the norm of the gradient together."""
    config = get_config(name, max_size=128)
    with pretended_cuda() as device:
        trainer = Trainer(Yolact(config), tmp_path, Ranks(CUDA), "fp32")

        def backward(_: torch.Tensor) -> None:
            for parameter in trainer.model.parameters():
                parameter.grad = torch.zeros_like(parameter.detach()) if parameter.requires_grad else None

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        operations: Counter[tuple[int, int]] = Counter()
        for objects, images in ((8, 2), (8, 2), (40, 2), (8, 4), (0, 2)):
            batch = make_batch(config, objects, images)
            device.waits.clear()
            device.operations = 0
            assert np.isfinite(trainer.step(batch, 1e-4)["total"])
            assert sum(device.waits.values()) == 2, device.waits
            operations[objects, images] = device.operations
    assert operations[40, 2] == operations[8, 2]
    assert operations[8, 4] - operations[8, 2] <= 2 * 40  # a few copies are per image


def test_equal_objects_in_a_regular_grid_get_anchors_on_the_device():
    """Their overlaps tie, so that they compete for the same anchors over many rounds."""
    config = get_config("yolact_r50")
    anchors = make_anchors(550, 550, config.model)
    corners = torch.cartesian_prod(torch.arange(15), torch.arange(15)) * 6 / 550
    boxes = torch.cat((corners, corners + 5 / 550), dim=1).float()
    target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.long), "crowds": torch.zeros(0, 4)}
    with pretended_cuda():
        moved = {key: value.pin_memory().to("cuda") for key, value in target.items()}
        matches = MultiBoxLoss(config.loss).match(anchors.pin_memory().to("cuda"), [moved])
        objects, classes = matches.objects.cpu(), matches.classes.cpu()
    assert len(objects[classes > 0].unique()) == len(boxes)


def peak_memory(function):
    """The largest sum of bytes that tensors held at a time during a call, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("nms", ["fast", "cluster", "cross_class"])
def test_decoding_many_classes_takes_little_memory(nms):
    """80 classes of 1000 candidates each, without dropping weak anchors, as on a GPU: all overlaps are 305 MiB."""
    config = get_config("yolact_lite")
    anchors = make_anchors(640, 640, config.model)
    shape = 1, len(anchors)
    outputs = torch.randn(*shape, 4) * 0.1, torch.randn(*shape, 81), torch.rand(*shape, 32), torch.rand(1, 160, 160, 32)
    setting = replace(config.detection, nms=nms, nms_top_k=1000, score_threshold=0.01)
    with torch.inference_mode():
        assert peak_memory(lambda: detect(Predictions(*outputs, None), anchors, setting)) < 200 * 2**20
