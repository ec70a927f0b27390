"""Run the original for compare.py: import its modules from a clone and call them as its eval.py and train.py do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Original:
    """The original's pipeline from an image to masks, for one image."""

    def __init__(self, net: Any, transform: Any, postprocess: Any, image: np.ndarray, threshold: float, device: str):
        self.net, self.transform, self.postprocess, self.image = net, transform, postprocess, image
        self.threshold, self.device = threshold, device
        self.batch = self.upload()

    @torch.no_grad()
    def upload(self) -> torch.Tensor:
        return self.transform(torch.from_numpy(self.image).to(self.device).float()[None])

    @torch.no_grad()
    def network(self, count: int = 1) -> Any:
        return self.net(self.batch.expand(count, -1, -1, -1))

    @torch.no_grad()
    def image_to_masks(self, count: int = 1) -> list[torch.Tensor]:
        height, width = self.image.shape[:2]
        found = self.net(torch.cat([self.upload() for _ in range(count)]))
        results: list[torch.Tensor] = []
        for i in range(count):
            results += self.postprocess(found, width, height, batch_idx=i, score_threshold=self.threshold)
        return [x.cpu() for x in results]

    def answer(self) -> dict[str, Any]:
        torch.backends.cudnn.allow_tf32 = False
        labels, scores, _, masks = self.image_to_masks()
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
        return {"labels": labels.tolist(), "scores": scores.tolist(), "areas": masks.sum(dim=(1, 2)).tolist()}


def load(folder: Path, config: str, device: str, weights: Path, image: np.ndarray, threshold: float) -> Original:
    """Return the original with random weights that yield detections, and save these weights to `weights`."""
    net = _network(folder, config, device)
    from layers.output_utils import postprocess
    from utils.augmentations import FastBaseTransform

    net.eval()
    net.detect.use_fast_nms, net.detect.use_cross_class_nms = True, False
    original = Original(net, FastBaseTransform(), postprocess, image, threshold, device)
    _spread_scores(net, original, threshold)
    torch.save(net.state_dict(), weights)
    return original


def _network(folder: Path, config: str, device: str) -> Any:
    """Return the original's network with random weights. Afterwards, imports resolve to the original's modules."""
    if device == "cpu":  # the original requires a GPU at import
        torch.cuda.current_device = lambda: 0
        torch.Tensor.cuda = lambda self, *_, **__: self
    else:
        torch.set_default_tensor_type("torch.cuda.FloatTensor")
    os.chdir(folder)
    sys.path.insert(0, os.getcwd())
    from data import cfg, set_cfg
    from utils import timer
    from yolact import Yolact

    set_cfg(f"{config}_config")
    cfg.mask_proto_debug = False  # eval.py sets it
    timer.disable_all()
    torch.manual_seed(0)
    return Yolact().to(device)


def _spread_scores(net: Any, original: Original, threshold: float, count: int = 40) -> None:
    """Spread the scores of random weights, and raise the background until `count` anchors pass the threshold."""
    conf = net.prediction_layers[0].conf_layer
    detect, net.detect = net.detect, lambda outputs, _: outputs["conf"][0]
    with torch.no_grad():
        conf.weight *= 3 / original.network().log().std()
        scores = original.network()
        low, high = -20.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            background = scores[:, 0] * np.exp(middle)
            best = scores[:, 1:].amax(dim=1) / (background + scores[:, 1:].sum(dim=1))
            low, high = (middle, high) if (best > threshold).sum() > count else (low, middle)
        conf.bias[:: scores.shape[1]] += high + 0.002  # the background logits, with a margin
    net.detect = detect


def training_step(
    folder: Path, config: str, device: str, images: list[tuple[np.ndarray, np.ndarray]]
) -> Callable[[], Any]:
    """Return an SGD step as in the original's train.py. `images` has boxes [n, 5] and masks [n, h, w] per image."""
    net = _network(folder, config, device)
    from layers.modules import MultiBoxLoss

    from data import cfg

    criterion = MultiBoxLoss(
        cfg.num_classes, cfg.positive_iou_threshold, cfg.negative_iou_threshold, cfg.ohem_negpos_ratio
    )
    targets, masks = ([torch.from_numpy(x).to(device) for x in part] for part in zip(*images, strict=True))
    images = torch.randn(len(images), 3, cfg.max_size, cfg.max_size, device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=cfg.momentum, weight_decay=cfg.decay)
    net.train()

    def step() -> float:
        optimizer.zero_grad()
        losses = criterion(net, net(images), targets, masks, [0] * len(images))
        loss = sum(losses.values())
        loss.backward()
        if torch.isfinite(loss).item():
            optimizer.step()
        return loss.item()

    return step
