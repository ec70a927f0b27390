"""Train YOLACT on any data set in COCO format.

python train.py --config yolact_lite --train_annotations train.json --train_images images \
                --val_annotations val.json --val_images images
python train.py ... --set max_size=256 lr=5e-4             # any field of config.py
python train.py ... --init yolact_r50                      # fine-tune released weights or your own
python train.py ... --batch_size 64 --accumulate 8         # gradient accumulation: 8 micro-batches of 8 images
python train.py --resume runs/yolact_lite                  # continue exactly where a run stopped
torchrun --nproc_per_node 8 train.py --config yolact_r50_8xb8 ...   # the batch is split over 8 GPUs
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...  # on each machine

The run's folder contains `last.pth` (for inference and for resuming; written at every validation, and when the run is
stopped), `log.jsonl` with one line for each step and each validation, `run.json` with the commands and the
configuration, and `first_batch.jpg` (the first training batch as the network receives it). With a validation set, also
`best.pth` (for inference), `validation.jpg` (predictions next to the ground truth) and `curves.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# GNU OpenMP's threads spin while they wait. If another process uses one of the cores, a training step of yolact_lite at
# 320 px then takes 14.7 s instead of 0.3. With this count, read when torch is imported, it takes 2.0 s. On an idle
# machine it changes nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

try:
    import cv2  # noqa: F401
except ImportError as error:  # libGL, for instance, in a container
    print(f"error: OpenCV: {error}; without a display, install opencv-python-headless instead", file=sys.stderr)
    sys.exit(2)

import torch
from tqdm import tqdm

from backbone import find_backbone
from config import Config, as_set_arguments, get_config, override, parse_overrides, to_dict
from data.coco import CocoDataset
from data.loader import Batch, TrainingLoader, UnusableImages
from evaluation import evaluate
from evaluation.evaluator import check_classes, per_class_table
from inference import Predictor
from layers.loss import MultiBoxLoss
from layers.nms import find_nms
from training.run_folder import RunLog, claim_folder, write_record
from training.schedule import Schedule
from training.trainer import Trainer, check_resumable
from utils.device import PRECISIONS, choose_device, choose_precision, configure_process
from utils.distributed import Ranks, StopSignal, process_group
from utils.errors import ArgumentParser, UserError, integer, run_main
from weights.convert import Weights
from weights.load import load_state, read_weights
from weights.released import checkpoint_in
from weights.transfer import Start, init_model, read_start
from yolact import Yolact

# Flags that are fields of the configuration: `--lr 1e-3` is short for `--set lr=1e-3`.
CONFIG_FLAGS = ("batch_size", "lr", "epochs", "max_iter")
# Arguments that a resumed run cannot change: the result would not be that of one run.
FIXED = ("config", "set", "batch_size", "lr", "init", "seed")
# Values of arguments that are neither given nor stored. None means: without validation, the configuration's own length,
# one thread per core, never; see the help.
DEFAULTS: dict[str, Any] = {
    "val_annotations": None,
    "val_images": None,
    "init": "imagenet",
    "accumulate": 1,
    "device": "auto",
    "precision": "auto",
    "workers": 2,
    "threads": None,
    "val_interval": None,
    "patience": None,
    "tensorboard": False,
    "ignore_audit": False,
    "seed": 0,
}


def build_parser() -> ArgumentParser:
    """Build the parser. Arguments that are not given are absent from the namespace, see DEFAULTS.

    Resuming therefore distinguishes arguments that override a stored one from those that were not given.
    """
    parser = ArgumentParser(
        description="Train YOLACT on a data set in COCO format.", allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("--config", help="a configuration named in config.py, or a .py file that defines `config`")
    add("--train_annotations", help="annotations in COCO format; they define the classes")
    add("--train_images", help="folder of the training images")
    add("--val_annotations", help="annotations of the validation set, in COCO format")
    add("--val_images", help="folder of the validation images (default: --train_images)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--init",
        help="weights to start from: a file, a run's folder, a released name, imagenet (the default), or none; "
        "without --config, the configuration in the file is used",
    )
    start.add_argument("--resume", type=Path, help="continue a run, given its folder or a checkpoint")
    add("--batch_size", help="images per step over all processes; learning rate, length and EMA follow if not set")
    add("--lr", help="learning rate")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", help="number of epochs, instead of the configuration's length")
    length.add_argument("--max_iter", help="number of iterations, instead of the configuration's length")
    add("--set", nargs="+", action="extend", metavar="key=value", help="any field of the configuration")
    add("--accumulate", type=integer(1), help="gradient accumulation: micro-batches per step (1)")
    add("--device", help="auto (default), cpu, cuda, cuda:1 or mps")
    add("--precision", choices=["auto", *PRECISIONS], help="network precision; losses use float32")
    add("--workers", type=integer(0), help="data loading processes (2); 0: load in the main process")
    add("--threads", type=integer(1), help="number of CPU threads (default: one per core)")
    add("--val_interval", type=integer(1), help="iterations between validations (default: see docs/training.md)")
    add("--patience", type=integer(1), help="stop after so many validations without a better mask AP (default: never)")
    add("--output_dir", help="folder for checkpoints and logs (default: runs/CONFIG)")
    add("--tensorboard", action="store_true", help="also write TensorBoard event files")
    add("--ignore_audit", action="store_true", help="train even if the audit finds errors")
    add("--seed", type=integer(0), help="random seed (0)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Start or resume a run. Return 0 if training finished, also by early stopping, and 130 if it was interrupted."""
    given = vars(build_parser().parse_args(argv))
    configure_process(given.get("threads"))
    resume: Path | None = given.pop("resume", None)
    start, stored = None, None
    if resume is not None:
        stored, config, args = resumed_run(resume, given)
    with process_group(args["device"] if stored else given.get("device", "auto")) as ranks:
        if stored is None:
            with ranks.main_first():  # only the main process downloads weights
                start, config, args = new_run(given)
        check_batch(config, args, ranks)
        torch.manual_seed(args["seed"])
        train, val = load_data(args, config, ranks, resumed=stored is not None)
        config = override(config, class_names=train.class_names, category_ids=train.category_ids)
        if start is not None:
            if config.training.fit_anchors and not chosen(args) & {"anchor_sizes", "aspect_ratios"}:
                from tools.fit_anchors import fit_anchors, keep_anchors

                # Weights depend on their anchors, so those of --init are kept, if there are as many per position.
                config = keep_anchors(config, start.config) if start.weights else fit_anchors(config, train)
            model = Yolact(config)
            with ranks.main_first():
                init_model(model, start)
        else:
            assert stored is not None
            model = Yolact(config)
            load_state(model, stored, str(resume))
        with claim_folder(Path(args["output_dir"]), ranks):
            trainer = Trainer(model, Path(args["output_dir"]), ranks, args["precision"], args["accumulate"])
            if stored is not None:
                trainer.load(stored.training or {})
                print(f"resumed {resume} at step {trainer.iteration}")
            schedule = Schedule.build(config.training, len(train))
            if trainer.iteration > schedule.max_iter:
                raise UserError(f"the run is at step {trainer.iteration}, beyond --max_iter {schedule.max_iter}")
            describe(trainer, schedule, train)
            if ranks.is_main:
                write_record(trainer.folder, args, config, resumed=stored is not None)
            start_at = trainer.iteration * config.training.batch_size  # images that the run has already used
            loader = TrainingLoader(train, config, args["seed"], start_at, args["workers"], ranks)
            with loader as batches:
                finished = fit(trainer, batches, schedule, val, args)
    return 0 if finished else 130


