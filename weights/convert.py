"""Released weights -> our names and order, and the configuration that they belong to.

Two foreign layouts are known: the authors' (dbolya/yolact: a bare state_dict) and MMDetection's 2.x and 3.x
(`{"meta": ..., "state_dict": ...}`). The content of the file decides, not its name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from config import CONFIGS, Config, canonical_name
from utils.errors import UserError, shorten
from weights.checkpoint import State, check_values

# Name in the file -> name in Yolact. Entries that match nothing are reported.
AUTHORS = (
    (r"backbone\.(layers\.|conv1\.|bn1\.|_preconv\.)(.+)", r"backbone.\1\2"),
    (r"proto_net\.([024])\.(.+)", r"protonet.\1.\2"),
    (r"proto_net\.8\.(.+)", r"protonet.7.\1"),  # their ReLU after the upsampling changes nothing and is left out here
    (r"proto_net\.10\.(.+)", r"protonet.9.\1"),
    (r"fpn\.lat_layers\.0\.(.+)", r"fpn.lateral.2.\1"),
    (r"fpn\.lat_layers\.1\.(.+)", r"fpn.lateral.1.\1"),
    (r"fpn\.lat_layers\.2\.(.+)", r"fpn.lateral.0.\1"),
    (r"fpn\.pred_layers\.0\.(.+)", r"fpn.output.2.\1"),
    (r"fpn\.pred_layers\.1\.(.+)", r"fpn.output.1.\1"),
    (r"fpn\.pred_layers\.2\.(.+)", r"fpn.output.0.\1"),
    (r"fpn\.downsample_layers\.([01])\.(.+)", r"fpn.downsample.\1.\2"),
    (r"prediction_layers\.0\.upfeature\.0\.(.+)", r"head.trunk.\1"),
    (r"prediction_layers\.0\.bbox_layer\.(.+)", r"head.box.\1"),
    (r"prediction_layers\.0\.conf_layer\.(.+)", r"head.cls.\1"),
    (r"prediction_layers\.0\.mask_layer\.(.+)", r"head.coeff.\1"),
    (r"semantic_seg_conv\.(.+)", r"semantic.\1"),
    (r"maskiou_net\.maskiou_net\.(.+)", r"mask_iou.\1"),
)
# Left behind by the authors' first versions in files that they released later.
AUTHORS_OLD = re.compile(r"backbone\.layer\d|fpn\.downsample_layers\.([2-9]|\d\d)")

MMDET = (
    (r"backbone\.layer1\.(.+)", r"backbone.layers.0.\1"),
    (r"backbone\.layer2\.(.+)", r"backbone.layers.1.\1"),
    (r"backbone\.layer3\.(.+)", r"backbone.layers.2.\1"),
    (r"backbone\.layer4\.(.+)", r"backbone.layers.3.\1"),
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
    """What a file holds, in our names."""

    state: State
    layout: str  # own, authors or mmdet
    config: Config
    ambiguous: tuple[str, ...] = ()  # configurations that the content fits equally well


def convert(content: dict[str, Any], source: str) -> Weights:
    """Convert what `torch.load` returned.

    Args:
        content: the file's content.
        source: the file's path. It names the file in errors, and decides between configurations that no entry of a
            state_dict distinguishes.

    Raises:
        UserError: if it is not a YOLACT, or incomplete.
    """
    if "state_dict" in content and isinstance(content["state_dict"], dict):
        state, layout = _rename(content["state_dict"], MMDET, None, source), "mmdet"
        if "head.box.bias" not in state:
            raise UserError(f"{source}: incomplete weights, 'bbox_head.conv_reg.bias' is missing")
        state = check_values(state, source)
        state = {name: _background_first(name, value, state) for name, value in state.items()}
        names = _names_from_meta(content.get("meta") or {})
    elif any(str(name).startswith("prediction_layers.") for name in content):
        state, layout, names = check_values(_rename(content, AUTHORS, AUTHORS_OLD, source), source), "authors", None
    else:
        raise UserError(f"{source}: these are not the weights of a YOLACT (the authors', MMDetection's or ours)")
    config, ambiguous = _recognise(state, layout, names, source)
    return Weights(state, layout, config, ambiguous)


def _rename(content: dict[str, Any], rules: tuple[tuple[str, str], ...], old: re.Pattern | None, source: str) -> State:
    state: State = {}
    unknown = []
    for name, value in content.items():
        if old is not None and old.match(str(name)):
            continue
        for pattern, replacement in rules:
            if isinstance(value, Tensor) and (match := re.fullmatch(pattern, str(name))):
                state[match.expand(replacement)] = value
                break
        else:
            unknown.append(str(name))
    if unknown:
        raise UserError(f"{source}: {len(unknown)} entries are not of a YOLACT: {shorten(unknown)}")
    return state


def _background_first(name: str, value: Tensor, state: State) -> Tensor:
    """MMDetection has the background as the last class of each anchor, here it is the first."""
    if not name.startswith("head.cls."):
        return value
    num_anchors = state["head.box.bias"].shape[0] // 4
    return value.unflatten(0, (num_anchors, -1)).roll(1, dims=1).flatten(0, 1)


def _names_from_meta(meta: dict[str, Any]) -> tuple[str, ...] | None:
    """Class names as MMDetection 2.x (`CLASSES`) and 3.x (`dataset_meta`) keep them."""
    dataset = meta.get("dataset_meta") or {}
    names = meta.get("CLASSES") or dataset.get("classes") or dataset.get("CLASSES")
    return tuple(map(str, names)) if names else None


def facts(config: Config) -> dict[str, Any]:
    """Return what a state_dict shows of a configuration, beside the number of classes."""
    model = config.model
    return {
        "backbone": model.backbone,
        "dcn_interval": model.dcn_interval,
        "mask_iou": model.mask_iou,
        "p6_from_c5": model.p6_from_c5,
        "anchors per position": model.anchors_per_position,
    }


def _recognise(state: State, layout: str, names: tuple[str, ...] | None, source: str) -> tuple[Config, tuple[str, ...]]:
    """Find the configuration that fits a state_dict, and the names of others that fit as well."""
    try:
        num_classes = state["semantic.bias"].shape[0]
        shown = {
            "backbone": _backbone(state),
            "dcn_interval": _dcn_interval(state),
            "mask_iou": any(name.startswith("mask_iou.") for name in state),
            "p6_from_c5": layout == "mmdet",
            "anchors per position": state["head.box.bias"].shape[0] // 4,
        }
    except KeyError as error:
        raise UserError(f"{source}: incomplete weights, {error.args[0]!r} is missing") from None
    fitting = [config for config in CONFIGS.values() if facts(config) == shown]
    # A bare state_dict has no class names: with as many classes as COCO it is COCO's. With as many as Pascal it may be
    # somebody's own data, so Pascal's names and anchors are taken only if the file's name says so.
    hint = canonical_name(re.split(r"[/\\]", source)[-1])
    coco = [config for config in fitting if config.num_classes == 80]
    named = [config for config in fitting if config.name == hint and config.num_classes in (80, num_classes)]
    if not coco:
        raise UserError(f"{source}: a YOLACT of no known configuration ({shown})")
    config = (named or coco)[0]
    # What is left open: sizes that share their shapes, and data sets that share their number of classes.
    choices = [c for c in fitting if c.num_classes == num_classes or (c.num_classes == 80 and num_classes != 80)]
    open_questions = len({c.model.max_size for c in choices}) > 1 or len({c.class_names for c in choices}) > 1
    if names is not None and len(names) == num_classes:
        if names != config.class_names:
            config = replace(config, class_names=names, category_ids=tuple(range(1, num_classes + 1)))
    elif config.num_classes != num_classes:
        config = with_unnamed_classes(config, num_classes)
    return config, () if named or not open_questions else tuple(c.name for c in choices)


def with_unnamed_classes(config: Config, num_classes: int) -> Config:
    """Return `config` for classes whose names are not known: class_1, class_2, ..."""
    ids = tuple(range(1, num_classes + 1))
    return replace(config, class_names=tuple(f"class_{i}" for i in ids), category_ids=ids)


def _backbone(state: State) -> str:
    if "backbone._preconv.0.weight" in state:
        return "darknet53"
    return "resnet101" if "backbone.layers.2.22.conv1.weight" in state else "resnet50"


def _dcn_interval(state: State) -> int:
    offsets = [name for name in state if "conv_offset_mask.weight" in name]
    if not offsets:
        return 0
    return 1 if "backbone.layers.1.1.conv2.conv_offset_mask.weight" in state else 3
