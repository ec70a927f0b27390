"""Train YOLACT on any data set in COCO format.

python train.py --config yolact_lite --train_annotations train.json --train_images photos \
                --val_annotations val.json --val_images photos
python train.py ... --set max_size=256 --set lr=5e-4       # any key of data/config.py
python train.py ... --init yolact_r50                      # fine-tune released or own weights
python train.py --resume runs/yolact_lite                  # go on exactly where a run stopped

The run's folder gets `last.pth` and `best.pth` (each is enough to predict and to resume) and `log.jsonl`,
a line a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from data.coco import Batch, CocoDataset, training_batches
from data.config import Config, get_config, override, parse_overrides
from data.errors import UserError, positive, run_main
from engine.checkpoint import read_checkpoint, save_checkpoint
from engine.devices import PRECISIONS, autocast, choose_device, choose_precision
from engine.evaluator import compare_classes, evaluate
from engine.finetune import init_model
from engine.predictor import Predictor
from layers.loss import MultiBoxLoss
from yolact import Yolact


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train YOLACT on a data set in COCO format.", allow_abbrev=False)
    parser.add_argument("--config", help="a name of data/config.py, or a .py file that defines `config`")
    parser.add_argument("--train_annotations", type=Path, help="COCO JSON; the classes come from it")
    parser.add_argument("--train_images", type=Path, help="the folder of its photos")
    parser.add_argument("--val_annotations", type=Path)
    parser.add_argument("--val_images", type=Path)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--init", default="imagenet", help="weights to start from: a file, a released name, imagenet, none"
    )
    start.add_argument("--resume", type=Path, help="the folder (or checkpoint) of a run to go on with")
    parser.add_argument("--batch_size", type=positive, help="the learning rate and the schedule scale with it")
    parser.add_argument("--lr", type=float, help="learning rate, taken as it is")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive)
    length.add_argument("--max_iter", type=positive)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS])
    parser.add_argument("--workers", type=int, default=2, help="processes that read and augment; 0: none")
    parser.add_argument(
        "--val_interval", type=int, help="iterations between validations; an epoch, or 500 if that is more"
    )
    parser.add_argument("--output_dir", type=Path, help="runs/CONFIG by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="key=value", help="override the configuration"
    )
    return parser.parse_args()


class TrainStep(nn.Module):
    """Network and loss as one module, pictures and targets in, losses out: what each step runs."""

    def __init__(self, model: Yolact):
        super().__init__()
        self.model = model
        self.loss = MultiBoxLoss(model.config)
        size = model.config.max_size
        self.register_buffer("anchors", model.anchors(size, size), persistent=False)

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        predictions = self.model(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.loss(predictions, self.anchors, targets, self.model.mask_iou)


@dataclasses.dataclass
class Schedule:
    """Learning rate and length, scaled to the batch size that is used."""

    config: Config
    lr: float
    max_iter: int
    steps: tuple[int, ...]

    @classmethod
    def build(cls, config: Config, args: argparse.Namespace, num_images: int) -> Schedule:
        batch_size = args.batch_size or config.batch_size
        scale = batch_size / config.batch_size
        per_epoch = max(1, math.ceil(num_images / batch_size))
        lr = config.lr * scale if args.lr is None else args.lr
        if args.max_iter or args.epochs:
            max_iter = args.max_iter or args.epochs * per_epoch
            whole = config.epochs * per_epoch or round(config.max_iter / scale)
            steps = tuple(
                round(s * (per_epoch if config.epochs else 1 / scale) * max_iter / whole) for s in config.lr_steps
            )
        elif config.epochs:
            max_iter, steps = config.epochs * per_epoch, tuple(s * per_epoch for s in config.lr_steps)
        else:
            max_iter, steps = round(config.max_iter / scale), tuple(round(s / scale) for s in config.lr_steps)
        plan = f"cosine to 0 at {max_iter}" if config.lr_schedule == "cosine" else f"x{config.lr_gamma} at {steps}"
        scaled = "" if args.lr is not None or scale == 1 else f" ({config.lr:g} x {scale:g} for the batch size)"
        print(
            f"schedule: {max_iter} iterations of {batch_size} ({max_iter / per_epoch:.1f} epochs), learning rate "
            f"{lr:g}{scaled}, {plan}, warm-up {config.warmup_iters}"
        )
        return cls(config, lr, max_iter, steps)

    def rate(self, step: int) -> float:
        config = self.config
        if self.config.lr_schedule == "cosine":
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


class Run:
    """The state of a run: all that a checkpoint holds, and where it is written."""

    def __init__(self, model: Yolact, args: argparse.Namespace, device: torch.device):
        config = model.config
        self.args, self.folder = args, args.output_dir
        self.model = model.to(device, memory_format=torch.channels_last)
        self.dtype = choose_precision(args.precision, device)
        self.device = device
        self.module = TrainStep(model).to(device).train()
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.ema = None
        if config.ema:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        self.step = 0
        self.best = -1.0
        self.table = ""  # COCOeval's, of the last validation
        self.folder.mkdir(parents=True, exist_ok=True)

    def train_step(self, batch: Batch, lr: float) -> dict[str, float]:
        """One step of the optimiser; the losses, weighted, and their sum."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(self.device, self.dtype):
            losses = self.module(batch.images.contiguous(memory_format=torch.channels_last), batch.targets)
        total = sum(losses.values())
        if not torch.isfinite(total):
            self._stop_non_finite(batch, losses)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.model.config.clip_grad or math.inf)
        if not (norm.isfinite() or self.scaler.is_enabled()):  # a scaler skips such a step and lowers its scale
            self._stop_non_finite(batch, losses | {"gradient": norm})
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        return {name: float(value.detach()) for name, value in losses.items()} | {"total": float(total.detach())}

    def _stop_non_finite(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        path = self.folder / "non_finite.json"
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
        training: dict[str, Any] = {
            "step": self.step,
            "best": self.best,
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


def load_data(args: argparse.Namespace) -> tuple[CocoDataset, CocoDataset | None]:
    train = CocoDataset(args.train_annotations, args.train_images)
    train.check_photos()
    if args.val_annotations is None:
        return train, None
    val = CocoDataset(args.val_annotations, args.val_images or args.train_images)
    val.check_photos()
    if val.class_names != train.class_names:
        known = Config("train", class_names=train.class_names, category_ids=train.category_ids)
        table = compare_classes(val, known).replace("in the weights", "in training")
        raise UserError(f"{val.path}: its categories are not those of {train.path}\n{table}")
    return train, val


def restore_arguments(args: argparse.Namespace, stored: dict[str, Any]) -> None:
    """Fill `args` with what the run was started with; what is given now counts where it can."""
    given = {word.split("=")[0].lstrip("-") for word in sys.argv[1:] if word.startswith("--")}
    for key in ("config", "set", "batch_size", "lr", "init", "seed"):
        if key in given:
            raise UserError(f"--{key} cannot change in a run that goes on; start a new one with --init {args.resume}")
    if given & {"epochs", "max_iter"}:
        given |= {"epochs", "max_iter"}
    for key, value in stored.items():
        if key not in given and key not in ("resume", "output_dir"):
            is_path = key.endswith(("_annotations", "_images")) and value is not None
            setattr(args, key, Path(value) if is_path else value)


def _resumed_folder(resume: Path | None) -> Path | None:
    return resume if resume is None or resume.is_dir() else resume.parent


def build_run(args: argparse.Namespace) -> tuple[Run, CocoDataset, CocoDataset | None]:
    """Data, model and optimiser, new or as the checkpoint of --resume has them."""
    args.output_dir = args.output_dir or _resumed_folder(args.resume) or Path("runs") / Path(args.config).stem
    if args.resume is None:
        torch.manual_seed(args.seed)
        device = choose_device(args.device)
        if (args.output_dir / "last.pth").exists():
            raise UserError(
                f"{args.output_dir} holds a run: --resume {args.output_dir}, or choose another --output_dir"
            )
        train, val = load_data(args)
        config = get_config(args.config, **parse_overrides(args.set))
        config = override(config, class_names=train.class_names, category_ids=train.category_ids)
        model = Yolact(config)
        init_model(model, args.init)
        return Run(model, args, device), train, val
    path = args.resume / "last.pth" if args.resume.is_dir() else args.resume
    content = read_checkpoint(path)
    if "training" not in content:
        raise UserError(f"{path}: holds weights alone, no state of a run; start a new one with --init {path}")
    restore_arguments(args, content["training"]["args"])
    model = Yolact.from_weights(path)
    train, val = load_data(args)
    if train.class_names != model.config.class_names:
        raise UserError(f"{train.path}: its categories are not the run's\n{compare_classes(train, model.config)}")
    run = Run(model, args, choose_device(args.device))
    run.load(content["training"])
    print(f"resumed {path} at step {run.step}")
    return run, train, val


def fit(run: Run, schedule: Schedule, batches: Iterator[Batch], val: CocoDataset | None, val_interval: int) -> bool:
    """Train to the end of the schedule, or until told to stop by Ctrl-C or SIGTERM; True when it was the end."""
    stopped: list[int] = []  # by signals; the step under way is finished first

    def stop(number: int, _: Any) -> None:
        if stopped:
            raise KeyboardInterrupt  # the second time at once
        stopped.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    unreadable = 0
    try:
        with (
            (run.folder / "log.jsonl").open("a", encoding="utf-8") as log,
            tqdm(total=schedule.max_iter, initial=run.step, desc="training", dynamic_ncols=True) as bar,
        ):
            while run.step < schedule.max_iter and not stopped:
                started, lr = time.perf_counter(), schedule.rate(run.step)
                batch = next(batches).to(run.device)
                if not len(batch.images):
                    raise UserError(f"ten photos in a row cannot be used; the last: {batch.problems[-1]}")
                waited = time.perf_counter() - started
                losses = run.train_step(batch, lr)
                timing = {"seconds": time.perf_counter() - started, "waited": waited}
                rounded = {name: round(value, 4) for name, value in losses.items()}
                log.write(json.dumps({"step": run.step, "lr": lr, **timing, **rounded}) + "\n")
                for problem in batch.problems:
                    unreadable += 1
                    bar.write(f"{problem}; another photo takes its place")
                bar.update()
                bar.set_postfix({name: f"{value:.2f}" for name, value in losses.items()}, refresh=False)
                if run.step % val_interval == 0 or run.step == schedule.max_iter:
                    log.flush()
                    run.save("last.pth")  # whatever the validation meets
                    if val is not None and not stopped:
                        metrics = validate(run, val)
                        bar.write(f"step {run.step}: {summary(metrics)}")
                        log.write(json.dumps({"step": run.step, **metrics}) + "\n")
                        run.save("last.pth")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if unreadable:
        print(f"{unreadable} times a photo could not be read and was replaced by another")
    if stopped:
        run.save("last.pth")
        print(f"stopped at step {run.step}; go on with: python train.py --resume {run.folder}")
    return not stopped


def validate(run: Run, val: CocoDataset) -> dict[str, dict[str, float]]:
    """COCO metrics of the model as it is; it is kept as `best.pth` when its mask AP is the best so far."""
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == run.dtype)
    predictor = Predictor(run.averaged(), str(run.device), precision)
    metrics = evaluate(predictor, val, progress=sys.stderr.isatty())
    run.module.train()
    run.table = metrics["table"]
    if metrics["segm"]["AP"] > run.best:
        run.best = metrics["segm"]["AP"]
        run.save("best.pth")
    return {kind: metrics[kind] for kind in ("bbox", "segm")}


def summary(metrics: dict[str, dict[str, float]]) -> str:
    box, mask = metrics["bbox"], metrics["segm"]
    return f"box AP {box['AP']:.3f} AP50 {box['AP50']:.3f}, mask AP {mask['AP']:.3f} AP50 {mask['AP50']:.3f}"


def main() -> int:
    args = parse_args()
    if args.resume is None and not (args.config and args.train_annotations and args.train_images):
        raise UserError("give --config, --train_annotations and --train_images, or --resume with a run's folder")
    run, train, val = build_run(args)
    device = run.device
    config = run.model.config
    batch_size = args.batch_size or config.batch_size
    schedule = Schedule.build(config, args, len(train))
    print(
        f"{config.name}: {config.num_classes} classes, {len(train)} photos, {config.max_size} px, "
        f"{str(run.dtype).removeprefix('torch.')} on {device}, batch norm {'frozen' if config.freeze_bn else 'trained'}"
    )
    batches = training_batches(
        train,
        config,
        batch_size=batch_size,
        seed=args.seed,
        start=run.step * batch_size,
        workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    finished = fit(run, schedule, batches, val, args.val_interval or max(500, math.ceil(len(train) / batch_size)))
    if finished and val is not None:
        print(run.table)
    if finished:
        print(f"done: {run.folder / 'last.pth'}" + (f", best: {run.folder / 'best.pth'}" if run.best >= 0 else ""))
    return 0 if finished else 130


if __name__ == "__main__":
    run_main(main)
