"""Train YOLACT on any data set in COCO format.

python train.py --config yolact_lite --train_annotations train.json --train_images images \
                --val_annotations val.json --val_images images
python train.py ... --set max_size=256 lr=5e-4             # any field of config.py
python train.py ... --init yolact_r50                      # fine-tune released or own weights
python train.py ... --batch_size 64 --accumulate 8         # a large batch on a small GPU, 8 images at a time
python train.py --resume runs/yolact_lite                  # continue exactly where a run stopped
torchrun --nproc_per_node 8 train.py --config yolact_r50_8xb8 ...   # the batch is shared by 8 GPUs
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...  # on each machine

The run's folder gets `last.pth` and `best.pth` (each is enough to predict and to resume), `log.jsonl` with one line per
step, `run.json` with the command and the configuration, `first_batch.jpg` (what the network is fed), and
`validation.jpg` (predictions beside the ground truth).
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
from evaluation.evaluator import check_classes
from training.loop import fit
from training.schedule import Schedule
from training.settings import Settings
from training.trainer import Trainer, check_resumable, claim_folder
from utils.device import PRECISIONS, configure_process
from utils.distributed import Ranks, join
from utils.errors import ArgumentParser, UserError, integer, positive_float, run_main
from utils.files import write_json
from weights.checkpoint import read_checkpoint
from weights.load import build_model, weights_from
from weights.released import checkpoint_in
from weights.transfer import init_model, read_start
from yolact import Yolact


def build_parser() -> ArgumentParser:
    """Arguments that are not given are absent, so that a resumed run knows which ones are."""
    parser = ArgumentParser(
        description="Train YOLACT on a data set in COCO format.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", help="a name of config.py, or a .py file that defines `config`")
    parser.add_argument("--train_annotations", type=Path, help="COCO JSON; the classes come from it")
    parser.add_argument("--train_images", type=Path, help="the folder of its images")
    parser.add_argument("--val_annotations", type=Path, help="COCO JSON of the validation set")
    parser.add_argument("--val_images", type=Path, help="the folder of its images, by default --train_images")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--init",
        help="weights to start from: a file, a run's folder, a released name, imagenet (the default), or none; "
        "without --config, the configuration in the file is used",
    )
    start.add_argument("--resume", type=Path, help="the folder (or checkpoint) of a run to continue")
    parser.add_argument("--batch_size", type=integer(1), help="of a step, over all processes; the schedule scales")
    parser.add_argument("--accumulate", type=integer(1), help="micro-batches that a batch is split into")
    parser.add_argument("--lr", type=positive_float, help="learning rate, not scaled with the batch size")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=integer(1), help="length of the run, instead of the configuration's")
    length.add_argument("--max_iter", type=integer(1), help="the same in iterations")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], help="of the network; losses are in float32")
    parser.add_argument("--workers", type=integer(0), help="processes that read and augment (2); 0: none")
    parser.add_argument(
        "--val_interval", type=integer(1), help="iterations between validations; an epoch, or 500 if that is more"
    )
    parser.add_argument("--output_dir", type=Path, help="runs/CONFIG by default")
    parser.add_argument("--tensorboard", action="store_true", help="write event files too (pip install tensorboard)")
    parser.add_argument("--ignore_audit", action="store_true", help="train although the audit found errors")
    parser.add_argument("--follow_links", action="store_true", help="accept links that lead out of the image folders")
    parser.add_argument("--seed", type=integer(0), help="of everything random (0)")
    parser.add_argument("--set", nargs="+", action="extend", metavar="key=value", help="override the configuration")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = vars(build_parser().parse_args(argv))
    configure_process()
    resume: Path | None = given.pop("resume", None)
    if resume is None:
        return start_run(given)
    return resume_run(resume, given)


def start_run(given: dict[str, Any]) -> int:
    """Start a new run."""
    if not {"train_annotations", "train_images"} <= given.keys() or not {"config", "init"} & given.keys():
        raise UserError(
            "give --train_annotations and --train_images with --config or --init, or --resume with a run's folder"
        )
    start = read_start(given.get("init", "imagenet"))
    config = get_config(given["config"]) if "config" in given else start.config
    config = override(config, **parse_overrides(given.get("set", [])))
    given.setdefault("output_dir", Path("runs") / Path(given.get("config", config.name)).stem)
    settings = Settings(**given | {"set": tuple(given.get("set", ()))})
    folder = settings.output_dir
    if (folder / "last.pth").exists():
        raise UserError(f"{folder} holds a run: --resume {folder}, or choose another --output_dir")
    with join(settings.device) as ranks:
        torch.manual_seed(settings.seed)
        train, val = load_data(settings, config, ranks)
        config = override(config, class_names=train.class_names, category_ids=train.category_ids)
        model = Yolact(config)
        init_model(model, start)
        with claim_folder(folder, ranks):
            return train_to_end(Trainer(model, settings, ranks), train, val)


def resume_run(resume: Path, given: dict[str, Any]) -> int:
    """Continue a run with the settings that it was started with, and those given now where they can change."""
    path = checkpoint_in(resume, ("last.pth",)) if resume.is_dir() else resume
    content = read_checkpoint(path)
    weights = weights_from(content, path)
    training = content.get("training")
    if not isinstance(training, dict):
        raise UserError(f"{path}: holds only weights, no state of a run; start a new one with --init {path}")
    check_resumable(training, bool(weights.config.training.ema), str(path))
    changed = retired(content["config"])
    if changed:
        raise UserError(f"{path}: was trained with {shown(content['config'], changed)}, which can no longer be set")
    settings = Settings.resumed(training["args"], given, path.parent)
    with join(settings.device) as ranks:
        train, val = load_data(settings, weights.config, ranks)
        check_classes(train, weights.config, "in the run")
        with claim_folder(settings.output_dir, ranks):
            trainer = Trainer(build_model(weights, path), settings, ranks)
            trainer.load(training)
            print(f"resumed {path} at step {trainer.step}")
            return train_to_end(trainer, train, val)


def load_data(settings: Settings, config: Config, ranks: Ranks) -> tuple[CocoDataset, CocoDataset | None]:
    """Read and audit the data sets. Raises UserError if training on them would go wrong."""
    assert settings.train_annotations is not None
    assert settings.train_images is not None
    train = CocoDataset(settings.train_annotations, settings.train_images, settings.follow_links)
    datasets = [train]
    if settings.val_annotations is not None:
        val_images = settings.val_images or settings.train_images
        datasets.append(CocoDataset(settings.val_annotations, val_images, settings.follow_links))
        known = override(config, class_names=train.class_names, category_ids=train.category_ids)
        check_classes(datasets[-1], known, "in training")
    for dataset in datasets:
        dataset.check_images()
        errors = quick_audit(dataset, config) if ranks.main else []
        problem = None
        if errors and not settings.ignore_audit:
            problem = UserError(f"{errors[0]} (--ignore_audit trains all the same)".removeprefix("error: "))
        ranks.agree(problem)
    copies = train.count_copies()
    if copies:
        print(f"{train.path}: {copies} annotations repeat another one of the same image; training drops them")
    return train, datasets[1] if len(datasets) > 1 else None


def train_to_end(trainer: Trainer, train: CocoDataset, val: CocoDataset | None) -> int:
    """Train; return 0 if the schedule's end was reached and 130 if the run was interrupted."""
    settings, ranks, config = trainer.settings, trainer.ranks, trainer.model.config
    batch_size = settings.batch_size or config.training.batch_size
    if batch_size % ranks.size or batch_size < ranks.size * settings.accumulate:
        raise UserError(
            f"batch size {batch_size} cannot be shared by {ranks.size} processes in {settings.accumulate} "
            "micro-batches each"
        )
    schedule = Schedule.build(config.training, len(train), batch_size, settings.lr, settings.epochs, settings.max_iter)
    if trainer.step > schedule.max_iter:
        raise UserError(f"{trainer.folder}: the run is at step {trainer.step}, beyond --max_iter {schedule.max_iter}")
    print(schedule)
    print(
        f"{config.name}: {config.num_classes} classes, {len(train)} images, {config.model.max_size} px, "
        f"{str(trainer.dtype).removeprefix('torch.')} on {ranks.size} x {trainer.device}, "
        f"batch norm {trainer.batch_norm}"
    )
    together = batch_size // settings.accumulate // (1 if trainer.batch_norm == "synchronised" else ranks.size)
    if together < batch_size and not config.training.freeze_bn:
        print(f"batch norm is trained on {together} images at a time; freeze_bn=true makes the split exact")
    if ranks.main:
        write_record(trainer)
    loader = TrainingLoader(
        train,
        config,
        batch_size=batch_size // ranks.size,
        seed=settings.seed,
        start=trainer.step * batch_size,
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
