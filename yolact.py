"""YOLACT: real-time instance segmentation (Bolya et al., ICCV 2019; YOLACT++, TPAMI 2020), the model in one file.

    model = Yolact(get_config("yolact_resnet50"))                   # random weights
    model = load_model("yolact_resnet50_54_800000.pth")             # from weights import load_model

A backbone and a feature pyramid feed two parallel branches. `ProtoNet` computes prototype masks for the whole image.
`PredictionHead` predicts a box, class scores and mask coefficients for each anchor; a mask is the combination of the
prototypes with these coefficients. `layers.detect` and `layers.masks` convert the raw outputs to detections.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import find_backbone
from config import Config
from layers.anchors import make_anchors
from layers.structures import Predictions

__all__ = ["FPN", "MaskIoUNet", "PredictionHead", "Predictions", "ProtoNet", "Yolact"]


class FPN(nn.Module):
    """Feature pyramid network (Lin et al. 2017) from C3, C4, C5 to P3..P7, with bilinear upsampling."""

    def __init__(self, in_channels: tuple[int, int, int], channels: int, relu: bool, p6_from_c5: bool):
        super().__init__()
        self.relu = relu
        self.p6_from_c5 = p6_from_c5
        self.lateral = nn.ModuleList(nn.Conv2d(n, channels, 1) for n in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        p6_in = in_channels[-1] if p6_from_c5 else channels
        self.downsample = nn.ModuleList(
            (nn.Conv2d(p6_in, channels, 3, stride=2, padding=1), nn.Conv2d(channels, channels, 3, stride=2, padding=1))
        )

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        """C3, C4, C5 [B, in_channels[i], h, w] at strides 8, 16, 32 -> P3..P7 [B, channels, h, w] at strides 8..128."""
        laterals = [conv(x) for conv, x in zip(self.lateral, features, strict=True)]
        # Top-down pathway. Upsample to the size of the finer map, not by a factor of 2: odd sizes were rounded up.
        for i in (1, 0):
            above = F.interpolate(laterals[i + 1], laterals[i].shape[2:], mode="bilinear", align_corners=False)
            laterals[i] = laterals[i] + above
        outputs = [conv(x) for conv, x in zip(self.output, laterals, strict=True)]
        if self.relu:
            outputs = [F.relu(x) for x in outputs]
        # P6 is computed from C5 in MMDetection and from P5 in the authors' code.
        outputs.append(self.downsample[0](features[-1] if self.p6_from_c5 else outputs[-1]))
        outputs.append(self.downsample[1](outputs[-1]))
        return outputs


class ProtoNet(nn.Sequential):
    """P3 [B, in_channels, h, w] -> non-negative prototypes [B, K, 2h, 2w] (paper, section 3.1, figure 3)."""

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
    """Predict boxes, classes and mask coefficients of one pyramid level (paper, sections 3.2 and 4, figure 4).

    All levels share its weights.
    """

    def __init__(self, channels: int, num_anchors: int, num_classes: int, num_prototypes: int):
        super().__init__()
        self.num_classes = num_classes
        self.num_prototypes = num_prototypes
        self.trunk = nn.Conv2d(channels, channels, 3, padding=1)
        self.box = nn.Conv2d(channels, num_anchors * 4, 3, padding=1)
        self.cls = nn.Conv2d(channels, num_anchors * (num_classes + 1), 3, padding=1)
        self.coeff = nn.Conv2d(channels, num_anchors * num_prototypes, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, channels, h, w] -> offsets [B, A, 4], logits [B, A, C + 1] and coefficients [B, A, K] in -1..1.

        A is h * w * num_anchors, ordered by row, column and anchor, as in `make_anchors`.
        """
        x = F.relu(self.trunk(x))
        batch = x.shape[0]
        box = self.box(x).permute(0, 2, 3, 1).reshape(batch, -1, 4)
        cls = self.cls(x).permute(0, 2, 3, 1).reshape(batch, -1, self.num_classes + 1)
        coeff = self.coeff(x).permute(0, 2, 3, 1).reshape(batch, -1, self.num_prototypes)
        return box, cls, coeff.tanh()


