"""Train YOLACT on any data set in COCO format.

python train.py --config yolact_lite --train_annotations train.json --train_images images \
                --val_annotations val.json --val_images images
python train.py ... --set max_size=256 lr=5e-4             # any field of config.py
python train.py ... --init yolact_r50                      # fine-tune released weights or your own
python train.py ... --batch_size 64 --accumulate 8         # gradient accumulation: 8 micro-batches of 8 images
python train.py --resume runs/yolact_lite                  # continue exactly where a run stopped
torchrun --nproc_per_node 8 train.py --config yolact_r50_8xb8 ...   # the batch is split over 8 GPUs
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...  # on each machine

docs/training.md describes the files in the run's folder.
"""

from __future__ import annotations

import math
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

from config import Config, override, parse_overrides
from data.coco import CocoDataset
from data.loader import Batch, default_workers, report_unusable, training_batches
from evaluation import evaluate
from evaluation.evaluator import check_classes, per_class_table
from inference import Predictor
from training.arguments import build_parser, check_batch, new_run, resumed_run
from training.run_folder import RunLog, claim_folder, write_record
from training.schedule import Schedule
from training.trainer import Trainer
from utils.device import configure_process
from utils.distributed import Ranks, StopSignal, process_group
from utils.errors import UserError, count, run_main
from weights.load import load_state
from weights.transfer import init_model
from yolact import Yolact


def main(argv: Sequence[str] | None = None) -> int:
    """Start or resume a run. Return 0 if training finished, also by early stopping, and 130 if it was interrupted."""
    given = vars(build_parser().parse_args(argv))
    resume: Path | None = given.pop("resume", None)
    start, stored = None, None
    if resume is not None:
        stored, config, args = resumed_run(resume, given)
    configure_process(args["threads"] if stored else given.get("threads"))
    with process_group(args["device"] if stored else given.get("device", "auto")) as ranks:
        if stored is None:
            with ranks.main_first():  # only the main process downloads weights
                start, config, args = new_run(given)
        check_batch(config, args, ranks)
        torch.manual_seed(args["seed"])
        train, val = load_data(args, config, ranks, resumed=stored is not None)
        config = override(config, class_names=train.class_names, category_ids=train.category_ids)
        if start is not None:
            stated = parse_overrides(args.get("set", [])).keys()
            if config.training.fit_anchors and not stated & {"anchor_sizes", "aspect_ratios"}:
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
            schedule = Schedule(config.training, len(train))
            if trainer.iteration > schedule.max_iter:
                raise UserError(f"the run is at step {trainer.iteration}, beyond --max_iter {schedule.max_iter}")
            describe(trainer, schedule, train)
            if ranks.is_main:
                write_record(trainer.folder, args, config, resumed=stored is not None)
            start_at = trainer.iteration * config.training.batch_size  # images that the run has already used
            workers = default_workers(ranks) if args["workers"] is None else args["workers"]
            with training_batches(train, config, args["seed"], start_at, workers, ranks) as batches:
                finished = fit(trainer, batches, schedule, val, args)
    return 0 if finished else 130


