"""The named configurations: frozen dataclasses with one section for each part of the project.

    config = get_config("yolact_r50")                 # a key of CONFIGS, or a published alias
    config = get_config("yolact_r50", max_size=400)   # with overrides; an unknown key is an error
    config = get_config("my.py", lr="2e-3")           # a Python file that defines `config`; text is converted

The values come from the authors' released code (`yolact_base` to `yolact_plus_resnet50`) and from MMDetection
(`yolact_r50`, `yolact_r50_8xb8`, `yolact_r101`); `yolact_lite` is our own. Field names are unique across all sections,
so an override does not name its section.
"""

from __future__ import annotations

import dataclasses
import re
import runpy
import typing
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError, look_up, suggestion
from utils.fields import convert

COCO_CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)
# COCO numbers its 80 classes from 1 to 90, with gaps.
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))

PASCAL_CLASSES = tuple(
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,pottedplant,"
    "sheep,sofa,train,tvmonitor".split(",")
)
PASCAL_IDS = tuple(range(1, 21))


@dataclass(frozen=True)
class ModelConfig:
    """Architecture, anchors and preprocessing, which weights depend on. Pixels are those of the network's input."""

    # Images are resized to a square with this side unless another size is given. Weights can be used at other sizes
    # than they were trained at, so `differences` does not compare this field.
    max_size: int = 550
    # In inference, resize to this area and the image's aspect ratio instead, see data.image.input_size. Training inputs
    # stay squares; the random crops of augmentation teach the network other aspect ratios.
    preserve_aspect_ratio: bool = False
    mean: tuple[float, float, float] = (123.68, 116.78, 103.94)  # RGB, for pixel values 0..255
    std: tuple[float, float, float] = (58.40, 57.12, 57.38)
    resize_uint8: bool = False  # resize the 8-bit image (MMDetection) or the float image (the authors)

    backbone: str = "resnet101"  # a key of backbone.BACKBONES
    dcn_interval: int = 0  # every n-th block from C3 on is deformable (YOLACT++); 0: none
    fpn_channels: int = 256
    fpn_relu: bool = True  # a ReLU after the FPN's 3x3 convolutions
    p6_from_c5: bool = False  # P6 comes from C5 (MMDetection) or from P5 (the authors)
    proto_channels: int = 256
    num_prototypes: int = 32
    mask_iou: bool = False  # the mask re-scoring network of YOLACT++

    # Anchors: sides in pixels for each of P3..P7, and width / height.
    anchor_sizes: tuple[tuple[float, ...], ...] = ((24,), (48,), (96,), (192,), (384,))
    aspect_ratios: tuple[float, ...] = (1, 1 / 2, 2)
    # Use the width of each anchor as its height. YOLACT's released COCO weights were trained like this, because of a
    # bug in the authors' code; YOLACT++, Pascal and MMDetection use the true aspect ratios.
    square_anchors: bool = True
    # The centres of the anchors divide the image evenly, as in all published models, or lie at multiples of the stride,
    # where the features are. The two differ if a side of the input is not a multiple of 128.
    even_anchors: bool = True

    @property
    def anchors_per_position(self) -> int:
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)


@dataclass(frozen=True)
class DetectionConfig:
    """Postprocessing of raw outputs, as for published AP. Any field can be passed to `Predictor`, and to eval.py --set.

    `Predictor` and eval.py show people fewer detections, see `DISPLAY`.
    """

    score_threshold: float = 0.05  # compared with the best class of an anchor
    # Whether the threshold applies to every detection, and to mask scores. The authors' evaluation selects anchors by
    # their best class and then also reports their other classes, which may score lower.
    strict_threshold: bool = False
    best_score_threshold: float = 0.0  # stored by eval.py --store_threshold; 0: unknown
    nms: str = "fast"  # a key of layers.nms.NMS
    nms_threshold: float = 0.5
    nms_top_k: int = 200  # candidates per class
    box_voting: bool = False  # refine boxes and scores by the boxes that NMS suppresses, see layers.voting
    top_k: int = 100  # detections per image
    pre_nms_top_k: int = 0  # anchors per pyramid level; 0: all (MMDetection: 1000)
    clip_boxes: bool = False  # clip boxes to the image before NMS (MMDetection)
    crop: bool = True  # crop masks to their boxes
    crop_after_resize: bool = False  # also crop at the image's resolution, so that no pixel lies outside the box
    mask_threshold: float = 0.5  # applied to the upsampled soft mask
    maskness: bool = False  # multiply scores by the mean of the soft mask above the threshold, see layers.masks


