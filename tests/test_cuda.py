"""A CUDA GPU gives the numbers of the CPU. Skipped without one; benchmarks/gpu.sh runs these tests."""

from __future__ import annotations

import pytest
import recipe
import torch
from conftest import ROOT, make_dataset, noisy_model, run, train_args

from config import get_config
from data.coco import CocoDataset
from data.image import read_image, to_network
from data.loader import training_batches
from inference import Predictor
from layers.nms import NMS
from training.trainer import Trainer
from utils.distributed import Ranks
from weights import load_model
from weights.released import BUNDLED
from yolact import Yolact

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def assert_same(found, wanted, score, share=0.99, pixels=1.0):
    """Almost all detections have a counterpart of the same class and place; equal scores may change their order."""
    for window, mask in zip(found.windows(), found.masks.cpu().numpy(), strict=True):
        mask[window.place] ^= window.pixels
        assert mask.mean() < 1e-4
    found = found.cpu()
    distances = (wanted.boxes[:, None] - found.boxes).abs().amax(dim=2) + 1e6 * (wanted.labels[:, None] != found.labels)
    distances += (wanted.mask_scores[:, None] - found.mask_scores).abs()  # boxes that reach the border may be equal
    nearest = distances.argmin(dim=1)
    same = distances.amin(dim=1) < pixels
    assert len(wanted) > 0
    assert float(same.float().mean()) >= share
    assert abs(len(found) - len(wanted)) <= (1 - share) * len(wanted)
    assert float((found.mask_scores[nearest] - wanted.mask_scores).abs()[same].max()) < score
    differing = (found.masks[nearest] != wanted.masks)[same].float().mean()
    assert float(differing) < 0.01 * pixels


@pytest.mark.parametrize("name", ["yolact_resnet50", "yolact_base", "yolact_plus_resnet50", "yolact_r50"])
def test_the_gpu_gives_the_detections_of_the_cpu(name):
    model, image = noisy_model(name), recipe.image(240, 320, 1)
    wanted = Predictor(model, "cpu", "fp32", score_threshold=0.1)(image)
    found = Predictor(model, "cuda", "fp32", score_threshold=0.1)(image)
    assert_same(found, wanted, score=1e-3, share=0.95)  # about 100 detections with nearly equal scores
    assert len(found.to_coco()) == len(found)
    assert found.draw(image).shape == image.shape


@pytest.fixture(scope="module")
def people():
    """The bundled model, a photo, and what the CPU finds on it."""
    model, image = load_model(BUNDLED), read_image(ROOT / "data/demo/camera.jpg")
    return model, image, Predictor(model, "cpu", "fp32", score_threshold=0.2)(image)


@pytest.mark.parametrize("nms", list(NMS))
def test_every_nms(people, nms):
    model, image, _ = people
    wanted, found = (Predictor(model, device, "fp32", nms=nms)(image) for device in ("cpu", "cuda"))
    assert_same(found, wanted, score=1e-3)


@pytest.mark.parametrize(
    ("options", "score"),
    [
        ({"precision": "fp32"}, 1e-3),
        ({"precision": "tf32"}, 0.02),
        ({"precision": "bf16"}, 0.1),
        ({"precision": "fp16"}, 0.02),
        ({"precision": "fp32", "compile": True, "size": (640, 640)}, 1e-3),
    ],
)
def test_precisions_and_compiled(people, options, score):
    model, image, wanted = people
    if "size" in options:
        wanted = Predictor(model, "cpu", "fp32", score_threshold=0.2, size=options["size"])(image)
    predictor = Predictor(model, "cuda", score_threshold=0.2, **options)
    for count in (1, 3, 1):
        for found in predictor([image] * count):
            assert_same(found, wanted, score, pixels=16 if options["precision"] == "bf16" else 1)


@pytest.mark.parametrize("uint8", [True, False])
def test_the_gpu_prepares_images_as_the_cpu(uint8):
    config = get_config("yolact_r50", resize_uint8=uint8).model
    for size in ((240, 320), (700, 500)):
        image = recipe.image(*size, 1)
        wanted, found = (to_network(image, (550, 550), config, device) for device in (CPU, CUDA))
        # In 8 bits, less than 0.5 % of the values differ, by one grey level.
        assert float(((found.cpu() - wanted).abs() > 1e-4).float().mean()) < (0.005 if uint8 else 1e-9)


@pytest.mark.parametrize("name", ["yolact_resnet50", "yolact_plus_resnet50", "yolact_lite"])
def test_two_training_steps_have_the_losses_of_the_cpu(tmp_path, name):
    path = make_dataset(tmp_path / "data", 4, size=(240, 320), negatives=1)
    dataset = CocoDataset(path, path.parent / "images")
    config = get_config(
        name, max_size=256, class_names="disc,tile", category_ids="7,3", freeze_bn=True, copy_paste=0, batch_size=4
    )
    state = None
    losses = {}
    for device in (CPU, CUDA):
        model = Yolact(config)
        state = state or model.state_dict()
        model.load_state_dict(state)
        trainer = Trainer(model, tmp_path, Ranks(device), "fp32")
        with training_batches(dataset, config) as batches:
            losses[device.type] = [trainer.step(next(batches), 1e-4) for _ in range(2)]
    for found, wanted in zip(losses["cuda"], losses["cpu"], strict=True):
        assert found == pytest.approx(wanted, rel=5e-3, abs=1e-4)


def test_training_resuming_and_evaluation(tmp_path):
    path = make_dataset(tmp_path / "data", 8, negatives=1)
    args = [*train_args(path, "--batch_size", "4", "--val_interval", "4", "--output_dir", tmp_path / "run")]
    args[args.index("cpu")] = "cuda"
    assert "on 1 x cuda" in run(*args, "--max_iter", "4")
    run("train.py", "--resume", tmp_path / "run", "--max_iter", "6")
    run(*args, "--max_iter", "2", "--precision", "fp16", "--output_dir", tmp_path / "fp16")
    images = path.parent / "images"
    found = run("eval.py", "--weights", tmp_path / "run", "--annotations", path, "--image_dir", images)
    assert "segm" in found or "mask" in found
