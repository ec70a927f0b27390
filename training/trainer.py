"""The training step, and the state of a run that checkpoints store and --resume restores."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.loader import Batch
from layers.anchors import feature_sizes
from layers.loss import MultiBoxLoss, Part, count_anchors
from layers.matching import Matches
from layers.structures import Target
from training.schedule import build_optimizer
from utils.device import choose_precision, float32_math
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import write_json
from weights.checkpoint import save_checkpoint
from yolact import Yolact

# The training state in a checkpoint and its types. "validated" and "stale" are optional, because older files lack them.
STATE: dict[str, Any] = {"step": int, "best": (int, float), "optimizer": dict, "scaler": dict, "args": dict}


class NetworkAndLoss(nn.Module):
    """Network and loss in one module: the loss calls `model.mask_iou`, which DDP has to see, too."""

    anchors: Tensor

    def __init__(self, model: Yolact):
        super().__init__()
        self.model = model
        self.loss = MultiBoxLoss(model.config.loss)
        size = model.config.train_size
        self.register_buffer("anchors", model.anchors(size, size), persistent=False)
        self.positions = [rows * columns for rows, columns in feature_sizes(size, size)]

    def match(self, targets: list[Target]) -> Matches:
        """Return what every anchor has to predict in these images."""
        return self.loss.match(self.anchors, targets, self.positions)

    def forward(self, images: Tensor, targets: list[Target], part: Part) -> dict[str, Tensor]:
        """Return the weighted loss terms for normalised RGB images [B, 3, S, S]; see MultiBoxLoss for the arguments."""
        predictions = self.model(images)
        with torch.autocast(images.device.type, enabled=False):  # the loss is computed in float32
            return self.loss(predictions, self.anchors, targets, self.model.mask_iou, part)


class Trainer:
    """A model in training: `step` takes one optimiser step, `save` and `load` store and restore the state of the run.

    With several processes the batch is split among them, and all take the step that a single process would take with
    the whole batch. The same holds for gradient accumulation. The exception is batch norm: where it is trained, its
    statistics are those of one micro-batch.

    The model is modified in place. `accumulate` is the number of micro-batches that a batch is split into; for
    `precision` see `utils.device.choose_precision`. Checkpoints and reports of errors are written to `folder`.
    """

    def __init__(self, model: Yolact, folder: Path, ranks: Ranks, precision: str = "auto", accumulate: int = 1):
        config = model.config.training
        self.config, self.folder, self.ranks, self.device = config, folder, ranks, ranks.device
        self.dtype, self.tf32 = choose_precision(precision, self.device), precision == "tf32"
        self.accumulate = accumulate
        self.model = model.to(memory_format=torch.channels_last).to(self.device)
        # In training mode, layers that the configuration freezes have no gradients; what follows has to know them.
        self.network_and_loss = NetworkAndLoss(model).to(self.device).train()
        self.module: nn.Module = self.network_and_loss
        if ranks.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            # Batch norm statistics are those of each process; checkpoints hold the main process's.
            self.module = DistributedDataParallel(self.module, device_ids=devices, broadcast_buffers=False)
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False) if config.ema else None
        self.best_model = self.ema or self.model  # for validation and inference
        averaged = {} if self.ema is None else self.ema.state_dict()
        names = [name for name, value in averaged.items() if value.is_floating_point()]
        self._averaged = [averaged[name] for name in names]
        trained = model.state_dict()  # the tensors themselves, which the optimiser and `load` change in place
        self._current = [trained[name] for name in names]
        self.iteration = 0  # the number of steps taken
        self.best = -1.0  # mask AP of the best validation
        self.validated = 0  # the iteration of the last validation
        self.stale = 0  # validations since the best one

    def step(self, batch: Batch, lr: float) -> dict[str, float]:
        """Take one optimiser step at learning rate `lr`; return the weighted losses and their sum, "total".

        In float16, a step whose gradient overflows leaves the weights as they are, and counts. Raises UserError if a
        loss is not finite or, except in float16, if the norm of the gradient is not.
        """
        batch = batch.to(self.device)
        self.optimizer.zero_grad()
        losses = self._backward(batch)
        # Clip the gradient to a maximum norm. With an infinite limit only the norm is computed, for the check below.
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad or math.inf)
        # Copying the losses synchronises with the device. The sum over the processes is not finite if one loss is
        # not, so all processes stop together.
        sums = self.ranks.sum(torch.stack([*losses.values(), norm]).cpu()) / self.ranks.size
        *values, norm_value = sums.tolist()
        named = dict(zip(losses, values, strict=True))
        # In float16, GradScaler skips steps whose gradient is not finite, and lowers its scale.
        skipped = self.scaler.is_enabled() and not math.isfinite(norm_value)
        self._check_finite(batch, named if self.scaler.is_enabled() else named | {"gradient": norm_value})
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None and not skipped:
            self._update_ema()
        self.iteration += 1
        return named | {"total": sum(values)}

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Forward and backward pass of each micro-batch; return the sums of their weighted losses."""
        parts = batch.split(self.accumulate)
        matches = self.network_and_loss.match(batch.targets)
        # Every micro-batch divides by the numbers of anchors in the whole batch, so that their losses add up. DDP
        # averages the gradients of the processes.
        divisors = self.ranks.sum(count_anchors(matches)).clamp(min=1) / self.ranks.size
        sizes = [len(part.images) for part in parts]
        matches_of_parts = map(Matches._make, zip(*(field.split(sizes) for field in matches), strict=True))
        sums: dict[str, Tensor] = {}
        for number, (part, matched) in enumerate(zip(parts, matches_of_parts, strict=True), start=1):
            # DDP reduces the gradients only in the last micro-batch's backward pass.
            postpone = number < len(parts) and isinstance(self.module, DistributedDataParallel)
            with self.module.no_sync() if postpone else nullcontext():  # type: ignore[operator]
                half = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()
                with half, float32_math(self.tf32):
                    images = part.normalised(self.model.config.model).contiguous(memory_format=torch.channels_last)
                    losses = self.module(images, part.targets, Part(matched, divisors, len(batch.images)))
                    total = torch.stack([*losses.values()]).sum()
                with float32_math(self.tf32):
                    self.scaler.scale(total).backward()
            sums = {name: sums.get(name, 0) + value.detach() for name, value in losses.items()}
        return sums

    def _check_finite(self, batch: Batch, values: dict[str, float]) -> None:
        """Raise UserError, in all processes, if a value is not finite; write the batch's image ids to a file."""
        bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        if not bad:
            return
        path = self.folder / ("non_finite.json" if self.ranks.is_main else f"non_finite_{self.ranks.rank}.json")
        texts = {name: str(value) for name, value in values.items()}  # JSON has no NaN
        write_json(path, {"step": self.iteration + 1, "losses": texts, "image_ids": batch.image_ids})
        raise UserError(
            f"not finite in step {self.iteration + 1}: {bad}; the batch's image ids are in {path}. "
            "Check their annotations, or lower --lr"
        )

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Update the EMA in place: averaged = d * averaged + (1 - d) * current, also of batch norm's statistics.

        d is min(config.ema, (1 + n) / (5 + n)) after n steps. Until it reaches the configured value, the EMA therefore
        covers about the last quarter of all steps, and does not lag behind in a short run. The first step copies.
        """
        n = self.iteration
        decay = min(self.config.ema, (1 + n) / (5 + n)) if n else 0.0
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)

    def save(self, name: str, args: dict[str, Any] | None = None) -> None:
        """Save a checkpoint as `name` in the run's folder. Only the main process writes; all raise if it fails.

        Args:
            args: the arguments of the run. If given, all that resuming needs is saved. The file is then up to twice as
                large with SGD, up to three times with AdamW, and an EMA adds one more copy of the weights.
        """
        training: dict[str, Any] | None = None
        if args is not None:
            training = {
                "step": self.iteration,
                "best": self.best,
                "validated": self.validated,
                "stale": self.stale,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "args": args,
            }
            # The checkpoint's own weights are the EMA, which inference uses; "raw" are the weights that are trained.
            if self.ema is not None:
                training["raw"] = self.model.state_dict()
        problem = None
        if self.ranks.is_main:
            try:
                save_checkpoint(self.folder / name, self.best_model, training)
            except UserError as error:
                problem = error
        self.ranks.raise_in_all(problem)

    def load(self, training: dict[str, Any]) -> None:
        """Restore the training state that `save` wrote. The model must already have the checkpoint's weights.

        Raises UserError if the state does not match this model and configuration.
        """
        try:
            # With an EMA, the checkpoint's weights are the averaged ones. The model gets the trained weights back.
            if self.ema is not None:
                self.model.load_state_dict(training["raw"])
            self.optimizer.load_state_dict(training["optimizer"])
            if training["scaler"]:  # empty unless the run was in float16
                self.scaler.load_state_dict(training["scaler"])
            self.iteration, self.best = training["step"], training["best"]
            self.validated = int(training.get("validated", self.iteration))
            self.stale = int(training.get("stale", 0))
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.folder}: its training state is damaged ({reason[:100]})") from None


def check_resumable(training: dict[str, Any], uses_ema: bool, where: str) -> None:
    """Raise UserError unless `training` has all entries of STATE (and "raw" with an EMA), of the right types."""
    needed = STATE | ({"raw": dict} if uses_ema else {})
    missing = [key for key in needed if key not in training]
    if missing:
        raise UserError(f"{where}: its training state is incomplete ({', '.join(missing)}); use another checkpoint")
    wrong = [key for key, kind in needed.items() if not isinstance(training[key], kind)]
    if wrong or training["step"] < 0:
        raise UserError(
            f"{where}: its training state is damaged ({', '.join(wrong) or 'step'}); use another checkpoint"
        )
