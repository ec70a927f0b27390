"""Learning rate, decay groups and EMA, against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from config import get_config, override
from training.schedule import Schedule, build_optimizer
from training.trainer import Trainer
from utils.distributed import Ranks
from yolact import Yolact


def test_steps_and_warm_up():
    schedule = Schedule(get_config("yolact_base").training, num_images=117_266)
    assert schedule.max_iter == 800_000
    assert schedule.steps == (280_000, 600_000, 700_000, 750_000)
    assert schedule.lr_at(0) == pytest.approx(1e-4)
    assert schedule.lr_at(250) == pytest.approx(5.5e-4)
    for step, lr in ((499, 9.982e-4), (500, 1e-3), (279_999, 1e-3), (280_000, 1e-4), (600_000, 1e-5), (700_000, 1e-6)):
        assert schedule.lr_at(step) == pytest.approx(lr)
    assert schedule.lr_at(799_999) == pytest.approx(1e-7)


def test_cosine():
    config = get_config("yolact_lite", epochs=10, warmup_iters=20, lr_end=0).training
    schedule = Schedule(config, num_images=800)
    assert schedule.max_iter == 1000
    for step in (20, 250, 500, 999):
        assert schedule.lr_at(step) == pytest.approx(7e-4 * 0.5 * (1 + math.cos(math.pi * step / 1000)))
    assert schedule.lr_at(500) == pytest.approx(3.5e-4)
    assert schedule.lr_at(0) == pytest.approx(7e-5)
    assert schedule.lr_at(1000) == pytest.approx(0, abs=1e-12)
    ending = Schedule(get_config("yolact_lite", epochs=10, warmup_iters=20, lr_end=0.2).training, num_images=800)
    assert "cosine to 0.00014" in str(ending)
    for step, lr in ((500, 4.2e-4), (1000, 1.4e-4)):  # the middle of 7e-4 and 1.4e-4, and the latter
        assert ending.lr_at(step) == pytest.approx(lr)


def test_another_batch_size_adapts_what_is_not_given():
    """SGD's learning rate linearly, AdamW's with the square root; the same number of images; a longer EMA per step."""
    base = get_config("yolact_base", batch_size=16).training
    assert (base.lr, base.max_iter, base.lr_steps[0], base.warmup_iters) == (2e-3, 400_000, 140_000, 250)
    lite = get_config("yolact_lite", batch_size=2).training
    assert (lite.lr, lite.epochs, lite.warmup_iters) == (7e-4 / 2, 30, 400)
    assert lite.ema == pytest.approx(0.9995**0.25)
    given = get_config("yolact_base", batch_size=16, lr=5e-3, max_iter=3, warmup_iters=7, ema=0.5).training
    assert (given.lr, given.max_iter, given.warmup_iters, given.ema) == (5e-3, 3, 7, 0.5)
    epochs = Schedule(get_config("yolact_r50", batch_size=16).training, 800)
    assert (epochs.per_epoch, epochs.max_iter, epochs.steps[0]) == (50, 2750, 1000)


@pytest.mark.parametrize(
    ("name", "settings", "max_iter", "steps"),
    [
        ("yolact_r50", {"max_iter": 1000}, 1000, (364, 764, 891, 945)),
        ("yolact_base", {"max_iter": 8000}, 8000, (2800, 6000, 7000, 7500)),
        ("yolact_base", {"epochs": 10}, 1000, (350, 750, 875, 938)),
        ("yolact_r50", {"epochs": 11}, 1100, (400, 840, 980, 1040)),
        ("yolact_base", {"epochs": 10, "lr_steps": (8,)}, 1000, (800,)),
        ("yolact_r50", {"max_iter": 1000, "lr_steps": "900"}, 1000, (900,)),
    ],
)
def test_lengths_of_the_configuration_count(name, settings, max_iter, steps):
    """`--set max_iter` and `--set epochs` replace each other, and keep the steps within reach."""
    schedule = Schedule(get_config(name, **settings).training, num_images=800)
    assert (schedule.max_iter, schedule.steps) == (max_iter, steps)


def test_a_short_run_reaches_its_learning_rate():
    schedule = Schedule(get_config("yolact_base", max_iter=400).training, 100)
    assert schedule.warmup == 80
    assert max(map(schedule.lr_at, range(400))) == 1e-3
    assert Schedule(get_config("yolact_base", max_iter=4000).training, 100).warmup == 500


def test_decay_groups():
    """AdamW decays neither biases nor batch norm; SGD decays everything, as published. Frozen weights are left out."""
    lite = get_config("yolact_lite")
    model = Yolact(lite).train()
    decayed, undecayed = build_optimizer(model, lite.training).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.05, 0.0)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in undecayed["params"]} == (norms | biases) & trained
    assert {id(p) for p in decayed["params"]} == trained - norms - biases
    assert len(trained) < len(list(model.parameters()))  # four stages are frozen
    base = get_config("yolact_resnet50")
    (group,) = build_optimizer(Yolact(base), base.training).param_groups
    assert (group["weight_decay"], group["momentum"], group["lr"]) == (5e-4, 0.9, 1e-3)


def test_ema(small_config, tmp_path):
    """averaged = d * averaged + (1 - d) * current, with d = min(decay, (1 + n) / (5 + n)); the first step copies."""
    trainer = Trainer(Yolact(override(small_config, ema=0.95)), tmp_path, Ranks(), "fp32")
    name = "fpn.lateral.0.weight"
    weight, averaged = trainer.model.state_dict()[name], trainer.best_model.state_dict()[name]
    wanted = weight.clone()
    for n in range(200):
        trainer.iteration = n
        weight.copy_(torch.full_like(weight, math.sin(n)))
        decay = min(0.95, (1 + n) / (5 + n)) if n else 0
        wanted = decay * wanted + (1 - decay) * weight
        trainer._update_ema()
        assert torch.allclose(averaged, wanted, atol=1e-6), n
    assert (1 + 199) / (5 + 199) > 0.95  # both branches were taken
