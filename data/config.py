"""Every named configuration: frozen dataclasses, passed in, never looked up.

    config = get_config("yolact_r50")                 # one of CONFIGS, or another name it is published under
    config = get_config("yolact_r50", max_size=400)   # with overrides; an unknown key is an error
    config = get_config("my.py", lr="2e-3")           # a Python file that defines `config`; text is converted

Values are those of the paper's released code (`yolact_base` ... `yolact_plus_resnet50`), of MMDetection
(`yolact_r50`, `yolact_r50_8xb8`, `yolact_r101`), and our own (`yolact_lite`).
"""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import types
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.errors import UserError, nearest

COCO_CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)
# COCO numbers its 80 classes with gaps, from 1 to 90.
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))

PASCAL_CLASSES = tuple(
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,pottedplant,"
    "sheep,sofa,train,tvmonitor".split(",")
)
PASCAL_IDS = tuple(range(1, 21))


@dataclass(frozen=True)
class Config:
    """One model and the recipe that trains it. Pixels are those of the network's input."""

    name: str

    # Classes, in the order of the labels 0..C-1, and the ids that go into COCO results.
    class_names: tuple[str, ...] = COCO_CLASSES
    category_ids: tuple[int, ...] = COCO_IDS

    # Input: every picture is resized to a square of this side unless another size is asked for.
    max_size: int = 550
    mean: tuple[float, float, float] = (123.68, 116.78, 103.94)  # RGB, of values 0..255
    std: tuple[float, float, float] = (58.40, 57.12, 57.38)
    resize_uint8: bool = False  # resize the bytes (MMDetection) or the float picture (the authors)

    # Network
    backbone: str = "resnet101"  # a key of backbone.BACKBONES
    dcn_interval: int = 0  # from C3 on, every n-th block has a deformable 3x3 convolution (YOLACT++); 0: none
    fpn_channels: int = 256
    fpn_relu: bool = True  # a ReLU after the FPN's 3x3 convolutions
    p6_from_c5: bool = False  # P6 comes from C5 (MMDetection) or from P5 (the authors)
    proto_channels: int = 256
    num_prototypes: int = 32
    mask_iou: bool = False  # the mask re-scoring network of YOLACT++

    # Anchors: sides in pixels for each of P3..P7, and width / height
    anchor_sizes: tuple[tuple[float, ...], ...] = ((24,), (48,), (96,), (192,), (384,))
    aspect_ratios: tuple[float, ...] = (1, 1 / 2, 2)
    square_anchors: bool = True  # the released weights were trained with heights equal to the widths

    # Detection
    score_threshold: float = 0.05  # an anchor counts when its best class scores more
    nms_threshold: float = 0.5
    nms_top_k: int = 200  # candidates a class
    top_k: int = 100  # detections a picture
    pre_nms_top_k: int = 0  # anchors a pyramid level, 0: all (MMDetection: 1000)
    mask_threshold: float = 0.5  # a soft mask, enlarged, counts where it is over this
    crop_after_resize: bool = False  # cut the enlarged masks at their boxes too: no pixel lies past one
    maskness: bool = False  # masks are ranked by their score times how sure they are of their pixels
    clip_boxes: bool = False  # clip boxes to the picture before NMS, and apply score_threshold once more after it

    # Schedule. lr, max_iter and lr_steps are for batch_size and scale with it.
    optimizer: str = "sgd"  # sgd or adamw
    batch_size: int = 8
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_iter: int = 800_000  # 0: `epochs` counts
    epochs: int = 0
    lr_schedule: str = "steps"  # steps or cosine
    lr_steps: tuple[int, ...] = (280_000, 600_000, 700_000, 750_000)  # in epochs when `epochs` counts
    lr_gamma: float = 0.1
    warmup_iters: int = 500
    warmup_factor: float = 0.1
    clip_grad: float = 0.0  # largest gradient norm, 0: no limit
    freeze_stages: int = 0  # the backbone's stem and so many stages (less one) or blocks keep their weights, 0: none
    freeze_bn: bool = False  # batch norm keeps the statistics and the scale that the backbone came with
    sync_bn: bool = False  # batch norm takes its statistics over the pictures of all GPUs
    ema: float = 0.0  # decay of the running average of the weights that is validated and saved, 0: none

    # Loss (paper, section 3 and the released code)
    positive_iou: float = 0.5
    negative_iou: float = 0.4
    crowd_iou: float = 0.7  # a negative anchor that lies this far inside a crowd region is left out; 1: never
    negatives_per_positive: int = 3
    box_weight: float = 1.5
    class_weight: float = 1.0
    mask_weight: float = 6.125
    semantic_weight: float = 1.0
    mask_iou_weight: float = 25.0
    masks_to_train: int = 100  # a picture; more positives than this are sampled
    mask_iou_min_area: int = 25  # in prototype pixels
    mask_supersample: int = 1  # masks are enlarged by this, and compared with ones drawn as large

    # Augmentation (SSD's, paper section 5)
    augment_photometric: bool = True
    augment_expand: float = 4.0  # the picture shrinks by up to this factor onto a mean canvas; 1: never
    augment_crop: bool = True
    crop_min_side: float = 0.3  # of the picture's width and height
    augment_mirror: bool = True
    copy_paste: float = 0.0  # the share of photos that get objects of another one pasted over them; 0: none
    min_box_size: float = 0.0  # smaller boxes are dropped in training

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


