from __future__ import annotations

import dataclasses

import pytest

from config import ALIASES, COCO_IDS, CONFIGS, canonical_name, from_dict, get_config, parse_overrides, to_dict
from utils.errors import UserError

PUBLISHED = (
    "yolact_r50 yolact_r50_8xb8 yolact_r101 yolact_base yolact_resnet50 yolact_darknet53 yolact_im400 yolact_im700 "
    "yolact_resnet50_pascal yolact_plus_base yolact_plus_resnet50 yolact_lite"
).split()


def test_every_name_is_there():
    assert set(CONFIGS) == set(PUBLISHED)
    assert set(ALIASES.values()) <= set(CONFIGS)
    assert len(COCO_IDS) == 80


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("yolact_base_config", "yolact_base"),
        ("yolact_plus_base_54_800000.pth", "yolact_plus_base"),
        ("yolact_resnet50_pascal_config", "yolact_resnet50_pascal"),
        ("yolact_r50_1xb8-55e_coco", "yolact_r50"),
        ("yolact_r50_8x8_coco_20200908-ca34f5db.pth", "yolact_r50_8xb8"),
        ("yolact_im700_54_800000", "yolact_im700"),
    ],
)
def test_published_spellings(spelling, name):
    assert canonical_name(spelling) == name
    assert get_config(spelling).name == name


def test_published_schedules():
    base = get_config("yolact_base").training
    assert (base.max_iter, base.lr_steps, base.batch_size) == (800_000, (280_000, 600_000, 700_000, 750_000), 8)
    assert (base.lr, base.warmup_iters) == (1e-3, 500)
    mmdet = get_config("yolact_r50_8xb8").training
    assert (mmdet.epochs, mmdet.lr_steps, mmdet.batch_size, mmdet.lr) == (55, (20, 42, 49, 52), 64, 8e-3)


def test_overrides_are_converted_and_checked():
    config = get_config(
        "yolact_r50", max_size="400", lr="2e-3", square_anchors="true", class_names="a, b", category_ids=(1, 2),
        anchor_sizes="((1, 2), (2, 3), (3, 4), (4, 5), (5, 6))",
    )  # fmt: skip
    assert (config.model.max_size, config.training.lr, config.model.square_anchors) == (400, 2e-3, True)
    assert config.class_names == ("a", "b")
    assert config.model.anchor_sizes[-1] == (5.0, 6.0)
    assert parse_overrides(["a=1=2", "b="]) == {"a": "1=2", "b": ""}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"max_sise": 400}, ["max_sise", "'max_size'"]),
        ({"max_size": "big"}, ["max_size", "'big'", "int"]),
        ({"max_size": 400.5}, ["max_size", "int"]),
        ({"max_size": True}, ["max_size", "int"]),
        ({"freeze_bn": "perhaps"}, ["freeze_bn", "bool"]),
        ({"mean": (1, 2)}, ["mean"]),
        ({"max_size": 8}, ["32"]),
        ({"lr": -1}, ["lr", "more than 0"]),
        ({"optimizer": "sdg"}, ["sdg", "'sgd'"]),
        ({"anchor_sizes": "(1,"}, ["anchor_sizes"]),
        ({"anchor_sizes": "((1,), (2,), (3,), (4,), (5, 6))"}, ["anchor_sizes", "every level"]),
        ({"ema": 2}, ["ema"]),
        ({"batch_size": 0}, ["batch_size"]),
        ({"mask_supersample": 0}, ["mask_supersample", "more than 0"]),
        ({"masks_to_train": 0}, ["masks_to_train", "more than 0"]),
        ({"crop_min_side": 1.5}, ["crop_min_side", "1.5", "at most 1"]),
        ({"copy_paste": 2}, ["copy_paste", "at most 1"]),
        ({"std": "1, 0, 1"}, ["std", "more than 0"]),
        ({"class_names": ("one",)}, ["1 class_names", "80 category_ids"]),
    ],
)
def test_bad_overrides(overrides, words):
    with pytest.raises(UserError) as error:
        get_config("yolact_r50", **overrides)
    assert all(word in str(error.value) for word in words)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(UserError, match="did you mean 'yolact_r50'"):
        get_config("yolact_r5")
    with pytest.raises(UserError, match="expected key=value"):
        parse_overrides(["max_size"])


def test_own_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from config import get_config\nconfig = get_config('yolact_lite', max_size=256)\n")
    assert get_config(str(path), lr=0.5) == get_config("yolact_lite", max_size=256, lr=0.5)
    path.write_text("x = 1\n")
    with pytest.raises(UserError, match="must define `config`"):
        get_config(str(path))
    with pytest.raises(UserError, match="no such configuration file"):
        get_config(str(tmp_path / "none.py"))


def test_frozen_and_stored_as_a_dictionary():
    config = get_config("yolact_plus_base")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.training.lr = 1
    assert from_dict(to_dict(config)) == config
