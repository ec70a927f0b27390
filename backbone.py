"""Backbones: a picture in, the feature maps C3, C4 and C5 (strides 8, 16 and 32) out.

Every strided layer pads by half its kernel, so that a side of n pixels becomes ceil(n / 2): the sizes of all feature
maps, and with them the anchors, follow from the picture's size alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from data.errors import UserError, nearest


class DeformConv2d(nn.Conv2d):
    """A 3x3 modulated deformable convolution (DCNv2, Zhu et al. 2019), which predicts its own offsets and weights."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1)
        self.conv_offset_mask = nn.Conv2d(in_channels, 3 * 9, 3, stride=stride, padding=1)
        for parameter in (self.bias, self.conv_offset_mask.weight, self.conv_offset_mask.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']. 18 channels of offsets (y, x for each tap), then 9 of weights."""
        offset, mask = self.conv_offset_mask(x).split((18, 9), dim=1)
        with torch.autocast(x.device.type, enabled=False):  # torchvision's kernel knows no bfloat16 on a CPU
            out = deform_conv2d(
                x.float(),
                offset.float(),
                self.weight,
                self.bias,
                self.stride,
                self.padding,
                mask=mask.float().sigmoid(),
            )
        return out.to(x.dtype)


class Bottleneck(nn.Module):
    """The ResNet block with the stride in its 3x3 convolution (He et al. 2016, torchvision's variant)."""

    def __init__(self, in_channels: int, channels: int, stride: int, deformable: bool):
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        if deformable:
            self.conv2: nn.Module = DeformConv2d(channels, channels, stride)
        else:
            self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out + shortcut, inplace=True)


class ResNet(nn.Module):
    """ResNet-50 or -101; from C3 on, every `dcn_interval`-th block may be deformable (YOLACT++, section 6.2)."""

    channels = (512, 1024, 2048)

    def __init__(self, blocks: tuple[int, int, int, int], dcn_interval: int = 0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layers = nn.ModuleList()
        in_channels = 64
        for stage, count in enumerate(blocks):
            channels = 64 * 2**stage
            layer = []
            for i in range(count):
                deformable = stage > 0 and dcn_interval > 0 and i % dcn_interval == 0
                # The first of a stage strides, but C2 keeps the size that the max pooling left.
                layer.append(Bottleneck(in_channels, channels, 2 if i == 0 and stage > 0 else 1, deformable))
                in_channels = 4 * channels
            self.layers.append(nn.Sequential(*layer))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        c2, c3, c4, c5 = self.layers
        c3_out = c3(c2(x))
        c4_out = c4(c3_out)
        return c3_out, c4_out, c5(c4_out)


def _darknet_conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.1, inplace=True))


class DarknetBlock(nn.Module):
    """1x1 down to half the channels, 3x3 back up, and a shortcut (Redmon and Farhadi 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = _darknet_conv(channels, channels // 2, 1)
        self.conv2 = _darknet_conv(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + x


class Darknet53(nn.Module):
    """The backbone of YOLOv3."""

    channels = (256, 512, 1024)

    def __init__(self) -> None:
        super().__init__()
        self._preconv = _darknet_conv(3, 32, 3)
        self.layers = nn.ModuleList()
        for stage, count in enumerate((1, 2, 8, 8, 4)):
            channels = 64 * 2**stage
            blocks = [DarknetBlock(channels) for _ in range(count)]
            self.layers.append(nn.Sequential(_darknet_conv(channels // 2, channels, 3, stride=2), *blocks))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self._preconv(x)
        c1, c2, c3, c4, c5 = self.layers
        c3_out = c3(c2(c1(x)))
        c4_out = c4(c3_out)
        return c3_out, c4_out, c5(c4_out)


class InvertedResidual(nn.Module):
    """MobileNetV2's block as EfficientNet-Lite uses it: expand, depthwise, project; ReLU6, no squeeze-and-excite."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expand: int):
        super().__init__()
        channels = in_channels * expand
        norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
        self.expand = None
        if expand != 1:
            self.expand = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, bias=False), norm(channels), nn.ReLU6(inplace=True)
            )
        self.depthwise = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False),
            norm(channels),
            nn.ReLU6(inplace=True),
        )
        self.project = nn.Sequential(nn.Conv2d(channels, out_channels, 1, bias=False), norm(out_channels))
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else self.expand(x)
        out = self.project(self.depthwise(out))
        return x + out if self.shortcut else out


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its classifier (Tan and Le 2019; the Lite variants, 2020).

    Unlike the TensorFlow original it pads symmetrically: the features move by less than one of their pixels, which
    fine-tuning does not notice, and any picture size works without a special case.
    """

    channels = (40, 112, 320)
    # channels, blocks, kernel, stride, expansion
    stages = (
        (16, 1, 3, 1, 1),
        (24, 2, 3, 2, 6),
        (40, 2, 5, 2, 6),
        (80, 3, 3, 2, 6),
        (112, 3, 5, 1, 6),
        (192, 4, 5, 2, 6),
        (320, 1, 3, 1, 6),
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32, eps=1e-3, momentum=0.01),
            nn.ReLU6(inplace=True),
        )
        self.blocks = nn.ModuleList()
        in_channels = 32
        for out_channels, count, kernel, stride, expand in self.stages:
            for i in range(count):
                block = InvertedResidual(in_channels, out_channels, kernel, stride if i == 0 else 1, expand)
                self.blocks.append(block)
                in_channels = out_channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (4, 10, 15):  # the last blocks at strides 8, 16 and 32
                features.append(x)
        c3, c4, c5 = features
        return c3, c4, c5


def _resnet(*blocks: int) -> Callable[..., nn.Module]:
    return lambda dcn_interval=0: ResNet(blocks, dcn_interval)


BACKBONES = {
    "resnet50": _resnet(3, 4, 6, 3),
    "resnet101": _resnet(3, 4, 23, 3),
    "darknet53": lambda dcn_interval=0: Darknet53(),
    "efficientnet_lite0": lambda dcn_interval=0: EfficientNetLite0(),
}


def build_backbone(name: str, dcn_interval: int = 0) -> nn.Module:
    """The backbone called `name`, a key of BACKBONES, with random weights. Its `channels` are those of C3, C4, C5."""
    if name not in BACKBONES:
        raise UserError(f"unknown backbone {name!r}{nearest(name, BACKBONES)}")
    return BACKBONES[name](dcn_interval)


def freeze_batch_norm(module: nn.Module) -> None:
    """Make every batch norm in `module` keep its statistics and its scale; call it again after `.train()`."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
            layer.requires_grad_(False)


def freeze_early(backbone: nn.Module, count: int) -> None:
    """Make the stem and the first `count` - 1 stages (EfficientNet: blocks) keep their weights and statistics."""
    stages = getattr(backbone, "layers", None) or backbone.blocks
    stem = [child for child in backbone.children() if child is not stages]
    for module in [*stem, *stages[: count - 1]] if count > 0 else []:
        module.eval()
        module.requires_grad_(False)


def init_conv(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, as the released code starts everything but the backbone."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
