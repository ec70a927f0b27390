"""The fast paths give what the plain model gives: folding, Winograd, merged head, precision, compiler, CUDA graphs."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch
from conftest import photo, run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data.config import CONFIGS, get_config
from data.errors import UserError
from engine import inference
from engine.inference import MergedHead, PointwiseConv2d, prepare
from engine.predictor import Predictor
from layers.winograd import WinogradConv2d
from yolact import Yolact

CPU = torch.device("cpu")
BACKBONES = ("yolact_resnet50", "yolact_darknet53", "yolact_plus_resnet50", "yolact_lite")


def livened(config):
    """A model whose batch norms have statistics, as training leaves them."""
    model = Yolact(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_prepared_is_the_same_function(name):
    model = livened(get_config(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ready = prepare(model, CPU, torch.float32)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ready.modules())
    assert any(isinstance(m, MergedHead) for m in ready.modules())
    assert any(isinstance(m, WinogradConv2d) for m in ready.modules())
    assert any(isinstance(m, PointwiseConv2d) for m in ready.modules())
    images = torch.randn(2, 3, 150, 190)
    with torch.no_grad():
        for wanted, found in zip(model(images)[:4], ready(images)[:4], strict=True):
            assert wanted.shape == found.shape
            assert float((wanted - found).abs().max() / wanted.abs().max()) < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("size", [(69, 69), (4, 96), (33, 18), (20, 31)])
@pytest.mark.parametrize("bias", [True, False])
def test_winograd_is_the_convolution(size, bias):
    conv = nn.Conv2d(120, 100, 3, padding=1, bias=bias)
    assert WinogradConv2d.pays(conv)
    x = torch.randn(2, 120, *size)
    wanted = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double() if bias else None, padding=1)
    with torch.no_grad():
        found = WinogradConv2d(conv)(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert float((found - wanted.detach()).abs().max() / wanted.detach().abs().max()) < 3e-5


def test_winograd_in_strips_and_for_few_pixels(monkeypatch):
    conv, x = nn.Conv2d(96, 100, 3, padding=1), torch.randn(1, 96, 50, 50)
    layer = WinogradConv2d(conv)
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr("layers.winograd.STRIP", 36 * 13 * 96 * 3)
        assert torch.allclose(layer(x), whole, atol=1e-5)
        few = torch.randn(1, 96, 5, 5)
        assert layer.fewest_pixels > 25
        assert torch.equal(layer(few), conv(few))
    for other in (nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)):
        with pytest.raises(ValueError, match="Winograd"):
            WinogradConv2d(other)


def test_winograd_and_the_compiler_agree_on_shapes():
    torch.library.opcheck(
        torch.ops.yolact.winograd.default,
        (torch.randn(2, 8, 9, 14), torch.randn(36, 8, 5), torch.randn(5), torch.randn(6, 6), torch.randn(4, 6)),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("name", ["yolact_lite", "yolact_plus_resnet50"])
def test_bfloat16_is_close(name):
    config = get_config(name, max_size=64)
    model, picture = livened(config), photo(60, 80)
    outputs = []
    for precision in ("fp32", "bf16"):
        predictor = Predictor(model, "cpu", precision)
        assert predictor.model.semantic.weight.dtype == predictor.dtype
        predictions = predictor.predict(predictor.preprocess(picture)[None])
        outputs.append(predictions)
        predictor(picture)  # the rest of the way takes what comes
    for wanted, found in zip(outputs[0][:4], outputs[1][:4], strict=True):
        assert found.dtype == torch.bfloat16
        assert float((wanted - found.float()).abs().mean() / wanted.abs().mean()) < 0.1


@pytest.mark.parametrize("nms", ["fast", "cross_class"])
@pytest.mark.parametrize("name", ["yolact_resnet50", "yolact_r50", "yolact_plus_resnet50", "yolact_lite"])
def test_nothing_waits_on_the_way_to_candidates(name, nms, monkeypatch):
    """Tensors without values: whoever asks for one, or for a shape that depends on one, is an error.

    So the way can be captured in a CUDA graph.
    """
    config = get_config(name, max_size=96)
    predictor = Predictor(Yolact(config), "cpu", nms=nms)
    monkeypatch.setattr(predictor, "device", torch.device("meta"))  # anything but a CPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        boxes, scores, labels, coefficients, prototypes = predictor._locate(
            torch.zeros(2, 60, 80, 3, dtype=torch.uint8)
        )
    assert boxes.shape[0] == scores.shape[0] == 2
    assert boxes.shape[1] <= 100
    assert labels.shape == scores.shape == boxes.shape[:2]
    assert coefficients.shape == (*scores.shape, 32)
    assert prototypes.shape == (2, 24, 24, 32)


def test_the_test_above_notices_who_waits():
    predictor = Predictor(Yolact(get_config("yolact_lite", max_size=96)), "cpu")
    with pytest.raises(Exception, match=r"data|value|nonzero|dynamic"), FakeTensorMode(allow_non_fake_inputs=True):
        predictor._locate(torch.zeros(1, 60, 80, 3, dtype=torch.uint8))  # a CPU's way looks at values


def test_pictures_on_the_device_are_resized_as_on_the_host(weights):
    predictor = Predictor(Yolact.from_weights(weights), "cpu")
    image = photo(120, 310)
    host, device = (
        predictor.preprocess(image),
        predictor.normalise(torch.from_numpy(image[..., ::-1].transpose(2, 0, 1)[None].copy()))[0],
    )
    levels = (host - device).abs() * predictor.std
    assert float(levels.max()) < 1.01
    assert float(levels.mean()) < 0.2


@pytest.mark.slow
def test_compiled_is_the_same(weights):
    model = Yolact.from_weights(weights)
    plain, compiled = Predictor(model, "cpu", "fp32"), Predictor(model, "cpu", "fp32", compile=True)
    assert compiled.compile_seconds > 0
    pictures = [photo(90, 130), photo(200, 64, seed=1)]
    for wanted, found in zip(plain(pictures), compiled(pictures), strict=True):  # another number than it was built for
        assert wanted.labels.tolist() == found.labels.tolist()
        assert torch.allclose(wanted.boxes, found.boxes, atol=1e-2)
        assert float((wanted.masks ^ found.masks).float().mean()) < 1e-3


def test_without_a_compiler_the_reason_is_told(weights, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no working C++ compiler found\nand much more")

    monkeypatch.setattr(inference.torch, "compile", lambda *_, **__: broken)
    with pytest.raises(UserError, match=r"cannot compile the network \(no working C\+\+ compiler found\)"):
        Predictor(Yolact.from_weights(weights), "cpu", compile=True)


def test_every_configuration_can_be_prepared():
    for name in CONFIGS:
        with torch.device("meta"):
            model = Yolact(get_config(name))
        inference.fold_batch_norm(model.eval())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
def test_no_wait_before_the_results_are_asked_for(weights):
    predictor = Predictor(Yolact.from_weights(weights), "cuda")
    pictures = torch.from_numpy(np.stack([photo(90, 130)] * 2)).cuda()
    for _ in range(inference.OFTEN + 1):  # met, captured, replayed
        predictor.locate_on_device(pictures)
    assert len(predictor.graphs.graphs) == 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        predictor.locate_on_device(pictures)
        predictor._locate(pictures)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_graph_gives_what_the_steps_give(weights, precision):
    model = Yolact.from_weights(weights)
    graph, steps = Predictor(model, "cuda", precision), Predictor(model, "cuda", precision, graphs=False)
    for seed in range(inference.OFTEN + 4):
        picture = photo(90, 130, seed=seed)
        wanted, found = steps(picture), graph(picture)
        assert wanted.labels.tolist() == found.labels.tolist()
        assert torch.allclose(wanted.boxes, found.boxes, atol=0.5)
    kept = graph(photo(90, 130, seed=20))
    before = kept.boxes.clone()
    graph(photo(90, 130, seed=21))
    assert torch.equal(kept.boxes, before), "a later picture must not change earlier results"


def test_other_devices_than_a_cpu_take_the_other_way(weights, monkeypatch):
    """The way of a GPU, on this machine's processor: the same detections as the CPU's own way."""
    predictor = Predictor(Yolact.from_weights(weights), "cpu", "fp32")
    wanted = predictor([photo(90, 130), photo(90, 130, seed=1)])
    pictures = torch.from_numpy(np.stack([photo(90, 130), photo(90, 130, seed=1)]))
    monkeypatch.setattr(predictor, "device", torch.device("meta"))
    scores = predictor._locate(pictures)[1]
    for i, found in enumerate(wanted):
        assert len(found) > 0
        assert int((scores[i] > 0).sum()) == len(found)
        close = (scores[i, : len(found)] - found.scores).abs() < 0.05  # pictures differ by up to a level of 255
        assert float(close.float().mean()) > 0.9


FAULTS = """
import resource, sys, torch
from engine.devices import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
torch.ones(2**25)  # 128 MiB, written, freed: enough for half of it, however it is aligned
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc's allocator")
def test_memory_is_used_again():
    new, again = (int(run("-c", FAULTS, how)) for how in ("free", "keep"))
    assert again < 0.1 * new
