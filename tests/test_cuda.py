"""A CUDA GPU gives the numbers of the CPU. Skipped without one; benchmarks/gpu.sh runs these tests."""

from __future__ import annotations

import pytest
import recipe
import torch
from conftest import make_dataset, random_image, run, train_args

from config import get_config
from data.coco import CocoDataset
from data.loader import TrainingLoader
from inference import Predictor
from layers.nms import NMS
from training.trainer import Trainer
from utils.distributed import one_process
from weights import load_model
from yolact import Yolact

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def noisy_model(name: str, **overrides) -> Yolact:
    """A model whose random weights detect objects: the background's logits are lowered."""
    model = Yolact(get_config(name, **overrides)).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(recipe.state_dict(shapes, seed=1, gain=0.7))
    with torch.no_grad():
        model.head.cls.bias.view(-1, model.config.num_classes + 1)[:, 0] -= 1
    return model


@pytest.mark.parametrize(
    "name", ["yolact_resnet50", "yolact_base", "yolact_plus_resnet50", "yolact_r50", "yolact_darknet53", "yolact_lite"]
)
def test_the_gpu_gives_the_detections_of_the_cpu(name):
    model, image = noisy_model(name), recipe.image(240, 320, 1)
    threshold = 0.01 if model.config.detection.box_voting else 0.1  # votes of random anchors lower the scores
    wanted = Predictor(model, "cpu", "fp32", score_threshold=threshold)(image)
    found = Predictor(model, "cuda", "fp32", score_threshold=threshold)(image)
    assert len(wanted) == len(found) > 3
    assert found.labels.tolist() == wanted.labels.tolist()
    assert (found.scores.cpu() - wanted.scores).abs().max() < 1e-3
    assert (found.mask_scores.cpu() - wanted.mask_scores).abs().max() < 1e-3
    assert (found.boxes.cpu() - wanted.boxes).abs().max() < 0.05
    differing = (found.masks.cpu() != wanted.masks).float().mean()
    assert differing < 1e-4
    assert len(found.to_coco()) == len(wanted)
    assert found.draw(image).shape == image.shape


@pytest.mark.parametrize("nms", list(NMS))
def test_every_nms(weights, nms):
    model = load_model(weights)
    wanted, found = (Predictor(model, device, "fp32", nms=nms)(random_image()) for device in ("cpu", "cuda"))
    assert found.labels.tolist() == wanted.labels.tolist()
    assert (found.scores.cpu() - wanted.scores).abs().max() < 1e-3


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}, {"compile": True}])
def test_other_precisions_and_compiled(weights, options):
    model = load_model(weights)
    wanted = Predictor(model, "cpu", "fp32")(random_image())
    predictor = Predictor(model, "cuda", **{"precision": "fp32"} | options)
    for count in (1, 1, 3):
        for found in predictor([random_image()] * count):
            assert torch.allclose(wanted.scores[:5], found.scores[:5].cpu(), atol=0.02)
            assert torch.allclose(wanted.boxes[:5], found.boxes[:5].cpu(), atol=1.0)


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
        trainer = Trainer(model, tmp_path, one_process(device), "fp32")
        with TrainingLoader(dataset, config) as batches:
            losses[device.type] = [trainer.step(next(batches), 1e-4) for _ in range(2)]
    for found, wanted in zip(losses["cuda"], losses["cpu"], strict=True):
        assert found == pytest.approx(wanted, rel=2e-3, abs=1e-4)


def test_training_resuming_and_evaluation(tmp_path):
    path = make_dataset(tmp_path / "data", 8, negatives=1)
    args = [*train_args(path, "--batch_size", "4", "--val_interval", "4", "--output_dir", tmp_path / "run")]
    args[args.index("cpu")] = "cuda"
    assert "on 1 x cuda" in run(*args, "--max_iter", "4")
    run("train.py", "--resume", tmp_path / "run", "--max_iter", "6")
    for precision in ("fp16", "fp32"):
        run(*args, "--max_iter", "2", "--precision", precision, "--output_dir", tmp_path / precision)
    images = path.parent / "images"
    found = run("eval.py", "--weights", tmp_path / "run", "--annotations", path, "--image_dir", images)
    assert "segm" in found or "mask" in found
