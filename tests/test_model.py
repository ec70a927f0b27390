from __future__ import annotations

import pytest
import torch

from backbone import BACKBONES, DepthwiseConv
from config import get_config
from yolact import Yolact

# Millions of parameters and anchors at the default size, as published.
PUBLISHED = {
    "yolact_resnet50": (31.165, 19248),
    "yolact_base": (50.157, 19248),
    "yolact_darknet53": (47.783, 19248),
    "yolact_plus_base": (None, 57744),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_anchors_as_published(name):
    model = Yolact(get_config(name))
    millions, anchors = PUBLISHED[name]
    if millions is not None:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    assert len(model.anchors(550, 550)) == anchors


def test_depthwise_convolutions_train_in_float32_on_the_cpu():
    """The gradient under bfloat16 autocast is that of float32, except for the rounding of the input and the output."""
    conv = DepthwiseConv(8, 5, 2)
    x = torch.randn(2, 8, 15, 15).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
        with torch.no_grad():
            assert conv(x).dtype == out.dtype == torch.bfloat16
    exact = torch.nn.functional.conv2d(x.float(), conv.weight, stride=2, padding=2, groups=8)
    weights = torch.randn_like(exact).bfloat16()  # a gradient that bfloat16 represents exactly
    found = torch.autograd.grad((out * weights).float().sum(), conv.weight)[0]
    assert torch.equal(out, exact.bfloat16())
    assert torch.allclose(found, torch.autograd.grad((exact * weights.float()).sum(), conv.weight)[0], rtol=1e-5)


def test_lite_is_small():
    from torch.utils.flop_counter import FlopCounterMode

    config = get_config("yolact_lite", max_size=288)
    model = Yolact(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, config.model.max_size, config.model.max_size))
    assert counter.get_total_flops() <= 10e9
    assert sum(p.numel() for p in model.parameters()) <= 8e6


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("size", [(64, 64), (65, 130), (32, 97)])
def test_any_size(backbone, size):
    config = get_config("yolact_base", backbone=backbone, fpn_channels=16, proto_channels=16)
    model = Yolact(config).train()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    anchors = len(model.anchors(*size))
    assert out.boxes.shape == (2, anchors, 4)
    assert out.logits.shape == (2, anchors, 81)
    assert out.coefficients.shape == (2, anchors, 32)
    height, width = -(-size[0] // 8), -(-size[1] // 8)
    assert out.prototypes.shape == (2, 2 * height, 2 * width, 32)
    assert out.semantic.shape == (2, 80, height, width)
    assert model.eval()(torch.randn(1, 3, *size)).semantic is None


def test_deformable_layers_are_where_they_were_published():
    def deformable(name):
        return [n for n, _ in Yolact(get_config(name)).named_modules() if n.endswith("conv_offset_mask")]

    assert len(deformable("yolact_plus_resnet50")) == 13  # every block of C3 to C5
    assert len(deformable("yolact_plus_base")) == 11  # every third


def test_deformable_convolution_starts_as_a_plain_one():
    from backbone import DeformConv2d

    layer = DeformConv2d(4, 6, stride=2)
    x = torch.randn(2, 4, 9, 11)
    plain = torch.nn.functional.conv2d(x, layer.weight * 0.5, stride=2, padding=1)
    assert torch.allclose(layer(x), plain, atol=1e-5)  # a sigmoid of zero halves each tap, and the bias is zero
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(layer(x.bfloat16()).float(), plain, atol=0.1)


def test_freezing():
    config = get_config("yolact_lite", freeze_stages=3, freeze_bn=True, max_size=64)
    model = Yolact(config).train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    sum(o.float().mean() for o in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert model.backbone.stem[0].weight.grad is None
    assert model.backbone.blocks[1].project[0].weight.grad is None
    assert model.backbone.blocks[2].project[0].weight.grad is not None
    assert not model.backbone.blocks[9].project[1].training


@pytest.mark.parametrize("name", ["yolact_plus_resnet50", "yolact_plus_base"])
def test_plus_trains_and_rescores(name):
    """One step with the mask-IoU term reaches the deformable offsets and the re-scoring network."""
    from layers.loss import MultiBoxLoss

    config = get_config(name, max_size=96, fpn_channels=32, proto_channels=16)
    model = Yolact(config).train()
    masks = torch.zeros(1, 24, 24)
    masks[0, 4:20, 4:20] = 1
    boxes = torch.tensor([[4 / 24, 4 / 24, 20 / 24, 20 / 24]])
    target = {"boxes": boxes, "labels": torch.tensor([3]), "masks": masks, "crowds": torch.zeros(0, 4)}
    losses = MultiBoxLoss(config.loss)(
        model(torch.randn(2, 3, 96, 96)), model.anchors(96, 96), [target] * 2, model.mask_iou
    )
    assert losses["mask_iou"] > 0
    sum(losses.values()).backward()
    assert model.backbone.layers[3][0].conv2.conv_offset_mask.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.mask_iou.parameters())
