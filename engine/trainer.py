"""One step of training, and the state of a run: all that a checkpoint holds."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data.coco import Batch
from data.errors import UserError
from engine.checkpoint import save_checkpoint
from engine.devices import autocast, choose_precision
from engine.distributed import Ranks
from engine.schedule import build_optimizer
from layers.loss import MultiBoxLoss
from yolact import Yolact


def average(decay: float, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
    """A step of the running average. At first it follows faster than `decay`, so that short runs do not lag behind."""
    followed = min(decay, (1 + int(count)) / (10 + int(count)))
    get_ema_multi_avg_fn(followed)(averaged, current, count)


class TrainStep(nn.Module):
    """Network and loss as one module, pictures and targets in, losses out: what each step runs."""

    def __init__(self, model: Yolact):
        super().__init__()
        self.model = model
        self.loss = MultiBoxLoss(model.config)
        size = model.config.max_size
        self.register_buffer("anchors", model.anchors(size, size), persistent=False)

    def forward(
        self,
        images: Tensor,
        targets: list[dict[str, Tensor]],
        num_positives: Tensor | None = None,
        num_images: int | None = None,
    ) -> dict[str, Tensor]:
        """images [B, 3, S, S] -> the loss's terms; see MultiBoxLoss for the rest."""
        predictions = self.model(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.loss(predictions, self.anchors, targets, self.model.mask_iou, num_positives, num_images)


class Run:
    """The state of a run, and where it is written.

    `args` are train.py's. With several processes each has a part of the batch, and all take the same step: the one
    that a single process would take with the whole batch. So it is with `args.accumulate` parts after each other; batch
    norm alone, where it is trained, sees the pictures that go through together.
    """

    def __init__(self, model: Yolact, args: argparse.Namespace, ranks: Ranks):
        config = model.config
        self.args, self.folder, self.ranks, self.device = args, args.output_dir, ranks, ranks.device
        self.dtype = choose_precision(args.precision, self.device)
        if config.sync_bn and ranks.size > 1:
            if self.device.type != "cuda":
                raise UserError("sync_bn=true needs GPUs: PyTorch synchronises batch norm between them alone")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.step_module = TrainStep(model).to(self.device).train()
        self.module: nn.Module = self.step_module
        if ranks.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.step_module, device_ids=devices)
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = None
        if config.ema:
            self.ema = AveragedModel(model, multi_avg_fn=partial(average, config.ema), use_buffers=True)
        self.step = 0
        self.best = -1.0
        self.validated = 0  # the step of the last validation
        self.table = ""  # COCOeval's, of the last validation
        self.folder.mkdir(parents=True, exist_ok=True)
        if ranks.main:
            for left in self.folder.glob(".*.part"):  # by a run that was killed while it wrote
                left.unlink()

    @property
    def batch_norm(self) -> str:
        """What batch norm does in this run, in a word."""
        if self.model.config.freeze_bn:
            return "frozen"
        return "synchronised" if self.model.config.sync_bn and self.ranks.size > 1 else "trained"

    def train_step(self, batch: Batch, lr: float) -> dict[str, float]:
        """One step of the optimiser; the losses, weighted, and their sum."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.model.config.clip_grad or math.inf)
        if not self.scaler.is_enabled():  # a scaler skips such a step and lowers its scale
            self._check_finite(batch, losses | {"gradient": norm})
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        values = self.ranks.sum(torch.stack([*losses.values()])) / self.ranks.size
        named = dict(zip(losses, values.tolist(), strict=True))
        return named | {"total": sum(named.values())}

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the whole batch, part by part; its losses."""
        parts = batch.split(self.args.accumulate)
        num_positives, num_images = None, len(batch.images)
        if len(parts) > 1 or self.ranks.size > 1:
            mine = self.step_module.loss.match(self.step_module.anchors, batch.targets).positive.sum()
            num_positives = self.ranks.sum(mine).clamp(min=1) / self.ranks.size  # DDP takes the mean of the gradients
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            wait = number < len(parts) and self.ranks.size > 1
            with self.module.no_sync() if wait else contextlib.nullcontext():
                with autocast(self.device, self.dtype):
                    images = part.images.contiguous(memory_format=torch.channels_last)
                    losses = self.module(images, part.targets, num_positives, num_images)
                self._check_finite(part, losses)
                self.scaler.scale(sum(losses.values())).backward()
            sums = {name: sums.get(name, 0) + value.detach() for name, value in losses.items()}
        return sums

    def _check_finite(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        """UserError in all processes when a loss is not finite in one of them."""
        finite = bool(torch.isfinite(torch.stack([value.detach() for value in losses.values()])).all())
        if not self.ranks.any(not finite):
            return
        if finite:
            raise UserError(f"the loss is not finite at step {self.step} in another process")
        path = self.folder / f"non_finite{f'_{self.ranks.rank}' * (not self.ranks.main)}.json"
        values = {name: float(value.detach()) for name, value in losses.items()}
        path.write_text(json.dumps({"step": self.step, "losses": values, "image_ids": batch.image_ids}, indent=1))
        bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        raise UserError(
            f"the loss is not finite at step {self.step} ({bad}); the batch's image ids are in {path}. "
            "Look at their annotations, or lower --lr"
        )

    def averaged(self) -> Yolact:
        """The model to validate and to predict with: the running average where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def save(self, name: str) -> None:
        """Write the state as `name` into the run's folder; the main process does it for all."""
        if not self.ranks.main:
            return
        training: dict[str, Any] = {
            "step": self.step,
            "best": self.best,
            "validated": self.validated,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()},
        }
        if self.ema is not None:
            training["raw"] = self.model.state_dict()
            training["averaged"] = int(self.ema.n_averaged)
        save_checkpoint(self.folder / name, self.averaged(), training)

    def load(self, training: dict[str, Any]) -> None:
        """Go on from what `save` wrote; the model has the checkpoint's weights already."""
        if self.ema is not None:
            self.ema.n_averaged.fill_(training["averaged"])
            self.model.load_state_dict(training["raw"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        torch.set_rng_state(training["random"])
        self.step, self.best = training["step"], training["best"]
        self.validated = training.get("validated", self.step)  # files of before say nothing of it
