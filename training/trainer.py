"""The training step, and the state of a run that checkpoints store and --resume restores."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from data.loader import Batch
from layers.anchors import feature_sizes
from layers.loss import MultiBoxLoss
from layers.matching import Matches
from layers.structures import Target
from training.schedule import build_optimizer, update_ema
from training.settings import Settings
from utils.device import autocast, choose_precision
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import exclusive, write_error, write_json
from weights.checkpoint import save_checkpoint
from yolact import Yolact

# The training state in a checkpoint and its types. "validated" and "stale" are optional, because older files lack them.
STATE: dict[str, Any] = {
    "step": int,
    "best": (int, float),
    "optimizer": dict,
    "scaler": dict,
    "random": Tensor,
    "args": dict,
}
EMA_STATE: dict[str, Any] = {"raw": dict, "averaged": int}


class TrainStep(nn.Module):
    """Network and loss in one module, so that DDP wraps both."""

    anchors: Tensor

    def __init__(self, model: Yolact):
        super().__init__()
        self.model = model
        self.loss = MultiBoxLoss(model.config.loss)
        size = model.config.train_size
        self.register_buffer("anchors", model.anchors(size, size), persistent=False)
        self.positions = [rows * columns for rows, columns in feature_sizes(size, size)]

    def match(self, targets: list[Target]) -> Matches:
        """Match the anchors to the objects of some images."""
        return self.loss.match(self.anchors, targets, self.positions)

    def forward(
        self,
        images: Tensor,
        targets: list[Target],
        num_positives: Tensor | None = None,
        num_images: int | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted loss terms for normalised RGB images [B, 3, S, S]; see MultiBoxLoss for the arguments."""
        predictions = self.model(images)
        with torch.autocast(images.device.type, enabled=False):  # the loss is computed in float32
            return self.loss(predictions, self.anchors, targets, self.model.mask_iou, num_positives, num_images)


