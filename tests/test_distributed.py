"""Two processes, or two parts, take the steps of one; on the CPU with gloo."""

from __future__ import annotations

import itertools
import json
import os

import pytest
import torch
from conftest import make_dataset, run, spawn, train_args

from config import from_dict, override
from data.coco import CocoDataset
from data.loader import default_workers, endless_shuffle, training_batches
from layers.loss import Part, count_anchors
from layers.matching import Matches
from tools.audit import SAMPLE
from training.trainer import NetworkAndLoss
from utils.distributed import Ranks
from weights.checkpoint import save_checkpoint
from yolact import Yolact

# Steps of plain SGD are as close as the gradients are; batch norm trained in parts is another network.
EXACT = ["--set", "freeze_bn=true", "optimizer=sgd", "ema=0.9", "warmup_iters=0", "clip_grad=0", "masks_to_train=3"]
EXACT += ["--lr", "1e-3", "--precision", "fp32", "--max_iter", "3"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def steps_taken(folder):
    """How far each weight is from where the run began, and the EMA from the weights."""
    content = torch.load(folder / "last.pth", weights_only=True)
    torch.manual_seed(0)
    start = Yolact(from_dict(content["config"])).state_dict()
    raw = content["training"]["raw"]
    moved = {name: raw[name] - start[name] for name in start if start[name].is_floating_point()}
    return moved | {f"average {name}": raw[name] - content["model"][name] for name in moved}


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["total"] for line in lines if "total" in line]