def fit(
    trainer: Trainer, batches: Iterator[Batch], schedule: Schedule, val: CocoDataset | None, args: dict[str, Any]
) -> bool:
    """Train to the end of the schedule, or until a validation or a signal stops the run; return False for a signal."""
    ranks, patience, table = trainer.ranks, args["patience"] or math.inf, ""
    unusable: set[str] = set()  # messages about images that were replaced
    # By default one epoch of at least 500 iterations, or a fifth of a shorter run, but at least 20 iterations.
    val_interval = args["val_interval"] or min(max(500, schedule.per_epoch), max(20, schedule.max_iter // 5))
    log = RunLog(trainer.folder, trainer.iteration, trainer.validated, args["tensorboard"], ranks.is_main)
    progress = tqdm(
        desc="training", total=schedule.max_iter, initial=trainer.iteration, disable=not ranks.is_main,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # in a file, each update is kept
    )  # fmt: skip
    with StopSignal() as stop_signal, log, progress:
        while True:
            due = trainer.iteration % val_interval == 0 or trainer.iteration == schedule.max_iter
            if due and trainer.iteration > trainer.validated:
                trainer.save("last.pth", args)  # nothing is lost if validation fails: --resume repeats it
                table = validate(trainer, val, log)
                trainer.save("last.pth", args)  # again, with the result of the validation
            if trainer.iteration == schedule.max_iter or trainer.stale >= patience:
                break
            started, lr = time.perf_counter(), schedule.lr_at(trainer.iteration)
            batch = next(batches)
            report_unusable(batch, unusable, schedule.num_images)
            waited = time.perf_counter() - started
            if trainer.iteration == 0:
                from tools.sheets import batch_sheet

                log.image(0, "first_batch", batch_sheet(batch, trainer.model.config))

            try:
                losses = trainer.step(batch, lr)
            except torch.OutOfMemoryError:
                advice = "lower --batch_size, or split it with --accumulate"
                raise UserError(f"{trainer.device} has not enough memory for a step; {advice}") from None

            times = {"seconds": time.perf_counter() - started, "waited": waited, "time": time.time()}
            values = {"epoch": trainer.iteration / schedule.per_epoch, **times, **losses}
            log.line(trainer.iteration, {"lr": lr} | {name: round(value, 4) for name, value in values.items()})
            shown = {name: f"{value:.2f}" for name, value in losses.items() if value or name != "mask_iou"}
            progress.set_postfix(shown, refresh=False)
            progress.update()
            if ranks.any(stop_signal.received):
                trainer.save("last.pth", args)
                ranks.barrier()  # an interrupted run exits with 130, on which torchrun ends all processes
                print(f"stopped at step {trainer.iteration}; continue with: python train.py --resume {trainer.folder}")
                return False
    if table:
        print(table)
    if trainer.stale >= patience:
        print(
            f"stopped early at step {trainer.iteration}: mask AP has not improved in {trainer.stale} validations "
            f"(best: {trainer.best:.3f})"
        )
    if unusable:
        print(f"images that could not be used and were replaced by others: {len(unusable)}")
    best = f", best: {trainer.folder / 'best.pth'}" if trainer.best >= 0 else ""
    print(f"done: {trainer.folder / 'last.pth'}{best}")
    return True


def validate(trainer: Trainer, val: CocoDataset | None, log: RunLog) -> str:
    """Compute and log the COCO metrics of the current model; save it as `best.pth` if its mask AP has improved.

    Returns COCOeval's table, or "" without a validation set.
    """
    if val is None:
        return ""
    model, ranks = trainer.best_model, trainer.ranks
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


def load_data(
    args: dict[str, Any], config: Config, ranks: Ranks, resumed: bool
) -> tuple[CocoDataset, CocoDataset | None]:
    """Read and audit the training set and, if one is given, the validation set.

    Raises UserError if a file cannot be read, the classes differ, or the audit finds errors (see --ignore_audit).
    """
    from tools.audit import quick_audit
    from tools.formats.readers import open_coco

    train = open_coco(args["train_annotations"], args["train_images"])
    datasets = [train]
    notes = [check_classes(train, config, "in the run")] if resumed else []
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
        number = train.num_copies
        print(f"{train.path}: annotations that repeat another one of their image: {number}; training ignores them")
    return train, datasets[1] if len(datasets) > 1 else None


def describe(trainer: Trainer, schedule: Schedule, train: CocoDataset) -> None:
    """Print what will be trained and how, and warnings about settings that are unlikely to work."""
    from tools.advice import objects_per_class, unlikely_settings

    config, ranks = trainer.model.config, trainer.ranks
    mode = "frozen" if config.training.freeze_bn else "trained"
    size = f"{config.train_size} px"
    if config.train_size != config.model.max_size:
        size += f" (train_scale {config.training.train_scale:g} of max_size {config.model.max_size})"
    dtype = "tf32" if trainer.tf32 else str(trainer.dtype).removeprefix("torch.")
    print(schedule)
    print(
        f"{config.name}: {count(config.num_classes, 'class')}, {count(len(train), 'image')}, {size}, {dtype} on "
        f"{ranks.size} x {trainer.device}, batch norm {mode}"
    )
    # The number of images that batch norm computes its statistics over in one forward pass.
    batch_size = config.training.batch_size
    per_pass = batch_size // trainer.accumulate // ranks.size
    if per_pass < batch_size and not config.training.freeze_bn:
        print(
            f"batch norm statistics are computed over {per_pass} of {batch_size} images at a time; "
            "with freeze_bn=true, splitting the batch does not change the result"
        )
    for line in unlikely_settings(config, per_pass, objects_per_class(train)):
        print(f"warning: {line}")


if __name__ == "__main__":
    run_main(main)
