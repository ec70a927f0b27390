"""The training loop: steps, validation, checkpoints, and a clean shutdown on errors and signals."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from data.coco import CocoDataset
from data.loader import Batch
from evaluation import evaluate
from evaluation.evaluator import per_class_table
from inference import Predictor
from training.log import RunLog
from training.schedule import Schedule
from training.sheets import batch_sheet, comparison_sheet, worst_images
from training.trainer import Trainer
from utils.distributed import Ranks
from utils.errors import UserError

LOG_SECONDS = 30  # interval of progress lines if the output is not a terminal
ESTIMATE_STEPS = 5  # steps that are timed for the estimate, after the first one, which includes starting the workers


def fit(
    trainer: Trainer, schedule: Schedule, batches: Iterator[Batch], val: CocoDataset | None, val_interval: int
) -> bool:
    """Train until the schedule ends, early stopping applies, or a signal arrives; return False only if interrupted.

    With `settings.patience`, training stops early after that many consecutive validations without a better mask AP.

    Args:
        val: the validation set, or None to train without validation.
        val_interval: steps between validations and checkpoints.
    """
    ranks, unusable = trainer.ranks, UnusableImages(trainer.ranks, schedule.num_images)
    with (
        Interruption() as interruption,
        RunLog(trainer.folder, trainer.step, trainer.validated, trainer.settings.tensorboard, ranks.main) as log,
        Progress(schedule.max_iter, trainer.step, ranks.main) as progress,
    ):
        while True:
            if trainer.step > trainer.validated and (
                trainer.step % val_interval == 0 or trainer.step == schedule.max_iter
            ):
                trainer.save("last.pth")  # nothing is lost if validation fails: --resume repeats it
                if val is not None:
                    validate(trainer, val, log, progress)
                trainer.validated = trainer.step
                trainer.save("last.pth")
            if trainer.step >= schedule.max_iter:
                break
            if trainer.settings.patience is not None and trainer.stale >= trainer.settings.patience:
                progress.write(
                    f"stopped early at step {trainer.step}: mask AP has not improved in {trainer.stale} validations "
                    f"(best: {trainer.best:.3f})"
                )
                break
            started, lr = time.perf_counter(), schedule.lr_at(trainer.step)
            batch = next(batches).to(trainer.device)
            unusable.check(batch, progress)
            waited = time.perf_counter() - started
            if trainer.step == 0:
                log.image(0, "first_batch", batch_sheet(batch, trainer.model.config))
            losses = trainer.train_step(batch, lr)
            timing = {"seconds": round(time.perf_counter() - started, 4), "waited": round(waited, 4)}
            where = {"epoch": round(trainer.step / schedule.per_epoch, 3), "time": round(time.time(), 1)}
            rounded = {name: round(value, 4) for name, value in losses.items()}
            log.line(trainer.step, {**where, "lr": lr, **timing, **rounded})
            shown = {k: v for k, v in losses.items() if k != "mask_iou" or trainer.model.mask_iou is not None}
            progress.step(trainer.step, shown, lr)
            if ranks.any(bool(interruption)):
                trainer.save("last.pth")
                ranks.barrier()  # an interrupted run exits with 130, on which torchrun ends all processes
                break
    if unusable.problems:
        print(f"images that could not be used and were replaced by others: {len(unusable.problems)}")
    finished = trainer.validated == trainer.step
    if not finished:
        print(f"stopped at step {trainer.step}; continue with: python train.py --resume {trainer.folder}")
    return finished


def validate(trainer: Trainer, val: CocoDataset, log: RunLog, progress: Progress) -> None:
    """Compute and log the COCO metrics of the current model; save it as `best.pth` if its mask AP has improved."""
    model = trainer.ema_or_model()
    # Batch norm statistics differ between processes; checkpoints save those of the main process.
    trainer.ranks.broadcast(model.buffers())
    predictor = Predictor(model, trainer.device, trainer.dtype)
    metrics = evaluate(predictor, val, per_class=True, progress=sys.stderr.isatty(), ranks=trainer.ranks)
    improved = False
    if metrics is not None:  # in the main process
        for problem in metrics["problems"]:
            progress.write(f"warning: {problem}; the image is evaluated as having no detections")
        worst = worst_images(val, metrics["results"], metrics["sizes"])
        log.image(trainer.step, "validation", comparison_sheet(predictor, val, worst))
        box, mask = metrics["bbox"], metrics["segm"]
        progress.write(
            f"step {trainer.step}: box AP {box['AP']:.3f} AP50 {box['AP50']:.3f}, "
            f"mask AP {mask['AP']:.3f} AP50 {mask['AP50']:.3f}"
        )
        per_class = {name: row["AP"] for name, row in metrics["per_class"]["segm"].items()}
        log.line(trainer.step, {"time": round(time.time(), 1), "bbox": box, "segm": mask, "class_AP": per_class})
        trainer.table = metrics["table"] + per_class_table(metrics) * (len(val.class_names) > 1)
        improved = mask["AP"] > trainer.best
        trainer.best = max(trainer.best, mask["AP"])
    if trainer.ranks.any(improved):
        trainer.stale = 0
        trainer.save("best.pth", with_state=False)
    else:
        trainer.stale += 1
    log.curves()
    trainer.module.train()


class Interruption:
    """Defer Ctrl-C and SIGTERM until the current step is complete.

    A second signal more than two seconds later raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.first = 0.0

    def __bool__(self) -> bool:
        return self.first > 0

    def __call__(self, _number: int, _frame: Any) -> None:
        now = time.monotonic()
        # torchrun forwards signals that its processes have already received; that is not a second Ctrl-C.
        if self.first and now > self.first + 2:
            raise KeyboardInterrupt
        self.first = self.first or now

    def __enter__(self) -> Interruption:
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Progress:
    """Show a progress bar in a terminal, or print a line every LOG_SECONDS if the output is not a terminal."""

    def __init__(self, total: int, step: int, main: bool):
        self.terminal = sys.stderr.isatty()
        disable = not (main and self.terminal)
        self.bar = tqdm(total=total, initial=step, desc="training", dynamic_ncols=True, disable=disable)
        self.total, self.first, self.main = total, step, main
        self.started = self.printed = self.timed_from = time.monotonic()

    def step(self, step: int, losses: dict[str, float], lr: float) -> None:
        """Show the losses after a step."""
        text = " ".join(f"{name}={value:.2f}" for name, value in losses.items()) + f" lr={lr:.1e}"
        self.bar.update()
        self.bar.set_postfix_str(text, refresh=False)
        now = time.monotonic()
        if step == self.first + 1:
            self.timed_from = now
        if step == self.first + 1 + ESTIMATE_STEPS and self.main and step < self.total:
            per_step = (now - self.timed_from) / ESTIMATE_STEPS
            remaining = describe_duration(per_step * (self.total - step))
            self.write(f"{per_step:.2f} s per step: about {remaining} for the remaining steps, plus validation")
        if self.main and not self.terminal and (now > self.printed + LOG_SECONDS or step == self.total):
            self.printed = now
            per_step = (now - self.started) / (step - self.first)
            minutes = per_step * (self.total - step) / 60
            print(f"step {step}/{self.total} {text} {per_step:.2f} s/step, {minutes:.0f} min left", file=sys.stderr)

    def write(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        self.bar.write(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def describe_duration(seconds: float) -> str:
    """Return a duration in words, such as "2 h 10 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class UnusableImages:
    """Collect the unusable images that were replaced: each is reported once, and too many of them end the run."""

    def __init__(self, ranks: Ranks, num_images: int):
        self.ranks, self.num_images = ranks, num_images
        self.problems: set[str] = set()

    def check(self, batch: Batch, progress: Progress) -> None:
        """Raise UserError if more than 1 % of the images (and more than one), or ten in a row, are unusable."""
        if not self.ranks.any(bool(batch.problems)):
            return
        problem = ""
        for problem in dict.fromkeys(self.ranks.all_gather(batch.problems)):
            if problem not in self.problems:
                progress.write(f"warning: {problem}; another image takes its place")
            self.problems.add(problem)
        if len(self.problems) > max(1, self.num_images // 100) or self.ranks.any(not len(batch.images)):
            raise UserError(
                f"{len(self.problems)} of {self.num_images} images cannot be used; python -m data.audit lists them. "
                f"The last problem was: {problem}"
            )