class MaskIoUNet(nn.Sequential):
    """The fast mask re-scoring network of YOLACT++ (section 6.1): predicts the IoU of each mask with its object."""

    keep_float32: ClassVar[bool] = True  # `inference.optimize` does not cast this module to a lower precision

    def __init__(self, num_classes: int):
        channels = (1, 8, 16, 32, 64, 128)
        layers: list[nn.Module] = []
        for in_channels, out_channels in itertools.pairwise(channels):
            layers += [nn.Conv2d(in_channels, out_channels, 3, stride=2), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Conv2d(channels[-1], num_classes, 1), nn.ReLU(inplace=True))

    def forward(self, masks: Tensor) -> Tensor:
        """Soft masks [N, h, w], cropped to their boxes -> predicted IoUs [N, C], one for each possible class."""
        height, width = masks.shape[1:]
        # Five unpadded 3x3 convolutions of stride 2 reduce 63 pixels to 1. Smaller masks are padded with zeros.
        short = (0, max(0, 63 - width), 0, max(0, 63 - height))
        masks = F.pad(masks, short) if any(short) else masks
        return super().forward(masks[:, None]).amax(dim=(2, 3))


class Yolact(nn.Module):
    """The complete network of a configuration, with random weights.

    Args:
        config: the configuration, kept as the attribute `config`. Its model and training sections are used.

    Raises:
        UserError: if the backbone is unknown or does not support `dcn_interval`.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        model, num_classes = config.model, config.num_classes
        channels, num_anchors = model.fpn_channels, model.anchors_per_position
        backbone = find_backbone(model.backbone, model.dcn_interval)
        self.backbone = backbone(model.dcn_interval) if backbone.deformable else backbone()
        self.fpn = FPN(self.backbone.channels, channels, model.fpn_relu, model.p6_from_c5)
        self.protonet = ProtoNet(channels, model.proto_channels, model.num_prototypes)
        self.head = PredictionHead(channels, num_anchors, num_classes, model.num_prototypes)
        # Used by the loss only: a 1x1 convolution on P3 that predicts the classes of every pixel (paper, section 5).
        self.semantic = nn.Conv2d(channels, num_classes, 1)
        self.mask_iou = MaskIoUNet(num_classes) if model.mask_iou else None
        for module in (self.fpn, self.protonet, self.head, self.semantic, self.mask_iou):
            if module is not None:
                _init_convolutions(module)

    def train(self, mode: bool = True) -> Yolact:
        """Set training or evaluation mode. Layers that the configuration freezes stay in evaluation mode."""
        super().train(mode)
        frozen = self.backbone.stages()[: self.config.training.freeze_stages]
        if self.config.training.freeze_bn:
            frozen += [module for module in self.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in frozen:
            module.eval().requires_grad_(False)
        return self

    def forward(self, images: Tensor) -> Predictions:
        """Normalised RGB [B, 3, H, W], with H and W of at least 32 -> Predictions; `semantic` in training mode only."""
        levels = self.fpn(self.backbone(images))
        prototypes = self.protonet(levels[0]).permute(0, 2, 3, 1)
        boxes, logits, coefficients = (torch.cat(x, dim=1) for x in zip(*map(self.head, levels), strict=True))
        semantic = self.semantic(levels[0]) if self.training else None
        return Predictions(boxes, logits, coefficients, prototypes, semantic)

    def anchors(self, height: int, width: int) -> Tensor:
        """[A, 4] anchors (cx, cy, w, h) relative to an input of `height` x `width` pixels, on the model's device."""
        return make_anchors(height, width, self.config.model, self.semantic.weight.device)


def _init_convolutions(module: nn.Module) -> None:
    """Initialise convolutions as in the released code: Xavier-uniform weights and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
