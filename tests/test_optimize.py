"""`optimize` returns the same function, faster: folding, precision and the compiler."""

from __future__ import annotations

import pickle
import platform
from unittest.mock import Mock

import pytest
import torch
from conftest import random_image, spawn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from backbone import DeformConv2d
from config import CONFIGS, get_config
from inference import Predictor
from inference import optimize as optimize_module
from inference.fusion import fuse
from inference.optimize import fold_batch_norm, optimize
from layers.detect import detect
from utils.errors import UserError
from weights import load_model
from yolact import Yolact

CPU = torch.device("cpu")
BACKBONES = ("yolact_resnet50", "yolact_darknet53", "yolact_plus_resnet50", "yolact_lite")


def with_statistics(config):
    """A model whose batch norms have statistics, as after training."""
    model = Yolact(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_optimized_is_the_same_function(name):
    model = with_statistics(get_config(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = optimize(model, CPU, torch.float32)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    images = torch.randn(2, 3, 150, 190)
    with torch.no_grad():
        for wanted, found in zip(model(images)[:4], fast(images)[:4], strict=True):
            assert wanted.shape == found.shape
            assert float((wanted - found).abs().max() / wanted.abs().max()) < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def reference_relu(x, weight, bias, stride, padding, dilation, groups):
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()


def reference_add_relu(x, weight, added, alpha, bias, stride, padding, dilation, groups):
    return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * added).relu()


# ResNet-50: 33 in the backbone, of which 13 are deformable in YOLACT++; 5 of prototypes, 3 of the FPN, 5 of the head.
@pytest.mark.parametrize(
    ("name", "relus", "sums"), [("yolact_resnet50", 46, 16), ("yolact_plus_resnet50", 33, 16), ("yolact_lite", 13, 0)]
)
def test_relus_become_a_part_of_convolutions(name, relus, sums, monkeypatch):
    """The operations of cuDNN are replaced by what they compute, since they exist for CUDA only."""
    monkeypatch.setattr(torch, "cudnn_convolution_relu", Mock(side_effect=reference_relu))
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", Mock(side_effect=reference_add_relu))
    model = optimize(with_statistics(get_config(name)), CPU, torch.float32)
    fused = pickle.loads(pickle.dumps(fuse(model)))
    for height, width in ((150, 190), (96, 128)):
        images = torch.randn(2, 3, height, width)
        with torch.inference_mode():
            for wanted, found in zip(model(images)[:4], fused(images)[:4], strict=True):
                assert torch.equal(wanted, found)
    assert torch.cudnn_convolution_relu.call_count == 2 * relus
    assert torch.cudnn_convolution_add_relu.call_count == 2 * sums


def test_a_network_that_decides_by_values_is_not_fused():
    class Deciding(nn.Module):
        def forward(self, x):
            return x.relu() if x.mean() > 0 else x

    model = Deciding()
    assert fuse(model) is model


def test_deformable_convolutions_keep_float32_weights():
    """Casting the model must not round them: references to parameters that `.to(dtype)` rewrites in place did."""
    model = with_statistics(get_config("yolact_plus_resnet50", max_size=64))
    exact, fast = optimize(model, CPU, torch.float32), optimize(model, CPU, torch.bfloat16)
    pairs = [(a, b) for a, b in zip(exact.modules(), fast.modules(), strict=True) if isinstance(a, DeformConv2d)]
    assert len(pairs) == 13
    for wanted, found in pairs:
        for name, value in wanted.state_dict().items():
            assert torch.equal(value, found.state_dict()[name]), name
    assert fast.semantic.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in fast.mask_iou.parameters())


@pytest.mark.parametrize(("name", "limit"), [("yolact_lite", 0.02), ("yolact_plus_resnet50", 0.03)])
def test_bfloat16_is_close(name, limit):
    """The mean error stays at the level of bfloat16's rounding, 2^-9 per operation, over all layers."""
    model, image = with_statistics(get_config(name, max_size=64)), random_image(60, 80)
    outputs = []
    for precision in ("fp32", "bf16"):
        predictor = Predictor(model, "cpu", precision)
        predictions = predictor.predict(predictor.preprocess(image)[None])
        outputs.append(predictions)
        predictor(image)  # detection accepts the type
    for wanted, found in zip(outputs[0][:4], outputs[1][:4], strict=True):
        assert found.dtype == torch.bfloat16
        assert float((wanted - found.float()).abs().mean() / wanted.abs().mean()) < limit


@pytest.mark.parametrize("nms", ["fast", "cross_class"])
@pytest.mark.parametrize("name", ["yolact_resnet50", "yolact_r50", "yolact_plus_resnet50", "yolact_lite"])
def test_nothing_synchronises_before_the_candidates(name, nms):
    """Fake tensors have no values, so any use of one is an error, and so is a shape that depends on one.

    On a GPU the network and detection can run without waiting, be captured in a graph, or be exported.
    """
    predictor = Predictor(Yolact(get_config(name, max_size=96)), "cpu", nms=nms)
    with FakeTensorMode(allow_non_fake_inputs=True):
        predictions = predictor.predict(torch.zeros(2, 3, 96, 96))
        found = detect(predictions, predictor.backend.anchors(96, 96), predictor.config.detection)
    boxes, scores, labels, coefficients = found
    assert boxes.shape[0] == scores.shape[0] == 2
    assert boxes.shape[1] <= 100
    assert labels.shape == scores.shape == boxes.shape[:2]
    assert coefficients.shape == (*scores.shape, 32)


def test_the_test_above_notices_a_use_of_values():
    predictor = Predictor(Yolact(get_config("yolact_lite", max_size=96)), "cpu")
    with pytest.raises(Exception, match=r"data|value|nonzero|dynamic"), FakeTensorMode(allow_non_fake_inputs=True):
        predictor.detect(predictor.predict(torch.zeros(1, 3, 96, 96)))  # on a CPU weak anchors are dropped


def test_other_devices_give_the_same_detections(predictor):
    """Without dropping weak anchors, as on a GPU, the same slots come out."""
    with torch.inference_mode():
        raw = predictor.predict(torch.stack([predictor.preprocess(random_image(90, 130, seed=s)) for s in range(2)]))
        fixed = detect(
            raw, predictor.backend.anchors(*predictor.input_size(random_image(90, 130))), predictor.config.detection
        )
    for i in range(2):
        wanted = predictor(random_image(90, 130, seed=i))
        used = int((fixed.scores[i] > 0).sum())
        assert used == len(wanted) > 0
        assert fixed.labels[i, :used].tolist() == wanted.labels.tolist()
        assert torch.allclose(fixed.scores[i, :used], wanted.scores, atol=1e-6)


@pytest.mark.slow
def test_compiled_is_the_same(weights):
    model = load_model(weights)
    plain, compiled = Predictor(model, "cpu", "fp32", size=(96, 96)), Predictor(model, "cpu", "fp32", compile=True)
    assert compiled.backend.compile_seconds > 0
    images = [random_image(90, 130), random_image(200, 64, seed=1)]
    for wanted, found in zip(plain(images), compiled(images), strict=True):  # not the batch size it was compiled for
        assert wanted.labels.tolist() == found.labels.tolist()
        assert torch.allclose(wanted.boxes, found.boxes, atol=1e-2)
        assert float((wanted.masks ^ found.masks).float().mean()) < 1e-3


def test_as_written_is_the_same(weights):
    model = load_model(weights)
    plain, fast = Predictor(model, "cpu", optimize=False), Predictor(model, "cpu", "fp32")
    assert any(isinstance(m, nn.BatchNorm2d) for m in plain.backend.model.modules())
    wanted, found = plain(random_image()), fast(random_image())
    assert wanted.labels.tolist() == found.labels.tolist()
    assert torch.allclose(wanted.scores, found.scores, atol=1e-5)


def test_without_a_compiler_the_reason_is_given(weights, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no working C++ compiler found\nand much more")

    monkeypatch.setattr(optimize_module.torch, "compile", lambda *_, **__: broken)
    with pytest.raises(UserError, match=r"cannot compile the network \(no working C\+\+ compiler found\)"):
        Predictor(load_model(weights), "cpu", compile=True)


def test_every_batch_norm_is_declared_for_folding():
    for name in CONFIGS:
        with torch.device("meta"):
            model = Yolact(get_config(name))
        fold_batch_norm(model.eval())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


FAULTS = """
import resource, sys, torch
from utils.device import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
torch.ones(2**25)  # 128 MiB, written and freed: enough for half of it, however it is aligned
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc's allocator")
def test_memory_is_reused():
    new, again = (int(spawn("-c", FAULTS, how)) for how in ("free", "keep"))
    assert again < 0.1 * new