_BASE = Config(name="yolact_base")
_RESNET50 = replace(_BASE, name="yolact_resnet50", backbone="resnet50")
_PLUS_SIZES = tuple(tuple(side * 2 ** (j / 3) for j in range(3)) for side in (24, 48, 96, 192, 384))
_PLUS = {"mask_iou": True, "square_anchors": False, "anchor_sizes": _PLUS_SIZES}
_MMDET = replace(
    _RESNET50,
    name="yolact_r50",
    resize_uint8=True,
    fpn_relu=False,
    p6_from_c5=True,
    square_anchors=False,
    aspect_ratios=(2, 1, 1 / 2),
    pre_nms_top_k=1000,
    clip_boxes=True,
    crowd_iou=1.0,
    min_box_size=4.0,
    max_iter=0,
    epochs=55,
    lr_steps=(20, 42, 49, 52),
)

CONFIGS: dict[str, Config] = {
    config.name: config
    for config in (
        _MMDET,
        replace(_MMDET, name="yolact_r50_8xb8", batch_size=64, lr=8e-3, warmup_iters=1000, clip_grad=35.0),
        replace(_MMDET, name="yolact_r101", backbone="resnet101"),
        _BASE,
        _RESNET50,
        replace(_BASE, name="yolact_darknet53", backbone="darknet53", mean=(0, 0, 0), std=(255, 255, 255)),
        replace(_BASE, name="yolact_im400", max_size=400, anchor_sizes=((17,), (34,), (69,), (139,), (279,))),
        replace(
            _BASE,
            name="yolact_im700",
            max_size=700,
            anchor_sizes=((30,), (61,), (122,), (244,), (488,)),
            masks_to_train=300,
        ),
        replace(
            _RESNET50,
            name="yolact_resnet50_pascal",
            class_names=PASCAL_CLASSES,
            category_ids=PASCAL_IDS,
            anchor_sizes=((32,), (64,), (128,), (256,), (512,)),
            square_anchors=False,
            max_iter=120_000,
            lr_steps=(60_000, 100_000),
        ),
        replace(_BASE, name="yolact_plus_base", dcn_interval=3, **_PLUS),
        replace(_RESNET50, name="yolact_plus_resnet50", dcn_interval=1, **_PLUS),
        replace(
            _BASE,
            name="yolact_lite",
            max_size=288,
            mean=(127, 127, 127),
            std=(128, 128, 128),
            resize_uint8=True,
            backbone="efficientnet_lite0",
            fpn_channels=96,
            proto_channels=64,
            anchor_sizes=((12,), (25,), (50,), (100,), (200,)),
            square_anchors=False,
            optimizer="adamw",
            batch_size=8,
            lr=7e-4,
            weight_decay=0.05,
            max_iter=0,
            epochs=100,
            lr_schedule="cosine",
            lr_steps=(),
            warmup_iters=100,
            clip_grad=10.0,
            freeze_stages=4,
            ema=0.998,
            augment_expand=1.5,
            min_box_size=4.0,
        ),
    )
}

SHARES = (  # between 0 and 1
    "score_threshold",
    "nms_threshold",
    "mask_threshold",
    "positive_iou",
    "negative_iou",
    "crowd_iou",
    "momentum",
    "warmup_factor",
    "crop_min_side",
    "copy_paste",
)
COUNTS = (  # at least 1
    "fpn_channels",
    "proto_channels",
    "num_prototypes",
    "nms_top_k",
    "top_k",
    "masks_to_train",
    "mask_supersample",
)

# Other names that the same configurations are published under, without dates, steps and checksums.
ALIASES = {
    "yolact_r50_1xb8-55e_coco": "yolact_r50",
    "yolact_r50_1x8_coco": "yolact_r50",
    "yolact_r50_8xb8-55e_coco": "yolact_r50_8xb8",
    "yolact_r50_8x8_coco": "yolact_r50_8xb8",
    "yolact_r101_1xb8-55e_coco": "yolact_r101",
    "yolact_r101_1x8_coco": "yolact_r101",
}


def canonical_name(name: str) -> str:
    """The name in CONFIGS for any published spelling: `yolact_base_config`, `yolact_base_54_800000`,
    `yolact_r50_1x8_coco_20200908-f38d58df.pth`. An unknown name comes back without those endings."""
    name = re.sub(r"\.pth$", "", name)
    name = re.sub(r"_config$|_\d+_\d+(_interrupt)?$|_\d{8}-[0-9a-f]{8}$", "", name)
    return ALIASES.get(name, name)


