"""YOLACT: real-time instance segmentation (Bolya et al., ICCV 2019; YOLACT++, TPAMI 2020), the model in one file.

    model = Yolact(get_config("yolact_resnet50"))
    model = Yolact.from_weights("yolact_resnet50_54_800000.pth")

A backbone and a feature pyramid feed two parallel branches: `ProtoNet` draws a few prototype masks for the whole
picture, `PredictionHead` gives each anchor a box, class scores and the coefficients that combine the prototypes into
its mask. What comes out is raw; `layers.detect` and `layers.masks` make detections of it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import build_backbone, freeze_batch_norm, freeze_early, init_conv
from data.config import Config
from layers.anchors import feature_sizes, make_anchors


class Predictions(NamedTuple):
    """The network's raw outputs for B pictures, A anchors, C classes, K prototypes."""

    boxes: Tensor  # [B, A, 4] offsets to the anchors, see layers.boxes.decode
    logits: Tensor  # [B, A, C + 1], the background first
    coefficients: Tensor  # [B, A, K], -1..1
    prototypes: Tensor  # [B, h, w, K], not negative; h, w are twice P3's
    semantic: Tensor | None  # [B, C, h, w] logits at P3's size, in training only


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017) from C3, C4, C5 to P3..P7, bilinear on the way down."""

    def __init__(self, in_channels: tuple[int, int, int], channels: int, relu: bool, p6_from_c5: bool):
        super().__init__()
        self.relu = relu
        self.p6_from_c5 = p6_from_c5
        self.lateral = nn.ModuleList(nn.Conv2d(n, channels, 1) for n in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        p6_in = in_channels[-1] if p6_from_c5 else channels
        self.downsample = nn.ModuleList(
            (
                nn.Conv2d(p6_in, channels, 3, stride=2, padding=1),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            )
        )

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        """Feature maps of strides 8, 16, 32 -> maps [B, channels, h, w] of strides 8, 16, 32, 64, 128."""
        laterals = [conv(x) for conv, x in zip(self.lateral, features, strict=True)]
        for i in (1, 0):
            above = F.interpolate(laterals[i + 1], laterals[i].shape[2:], mode="bilinear", align_corners=False)
            laterals[i] = laterals[i] + above
        outputs = [conv(x) for conv, x in zip(self.output, laterals, strict=True)]
        if self.relu:
            outputs = [F.relu(x) for x in outputs]
        outputs.append(self.downsample[0](features[-1] if self.p6_from_c5 else outputs[-1]))
        outputs.append(self.downsample[1](outputs[-1]))
        return outputs


class ProtoNet(nn.Sequential):
    """P3 [B, in_channels, h, w] -> prototypes [B, K, 2h, 2w], not negative (paper, figure 3)."""

    def __init__(self, in_channels: int, channels: int, num_prototypes: int):
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, num_prototypes, 1),
            nn.ReLU(inplace=True),
        )


class PredictionHead(nn.Module):
    """Boxes, classes and coefficients from one level of the pyramid; all levels share it (paper, figure 4)."""

    def __init__(self, channels: int, num_anchors: int, num_classes: int, num_prototypes: int):
        super().__init__()
        self.num_classes = num_classes
        self.num_prototypes = num_prototypes
        self.trunk = nn.Conv2d(channels, channels, 3, padding=1)
        self.box = nn.Conv2d(channels, num_anchors * 4, 3, padding=1)
        self.cls = nn.Conv2d(channels, num_anchors * (num_classes + 1), 3, padding=1)
        self.coeff = nn.Conv2d(channels, num_anchors * num_prototypes, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, channels, h, w] -> offsets [B, a, 4], logits [B, a, C + 1], coefficients [B, a, K], a anchors."""
        x = F.relu(self.trunk(x))
        batch = x.shape[0]
        box = self.box(x).permute(0, 2, 3, 1).reshape(batch, -1, 4)
        cls = self.cls(x).permute(0, 2, 3, 1).reshape(batch, -1, self.num_classes + 1)
        coeff = self.coeff(x).permute(0, 2, 3, 1).reshape(batch, -1, self.num_prototypes)
        return box, cls, coeff.tanh()