class Trainer:
    """The state of a run and its training step.

    With several processes the batch is split among them, and all take the step that a single process would take with
    the whole batch. The same holds for `settings.accumulate` gradient accumulation steps. The exception is batch norm:
    where it is trained, its statistics are those of one micro-batch.
    """

    def __init__(self, model: Yolact, settings: Settings, ranks: Ranks):
        config = model.config.training
        self.settings, self.folder, self.ranks, self.device = settings, settings.output_dir, ranks, ranks.device
        self.dtype = choose_precision(settings.precision, self.device)
        if config.sync_bn and ranks.size > 1:
            if self.device.type != "cuda":
                raise UserError("sync_bn=true needs GPUs: PyTorch synchronises batch norm only between them")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(memory_format=torch.channels_last).to(self.device)
        self.step_module = TrainStep(model).to(self.device).train()
        self.module: nn.Module = self.step_module
        if ranks.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.step_module, device_ids=devices)
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = None
        if config.ema:
            self.ema = AveragedModel(model, multi_avg_fn=partial(update_ema, config.ema), use_buffers=True)
        self.step = 0
        self.best = -1.0  # mask AP
        self.validated = 0  # the step of the last validation
        self.stale = 0  # validations since the best one
        self.table = ""  # COCOeval's table of the last validation

    @property
    def batch_norm(self) -> str:
        """The mode of batch norm in this run: "frozen", "synchronised" or "trained"."""
        config = self.model.config.training
        if config.freeze_bn:
            return "frozen"
        return "synchronised" if config.sync_bn and self.ranks.size > 1 else "trained"

    def train_step(self, batch: Batch, lr: float) -> dict[str, float]:
        """Take one optimiser step at learning rate `lr`; return the weighted losses and their sum, "total".

        Raises UserError if a loss is not finite or, except in float16, if the gradient norm is not.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        # With an infinite limit nothing is clipped, but the norm is computed for the check below.
        limit = self.model.config.training.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if not self.scaler.is_enabled():  # GradScaler skips steps with non-finite gradients and lowers its scale
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
        """Accumulate the gradients of the batch over its micro-batches; return the summed, weighted losses."""
        parts = batch.split(self.settings.accumulate)
        num_positives, num_images = None, len(batch.images)
        if len(parts) > 1 or self.ranks.size > 1:
            # Every micro-batch divides by the number of positives in the whole batch, so that their losses add up.
            mine = self.step_module.match(batch.targets).positive.sum()
            num_positives = self.ranks.sum(mine).clamp(min=1) / self.ranks.size  # DDP averages the gradients
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            # DDP reduces the gradients only in the last micro-batch's backward pass.
            postpone = number < len(parts) and isinstance(self.module, DistributedDataParallel)
            with self.module.no_sync() if postpone else contextlib.nullcontext():  # type: ignore[operator]
                with autocast(self.device, self.dtype):
                    images = part.images.contiguous(memory_format=torch.channels_last)
                    losses = self.module(images, part.targets, num_positives, num_images)
                self._check_finite(part, losses)
                self.scaler.scale(sum(losses.values(), torch.zeros((), device=self.device))).backward()
            sums = {name: sums.get(name, 0) + value.detach() for name, value in losses.items()}
        return sums

    def _check_finite(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Raise UserError in all processes if a loss is not finite in one of them."""
        finite = bool(torch.isfinite(torch.stack([value.detach() for value in losses.values()])).all())
        if not self.ranks.any(not finite):
            return
        if finite:
            raise UserError(f"the loss is not finite at step {self.step} in another process")
        path = self.folder / f"non_finite{f'_{self.ranks.rank}' * (not self.ranks.main)}.json"
        values = {name: float(value.detach()) for name, value in losses.items()}
        report = {"step": self.step, "losses": {k: str(v) for k, v in values.items()}, "image_ids": batch.image_ids}
        write_json(path, report)
        bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        raise UserError(
            f"the loss is not finite at step {self.step} ({bad}); the batch's image ids are in {path}. "
            "Check their annotations, or lower --lr"
        )

    def ema_or_model(self) -> Yolact:
        """Return the model for validation and inference: the EMA if there is one, otherwise the trained model."""
        if self.ema is None:
            return self.model
        assert isinstance(self.ema.module, Yolact)
        return self.ema.module

    def save(self, name: str, with_state: bool = True) -> None:
        """Save a checkpoint as `name` in the run's folder. Only the main process writes; all raise if it fails.

        Args:
            with_state: also save what resuming needs. The file is then up to twice as large with SGD, up to three times
                with AdamW, and an EMA adds one more copy of the weights.
        """
        problem = None
        if self.ranks.main:
            try:
                self._write(name, with_state)
            except UserError as error:
                problem = error
        self.ranks.agree(problem)

    def _write(self, name: str, with_state: bool) -> None:
        if not with_state:
            save_checkpoint(self.folder / name, self.ema_or_model())
            return
        training: dict[str, Any] = {
            "step": self.step,
            "best": self.best,
            "validated": self.validated,
            "stale": self.stale,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "args": self.settings.to_dict(),
        }
        # The checkpoint's own weights are the EMA, which inference uses; "raw" are the weights that are trained.
        if self.ema is not None:
            training["raw"] = self.model.state_dict()
            training["averaged"] = int(self.ema.n_averaged)
        save_checkpoint(self.folder / name, self.ema_or_model(), training)

    def load(self, training: dict[str, Any]) -> None:
        """Restore the training state that `save` wrote. The model must already have the checkpoint's weights.

        Raises UserError if the state does not match this model and configuration.
        """
        try:
            self._load(training)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.folder}: its training state is damaged ({reason[:100]})") from None

    def _load(self, training: dict[str, Any]) -> None:
        # With an EMA, the checkpoint's weights are the averaged ones, and the model and its EMA copy both start with
        # them. Here the model, but not the EMA copy, gets the trained weights back.
        if self.ema is not None:
            self.ema.n_averaged.fill_(training["averaged"])
            self.model.load_state_dict(training["raw"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        torch.set_rng_state(training["random"])
        self.step, self.best = training["step"], training["best"]
        self.validated = int(training.get("validated", self.step))
        self.stale = int(training.get("stale", 0))


@contextlib.contextmanager
def claim_folder(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Create and lock a run's folder for the duration of the block.

    Temporary files that a killed run left are removed; other files are not touched. Raises UserError if another process
    is training in the folder, or the folder cannot be written.
    """
    busy = f"{folder}: another process is training in it; wait for it, or choose another --output_dir"
    problem = None
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if ranks.main:
                stack.enter_context(exclusive(folder / ".lock", busy))
                for name in (
                    "last.pth",
                    "best.pth",
                    "log.jsonl",
                    "run.json",
                    "first_batch.jpg",
                    "validation.jpg",
                    "curves.png",
                ):
                    for left in folder.glob(f".{name}.*.part"):
                        left.unlink()
        except OSError as error:
            problem = write_error(folder, error)
        except UserError as error:
            problem = error
        ranks.agree(problem)
        yield


def check_resumable(training: dict[str, Any], uses_ema: bool, where: str) -> None:
    """Raise UserError unless `training` has all entries of STATE (and EMA_STATE with an EMA), of the right types."""
    needed = STATE | (EMA_STATE if uses_ema else {})
    missing = [key for key in needed if key not in training]
    if missing:
        raise UserError(f"{where}: its training state is incomplete ({', '.join(missing)}); use another checkpoint")
    wrong = [key for key, kind in needed.items() if not isinstance(training[key], kind)]
    if wrong or training["step"] < 0:
        raise UserError(
            f"{where}: its training state is damaged ({', '.join(wrong) or 'step'}); use another checkpoint"
        )
