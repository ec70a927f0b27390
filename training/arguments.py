"""The arguments of train.py: what they are, and how they and a stored run become a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from backbone import find_backbone
from config import Config, get_config, override, parse_overrides, to_dict
from layers.loss import MultiBoxLoss
from layers.nms import NMS
from training.trainer import check_resumable
from utils.device import PRECISIONS, choose_device, choose_precision
from utils.distributed import Ranks
from utils.errors import ArgumentParser, UserError, integer, look_up
from weights.convert import Weights
from weights.load import read_weights
from weights.released import checkpoint_in
from weights.transfer import Start, read_start

# Flags that are fields of the configuration: `--lr 1e-3` is short for `--set lr=1e-3`.
CONFIG_FLAGS = ("batch_size", "lr", "epochs", "max_iter")
# Arguments that a resumed run cannot change: the result would not be that of one run.
FIXED = ("config", "set", "batch_size", "lr", "init", "seed")
# Values of arguments that are neither given nor stored. None means: without validation, one worker per core of a GPU's
# process, one thread per core, never; see the help.
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("val_annotations", "val_images", "workers", "threads", "val_interval", "patience")),
    "init": "imagenet", "accumulate": 1, "device": "auto", "precision": "auto", "seed": 0,
    "tensorboard": False, "ignore_audit": False,
}  # fmt: skip


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
    start.add_argument("--init", help="a file, a run's folder, a released name, imagenet (the default), or none")
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
    add("--workers", type=integer(0), help="data loading processes (default: 2, or more for a GPU); 0: none")
    add("--threads", type=integer(1), help="number of CPU threads (default: one per core)")
    add("--val_interval", type=integer(1), help="iterations between validations (default: see docs/training.md)")
    add("--patience", type=integer(1), help="stop after so many validations without a better mask AP (default: never)")
    add("--output_dir", help="folder for checkpoints and logs (default: runs/CONFIG)")
    add("--tensorboard", action="store_true", help="also write TensorBoard event files")
    add("--ignore_audit", action="store_true", help="train even if the audit finds errors")
    add("--seed", type=integer(0), help="random seed (0)")
    return parser


def new_run(given: dict[str, Any]) -> tuple[Start, Config, dict[str, Any]]:
    """Return the initial weights, the configuration and the arguments of a new run.

    Raises UserError for arguments that are missing or invalid, and if the output folder already holds a run.
    """
    if not {"train_annotations", "train_images"} <= given.keys() or not {"config", "init"} & given.keys():
        raise UserError(
            "to start a run, give --train_annotations, --train_images and --config or --init; to continue one, --resume"
        )
    start = None if "config" in given else read_start(given["init"])
    # A stored best threshold is that of the old weights.
    base = get_config(given["config"]) if start is None else override(start.config, best_score_threshold=0)
    flags = {key: given[key] for key in CONFIG_FLAGS if key in given}
    overrides = parse_overrides(given.get("set", [])) | flags
    config = override(base, **overrides)
    before = to_dict(base)
    adapted = {k: v for k, v in to_dict(config).items() if v and v != before[k] and k not in overrides}
    if adapted:
        texts = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in adapted.items()}
        if "lr_steps" in adapted:
            texts["lr_steps"] = str(tuple(round(step, 1) for step in adapted["lr_steps"]))
        print(f"adapted to {', '.join(overrides)}: {', '.join(f'{key} {text}' for key, text in texts.items())}")
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
    if "output_dir" in given and Path(given["output_dir"]).resolve() != path.parent.resolve():
        raise UserError(
            f"--output_dir has no effect with --resume, which continues in {path.parent}; copy that "
            "folder, and give the copy to --resume"
        )
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


def check_arguments(config: Config, args: dict[str, Any]) -> None:
    """Raise UserError for arguments that cannot work, before data are read or folders created."""
    if args["val_images"] and not args["val_annotations"]:
        raise UserError("--val_images has no effect without --val_annotations")
    if args["patience"] is not None and not args["val_annotations"]:
        raise UserError("--patience needs --val_annotations, because it compares validations")
    find_backbone(config.model.backbone, config.model.dcn_interval)
    look_up("nms", config.detection.nms, NMS)
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