def assert_same_run(folder, other):
    assert losses(folder) == pytest.approx(losses(other), rel=1e-4)
    ours, theirs = steps_taken(folder), steps_taken(other)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0.01, atol=0.01 * float(value.abs().max()) + 1e-7, msg=name)
    assert max(float(value.abs().max()) for value in theirs.values()) > 1e-4  # the steps were real ones


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(dataset, tmp_path):
    args = train_args(dataset, "--batch_size", "4", *EXACT)
    run(*args, "--output_dir", tmp_path / "one")
    out = spawn(*TORCHRUN, *args, "--output_dir", tmp_path / "two")
    assert "2 x cpu" in out
    assert out.count("schedule:") == 1
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two/best.pth").exists()
    run("train.py", "--resume", tmp_path / "one", "--max_iter", "5")
    assert "resumed" in spawn(*TORCHRUN, "train.py", "--resume", tmp_path / "two", "--max_iter", "5")
    assert len(losses(tmp_path / "two")) == 5
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_evaluation_is_shared_without_duplicates(dataset, small_config, tmp_path):
    save_checkpoint(tmp_path / "w.pth", Yolact(small_config))
    args = ["eval.py", "--weights", tmp_path / "w.pth", "--annotations", dataset, "--device", "cpu"]
    args += ["--image_dir", dataset.parent / "images", "--score_threshold", "0.01"]
    run(*args, "--output", tmp_path / "one.json")
    spawn(*TORCHRUN, *args, "--output", tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{name}.bbox.json").read_text()) for name in ("one", "two"))
    assert len(one) == len(two) > 0
    key = lambda r: (r["image_id"], -r["score"], r["category_id"], r["bbox"])  # noqa: E731
    for a, b in zip(sorted(one, key=key), sorted(two, key=key), strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["score"] == pytest.approx(b["score"], rel=1e-4)
    assert json.loads((tmp_path / "one.json").read_text())["segm"] == pytest.approx(
        json.loads((tmp_path / "two.json").read_text())["segm"], abs=1e-3
    )


@pytest.mark.slow
def test_accumulated_parts_take_the_step_of_the_whole(dataset, tmp_path):
    args = train_args(dataset, "--batch_size", "5", *EXACT)
    run(*args, "--output_dir", tmp_path / "whole")
    run(*args, "--accumulate", "2", "--output_dir", tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def first_batch(data, config, size):
    with training_batches(data, override(config, batch_size=size)) as batches:
        return next(batches)


def without_objects(target):
    return {key: value if key == "seed" else value[:0] for key, value in target.items()}


def test_gradients_of_parts_add_up(dataset, small_config):
    """Also with a part that holds no object at all."""
    data = CocoDataset(dataset, dataset.parent / "images")
    batch = first_batch(data, small_config, 4)
    batch.targets[0] = without_objects(batch.targets[0])
    step = NetworkAndLoss(Yolact(small_config)).train()
    step.model.backbone.eval()

    matches = step.match(batch.targets)
    divisors = count_anchors(matches)

    def gradients(parts):
        step.zero_grad(set_to_none=True)
        split = zip(*(field.split(len(batch.images) // len(parts)) for field in matches), strict=True)
        for part, some in zip(parts, split, strict=True):
            share = Part(Matches(*some), divisors, 4)
            sum(step(part.normalised(small_config.model), part.targets, share).values()).backward()
        return {name: p.grad.clone() for name, p in step.named_parameters() if p.requires_grad}

    whole, parts = gradients([batch]), gradients(batch.split(4))
    assert [len(part.images) for part in batch.split(3)] == [1, 2, 1]
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()), msg=name)


def test_all_parameters_get_gradients_without_any_object(dataset, small_config):
    """DDP waits for every one of them."""
    data = CocoDataset(dataset, dataset.parent / "images")
    batch = first_batch(data, small_config, 2)
    empty = [without_objects(target) for target in batch.targets]
    step = NetworkAndLoss(Yolact(small_config)).train()
    share = Part(step.match(empty), torch.tensor([1, 20]), 2)
    sum(step(batch.normalised(small_config.model), empty, share).values()).backward()
    assert all(p.grad is not None for p in step.parameters() if p.requires_grad)


def test_batches_that_cannot_be_shared_are_refused(tmp_path):
    path = make_dataset(tmp_path / "data", 2)
    out = run(*train_args(path, "--batch_size", "2", "--accumulate", "3"), code=2)
    assert "batch size 2 cannot be split over 1 processes with 3 gradient accumulation steps each" in out


@pytest.mark.slow
def test_a_mistake_that_one_process_meets_ends_all(tmp_path):
    """The second process alone gets broken images, which the audit at the start does not read; both stop."""
    path = make_dataset(tmp_path / "data", 230)
    looked_at = range(0, 230, -(-230 // SAMPLE))
    keys = itertools.islice(endless_shuffle(230, seed=0, rank=1, world_size=2), 10)
    for index in [index for _, index in keys if index not in looked_at][:3]:
        (tmp_path / f"data/images/image_{index}.png").write_bytes(b"broken")
    args = train_args(path, "--batch_size", "20", "--max_iter", "20", "--output_dir", tmp_path / "run")
    args[args.index("--val_annotations") + 1] = make_dataset(tmp_path / "val", 2)
    args[args.index("--val_images") + 1] = tmp_path / "val/images"
    out = spawn(*TORCHRUN, *args, code=1)
    assert "3 of 230 images cannot be used" in out


@pytest.mark.slow
def test_no_process_group_is_left_when_the_interpreter_ends(dataset, tmp_path):
    # Gloo's threads abort a process (SIGABRT, once in dozens of runs) that ends before its process group does.
    probe = (
        "import sys, weakref, torch.distributed as dist\n"
        "destroy, groups = dist.destroy_process_group, []\n"
        "dist.destroy_process_group = lambda: (groups.append(weakref.ref(dist.group.WORLD)), destroy())\n"
        "import train\n"
        "from utils.errors import run_main\n"
        "try:\n"
        "    run_main(train.main)\n"
        "finally:\n"
        "    print('groups left:', [group() for group in groups], file=sys.stderr)\n"
    )
    (tmp_path / "probe.py").write_text(probe)
    _, *args = train_args(dataset, "--batch_size", "4", *EXACT)
    out = spawn(*TORCHRUN, tmp_path / "probe.py", *args, "--output_dir", tmp_path / "two")
    assert out.count("groups left: [None]") == 2


def test_gpus_share_the_cores_among_their_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert default_workers(Ranks(torch.device("cpu"))) == 2
    assert default_workers(Ranks(torch.device("cuda:0"))) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers(Ranks(torch.device("cuda:1"), 1, 4)) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers(Ranks(torch.device("cuda:1"), 1, 16)) == 1
