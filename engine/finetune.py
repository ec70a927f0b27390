"""Where training starts: nothing, an ImageNet backbone, or the weights of a YOLACT for other classes."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.checkpoint import init_backbone, read_checkpoint, read_weights
from engine.convert import shorten
from engine.released import RELEASED, find_weights
from yolact import Yolact

# The layers with outputs for each class, and whether the background is one of them.
CLASS_LAYERS = {"head.cls": True, "semantic": False, "mask_iou.10": False}


def init_model(model: Yolact, source: str | Path) -> None:
    """Start `model` from "none" (random weights), "imagenet", a backbone's file, or the weights of a YOLACT.

    Of a YOLACT's weights all that fits is loaded, the outputs of classes with the same name are copied, and the rest
    is listed.
    """
    if str(source) == "none":
        return
    if str(source) == "imagenet":
        init_backbone(model)
        print(f"starting from the ImageNet weights of {model.config.backbone}")
        return
    path = find_weights(source) if str(source) in RELEASED or not Path(source).exists() else Path(source)
    content = read_checkpoint(path)
    names = [str(name) for name in content]
    if "yolact" in content or "state_dict" in content or any(n.startswith("prediction_layers") for n in names):
        print(_init_from_yolact(model, path))
    else:
        init_backbone(model, path)
        print(f"starting from the backbone in {path}")


def _init_from_yolact(model: Yolact, path: Path) -> str:
    """Load what fits and say what did not."""
    weights = read_weights(path)
    own = model.state_dict()
    common = [name for name in model.config.class_names if name in weights.config.class_names]
    fresh = []
    with torch.no_grad():
        for name, value in own.items():
            layer = name.rpartition(".")[0]
            theirs = weights.state.get(name)
            if layer in CLASS_LAYERS and weights.config.class_names != model.config.class_names:
                if theirs is None or not _copy_classes(
                    value, theirs, model, weights.config, common, CLASS_LAYERS[layer]
                ):
                    fresh.append(name)
            elif theirs is not None and theirs.shape == value.shape:
                value.copy_(theirs)
            elif not name.endswith("num_batches_tracked"):
                fresh.append(name)
    model.load_state_dict(own)
    lines = [f"starting from {path} ({weights.config.name}, {weights.config.num_classes} classes)"]
    if weights.config.class_names != model.config.class_names:
        new = [name for name in model.config.class_names if name not in common]
        lines.append(f"  outputs copied for classes of the same name: {shorten(common, 12) or 'none'}")
        lines.append(f"  classes that start anew: {shorten(new, 12) or 'none'}")
    if fresh:
        lines.append(f"  {len(fresh)} entries do not fit and start anew: {shorten(fresh)}")
    return "\n".join(lines)


def _copy_classes(
    value: torch.Tensor, theirs: torch.Tensor, model: Yolact, other: object, common: list[str], background: bool
) -> bool:
    """Copy the rows of `common` classes, and of the background, for every anchor; False if the layers differ."""
    mine, their_names = model.config.class_names, other.class_names
    ours_per_anchor, theirs_per_anchor = len(mine) + background, len(their_names) + background
    anchors = value.shape[0] // ours_per_anchor
    if theirs.shape[0] != anchors * theirs_per_anchor or theirs.shape[1:] != value.shape[1:]:
        return False
    target = value.view(anchors, ours_per_anchor, *value.shape[1:])
    source = theirs.view(anchors, theirs_per_anchor, *theirs.shape[1:])
    if background:
        target[:, 0] = source[:, 0]
    for name in common:
        target[:, mine.index(name) + background] = source[:, their_names.index(name) + background]
    return True
