"""Learning rate, decay groups and EMA, against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from config import get_config
from training.schedule import Schedule, build_optimizer, update_ema
from yolact import Yolact


def test_steps_and_warm_up():
    schedule = Schedule.build(get_config("yolact_base").training, num_images=117_266)
    assert schedule.max_iter == 800_000
    assert schedule.steps == (280_000, 600_000, 700_000, 750_000)
    assert schedule.lr_at(0) == pytest.approx(1e-4)
    assert schedule.lr_at(250) == pytest.approx(5.5e-4)
    for step, lr in ((499, 9.982e-4), (500, 1e-3), (279_999, 1e-3), (280_000, 1e-4), (600_000, 1e-5), (700_000, 1e-6)):
        assert schedule.lr_at(step) == pytest.approx(lr)
    assert schedule.lr_at(799_999) == pytest.approx(1e-7)


def test_cosine():
    config = get_config("yolact_lite", epochs=10, warmup_iters=20, lr_end=0).training
    schedule = Schedule.build(config, num_images=800)
    assert schedule.max_iter == 1000
    for step in (20, 250, 500, 999):
        assert schedule.lr_at(step) == pytest.approx(7e-4 * 0.5 * (1 + math.cos(math.pi * step / 1000)))
    assert schedule.lr_at(500) == pytest.approx(3.5e-4)
    assert schedule.lr_at(0) == pytest.approx(7e-5)
    assert schedule.lr_at(1000) == pytest.approx(0, abs=1e-12)
    ending = Schedule.build(get_config("yolact_lite", epochs=10, warmup_iters=20, lr_end=0.2).training, num_images=800)
    assert "cosine to 0.00014 at 1000" in str(ending)
    for step, lr in ((500, 4.2e-4), (1000, 1.4e-4)):  # the middle of 7e-4 and 1.4e-4, and the latter
        assert ending.lr_at(step) == pytest.approx(lr)


def test_another_batch_size_scales_rate_and_length():
    config = get_config("yolact_base").training
    schedule = Schedule.build(config, 1000, batch_size=16)
    assert (schedule.lr, schedule.max_iter, schedule.steps[0]) == (2e-3, 400_000, 140_000)
    assert Schedule.build(config, 1000, batch_size=16, lr=5e-3).lr == 5e-3
    epochs = Schedule.build(get_config("yolact_r50").training, 800, batch_size=16)
    assert (epochs.per_epoch, epochs.max_iter, epochs.steps[0]) == (50, 2750, 1000)


def test_length_flags_move_the_steps_in_proportion():
    config = get_config("yolact_r50").training  # 55 epochs, steps at 20, 42, 49, 52
    assert Schedule.build(config, 800, max_iter=550).steps == (200, 420, 490, 520)
    assert Schedule.build(config, 800, epochs=11).steps == (400, 840, 980, 1040)


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
    schedule = Schedule.build(get_config(name, **settings).training, num_images=800)
    assert (schedule.max_iter, schedule.steps) == (max_iter, steps)


def test_a_run_within_the_warm_up_says_so():
    config = get_config("yolact_base").training
    assert "ends within the warm-up" in str(Schedule.build(config, 100, max_iter=400))
    assert "warm-up, so" not in str(Schedule.build(config, 100, max_iter=501))


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


def test_ema():
    """averaged = d * averaged + (1 - d) * current, with d = min(decay, (1 + n) / (5 + n))."""
    averaged, wanted = [torch.tensor([1.0, -2.0])], torch.tensor([1.0, -2.0])
    for n in range(1, 200):
        current = torch.tensor([math.sin(n), math.cos(n)])
        decay = min(0.95, (1 + n) / (5 + n))
        wanted = decay * wanted + (1 - decay) * current
        update_ema(0.95, averaged, [current], torch.tensor(n))
        assert torch.allclose(averaged[0], wanted, atol=1e-6), n
    assert (1 + 199) / (5 + 199) > 0.95  # both branches were taken
