"""Convert released weights to this project's names and channel order, and identify their configuration.

Two layouts are supported: the authors' (dbolya/yolact, a bare state_dict) and that of MMDetection 2.x and 3.x
(`{"meta": ..., "state_dict": ...}`). The layout is detected from the content of the file, not from its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from config import CONFIGS, Config, canonical_name
from utils.errors import UserError, join_names
from weights.checkpoint import State, check_values

Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]
# Patterns for names in the file -> names in Yolact. An entry that matches no pattern is an error.
AUTHORS: Rules = (
    (r"backbone\.(layers\.|conv1\.|bn1\.|_preconv\.)(.+)", r"backbone.\1\2"),
    (r"proto_net\.([024])\.(.+)", r"protonet.\1.\2"),
    (r"proto_net\.8\.(.+)", r"protonet.7.\1"),  # no ReLU after upsampling here: it changes nothing
    (r"proto_net\.10\.(.+)", r"protonet.9.\1"),
    # The authors number these layers from C5 to C3; here C3 comes first.
    (r"fpn\.lat_layers\.([012])\.(.+)", lambda match: f"fpn.lateral.{2 - int(match[1])}.{match[2]}"),
    (r"fpn\.pred_layers\.([012])\.(.+)", lambda match: f"fpn.output.{2 - int(match[1])}.{match[2]}"),
    (r"fpn\.downsample_layers\.([01])\.(.+)", r"fpn.downsample.\1.\2"),
    (r"prediction_layers\.0\.upfeature\.0\.(.+)", r"head.trunk.\1"),
    (r"prediction_layers\.0\.bbox_layer\.(.+)", r"head.box.\1"),
    (r"prediction_layers\.0\.conf_layer\.(.+)", r"head.cls.\1"),
    (r"prediction_layers\.0\.mask_layer\.(.+)", r"head.coeff.\1"),
    (r"semantic_seg_conv\.(.+)", r"semantic.\1"),
    (r"maskiou_net\.maskiou_net\.(.+)", r"mask_iou.\1"),
)
# Unused entries of the authors' v1.0 code that released files still contain. The authors' loader drops them, too.
AUTHORS_OLD = re.compile(r"backbone\.layer\d|fpn\.downsample_layers\.([2-9]|\d\d)")

MMDET: Rules = (
    (r"backbone\.layer([1-4])\.(.+)", lambda match: f"backbone.layers.{int(match[1]) - 1}.{match[2]}"),
    (r"backbone\.(conv1|bn1)\.(.+)", r"backbone.\1.\2"),
    (r"neck\.lateral_convs\.([012])\.conv\.(.+)", r"fpn.lateral.\1.\2"),
    (r"neck\.fpn_convs\.([012])\.conv\.(.+)", r"fpn.output.\1.\2"),
    (r"neck\.fpn_convs\.3\.conv\.(.+)", r"fpn.downsample.0.\1"),
    (r"neck\.fpn_convs\.4\.conv\.(.+)", r"fpn.downsample.1.\1"),
    (r"bbox_head\.head_convs\.0\.conv\.(.+)", r"head.trunk.\1"),
    (r"bbox_head\.conv_reg\.(.+)", r"head.box.\1"),
    (r"bbox_head\.conv_cls\.(.+)", r"head.cls.\1"),
    (r"bbox_head\.conv_coeff\.(.+)", r"head.coeff.\1"),
    (r"mask_head\.protonet\.([024])\.(.+)", r"protonet.\1.\2"),
    (r"mask_head\.protonet\.8\.(.+)", r"protonet.7.\1"),
    (r"mask_head\.protonet\.10\.(.+)", r"protonet.9.\1"),
    (r"(?:mask_head\.segm_branch|segm_head)\.segm_conv\.(.+)", r"semantic.\1"),
)


@dataclass
class Weights:
    """The content of a weights file, under this project's names."""

    state: State
    layout: str  # own, authors or mmdet
    config: Config
    ambiguous: tuple[str, ...] = ()  # names of the configurations that match equally well, if there are several
    training: dict[str, Any] | None = None  # the state of the run, for resuming


def is_yolact(content: dict[str, Any]) -> bool:
    """Whether the content of a file looks like YOLACT weights of any layout, and not those of a backbone alone."""
    nested = content.get("state_dict")
    mmdet = isinstance(nested, dict) and any(str(name).startswith("bbox_head") for name in nested)
    return "yolact" in content or mmdet or any(str(name).startswith("prediction_layers") for name in content)


