"""Learning rate schedule and optimiser."""

from __future__ import annotations

import math

import torch

from config import TrainingConfig
from yolact import Yolact

MOMENTUM = 0.9  # SGD's, in the released code and in MMDetection
LR_GAMMA = 0.1  # the learning rate's factor at each step
WARMUP_FACTOR = 0.1  # the first iteration uses this fraction of the learning rate
MAX_WARMUP = 0.2  # of the run: a short run would otherwise never reach its learning rate


class Schedule:
    """The learning rate of every iteration, and the length of a run, for a training set of `num_images`."""

    def __init__(self, config: TrainingConfig, num_images: int):
        self.config, self.num_images = config, num_images
        self.per_epoch = max(1, math.ceil(num_images / config.batch_size))  # iterations
        unit = self.per_epoch if config.epochs else 1  # of lr_steps, in iterations
        self.max_iter = config.epochs * self.per_epoch or config.max_iter
        self.warmup = min(config.warmup_iters, int(MAX_WARMUP * self.max_iter))
        self.steps = tuple(round(step * unit) for step in config.lr_steps)  # at which the learning rate drops

    def __str__(self) -> str:
        config = self.config
        cosine = config.lr_schedule == "cosine"
        plan = f"cosine to {config.lr * config.lr_end:g}" if cosine else f"x{LR_GAMMA} at {self.steps}"
        return (
            f"schedule: {self.max_iter} iterations of {config.batch_size} images "
            f"({self.max_iter / self.per_epoch:.1f} epochs), learning rate {config.lr:g}, {plan}, warm-up {self.warmup}"
        )

    def lr_at(self, iteration: int) -> float:
        """Return the learning rate of an iteration, counted from 0, including the linear warm-up."""
        config = self.config
        if config.lr_schedule == "cosine":
            cosine = 0.5 * (1 + math.cos(math.pi * min(1, iteration / self.max_iter)))
            lr = config.lr * (config.lr_end + (1 - config.lr_end) * cosine)
        else:
            lr = config.lr * LR_GAMMA ** sum(iteration >= step for step in self.steps)
        if iteration < self.warmup:
            lr *= WARMUP_FACTOR + (1 - WARMUP_FACTOR) * iteration / self.warmup
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
