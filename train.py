"""Train YOLACT on any data set in COCO format.

python train.py --config yolact_lite --train_annotations train.json --train_images images \
                --val_annotations val.json --val_images images
python train.py ... --set max_size=256 lr=5e-4             # any field of config.py
python train.py ... --init yolact_r50                      # fine-tune released weights or your own
python train.py ... --batch_size 64 --accumulate 8         # gradient accumulation: 8 micro-batches of 8 images
python train.py --resume runs/yolact_lite                  # continue exactly where a run stopped
torchrun --nproc_per_node 8 train.py --config yolact_r50_8xb8 ...   # the batch is split over 8 GPUs
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...  # on each machine

The run's folder contains `last.pth` (for inference and for resuming), `best.pth` (for inference), `log.jsonl` with one
line per step, `run.json` with the commands and the configuration, `first_batch.jpg` (the first training batch as the
network receives it), and `validation.jpg` (predictions next to the ground truth).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from config import Config, get_config, override, parse_overrides, retired, shown, to_dict
from data.audit import quick_audit
from data.coco import CocoDataset
from data.loader import TrainingLoader
from data.sampling import epoch_indices
from evaluation.evaluator import check_classes
from training.advice import objects_per_class, unlikely_settings
from training.batch_size import fitting_batch_size
from training.fit_anchors import fit_anchors, keep_anchors
from training.loop import fit
from training.schedule import Schedule
from training.settings import Settings
from training.trainer import Trainer, check_resumable, claim_folder
from utils.device import PRECISIONS, choose_device, choose_precision, configure_process
from utils.distributed import Ranks, join
from utils.errors import ArgumentParser, UserError, integer, integer_or_auto, positive_float, run_main
from utils.files import write_json
from weights.checkpoint import read_checkpoint
from weights.load import build_model, weights_from
from weights.released import checkpoint_in
from weights.transfer import init_model, read_start
from yolact import Yolact


def build_parser() -> ArgumentParser:
    """Build the parser. Arguments that are not given are absent from the namespace, not None.

    Resuming therefore distinguishes arguments that override a stored setting from those that were not given.
    """
    parser = ArgumentParser(
        description="Train YOLACT on a data set in COCO format.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", help="a configuration named in config.py, or a .py file that defines `config`")
    parser.add_argument("--train_annotations", type=Path, help="annotations in COCO format; they define the classes")
    parser.add_argument("--train_images", type=Path, help="folder of the training images")
    parser.add_argument("--val_annotations", type=Path, help="annotations of the validation set, in COCO format")
    parser.add_argument("--val_images", type=Path, help="folder of the validation images (default: --train_images)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--init",
        help="weights to start from: a file, a run's folder, a released name, imagenet (the default), or none; "
        "without --config, the configuration in the file is used",
    )
    start.add_argument("--resume", type=Path, help="continue a run, given its folder or a checkpoint")
    parser.add_argument(
        "--batch_size",
        type=integer_or_auto,
        help="images per step over all processes; scales the schedule. auto: as many as a CUDA GPU can hold (untested)",
    )
    parser.add_argument("--accumulate", type=integer(1), help="gradient accumulation: micro-batches per step (1)")
    parser.add_argument("--lr", type=positive_float, help="learning rate; it is not scaled to the batch size")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=integer(1), help="number of epochs, instead of the configuration's")
    length.add_argument("--max_iter", type=integer(1), help="number of iterations, instead of the configuration's")
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1 or mps")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], help="network precision; losses use float32")
    parser.add_argument("--workers", type=integer(0), help="data loading processes (2); 0: load in the main process")
    parser.add_argument(
        "--val_interval", type=integer(1), help="iterations between validations (default: one epoch, at least 500)"
    )
    parser.add_argument(
        "--patience", type=integer(1), help="stop after this many validations without a better mask AP (default: never)"
    )
    parser.add_argument("--output_dir", type=Path, help="folder for checkpoints and logs (default: runs/CONFIG)")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files")
    parser.add_argument("--ignore_audit", action="store_true", help="train even if the audit finds errors")
    parser.add_argument("--follow_links", action="store_true", help="follow links to files outside the image folders")
    parser.add_argument("--seed", type=integer(0), help="random seed (0)")
    parser.add_argument("--set", nargs="+", action="extend", metavar="key=value", help="override configuration fields")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = vars(build_parser().parse_args(argv))
    configure_process()
    resume: Path | None = given.pop("resume", None)
    if resume is None:
        return start_run(given)
    return resume_run(resume, given)


def start_run(given: dict[str, Any]) -> int:
    """Start a new run; return the exit code, see `train_to_end`.

    Raises UserError for arguments that are missing or invalid, and if the output folder already holds a run.
    """
    if not {"train_annotations", "train_images"} <= given.keys() or not {"config", "init"} & given.keys():
        raise UserError(
            "to start a run, give --train_annotations, --train_images and --config or --init; to continue one, --resume"
        )
    if "val_images" in given and "val_annotations" not in given:
        raise UserError("--val_images has no effect without --val_annotations")
    start = read_start(given.get("init", "imagenet"))
    config = get_config(given["config"]) if "config" in given else start.config
    overrides = parse_overrides(given.get("set", []))
    config = override(config, **overrides)
    if given.get("batch_size") == "auto":
        device = choose_device(given.get("device", "auto"))
        dtype = choose_precision(given.get("precision", "auto"), device)
        given["batch_size"] = fitting_batch_size(config, device, dtype)
        print(f"--batch_size auto: {given['batch_size']}")
    given.setdefault("output_dir", Path("runs") / Path(given.get("config", config.name)).stem)
    settings = Settings(**given | {"set": tuple(given.get("set", ()))})
    folder = settings.output_dir
    if (folder / "last.pth").exists():
        raise UserError(f"{folder} already holds a run; use --resume {folder}, or choose another --output_dir")
    with join(settings.device) as ranks:
        torch.manual_seed(settings.seed)
        train, val = load_data(settings, config, ranks)
        config = override(config, class_names=train.class_names, category_ids=train.category_ids)
        if config.training.fit_anchors and not {"anchor_sizes", "aspect_ratios"} & overrides.keys():
            # Weights depend on their anchors, so those of --init are kept.
            config = keep_anchors(config, start.config) if start.weights else fit_anchors(config, train)
        model = Yolact(config)
        init_model(model, start)
        with claim_folder(folder, ranks):
            return train_to_end(Trainer(model, settings, ranks), train, val)


def resume_run(resume: Path, given: dict[str, Any]) -> int:
    """Continue a run with its stored settings, overridden by the arguments given now; return the exit code.

    Raises UserError if the file has no valid training state, or an argument cannot change in a resumed run.
    """
    if not resume.exists():
        raise UserError(f"--resume {resume}: no such run; give the --output_dir of an earlier one")
    path = checkpoint_in(resume, ("last.pth",)) if resume.is_dir() else resume
    content = read_checkpoint(path)
    weights = weights_from(content, path)
    training = content.get("training")
    if not isinstance(training, dict):
        raise UserError(f"{path}: holds only weights and no training state; start a new run with --init {path}")
    check_resumable(training, bool(weights.config.training.ema), str(path))
    changed = retired(content["config"])
    if changed:
        raise UserError(f"{path}: trained with {shown(content['config'], changed)}, which can no longer be set")
    settings = Settings.resumed(training["args"], given, path.parent)
    with join(settings.device) as ranks:
        train, val = load_data(settings, weights.config, ranks)
        check_classes(train, weights.config, "in the run")
        with claim_folder(settings.output_dir, ranks):
            # The file's model weights are the EMA's if there is one; `load` then restores the weights being trained,
            # the optimiser and the random state, so no seed is set here.
            trainer = Trainer(build_model(weights, path), settings, ranks)
            trainer.load(training)
            print(f"resumed {path} at step {trainer.step}")
            return train_to_end(trainer, train, val)


def load_data(settings: Settings, config: Config, ranks: Ranks) -> tuple[CocoDataset, CocoDataset | None]:
    """Read and audit the training set and, if one is given, the validation set.
    Raises UserError if a file cannot be read, the classes differ, or the audit finds errors (see --ignore_audit).
    """
    assert settings.train_annotations is not None
    assert settings.train_images is not None
    train = CocoDataset(settings.train_annotations, settings.train_images, settings.follow_links)
    datasets = [train]
    if settings.val_annotations is not None:
        val_images = settings.val_images or settings.train_images
        datasets.append(CocoDataset(settings.val_annotations, val_images, settings.follow_links))
        known = override(config, class_names=train.class_names, category_ids=train.category_ids)
        check_classes(datasets[-1], known, "in training")
        if settings.val_annotations.resolve() == settings.train_annotations.resolve():
            print("warning: training and validation use the same annotations, so AP will be too high")
    for dataset in datasets:
        dataset.check_images()
        errors = quick_audit(dataset, config) if ranks.main else []
        problem = None
        if errors and not settings.ignore_audit:
            problem = UserError(f"{errors[0]} (use --ignore_audit to train anyway)".removeprefix("error: "))
        ranks.agree(problem)
    copies = train.count_copies()
    if copies:
        print(f"{train.path}: {copies} annotations duplicate another one of the same image and are ignored in training")
    return train, datasets[1] if len(datasets) > 1 else None


def train_to_end(trainer: Trainer, train: CocoDataset, val: CocoDataset | None) -> int:
    """Train; return 0 if training finished, including by early stopping, and 130 if interrupted."""
    settings, ranks, config = trainer.settings, trainer.ranks, trainer.model.config
    batch_size = settings.batch_size or config.training.batch_size
    if batch_size % ranks.size or batch_size < ranks.size * settings.accumulate:
        raise UserError(
            f"batch size {batch_size} cannot be split over {ranks.size} processes with {settings.accumulate} "
            "gradient accumulation steps each"
        )
    per_epoch = len(epoch_indices(train, config.training.repeat_threshold))
    schedule = Schedule.build(config.training, per_epoch, batch_size, settings.lr, settings.epochs, settings.max_iter)
    if trainer.step > schedule.max_iter:
        raise UserError(f"{trainer.folder}: the run is at step {trainer.step}, beyond --max_iter {schedule.max_iter}")
    print(schedule)
    size = f"{config.train_size} px" + f" for {config.model.max_size}" * (config.train_size != config.model.max_size)
    print(
        f"{config.name}: {config.num_classes} classes, {len(train)} images, {size}, "
        f"{str(trainer.dtype).removeprefix('torch.')} on {ranks.size} x {trainer.device}, "
        f"batch norm {trainer.batch_norm}"
    )
    # The number of images that batch norm computes its statistics over in one forward pass.
    together = batch_size // settings.accumulate // (1 if trainer.batch_norm == "synchronised" else ranks.size)
    if together < batch_size and not config.training.freeze_bn:
        print(
            f"batch norm statistics are computed over {together} of {batch_size} images at a time; "
            "with freeze_bn=true, splitting the batch does not change the result"
        )
    for line in unlikely_settings(config, schedule, together, objects_per_class(train)):
        print(f"warning: {line}")
    if settings.patience is not None and val is None:
        raise UserError("--patience needs --val_annotations, because it compares validations")
    if ranks.main:
        write_record(trainer)
    loader = TrainingLoader(
        train,
        config,
        batch_size=batch_size // ranks.size,
        seed=settings.seed,
        start=trainer.step * batch_size,  # images already used; a resumed run continues with the next one
        workers=settings.workers,
        ranks=ranks,
    )
    with loader as batches:
        finished = fit(trainer, schedule, batches, val, settings.val_interval or max(500, schedule.per_epoch))
    if not finished:
        return 130
    print(trainer.table, end="\n" * bool(trainer.table))
    best = f", best: {trainer.folder / 'best.pth'}" if trainer.best >= 0 else ""
    print(f"done: {trainer.folder / 'last.pth'}{best}")
    return 0


def write_record(trainer: Trainer) -> None:
    """Write the commands that started and resumed a run, and its configuration, as `run.json`."""
    path = trainer.folder / "run.json"
    try:
        commands = json.loads(path.read_text(encoding="utf-8"))["commands"] if trainer.step else []
    except (OSError, ValueError, KeyError, TypeError):
        commands = []
    commands = [*commands, shlex.join(["python", *sys.argv])]
    settings, config = trainer.settings.to_dict(), to_dict(trainer.model.config)
    write_json(path, {"commands": commands, "settings": settings, "config": config, "torch": torch.__version__})


if __name__ == "__main__":
    run_main(main)