def convert(content: dict[str, Any], source: str) -> Weights:
    """Convert the content of a file of released weights, as `read_checkpoint` returns it.

    `source` is the path of the file, whose name chooses between configurations that the state_dict does not
    distinguish. Raises UserError if the weights are incomplete, invalid, or not those of a YOLACT model.
    """
    if "state_dict" in content and isinstance(content["state_dict"], dict):
        state, layout = _rename(content["state_dict"], MMDET, None, source), "mmdet"
        if "head.box.bias" not in state:
            raise UserError(f"{source}: incomplete weights, 'bbox_head.conv_reg.bias' is missing")
        state = check_values(state, source)
        # The outputs are groups of C + 1 classes. The background is MMDetection's last class, here the first.
        anchors = state["head.box.bias"].shape[0] // 4
        for name in ("head.cls.weight", "head.cls.bias"):
            if name in state:
                state[name] = state[name].unflatten(0, (anchors, -1)).roll(1, dims=1).flatten(0, 1)
        meta = content.get("meta") or {}
        dataset = meta.get("dataset_meta") or {}  # MMDetection 3.x; 2.x has CLASSES
        classes = meta.get("CLASSES") or dataset.get("classes") or dataset.get("CLASSES")
        names = tuple(map(str, classes)) if classes else None
    elif any(str(name).startswith("prediction_layers.") for name in content):
        state, layout, names = check_values(_rename(content, AUTHORS, AUTHORS_OLD, source), source), "authors", None
    else:
        raise UserError(f"{source}: not the weights of a YOLACT model of the authors, MMDetection or this project")
    config, ambiguous = _recognise(state, layout, names, source)
    return Weights(state, layout, config, ambiguous)


def _rename(content: dict[str, Any], rules: Rules, old: re.Pattern | None, source: str) -> State:
    state: State = {}
    unknown = []
    for name, value in content.items():
        if old is not None and old.match(str(name)):
            continue
        for pattern, replacement in rules:
            if isinstance(value, Tensor) and re.fullmatch(pattern, str(name)):
                state[re.sub(pattern, replacement, name)] = value
                break
        else:
            unknown.append(str(name))
    if unknown:
        raise UserError(f"{source}: {len(unknown)} entries do not belong to a YOLACT model: {join_names(unknown)}")
    return state


def visible_in_state_dict(config: Config) -> dict[str, Any]:
    """Return the properties of a configuration that a state_dict reveals, except the number of classes."""
    keys = ("backbone", "dcn_interval", "mask_iou", "p6_from_c5", "anchors_per_position")
    return {key: getattr(config.model, key) for key in keys}


def _recognise(state: State, layout: str, names: tuple[str, ...] | None, source: str) -> tuple[Config, tuple[str, ...]]:
    """Find the configuration that matches a state_dict; also return the names of all that match if it is ambiguous."""
    # The second block of C3 is deformable with an interval of 1, but not with 3, the only other released interval.
    second = "backbone.layers.1.1.conv2.conv_offset_mask.weight" in state
    deep = "backbone.layers.2.22.conv1.weight" in state  # C4 has 23 blocks in ResNet-101 and 6 in ResNet-50
    try:
        num_classes = state["semantic.bias"].shape[0]
        shown = {
            "backbone": "darknet53" if "backbone._preconv.0.weight" in state else f"resnet{101 if deep else 50}",
            "dcn_interval": (1 if second else 3) if any("conv_offset_mask" in name for name in state) else 0,
            "mask_iou": any(name.startswith("mask_iou.") for name in state),
            "p6_from_c5": layout == "mmdet",
            "anchors_per_position": state["head.box.bias"].shape[0] // 4,
        }
    except KeyError as error:
        raise UserError(f"{source}: incomplete weights, {error.args[0]!r} is missing") from None
    fitting = [config for config in CONFIGS.values() if visible_in_state_dict(config) == shown]
    # A bare state_dict has no class names. 80 classes are assumed to be COCO's. 20 classes may be custom data, so
    # Pascal's names and anchors are used only if the name of the file is that of Pascal's configuration.
    hint = canonical_name(re.split(r"[/\\]", source)[-1])
    coco = [config for config in fitting if config.num_classes == 80]
    named = [config for config in fitting if config.name == hint and config.num_classes in (80, num_classes)]
    if not coco:
        raise UserError(f"{source}: these YOLACT weights match no known configuration ({shown})")
    config = (named or coco)[0]
    # A state_dict does not reveal the input size, or which of several data sets with this number of classes was used.
    choices = [c for c in fitting if c.num_classes == num_classes or (c.num_classes == 80 and num_classes != 80)]
    open_questions = len({c.model.max_size for c in choices}) > 1 or len({c.class_names for c in choices}) > 1
    ids = tuple(range(1, num_classes + 1))
    if names is None or len(names) != num_classes:
        names = config.class_names if config.num_classes == num_classes else tuple(f"class_{i}" for i in ids)
    if names != config.class_names:
        config = replace(config, class_names=names, category_ids=ids)
    return config, () if named or not open_questions else tuple(c.name for c in choices)
