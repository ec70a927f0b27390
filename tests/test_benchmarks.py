"""The scripts that measure: they run, they notice what differs, and README shows their figures."""

from __future__ import annotations

import argparse
import json
import time

import pytest
from conftest import spawn

from benchmarks import compare, report
from benchmarks.stages import benchmark, format_report, network_flops


def test_figures_in_the_readmes_are_those_in_the_files():
    for path, wanted in ((report.README, report.readme()), (report.TABLES, report.tables())):
        assert path.read_text(encoding="utf-8") == wanted, "run python benchmarks/report.py"


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
    args = argparse.Namespace(exports=False, device="cpu", weights=weights, configs=["yolact_lite"], batch_size=2)
    jobs = compare.our_jobs(args) | compare.our_training_step(args)
    assert {"network float32", "image float32 compiled", "training float32"} <= set(jobs)
    for name, job in jobs.items():
        answer = job()
        if name.startswith("training"):
            assert answer["total"] > 0
    assert len(jobs["answer"]()["scores"]) > 0
    assert jobs["machine"]()["compute_peak"] > 1e9


@pytest.mark.slow
def test_costs_are_measured(tmp_path):
    out = tmp_path / "scaling.json"
    spawn("benchmarks/scaling.py", "--config", "yolact_lite", "--sizes", 64, 96, "--batches", 1, "--detections", 3,
        "--repeats", 2, "--output", out)  # fmt: skip
    result = json.loads(out.read_text())
    assert [row["varied"] for row in result["rows"]] == ["size"] * 2 + ["batch_size", "detections"] + ["image"] * 4
    assert all(row["image_to_masks_ms"] > 0 and row["memory_mib"] > 100 for row in result["rows"])
    assert "## Scaling" in report.scaling(result)


def test_a_slow_stage_shows_where_it_is(predictor, monkeypatch):
    """A stage that sleeps for 30 ms takes at least that, and so does the whole that contains it."""
    preprocess = predictor.preprocess
    monkeypatch.setattr(predictor, "preprocess", lambda image: time.sleep(0.03) or preprocess(image))
    slow = benchmark(predictor, batch_size=2, image_size=(60, 80), repeats=3)["stages_ms"]
    assert slow["resize and normalise"]["p10"] >= 60
    assert slow["image to masks"]["p10"] >= 60
