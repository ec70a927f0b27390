"""How long to train, at which learning rate, with which optimiser: what the configuration says, scaled visibly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from data.config import Config
from yolact import Yolact


@dataclass(frozen=True)
class Schedule:
    """Learning rate and length for the batch size that is used."""

    config: Config
    num_images: int  # in an epoch
    batch_size: int
    per_epoch: int  # iterations
    lr: float
    max_iter: int
    steps: tuple[int, ...]  # iterations at which the rate falls

    @classmethod
    def build(
        cls,
        config: Config,
        num_images: int,
        batch_size: int | None = None,
        lr: float | None = None,
        epochs: int | None = None,
        max_iter: int | None = None,
    ) -> Schedule:
        """The configuration's schedule. Another `batch_size` scales rate and length with it; a given `lr` is taken as
        it is; another length, in `epochs` or iterations, moves the steps in proportion."""
        batch_size = batch_size or config.batch_size
        scale = batch_size / config.batch_size
        per_epoch = max(1, math.ceil(num_images / batch_size))
        unit = per_epoch if config.epochs else 1 / scale  # of lr_steps, in iterations
        whole = config.epochs * per_epoch or round(config.max_iter / scale)
        length = max_iter or (epochs or 0) * per_epoch or whole
        steps = tuple(round(step * unit * length / whole) for step in config.lr_steps)
        return cls(config, num_images, batch_size, per_epoch, config.lr * scale if lr is None else lr, length, steps)

    def __str__(self) -> str:
        config, scale = self.config, self.batch_size / self.config.batch_size
        cosine = config.lr_schedule == "cosine"
        plan = f"cosine to 0 at {self.max_iter}" if cosine else f"x{config.lr_gamma} at {self.steps}"
        published = math.isclose(self.lr, config.lr * scale)
        scaled = f" ({config.lr:g} x {scale:g} for the batch size)" if published and scale != 1 else ""
        return (
            f"schedule: {self.max_iter} iterations of {self.batch_size} ({self.max_iter / self.per_epoch:.1f} epochs), "
            f"learning rate {self.lr:g}{scaled}, {plan}, warm-up {config.warmup_iters}"
        )

    def rate(self, step: int) -> float:
        """The learning rate for iteration `step`, from 0."""
        config = self.config
        if config.lr_schedule == "cosine":
            rate = self.lr * 0.5 * (1 + math.cos(math.pi * min(1, step / self.max_iter)))
        else:
            rate = self.lr * config.lr_gamma ** sum(step >= s for s in self.steps)
        if step < config.warmup_iters:
            rate *= config.warmup_factor + (1 - config.warmup_factor) * step / config.warmup_iters
        return rate


def build_optimizer(model: Yolact, config: Config) -> torch.optim.Optimizer:
    """SGD as published, or AdamW, which leaves biases and batch norms undecayed. Frozen weights are left out."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)