# What `Predictor` and eval.py change for people, unless told otherwise.
DISPLAY: dict[str, Any] = {"score_threshold": 0.3, "strict_threshold": True, "crop_after_resize": True}


@dataclass(frozen=True)
class TrainingConfig:
    """Optimiser and schedule.

    `lr`, `max_iter`, `lr_steps`, `warmup_iters` and `ema` are for `batch_size`. Overriding `batch_size` adapts those
    that are not overridden too, see `_adapt`.
    """

    optimizer: str = "sgd"
    batch_size: int = 8
    lr: float = 1e-3
    weight_decay: float = 5e-4
    max_iter: int = 800_000  # length in iterations; 0: use `epochs`
    epochs: int = 0  # length in epochs; 0: use `max_iter`
    lr_schedule: str = "steps"
    lr_end: float = 0.0  # the cosine schedule ends at this fraction of `lr`
    # Points at which the learning rate is divided by 10: in epochs if `epochs` is set, otherwise in iterations.
    lr_steps: tuple[float, ...] = (280_000, 600_000, 700_000, 750_000)
    warmup_iters: int = 500
    clip_grad: float = 0.0  # maximum norm of the gradient; 0: no clipping
    freeze_stages: int = 0  # freeze the stem and the next n - 1 stages (EfficientNet: blocks)
    freeze_bn: bool = False  # freeze the backbone's batch norm: statistics, scale and shift
    # Side of the training input, as a fraction of max_size. Random crops make objects larger, so that they have the
    # same size in a smaller training input as in inference (Touvron et al. 2019).
    train_scale: float = 1.0
    fit_anchors: bool = False  # fit the anchors to the training set, see tools/fit_anchors.py
    ema: float = 0.0  # decay of the EMA of the weights, which is validated and saved; 0: no EMA


@dataclass(frozen=True)
class LossConfig:
    """Matching and the mask loss. Values that no configuration changes are constants in layers/loss.py."""

    assigner: str = "max_iou"  # a key of layers.matching.ASSIGNERS
    crowd_iou: float = 0.7  # negatives with more than this share in a crowd are ignored; 1: none
    masks_to_train: int = 100  # per image, for the mask loss; a random sample
    # The mask loss is computed at this multiple of the prototypes' size.
    mask_supersample: int = 1


@dataclass(frozen=True)
class AugmentationConfig:
    """SSD's augmentation (paper, section 5) and copy-paste."""

    augment_photometric: bool = True
    augment_expand: float = 4.0  # zoom out by up to this factor; mean colour around
    augment_crop: bool = True
    crop_min_side: float = 0.3  # share of the image's width and height
    augment_mirror: bool = True
    copy_paste: float = 0.0  # probability of pasting objects from another image
    min_box_size: float = 0.0  # in pixels; smaller boxes are dropped


@dataclass(frozen=True)
class Config:
    """A complete configuration: the model, its postprocessing and its training recipe."""

    name: str
    class_names: tuple[str, ...] = COCO_CLASSES  # class_names[label] for the labels 0..C-1
    category_ids: tuple[int, ...] = COCO_IDS  # category_ids[label] is written to COCO results
    model: ModelConfig = ModelConfig()
    detection: DetectionConfig = DetectionConfig()
    training: TrainingConfig = TrainingConfig()
    loss: LossConfig = LossConfig()
    augmentation: AugmentationConfig = AugmentationConfig()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def train_size(self) -> int:
        """The side of the training input in pixels: a multiple of 32, unless it is `max_size`."""
        scale, side = self.training.train_scale, self.model.max_size
        return side if scale == 1 else max(32, 32 * round(scale * side / 32))


CHOICES = {"optimizer": ("sgd", "adamw"), "lr_schedule": ("steps", "cosine")}
LARGEST = 1e9  # no number in a configuration is larger
# Fields with values from 0 to 1, and fields that cannot be 0.
SHARES = {
    "score_threshold", "best_score_threshold", "nms_threshold", "mask_threshold", "lr_end", "ema", "crowd_iou",
    "crop_min_side", "copy_paste", "train_scale",
}  # fmt: skip
NOT_ZERO = {
    "std", "fpn_channels", "proto_channels", "num_prototypes", "anchor_sizes", "aspect_ratios", "nms_top_k", "top_k",
    "batch_size", "lr", "train_scale", "masks_to_train", "mask_supersample", "crop_min_side",
}  # fmt: skip