def fit(
    trainer: Trainer, batches: Iterator[Batch], schedule: Schedule, val: CocoDataset | None, args: dict[str, Any]
) -> bool:
    """Train to the end of the schedule, or until a validation or a signal stops the run; return False for a signal."""
    ranks, table = trainer.ranks, ""
    unusable = UnusableImages(schedule.num_images)
    # By default one epoch of at least 500 iterations, or a fifth of a shorter run, but at least 20 iterations.
    val_interval = args["val_interval"] or min(max(500, schedule.per_epoch), max(20, schedule.max_iter // 5))
    log = RunLog(trainer.folder, trainer.iteration, trainer.validated, args["tensorboard"], ranks.is_main)
    progress = progress_bar(schedule.max_iter, trainer.iteration, ranks.is_main)
    with StopSignal() as stop_signal, log, progress:
        while True:
            due = trainer.iteration % val_interval == 0 or trainer.iteration == schedule.max_iter
            if due and trainer.iteration > trainer.validated:
                trainer.save("last.pth", args)  # nothing is lost if validation fails: --resume repeats it
                table = validate(trainer, val, log)
                trainer.save("last.pth", args)  # again, with the result of the validation
            if trainer.iteration == schedule.max_iter or is_stale(trainer, args):
                break
            started, lr = time.perf_counter(), schedule.lr_at(trainer.iteration)
            batch = next(batches)
            unusable.check(batch)
            waited = time.perf_counter() - started
            if trainer.iteration == 0:
                from tools.sheets import batch_sheet

                log.image(0, "first_batch", batch_sheet(batch, trainer.model.config))

            with explained_memory(trainer.device):
                losses = trainer.step(batch, lr)

            times = {"seconds": time.perf_counter() - started, "waited": waited, "time": time.time()}
            values = {"epoch": trainer.iteration / schedule.per_epoch, **times, **losses}
            log.line(trainer.iteration, {"lr": lr} | {name: round(value, 4) for name, value in values.items()})
            shown = {
                name: value
                for name, value in losses.items()
                if name != "mask_iou" or trainer.model.mask_iou is not None
            }
            progress.set_postfix({name: f"{value:.2f}" for name, value in shown.items()}, refresh=False)
            progress.update()
            if ranks.any(stop_signal.received):
                trainer.save("last.pth", args)
                ranks.barrier()  # an interrupted run exits with 130, on which torchrun ends all processes
                print(f"stopped at step {trainer.iteration}; continue with: python train.py --resume {trainer.folder}")
                return False
    if table:
        print(table)
    if is_stale(trainer, args):
        print(
            f"stopped early at step {trainer.iteration}: mask AP has not improved in {trainer.stale} validations "
            f"(best: {trainer.best:.3f})"
        )
    if unusable.problems:
        print(f"images that could not be used and were replaced by others: {len(unusable.problems)}")
    best = f", best: {trainer.folder / 'best.pth'}" if trainer.best >= 0 else ""
    print(f"done: {trainer.folder / 'last.pth'}{best}")
    return True


def progress_bar(total: int, initial: int, is_main: bool) -> tqdm:
    """Return the progress bar of a run. In a file, each update is kept, so there is one in half a minute only."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=initial, desc="training", mininterval=interval, disable=not is_main)


@contextlib.contextmanager
def explained_memory(device: torch.device) -> Iterator[None]:
    """Turn an error about too little memory into one line that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError:
        advice = "lower --batch_size, or split it with --accumulate"
        raise UserError(f"{device} has not enough memory for a step; {advice}") from None


def is_stale(trainer: Trainer, args: dict[str, Any]) -> bool:
    """Whether --patience is exhausted."""
    return args["patience"] is not None and trainer.stale >= args["patience"]


def validate(trainer: Trainer, val: CocoDataset | None, log: RunLog) -> str:
    """Compute and log the COCO metrics of the current model; save it as `best.pth` if its mask AP has improved.

    Returns COCOeval's table, or "" without a validation set.
    """
    if val is None:
        trainer.validated = trainer.iteration
        return ""
    model, ranks = trainer.ema_or_model(), trainer.ranks
    ranks.broadcast(model.buffers())  # batch norm statistics differ between processes
    predictor = Predictor(model, trainer.device, trainer.dtype)
    metrics = evaluate(predictor, val, per_class=True, progress=sys.stderr.isatty(), ranks=ranks)
    improved, table = False, ""
    if metrics is not None:  # in the main process
        from tools.curves import draw_curves
        from tools.sheets import comparison_sheet, worst_images

        for problem in metrics["problems"]:
            tqdm.write(f"warning: {problem}; the image is evaluated as having no detections")
        worst = worst_images(val, metrics["results"], metrics["sizes"])
        log.image(trainer.iteration, "validation", comparison_sheet(predictor, val, worst))
        box, mask = metrics["bbox"], metrics["segm"]
        tqdm.write(
            f"step {trainer.iteration}: box AP {box['AP']:.3f} AP50 {box['AP50']:.3f}, "
            f"mask AP {mask['AP']:.3f} AP50 {mask['AP50']:.3f}"
        )
        table = metrics["table"] + (per_class_table(metrics) if len(val.class_names) > 1 else "")
        per_class = {name: row["AP"] for name, row in metrics["per_class"]["segm"].items()}
        log.line(trainer.iteration, {"time": round(time.time(), 1), "bbox": box, "segm": mask, "class_AP": per_class})
        score = mask["AP"] if mask["AP"] >= 0 else box["AP"]  # -1: the validation set has no masks
        improved = score > trainer.best
        trainer.best = max(trainer.best, score)
        draw_curves(log.folder / "log.jsonl", log.folder / "curves.png")
    if ranks.any(improved):
        trainer.stale = 0
        trainer.save("best.pth")
    else:
        trainer.stale += 1
    trainer.validated = trainer.iteration
    trainer.module.train()
    return table


def new_run(given: dict[str, Any]) -> tuple[Start, Config, dict[str, Any]]:
    """Return the initial weights, the configuration and the arguments of a new run.

    Raises UserError for arguments that are missing or invalid, and if the output folder already holds a run.
    """
    if not {"train_annotations", "train_images"} <= given.keys() or not {"config", "init"} & given.keys():
        raise UserError(
            "to start a run, give --train_annotations, --train_images and --config or --init; to continue one, --resume"
        )
    start = None if "config" in given else read_start(given["init"])
    base = get_config(given["config"]) if start is None else start.config
    flags = {key: given[key] for key in CONFIG_FLAGS if key in given}
    overrides = parse_overrides(given.get("set", [])) | flags
    config = override(base, **overrides)
    adapted = [key for key, value in to_dict(config).items() if value != to_dict(base)[key] and key not in overrides]
    if adapted:
        print(f"adapted to {', '.join(overrides)}: {as_set_arguments(config, adapted)}")
    name = Path(given.get("config", config.name)).stem
    args = DEFAULTS | {"output_dir": f"runs/{name}"} | given
    if (Path(args["output_dir"]) / "last.pth").exists():
        folder = args["output_dir"]
        raise UserError(f"{folder} already holds a run; use --resume {folder}, or choose another --output_dir")
    check_arguments(config, args)
    return start or read_start(args["init"]), config, args


def resumed_run(resume: Path, given: dict[str, Any]) -> tuple[Weights, Config, dict[str, Any]]:
    """Return the weights with the training state, the configuration, and the arguments of a run updated with `given`.

    Raises UserError if the file has no valid training state, or an argument cannot change in a resumed run.
    """
    for key in FIXED:
        if key in given:
            raise UserError(f"--{key} cannot change in a run that is resumed; start a new one with --init {resume}")
    if not resume.exists():
        raise UserError(f"--resume {resume}: no such run; give the --output_dir of an earlier one")
    path = checkpoint_in(resume, ("last.pth",)) if resume.is_dir() else resume
    weights = read_weights(path)
    config, training = weights.config, weights.training
    if training is None:
        raise UserError(f"{path}: holds only weights and no training state; start a new run with --init {path}")
    check_resumable(training, bool(config.training.ema), str(path))
    length = {key: given[key] for key in ("epochs", "max_iter") if key in given}
    stored = {key: value for key, value in training["args"].items() if value is not None}
    args = DEFAULTS | stored | given | {"output_dir": str(path.parent)}
    if not isinstance(args.get("train_annotations"), str) or not isinstance(args.get("train_images"), str):
        raise UserError(f"{path.parent}: the arguments of this run are damaged (they name no training data)")
    config = override(config, **length)
    check_arguments(config, args)
    return weights, config, args


def chosen(args: dict[str, Any]) -> set[str]:
    """Return the fields of the configuration that the user has set."""
    return {*parse_overrides(args.get("set") or []), *(key for key in CONFIG_FLAGS if key in args)}


def check_arguments(config: Config, args: dict[str, Any]) -> None:
    """Raise UserError for arguments that cannot work, before data are read or folders created."""
    if args["val_images"] and not args["val_annotations"]:
        raise UserError("--val_images has no effect without --val_annotations")
    if args["patience"] is not None and not args["val_annotations"]:
        raise UserError("--patience needs --val_annotations, because it compares validations")
    find_backbone(config.model.backbone, config.model.dcn_interval)
    find_nms(config.detection.nms)
    MultiBoxLoss(config.loss)  # raises for an unknown assigner
    choose_precision(args["precision"], choose_device(args["device"]))


def check_batch(config: Config, args: dict[str, Any], ranks: Ranks) -> None:
    """Raise UserError if the batch cannot be split over the processes and micro-batches."""
    batch_size = config.training.batch_size
    if batch_size % ranks.size or batch_size < ranks.size * args["accumulate"]:
        raise UserError(
            f"batch size {batch_size} cannot be split over {ranks.size} processes with {args['accumulate']} "
            "gradient accumulation steps each"
        )


def load_data(
    args: dict[str, Any], config: Config, ranks: Ranks, resumed: bool
) -> tuple[CocoDataset, CocoDataset | None]:
    """Read and audit the training set and, if one is given, the validation set.

    Raises UserError if a file cannot be read, the classes differ, or the audit finds errors (see --ignore_audit).
    """
    from tools.audit import quick_audit
    from tools.formats.readers import open_coco

    train = open_coco(args["train_annotations"], args["train_images"])
    datasets, notes = [train], [""]
    if resumed:
        notes.append(check_classes(train, config, "in the run"))
    if args["val_annotations"]:
        datasets.append(open_coco(args["val_annotations"], args["val_images"] or args["train_images"]))
        known = override(config, class_names=train.class_names, category_ids=train.category_ids)
        notes.append(check_classes(datasets[-1], known, "in training"))
        if datasets[-1].path.resolve() == train.path.resolve():
            print("warning: training and validation use the same annotations, so AP will be too high")
    for note in filter(None, notes):
        print(note)
    for dataset in datasets:
        dataset.check_images()
        errors = quick_audit(dataset, config) if ranks.is_main else []
        problem = None
        if errors and not args["ignore_audit"]:
            problem = UserError(f"{errors[0]} (use --ignore_audit to train anyway)".removeprefix("error: "))
        ranks.raise_in_all(problem)
    if train.num_copies:
        print(
            f"{train.path}: {train.num_copies} annotations repeat another one of the same image; training ignores them"
        )
    return train, datasets[1] if len(datasets) > 1 else None


def describe(trainer: Trainer, schedule: Schedule, train: CocoDataset) -> None:
    """Print what will be trained and how, and warnings about settings that are unlikely to work."""
    from tools.advice import objects_per_class, unlikely_settings

    config, ranks = trainer.model.config, trainer.ranks
    synchronised = config.training.sync_bn and ranks.size > 1
    mode = "frozen" if config.training.freeze_bn else "synchronised" if synchronised else "trained"
    size = f"{config.train_size} px"
    if config.train_size != config.model.max_size:
        size += f" (train_scale {config.training.train_scale:g} of max_size {config.model.max_size})"
    dtype = "tf32" if trainer.tf32 else str(trainer.dtype).removeprefix("torch.")
    print(schedule)
    print(
        f"{config.name}: {config.num_classes} classes, {len(train)} images, {size}, {dtype} on "
        f"{ranks.size} x {trainer.device}, batch norm {mode}"
    )
    # The number of images that batch norm computes its statistics over in one forward pass.
    batch_size = config.training.batch_size
    per_pass = batch_size // trainer.accumulate // (1 if synchronised else ranks.size)
    if per_pass < batch_size and not config.training.freeze_bn:
        print(
            f"batch norm statistics are computed over {per_pass} of {batch_size} images at a time; "
            "with freeze_bn=true, splitting the batch does not change the result"
        )
    for line in unlikely_settings(config, per_pass, objects_per_class(train)):
        print(f"warning: {line}")


if __name__ == "__main__":
    run_main(main)
