"""Train YOLACT on any data set in COCO format.

python train.py --config yolact_lite --train_annotations train.json --train_images photos \
                --val_annotations val.json --val_images photos
python train.py ... --set max_size=256 --set lr=5e-4       # any key of data/config.py
python train.py ... --init yolact_r50                      # fine-tune released or own weights
python train.py ... --batch_size 64 --accumulate 8         # a large batch on a small GPU, 8 pictures at a time
python train.py --resume runs/yolact_lite                  # go on exactly where a run stopped
torchrun --nproc_per_node 8 train.py --config yolact_r50_8xb8 ...   # the batch is spread over 8 GPUs
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...  # on each machine

The run's folder gets `last.pth` and `best.pth` (each is enough to predict and to resume), `log.jsonl`, a line a step,
`first_batch.jpg`, what the network is fed, and `validation.jpg`, predictions beside the truth.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.audit import quick_audit
from data.coco import Batch, CocoDataset, training_batches
from data.config import Config, get_config, override, parse_overrides
from data.errors import UserError, positive, run_main
from engine.checkpoint import read_checkpoint
from engine.devices import PRECISIONS, keep_memory
from engine.distributed import Ranks, join
from engine.evaluator import compare_classes, evaluate, per_class_table
from engine.finetune import init_model
from engine.predictor import Predictor
from engine.runlog import RunLog
from engine.schedule import Schedule
from engine.sheets import batch_sheet, comparison_sheet
from engine.trainer import Run
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
    parser.add_argument("--batch_size", type=positive, help="of a step, over all processes; rate and schedule scale")
    parser.add_argument("--accumulate", type=positive, default=1, help="parts that a batch goes through in")
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
    parser.add_argument("--tensorboard", action="store_true", help="write event files too (pip install tensorboard)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="key=value", help="override the configuration"
    )
    return parser.parse_args()


def load_data(args: argparse.Namespace, config: Config, ranks: Ranks) -> tuple[CocoDataset, CocoDataset | None]:
    train = CocoDataset(args.train_annotations, args.train_images)
    train.check_photos()
    if ranks.main:
        quick_audit(train, config)
    if args.val_annotations is None:
        return train, None
    val = CocoDataset(args.val_annotations, args.val_images or args.train_images)
    val.check_photos()
    if ranks.main:
        quick_audit(val, config)
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


def build_run(args: argparse.Namespace, ranks: Ranks) -> tuple[Run, CocoDataset, CocoDataset | None]:
    """Data, model and optimiser, new or as the checkpoint of --resume has them."""
    args.output_dir = args.output_dir or _resumed_folder(args.resume) or Path("runs") / Path(args.config).stem
    if args.resume is None:
        torch.manual_seed(args.seed)
        if (args.output_dir / "last.pth").exists():
            raise UserError(
                f"{args.output_dir} holds a run: --resume {args.output_dir}, or choose another --output_dir"
            )
        config = get_config(args.config, **parse_overrides(args.set))
        train, val = load_data(args, config, ranks)
        config = override(config, class_names=train.class_names, category_ids=train.category_ids)
        model = Yolact(config)
        init_model(model, args.init)
        return Run(model, args, ranks), train, val
    path = args.resume / "last.pth" if args.resume.is_dir() else args.resume
    content = read_checkpoint(path)
    if "training" not in content:
        raise UserError(f"{path}: holds weights alone, no state of a run; start a new one with --init {path}")
    restore_arguments(args, content["training"]["args"])
    model = Yolact.from_weights(path)
    train, val = load_data(args, model.config, ranks)
    if train.class_names != model.config.class_names:
        raise UserError(f"{train.path}: its categories are not the run's\n{compare_classes(train, model.config)}")
    run = Run(model, args, ranks)
    run.load(content["training"])
    print(f"resumed {path} at step {run.step}")
    return run, train, val


class Interruption:
    """Ctrl-C and SIGTERM, noted: the step under way is finished first. The second one, seconds later, acts at once."""

    def __init__(self) -> None:
        self.first = 0.0

    def __bool__(self) -> bool:
        return self.first > 0

    def __call__(self, _number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.first and now > self.first + 2:  # torchrun passes on what its processes have received themselves
            raise KeyboardInterrupt
        self.first = self.first or now

    def __enter__(self) -> Interruption:
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def fit(run: Run, schedule: Schedule, batches: Iterator[Batch], val: CocoDataset | None, val_interval: int) -> bool:
    """Train to the end of the schedule, or until told to stop by Ctrl-C or SIGTERM; True when it was the end."""
    ranks, unusable = run.ranks, Unusable(run.ranks, schedule.num_images)
    bar = tqdm(total=schedule.max_iter, initial=run.step, desc="training", dynamic_ncols=True, disable=not ranks.main)
    with (
        Interruption() as interruption,
        RunLog(run.folder, run.step, run.args.tensorboard, ranks.main) as log,
        bar,
    ):
        while True:
            if run.step > run.validated and (run.step % val_interval == 0 or run.step == schedule.max_iter):
                run.save("last.pth")  # whatever the validation meets
                if val is not None:
                    validate(run, val, log, bar)
                run.validated = run.step
                run.save("last.pth")
            if run.step >= schedule.max_iter:
                break
            started, lr = time.perf_counter(), schedule.rate(run.step)
            batch = next(batches).to(run.device)
            unusable.check(batch, bar)
            waited = time.perf_counter() - started
            if run.step == 0:
                log.picture(0, "first_batch", batch_sheet(batch, run.model.config))
            losses = run.train_step(batch, lr)
            timing = {"seconds": time.perf_counter() - started, "waited": waited}
            log.line(run.step, {"lr": lr, **timing, **{name: round(value, 4) for name, value in losses.items()}})
            bar.update()
            shown = {name: f"{value:.2f}" for name, value in losses.items()} | {"lr": f"{lr:.1e}"}
            bar.set_postfix(shown, refresh=False)
            if ranks.any(bool(interruption)):
                run.save("last.pth")
                ranks.wait()  # a process that ended earlier would have torchrun end the one that writes
                break
    if unusable.problems:
        print(f"{len(unusable.problems)} photos could not be used and were replaced by others")
    finished = run.validated == schedule.max_iter
    if not finished:
        print(f"stopped at step {run.step}; go on with: python train.py --resume {run.folder}")
    return finished


class Unusable:
    """The photos that a run had to replace by others: each is named once, and too many of them end it."""

    def __init__(self, ranks: Ranks, num_images: int):
        self.ranks, self.num_images = ranks, num_images
        self.problems: set[str] = set()

    def check(self, batch: Batch, bar: tqdm) -> None:
        """UserError when more than 1 % of the photos cannot be used (one may), or ten in a row."""
        if not self.ranks.any(bool(batch.problems)):
            return
        for problem in dict.fromkeys(self.ranks.share(batch.problems)):
            if problem not in self.problems:
                bar.write(f"{problem}; another photo takes its place")
            self.problems.add(problem)
        if len(self.problems) > max(1, self.num_images // 100) or self.ranks.any(not len(batch.images)):
            raise UserError(
                f"{len(self.problems)} of {self.num_images} photos cannot be used: python -m data.audit lists them; "
                f"the last one: {problem}"
            )


def validate(run: Run, val: CocoDataset, log: RunLog, bar: tqdm) -> None:
    """COCO metrics of the model as it is, logged; it is kept as `best.pth` when its mask AP is the best so far."""
    model = run.averaged()
    run.ranks.copy_from_main(model.buffers())  # batch norm's statistics differ, and the main process's are saved
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == run.dtype)
    predictor = Predictor(model, str(run.device), precision, graphs=False)
    metrics = evaluate(
        predictor, val, per_class=True, progress=sys.stderr.isatty(), ranks=run.ranks, unreadable=bar.write
    )
    if metrics is not None:
        log.picture(run.step, "validation", comparison_sheet(predictor, val))
        box, mask = metrics["bbox"], metrics["segm"]
        bar.write(
            f"step {run.step}: box AP {box['AP']:.3f} AP50 {box['AP50']:.3f}, "
            f"mask AP {mask['AP']:.3f} AP50 {mask['AP50']:.3f}"
        )
        per_class = {name: row["AP"] for name, row in metrics["per_class"]["segm"].items()}
        log.line(run.step, {"bbox": box, "segm": mask, "class_AP": per_class})
        run.table = metrics["table"] + per_class_table(metrics) * (len(val.class_names) > 1)
        if mask["AP"] > run.best:
            run.best = mask["AP"]
            run.save("best.pth")
    run.module.train()


def train(args: argparse.Namespace, ranks: Ranks) -> bool:
    """Build all that a run needs and train; True when the schedule's end was reached."""
    run, train_set, val_set = build_run(args, ranks)
    config, batch_size = run.model.config, args.batch_size or run.model.config.batch_size
    if batch_size % ranks.size or batch_size < ranks.size * args.accumulate:
        raise UserError(
            f"batch size {batch_size} cannot be shared by {ranks.size} processes in {args.accumulate} parts each"
        )
    schedule = Schedule.build(config, len(train_set), args.batch_size, args.lr, args.epochs, args.max_iter)
    print(schedule)
    print(
        f"{config.name}: {config.num_classes} classes, {len(train_set)} photos, {config.max_size} px, "
        f"{str(run.dtype).removeprefix('torch.')} on {ranks.size} x {run.device}, batch norm {run.batch_norm}"
    )
    together = batch_size // args.accumulate // (1 if run.batch_norm == "synchronised" else ranks.size)
    if together < batch_size and not config.freeze_bn:
        print(f"batch norm is trained on {together} pictures at a time; with freeze_bn=true parts equal the whole")
    batches = training_batches(
        train_set,
        config,
        batch_size=batch_size // ranks.size,
        seed=args.seed,
        start=run.step * batch_size,
        workers=args.workers,
        pin_memory=run.device.type == "cuda",
        rank=ranks.rank,
        world_size=ranks.size,
    )
    finished = fit(run, schedule, batches, val_set, args.val_interval or max(500, schedule.per_epoch))
    if finished:
        print(run.table, end="\n" * bool(run.table))
        print(f"done: {run.folder / 'last.pth'}" + (f", best: {run.folder / 'best.pth'}" if run.best >= 0 else ""))
    return finished


def main() -> int:
    args = parse_args()
    keep_memory()
    if args.resume is None and not (args.config and args.train_annotations and args.train_images):
        raise UserError("give --config, --train_annotations and --train_images, or --resume with a run's folder")
    with join(args.device) as ranks:
        return 0 if train(args, ranks) else 130


if __name__ == "__main__":
    run_main(main)
