"""The scripts that measure: they run, they notice what differs, and README shows their figures."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time

import pytest
import recipe
import torch
from conftest import ROOT, make_dataset, spawn

from benchmarks import compare
from benchmarks.stages import benchmark, format_report, network_flops
from config import COCO_CLASSES, COCO_IDS, get_config


def figures(name):
    """The cells that the tables must show for a JSON file, row by row."""
    content = json.loads((ROOT / "benchmarks" / name).read_text())
    if name.startswith("compare"):
        digits = 2 if "h200" in name else 0
        rows = [row for row in content["rows"] if row["what"] in ("network", "image") or "training" in name]
        return [(row["variant"], f"{row['ms']:.{digits}f}", f"{row['times_the_original']:.2f}") for row in rows]
    if name.startswith("gpu"):
        return [(row["configuration"], row["precision"], f"{row['ms']:.2f}") for row in content["networks"]]
    if name.startswith("stages"):
        return [(stage, f"{values['median']:.2f}") for stage, values in content["stages_ms"].items()]
    if name == "tiles.json":
        return [
            (row["variant"], *(f"{100 * row[key]:.1f}" for key in ("mask_AP", "mask_APs"))) for row in content["rows"]
        ]
    if name in ("nms.json", "precision.json"):
        digits = 1 if name == "nms.json" else 2
        aps = [(f"{100 * row['box_AP']:.{digits}f}", f"{100 * row['mask_AP']:.{digits}f}") for row in content["rows"]]
        return [(row["variant"], *ap) for row, ap in zip(content["rows"], aps, strict=True)]
    names = {"network": "network", "image": "image to masks"}
    return [(names[row["what"]], f"{row['ms']:.1f}") for row in content["rows"]]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.json")), ids=lambda path: path.name)
def test_figures_in_the_tables_are_those_in_the_files(path):
    lines = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    wanted = figures(path.name)
    assert wanted
    for cells in wanted:
        label, *numbers = cells
        assert any(label in row[1:5] or f"ours {label}" in row for row in rows if set(numbers) <= set(row)), cells


def test_operations_do_not_depend_on_how_they_are_computed(small_config):
    from config import get_config

    assert network_flops(get_config("yolact_resnet50"), (550, 550)) == pytest.approx(118.28e9, rel=1e-3)
    assert network_flops(small_config, (96, 96), 3) == 3 * network_flops(small_config, (96, 96))
    plain, deformable = (get_config(name, max_size=64) for name in ("yolact_resnet50", "yolact_plus_resnet50"))
    assert network_flops(deformable, (64, 64)) > network_flops(plain, (64, 64))


@pytest.mark.parametrize("provide", [0, 7])
def test_every_stage_is_timed(predictor, provide):
    result = benchmark(predictor, batch_size=2, provide=provide, image_size=(60, 80), repeats=3)
    stages = result["stages_ms"]
    assert set(stages) >= {"read", "backbone", "FPN", "prototypes", "head", "detect", "masks", "draw", "network"}
    assert all(row["median"] > 0 for row in stages.values() if row is not stages["copy to host"])
    assert result["share_of_peak"] > 0
    assert "image to masks" in format_report(result)
    assert format_report(result).startswith(f"{result['paper_fps']:.1f} frames/s as the paper counts")
    assert result["paper_fps"] == pytest.approx(2000 / stages["network to masks"]["median"])
    json.dumps(result)


def test_different_answers_stop_the_comparison():
    theirs = {"labels": [1, 2], "scores": [0.9, 0.5], "areas": [100, 50]}
    assert "the same 2 detections" in compare.compare_answers(theirs, theirs | {"areas": [100, 50.5]})
    for ours in (
        theirs | {"labels": [2, 1]},
        theirs | {"scores": [0.9, 0.6]},
        theirs | {"areas": [90, 50]},
        {"labels": [], "scores": [], "areas": []},
    ):
        with pytest.raises(SystemExit, match="detections"):
            compare.compare_answers(theirs, ours)


@pytest.mark.slow
def test_our_side_of_the_comparison(weights):
    given = {"device": "cpu", "weights": weights, "configs": ["yolact_lite"], "batch_size": 2}
    args = argparse.Namespace(**given, batches=[1], no_compile=False)
    jobs = compare.our_jobs(args) | compare.our_training_step(args)
    assert {"network float32", "image float32 compiled", "training float32"} <= set(jobs)
    for name, job in jobs.items():
        answer = job()
        if name.startswith("training"):
            assert answer["total"] > 0
    assert len(jobs["answer"]()["scores"]) > 0
    assert "threads" in jobs["machine"]()


@pytest.mark.slow
def test_the_gpu_script_is_rehearsed_on_the_cpu(tmp_path):
    """Without the original, whose part fails and stops nothing."""
    env = {**os.environ, "DEVICE": "cpu", "QUICK": "1"}
    done = subprocess.run(["bash", "benchmarks/gpu.sh", tmp_path], cwd=ROOT, env=env, text=True, capture_output=True)
    assert "tests: exit code 0" in done.stdout
    assert "gpu: exit code 0" in done.stdout
    assert "training_yolact_base: exit code" in done.stdout
    assert "compare_yolact_base: exit code" in done.stdout
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert ["compiled" in row["precision"] for row in report["networks"]] == [False, True]
    assert all(row["ms"] > 0 for row in report["networks"] + report["nms"])


@pytest.mark.slow
def test_a_study_compares_variants(tmp_path, weights, dataset):
    out = tmp_path / "nms.json"
    spawn("benchmarks/studies.py", "nms", "--weights", weights, "--annotations", dataset, "--image_dir",
        dataset.parent / "images", "--max_images", 2, "--device", "cpu", "--output", out)  # fmt: skip
    assert len(json.loads(out.read_text())["rows"]) == 10


def test_a_slow_stage_shows_where_it_is(predictor, monkeypatch):
    """A stage that sleeps for 30 ms takes at least that, and so does the whole that contains it."""
    preprocess = predictor.preprocess
    monkeypatch.setattr(predictor, "preprocess", lambda image: time.sleep(0.03) or preprocess(image))
    slow = benchmark(predictor, batch_size=2, image_size=(60, 80), repeats=3)["stages_ms"]
    assert slow["resize and normalise"]["p10"] >= 60
    assert slow["image to masks"]["p10"] >= 60


@pytest.mark.slow
def test_the_table_of_the_paper_is_reproduced(tmp_path):
    """Rehearsed with generated weights in both released layouts, and a set of images with COCO's classes."""
    shapes = json.loads((ROOT / "tests/fixtures/state_dict_shapes.json").read_text())
    names = ("dbolya/yolact_resnet50_config", "mmdet/yolact_r50_1xb8-55e_coco")
    files = [tmp_path / f"{get_config(name.split('/')[1]).name}_54_800000.pth" for name in names]
    for name, file in zip(names, files, strict=True):
        state = recipe.state_dict(shapes[name], seed=1, gain=0.7)
        torch.save(state if name.startswith("dbolya") else {"meta": {}, "state_dict": state}, file)
    path = make_dataset(tmp_path / "made", 2)
    content = json.loads(path.read_text())
    content["categories"] = [{"id": i, "name": n} for i, n in zip(COCO_IDS, COCO_CLASSES, strict=True)]
    for entry in content["annotations"]:
        entry["category_id"] = 1
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/annotations/instances_val2017.json").write_text(json.dumps(content))
    (path.parent / "images").rename(tmp_path / "coco/val2017")
    out = tmp_path / "reproduced.json"
    text = spawn("benchmarks/reproduce.py", "--coco", tmp_path / "coco", "--weights", *files, tmp_path / "gone.pth",
        "--device", "cpu", "--repeats", 1, "--output", out, code=1)  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [row["configuration"] for row in rows] == ["yolact_resnet50", "yolact_r50"]
    assert [row["published_mask_AP"] for row in rows] == ["28.2 (test-dev)", "29.0 (val2017)"]
    assert all(row["fps"] > 0 and 0 <= row["mask_AP"] <= 1 for row in rows)
    assert "gone.pth: no such weights file" in text