# The sections of Config, and every key that can be overridden: its section ("" for fields of Config itself) and type.
SECTIONS: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(Config) if is_dataclass(f.default)}
FIELDS: dict[str, tuple[str, Any]] = {
    name: (section, hint)
    for section, cls in {"": Config, **SECTIONS}.items()
    for name, hint in typing.get_type_hints(cls).items()
    if name not in SECTIONS
}


def override(config: Config, /, **overrides: Any) -> Config:
    """Return `config` with some values replaced, each converted to the field's type and checked.

    Raises UserError for an unknown key, a value of the wrong type or out of range, or values that contradict each
    other.
    """
    changed: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, hint = look_up("configuration key", key, FIELDS)
        changed.setdefault(section, {})[key] = convert(key, value, hint)
    if "training" in changed:
        changed["training"] = _adapt(config.training, changed["training"])
    values = {name: replace(getattr(config, name), **changed[name]) for name in SECTIONS if name in changed}
    config = replace(config, **values, **changed.get("", {}))
    check(config)
    return config


def with_detection(config: Config, given: dict[str, Any], display: bool = False) -> Config:
    """Return `config` with other values for fields of its detection section.

    A score threshold other than the configuration's own applies to every detection, unless `strict_threshold` is given.
    It may be "best", the one that eval.py --store_threshold has stored. With `display`, DISPLAY replaces the values
    that are neither given nor set by the configuration. Raises UserError for an unknown field or an invalid value.
    """
    own, defaults = vars(config.detection), vars(DetectionConfig())
    if given.get("score_threshold") == "best":
        if not own["best_score_threshold"]:
            raise UserError("score_threshold best: none is stored, see eval.py --store_threshold")
        given = given | {"score_threshold": own["best_score_threshold"]}
    for key in given:
        if key not in own:
            raise UserError(f"unknown option {key!r}, not a field of DetectionConfig{suggestion(key, own)}")
    options = {key: value for key, value in DISPLAY.items() if display and own[key] == defaults[key]}
    if "score_threshold" in given:
        threshold = override(config, score_threshold=given["score_threshold"]).detection.score_threshold
        options["strict_threshold"] = own["strict_threshold"] or threshold != own["score_threshold"]
    return override(config, **options | given)