class MaskIoUNet(nn.Sequential):
    """The fast mask re-scoring network of YOLACT++ (section 6.1): how well does a mask fit, for each class."""

    def __init__(self, num_classes: int):
        channels = (1, 8, 16, 32, 64, 128)
        layers: list[nn.Module] = []
        for in_channels, out_channels in itertools.pairwise(channels):
            layers += [nn.Conv2d(in_channels, out_channels, 3, stride=2), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Conv2d(channels[-1], num_classes, 1), nn.ReLU(inplace=True))

    def forward(self, masks: Tensor) -> Tensor:
        """Soft masks [N, h, w], cropped to their boxes -> the IoU to expect if it is of class c, [N, C]."""
        height, width = masks.shape[1:]
        short = (0, max(0, 63 - width), 0, max(0, 63 - height))  # five unpadded layers need that much
        masks = F.pad(masks, short) if any(short) else masks
        return super().forward(masks[:, None]).amax(dim=(2, 3))


class Yolact(nn.Module):
    """The whole network for a configuration, with random weights. `config` comes along as an attribute."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, config.dcn_interval)
        channels = config.fpn_channels
        num_anchors = len(config.anchor_sizes[0]) * len(config.aspect_ratios)
        self.fpn = FPN(self.backbone.channels, channels, config.fpn_relu, config.p6_from_c5)
        self.protonet = ProtoNet(channels, config.proto_channels, config.num_prototypes)
        self.head = PredictionHead(channels, num_anchors, config.num_classes, config.num_prototypes)
        self.semantic = nn.Conv2d(channels, config.num_classes, 1)
        self.mask_iou = MaskIoUNet(config.num_classes) if config.mask_iou else None
        for module in (self.fpn, self.protonet, self.head, self.semantic, self.mask_iou):
            if module is not None:
                init_conv(module)

    @classmethod
    def from_weights(cls, path_or_name: str | Path, device: torch.device | str = "cpu") -> Yolact:
        """The model that a file holds, or that a released name stands for (downloaded once), in evaluation mode.

        Raises UserError when the file is missing, broken or of an unknown format.
        """
        from engine.checkpoint import model_from_weights  # the engine imports this file

        return model_from_weights(path_or_name).to(device).eval()

    def train(self, mode: bool = True) -> Yolact:
        super().train(mode)
        if self.config.freeze_bn:
            freeze_batch_norm(self.backbone)
        freeze_early(self.backbone, self.config.freeze_stages)
        return self

    def forward(self, images: Tensor) -> Predictions:
        """[B, 3, H, W] normalised RGB, any H and W from 32 on -> Predictions."""
        levels = self.fpn(self.backbone(images))
        prototypes = self.protonet(levels[0]).permute(0, 2, 3, 1)
        boxes, logits, coefficients = (torch.cat(x, dim=1) for x in zip(*map(self.head, levels), strict=True))
        semantic = self.semantic(levels[0]) if self.training else None
        return Predictions(boxes, logits, coefficients, prototypes, semantic)

    def anchors(self, height: int, width: int) -> Tensor:
        """[A, 4] anchors (cx, cy, w, h) relative to an input of `height` x `width` pixels, on the model's device."""
        config = self.config
        device = self.semantic.weight.device
        return make_anchors(height, width, config.anchor_sizes, config.aspect_ratios, config.square_anchors, device)

    def level_sizes(self, height: int, width: int) -> list[int]:
        """How many of the anchors are of P3, P4, ... P7."""
        num_anchors = len(self.config.anchor_sizes[0]) * len(self.config.aspect_ratios)
        return [rows * columns * num_anchors for rows, columns in feature_sizes(height, width)]