def get_config(name: str, /, **overrides: Any) -> Config:
    """The configuration called `name`, with overrides.

    `name` is a key of CONFIGS, another published name of one, or the path of a `.py` file that defines `config`.
    Values given as text are converted to the field's type. Raises UserError for an unknown name or key, or for a
    value of the wrong type.
    """
    if name.endswith(".py"):
        config = _config_from_file(Path(name))
    elif (key := canonical_name(name)) in CONFIGS:
        config = CONFIGS[key]
    else:
        raise UserError(f"unknown configuration {name!r}{nearest(key, CONFIGS)}")
    config = override(config, **overrides)
    _check(config)
    return config


def override(config: Config, /, **overrides: Any) -> Config:
    """`config` with some values replaced, each checked against the field's type."""
    hints = typing.get_type_hints(Config)
    for key in overrides:
        if key not in hints:
            raise UserError(f"unknown configuration key {key!r}{nearest(key, hints)}")
    return replace(config, **{key: _convert(key, value, hints[key]) for key, value in overrides.items()})


def config_from_dict(values: dict[str, Any]) -> Config:
    """A Config from what `dataclasses.asdict` gave, as stored in a checkpoint."""
    return override(Config(name="stored"), **values)


def parse_overrides(pairs: list[str]) -> dict[str, str]:
    """`["lr=2e-3", "ema=0"]` -> `{"lr": "2e-3", "ema": "0"}`, for `--set`."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--set {pair}: expected key=value, for instance --set max_size=400")
    return dict(pair.split("=", 1) for pair in pairs)


def _config_from_file(path: Path) -> Config:
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    config = runpy.run_path(str(path)).get("config")
    if not isinstance(config, Config):
        raise UserError(f"{path}: it must define `config`, for instance config = get_config('yolact_r50', lr=2e-3)")
    return config


def _convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` (int, float, bool, str, or tuples of them); UserError when it does not fit."""
    origin = typing.get_origin(hint)
    try:
        if origin is tuple:
            item, *rest = typing.get_args(hint)
            if isinstance(value, str):  # "(16,), (32,)" or "person, dog"
                nested = value.lstrip()[:1] in ("(", "[")
                value = ast.literal_eval(value) if nested else [part.strip() for part in value.split(",")]
            value = tuple(_convert(key, part, item) for part in value)
            if rest and rest[0] is not Ellipsis and len(value) != 1 + len(rest):
                raise ValueError
            return value
        if hint is bool and isinstance(value, str):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if hint is int and isinstance(value, float) and value != int(value):
            raise ValueError
        if hint is bool and not isinstance(value, bool):
            raise ValueError
        if hint in (int, float) and isinstance(value, bool):
            raise ValueError
        return hint(value)
    except (ValueError, TypeError, KeyError, SyntaxError):
        wanted = hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)
        raise UserError(f"configuration key {key!r}: {value!r} is not a value of type {wanted}") from None


def _check(config: Config) -> None:
    """Values of the right type that still cannot work."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (int, float)) and value < 0:
            raise UserError(f"configuration key {field.name!r}: {value} is negative")
        if field.name in SHARES and value > 1:
            raise UserError(f"configuration key {field.name!r}: {value} is not between 0 and 1")
        if field.name in COUNTS and value < 1:
            raise UserError(f"configuration key {field.name!r}: {value} must be at least 1")
    if min(config.std) <= 0:
        raise UserError(f"configuration key 'std': {config.std}: each must be more than 0")
    if config.max_size < 32:
        raise UserError(f"max_size={config.max_size}: the network needs at least 32 pixels a side")
    if len(config.class_names) != len(config.category_ids):
        raise UserError(
            f"{config.name}: {len(config.class_names)} class_names but {len(config.category_ids)} category_ids"
        )
    if len(config.anchor_sizes) != 5:
        raise UserError(
            f"{config.name}: anchor_sizes needs one entry for each of P3..P7, not {len(config.anchor_sizes)}"
        )
    if len({len(sides) for sides in config.anchor_sizes}) > 1 or not (config.anchor_sizes[0] and config.aspect_ratios):
        raise UserError(
            f"{config.name}: anchor_sizes needs as many sides at every level, and aspect_ratios at least one"
        )
    if min(config.batch_size, config.lr, config.num_classes) <= 0 or not (config.max_iter or config.epochs):
        raise UserError(f"{config.name}: batch_size, lr, and one of max_iter and epochs must be more than 0")
    if config.ema >= 1:
        raise UserError(f"configuration key 'ema': {config.ema} must be less than 1")
    for key, known in (("optimizer", ("sgd", "adamw")), ("lr_schedule", ("steps", "cosine"))):
        if getattr(config, key) not in known:
            raise UserError(f"unknown {key} {getattr(config, key)!r}{nearest(getattr(config, key), known)}")