def _adapt(training: TrainingConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Return `given` with the fields that follow from it. A value that is given is never changed.

    The schedule of another batch size shows the network as many images as before: the number of iterations is scaled
    inversely and the learning rate linearly for SGD (Goyal et al. 2017), with the square root for AdamW (Malladi et al.
    2022). Another length moves the steps of the learning rate in proportion.
    """
    factor = given.get("batch_size", training.batch_size) / training.batch_size
    follow: dict[str, Any] = {}
    if factor != 1 and factor > 0:
        linear = given.get("optimizer", training.optimizer) == "sgd"
        follow["lr"] = training.lr * (factor if linear else factor**0.5)
        follow["warmup_iters"] = round(training.warmup_iters / factor)
        follow["ema"] = training.ema**factor
        if training.max_iter:
            follow["max_iter"] = max(1, round(training.max_iter / factor))
            follow["lr_steps"] = tuple(step / factor for step in training.lr_steps)
    lengths = [key for key in ("max_iter", "epochs") if given.get(key)]
    if len(lengths) == 1:
        (key,) = lengths
        length = training.epochs or training.max_iter
        follow["lr_steps"] = tuple(step * given[key] / length for step in training.lr_steps)
        follow["max_iter"] = follow["epochs"] = 0
    return follow | given


def differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Return the names of the fields that differ, except those of the input size. Weights need the others equal."""
    free = {"max_size", "preserve_aspect_ratio"}
    return [f.name for f in dataclasses.fields(a) if f.name not in free and getattr(a, f.name) != getattr(b, f.name)]


def check(config: Config) -> None:
    """Raise UserError for values that are out of range or inconsistent with each other."""
    model, training = config.model, config.training
    if not config.class_names or len(config.class_names) != len(config.category_ids):
        raise UserError(
            f"{config.name}: {len(config.class_names)} class_names and {len(config.category_ids)} category_ids; "
            "there must be at least one class, and one id for each class"
        )
    if len(set(config.category_ids)) < len(config.category_ids):
        raise UserError(f"{config.name}: category_ids are not unique")
    if len(model.anchor_sizes) != 5:
        raise UserError(f"anchor_sizes needs one entry for each of P3..P7, not {len(model.anchor_sizes)}")
    if len({len(sides) for sides in model.anchor_sizes}) > 1 or not (model.anchor_sizes[0] and model.aspect_ratios):
        raise UserError("anchor_sizes needs the same number of sides at every level; aspect_ratios needs at least one")
    if bool(training.max_iter) == bool(training.epochs):
        raise UserError("exactly one of max_iter and epochs must be greater than 0")
    for key, known in CHOICES.items():
        value = getattr(training, key)
        if value not in known:
            raise UserError(f"unknown {key} {value!r}{suggestion(value, known)}")
    for key, value in ((key, value) for section in SECTIONS for key, value in vars(getattr(config, section)).items()):
        low, high = 0.0, 1.0 if key in SHARES else LARGEST
        for number in () if isinstance(value, str) else np.ravel(value).tolist():
            if not low <= number <= high or (number == 0 and key in NOT_ZERO):  # false for NaN as well
                words = f"{'more than' if key in NOT_ZERO else 'at least'} 0 and at most {high:g}"
                raise UserError(f"{key}: {number:g} is out of range; it must be {words}")
    if not 32 <= model.max_size <= 16384:
        raise UserError(f"max_size: {model.max_size} is out of range; it must be from 32 to 16384 pixels")
    if config.augmentation.augment_expand < 1:
        raise UserError("augment_expand: images can only be made smaller, so it must be at least 1")


def geometric_sizes(side: int) -> tuple[tuple[float, ...], ...]:
    """Return anchor sizes for an input of `side` pixels: three for each of P3..P7, in a geometric progression.

    It starts with twice the stride of P3 and ends with the side. At 512 pixels, the sizes of every level are between
    two and four times its stride.
    """
    count, smallest = 15, 16
    sizes = [round(smallest * (side / smallest) ** (i / (count - 1)), 1) for i in range(count)]
    return tuple(tuple(sizes[i : i + 3]) for i in range(0, count, 3))


_BASE = Config(name="yolact_base")


def _derive(config: Config, name: str, **overrides: Any) -> Config:
    return override(replace(config, name=name), **overrides)


# fmt: off
_RESNET50 = _derive(_BASE, "yolact_resnet50", backbone="resnet50")
_PLUS: dict[str, Any] = {
    "mask_iou": True, "square_anchors": False,
    "anchor_sizes": tuple(tuple(side * 2 ** (j / 3) for j in range(3)) for side in (24, 48, 96, 192, 384)),
}
_MMDET = _derive(
    _RESNET50, "yolact_r50", resize_uint8=True, fpn_relu=False, p6_from_c5=True, square_anchors=False,
    aspect_ratios=(2, 1, 1 / 2),  # MMDetection's (0.5, 1, 2) are height / width; the order decides the anchors' order
    pre_nms_top_k=1000, clip_boxes=True, strict_threshold=True, crowd_iou=1.0, min_box_size=4.0,
    max_iter=0, epochs=55, lr_steps=(20, 42, 49, 52),
)
_LITE = _derive(
    _BASE, "yolact_lite", max_size=640, preserve_aspect_ratio=True, resize_uint8=True,
    mean=(127, 127, 127), std=(128, 128, 128), backbone="efficientnet_lite0", fpn_channels=96, proto_channels=64,
    anchor_sizes=geometric_sizes(512), aspect_ratios=(1, 0.5), square_anchors=False, even_anchors=False,
    nms="cluster", box_voting=True, mask_threshold=0.35, crop_after_resize=True, maskness=True,
    nms_top_k=1000,  # ATSS trains several anchors for each object, so 200 do not reach the small objects
    assigner="atss", masks_to_train=80, mask_supersample=2,
    optimizer="adamw", lr=7e-4, weight_decay=0.05, clip_grad=10.0, warmup_iters=100, max_iter=0, epochs=30,
    lr_schedule="cosine", lr_end=0.2, lr_steps=(), freeze_stages=4, ema=0.9995, train_scale=0.8, fit_anchors=True,
    augment_expand=1.25, crop_min_side=0.4, copy_paste=0.5, min_box_size=4.0,
)
CONFIGS: dict[str, Config] = {config.name: config for config in (
    _MMDET,
    _derive(_MMDET, "yolact_r50_8xb8", batch_size=64, lr=8e-3, warmup_iters=1000, clip_grad=35.0),
    _derive(_MMDET, "yolact_r101", backbone="resnet101"),
    _BASE,
    _RESNET50,
    _derive(_BASE, "yolact_darknet53", backbone="darknet53", mean=(0, 0, 0), std=(255, 255, 255)),
    _derive(_BASE, "yolact_im400", max_size=400, anchor_sizes=((17,), (34,), (69,), (139,), (279,))),
    _derive(_BASE, "yolact_im700", max_size=700, anchor_sizes=((30,), (61,), (122,), (244,), (488,)),
            masks_to_train=300),
    _derive(_RESNET50, "yolact_resnet50_pascal", class_names=PASCAL_CLASSES, category_ids=PASCAL_IDS,
            anchor_sizes=((32,), (64,), (128,), (256,), (512,)), square_anchors=False, max_iter=120_000,
            lr_steps=(60_000, 100_000)),
    _derive(_BASE, "yolact_plus_base", dcn_interval=3, **_PLUS),
    _derive(_RESNET50, "yolact_plus_resnet50", dcn_interval=1, **_PLUS),
    _LITE,
)}
# fmt: on

# Other published names of these configurations, without dates, iterations and checksums.
ALIASES = {
    "yolact_r50_1xb8-55e_coco": "yolact_r50",
    "yolact_r50_1x8_coco": "yolact_r50",
    "yolact_r50_8xb8-55e_coco": "yolact_r50_8xb8",
    "yolact_r50_8x8_coco": "yolact_r50_8xb8",
    "yolact_r101_1xb8-55e_coco": "yolact_r101",
    "yolact_r101_1x8_coco": "yolact_r101",
}


def canonical_name(name: str) -> str:
    """Return the key of CONFIGS for any published spelling, such as `yolact_base_config`, `yolact_base_54_800000` or
    `yolact_r50_1x8_coco_20200908-f38d58df.pth`. An unknown name is returned without these suffixes."""
    name = re.sub(r"\.pth$", "", name)
    name = re.sub(r"_config$|_\d+_\d+(_interrupt)?$|_\d{8}-[0-9a-f]{8}$", "", name)
    return ALIASES.get(name, name)


def get_config(name: str, /, **overrides: Any) -> Config:
    """Return the configuration called `name`: a key of CONFIGS, a published alias, or a `.py` file that has `config`.

    `overrides` are new values for fields of any section; strings are converted to the field's type. Raises UserError
    for an unknown name or key, or a value of the wrong type or out of range.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such configuration file exists")
        config = runpy.run_path(name).get("config")
        if not isinstance(config, Config):
            raise UserError(
                f"{name}: the file must define `config`, for instance with the two lines "
                "`from config import get_config` and `config = get_config('yolact_r50', lr=2e-3)`"
            )
    else:
        config = look_up("configuration", canonical_name(name), CONFIGS)
    return override(config, **overrides)


def parse_overrides(pairs: list[str], example: str = "max_size=400") -> dict[str, str]:
    """Parse the arguments of --set: `["lr=2e-3", "ema=0"]` -> `{"lr": "2e-3", "ema": "0"}`.

    Raises UserError for an argument without "=", with `example` as a hint.
    """
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--set {pair}: expected key=value, for instance --set {example}")
    return dict(pair.split("=", 1) for pair in pairs)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as a flat dictionary of plain values, as checkpoints store it."""
    values = dataclasses.asdict(config)
    for section in SECTIONS:
        values |= values.pop(section)
    return values


def from_dict(values: dict[str, Any]) -> Config:
    """Rebuild the Config that `to_dict` flattened. Raises UserError for unknown keys or invalid values.

    An older version may have stored a key that has been deleted since. It is dropped if it was switched off.
    """
    off = [key for key, value in values.items() if key not in FIELDS and isinstance(value, (int, float)) and not value]
    return override(Config(name="stored"), **{key: value for key, value in values.items() if key not in off})


def as_set_arguments(config: Config, keys: typing.Iterable[str]) -> str:
    """Format fields as arguments of --set, quoted for a shell."""
    values = to_dict(config)
    pairs = [f"{key}={str(values[key]).replace(' ', '')}" for key in keys]
    return " ".join(f'"{pair}"' if "(" in pair else pair for pair in pairs)
