"""Learning rate schedule and optimiser: the values of the configuration, scaled to the actual batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from config import TrainingConfig
from yolact import Yolact

MOMENTUM = 0.9  # SGD's, in the released code and in MMDetection
LR_GAMMA = 0.1  # the learning rate's factor at each step
WARMUP_FACTOR = 0.1  # the first step uses this fraction of the learning rate


@dataclass(frozen=True)
class Schedule:
    """Learning rate and length for the batch size that is used."""

    config: TrainingConfig
    num_images: int  # per epoch
    batch_size: int
    per_epoch: int  # iterations
    lr: float
    max_iter: int
    steps: tuple[int, ...]  # iterations at which the learning rate drops

    @classmethod
    def build(
        cls,
        config: TrainingConfig,
        num_images: int,
        batch_size: int | None = None,
        lr: float | None = None,
        epochs: int | None = None,
        max_iter: int | None = None,
    ) -> Schedule:
        """Return the configuration's schedule for a data set.

        A different `batch_size` scales the learning rate linearly and the length inversely, so that the number of
        images seen is unchanged; `lr`, if given, is not scaled. A different length, in epochs or iterations, moves the
        steps in proportion.
        """
        batch_size = batch_size or config.batch_size
        scale = batch_size / config.batch_size
        per_epoch = max(1, math.ceil(num_images / batch_size))
        unit = per_epoch if config.epochs else 1 / scale  # of lr_steps, in iterations
        configured = config.epochs * per_epoch or max(1, round(config.max_iter / scale))
        length = max_iter or (epochs or 0) * per_epoch or configured
        steps = tuple(round(step * unit * length / configured) for step in config.lr_steps)
        return cls(config, num_images, batch_size, per_epoch, config.lr * scale if lr is None else lr, length, steps)

    def __str__(self) -> str:
        config, scale = self.config, self.batch_size / self.config.batch_size
        cosine = config.lr_schedule == "cosine"
        plan = f"cosine to {self.lr * config.lr_end:g} at {self.max_iter}" if cosine else f"x{LR_GAMMA} at {self.steps}"
        scaled_from_config = scale != 1 and math.isclose(self.lr, config.lr * scale)
        scaled = f" ({config.lr:g} x {scale:g} for the batch size)" if scaled_from_config else ""
        text = (
            f"schedule: {self.max_iter} iterations of {self.batch_size} ({self.max_iter / self.per_epoch:.1f} epochs), "
            f"learning rate {self.lr:g}{scaled}, {plan}, warm-up {config.warmup_iters}"
        )
        if self.max_iter <= config.warmup_iters:
            text += (
                f"\nwarning: the run ends within the warm-up, so the learning rate never reaches {self.lr:g}; "
                f"--set warmup_iters={max(1, self.max_iter // 10)} shortens it"
            )
        return text

    def lr_at(self, step: int) -> float:
        """Return the learning rate of iteration `step`, counted from 0, including the linear warm-up."""
        if self.config.lr_schedule == "cosine":
            cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / self.max_iter)))
            lr = self.lr * (self.config.lr_end + (1 - self.config.lr_end) * cosine)
        else:
            lr = self.lr * LR_GAMMA ** sum(step >= s for s in self.steps)
        if step < self.config.warmup_iters:
            lr *= WARMUP_FACTOR + (1 - WARMUP_FACTOR) * step / self.config.warmup_iters
        return lr


def build_optimizer(model: Yolact, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return SGD, as published, or AdamW without weight decay for biases and batch norm; frozen weights excluded."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)


def update_ema(decay: float, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
    """Update the EMA in place: averaged = d * averaged + (1 - d) * current.

    d is min(decay, (1 + n) / (5 + n)) with n = `count` previous updates. Until it reaches `decay`, the EMA therefore
    covers about the last quarter of all updates, and does not lag behind in a short run. `AveragedModel` calls this
    from the second update on; the first one copies the weights.
    """
    warm = min(decay, (1 + int(count)) / (5 + int(count)))
    get_ema_multi_avg_fn(warm)(averaged, current, count)
