"""Videos: length, rate and order kept, nothing lost when they are interrupted, broken or the disk is full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from conftest import ROOT, run, spawn

from tools import encoder, video
from tools.video import process_video
from utils.errors import UserError


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12.5, (128, 96))
    for i in range(20):
        frame = np.full((96, 128, 3), 12 * i, np.uint8)  # brighter and brighter: order can be checked
        writer.write(frame)
    writer.release()
    return path


def frames(path):
    capture = cv2.VideoCapture(str(path))
    out = []
    while (read := capture.read())[0]:
        out.append(read[1])
    return out, capture.get(cv2.CAP_PROP_FPS)


def test_video_keeps_length_rate_and_order(weights, clip, tmp_path):
    out = run("eval.py", "--weights", weights, "--video", clip, "--output", tmp_path / "out/seg", "--device", "cpu",
              "--save", "overlay,json,masks", "--score_threshold", 1)  # fmt: skip
    assert "20 frames" in out
    assert "latency" in out
    written, rate = frames(tmp_path / "out/seg.mp4")
    assert len(written) == 20
    assert rate == pytest.approx(12.5)
    assert np.abs([f.mean() - 12 * i for i, f in enumerate(written)]).max() < 9
    assert sorted(p.name for p in (tmp_path / "out/seg").glob("*.png"))[-1] == "000019.masks.png"
    assert not list((tmp_path / "out").glob(".*"))


def test_interrupted_video_is_playable(predictor, clip, tmp_path):
    calls = []

    def slow(frame):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return predictor(frame)

    report = process_video(slow, str(clip), tmp_path / "cut", ("overlay", "json"))
    assert report.interrupted
    written, _ = frames(tmp_path / "cut.mp4")
    assert 5 <= len(written) == report.frames < 20
    results = json.loads((tmp_path / "cut.json").read_text())
    assert {r["frame"] for r in results} == set(range(report.frames))
    assert results[0]["video"] == "clip.mp4"


def test_video_does_not_replace_itself(predictor, clip):
    before = clip.read_bytes()
    with pytest.raises(UserError, match="replace the video itself"):
        process_video(predictor, str(clip), clip.with_suffix(""), ("overlay",))
    assert clip.read_bytes() == before


FULL_DISK = """
import resource, signal, sys, numpy as np
from utils.errors import run_main
import eval as script
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # as if the disk were full
run_main(script.main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize("kind", ["overlay", pytest.param("json", marks=pytest.mark.slow)])
def test_full_disk_leaves_no_broken_video(weights, clip, tmp_path, kind):
    args = ["--weights", weights, "--video", clip, "--output", tmp_path / "out/clip", "--save", kind, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, args)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_errors_while_writing_reach_the_caller(predictor, clip, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("disk full")

    monkeypatch.setattr(encoder.Mpeg4Encoder, "_check", fail)
    monkeypatch.setattr(video, "has_h264", lambda: False)
    with pytest.raises(UserError, match="disk full"):
        process_video(predictor, str(clip), tmp_path / "x", ("overlay", "json"))
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    monkeypatch.setattr(video, "write_results", fail)
    with pytest.raises(UserError, match="disk full"):
        process_video(predictor, str(clip), tmp_path / "x", ("masks",))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        process_video(predictor, str(clip), tmp_path / "file" / "x", ("json",))


def test_broken_video(predictor, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    with pytest.raises(UserError, match="cannot be opened"):
        process_video(predictor, str(tmp_path / "bad.mp4"), tmp_path / "out", ("overlay",))


def test_the_same_command_again_replaces_its_results(weights, clip, tmp_path):
    args = ["eval.py", "--weights", weights, "--video", clip, "--output", tmp_path / "out", "--save", "masks"]
    run(*args, "--max_images", 3, "--device", "cpu")
    run(*args, "--max_images", 2, "--device", "cpu")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["000000.masks.png", "000001.masks.png"]


def test_a_persons_own_frames_stay(weights, clip, tmp_path):
    """Stills numbered as ours are, in the folder that is named for the results."""
    own = tmp_path / "stills"
    own.mkdir()
    for i in range(4):
        (own / f"{i:06d}.jpg").write_bytes(b"mine")
    args = ["eval.py", "--weights", weights, "--video", clip, "--output", own, "--device", "cpu", "--max_images", 2]
    for _ in range(2):
        run(*args, "--save", "overlay,masks,polygons")
    assert [(own / f"{i:06d}.jpg").read_bytes() for i in range(4)] == [b"mine"] * 4
    assert (own / "clip.mp4").exists()
    assert len(list((own / "clip").glob("*.frame.jpg"))) == 2


def test_beside_the_video_the_result_has_another_name(weights, clip):
    before = clip.read_bytes()
    spawn(ROOT / "eval.py", "--weights", weights, "--video", clip.name, "--output", ".", "--max_images", 2,
        "--device", "cpu", cwd=clip.parent)  # fmt: skip
    assert clip.read_bytes() == before
    assert (clip.parent / "clip.yolact.mp4").exists()


def test_videos_are_mp4(weights, clip, tmp_path):
    out = run("eval.py", "--weights", weights, "--video", clip, "--output", tmp_path / "out.avi", code=2)
    assert "name it out.mp4" in out


needs_ffmpeg = pytest.mark.skipif(not encoder.has_h264(), reason="needs ffmpeg with libx264")


def streams(path):
    """Codec and duration of each stream of a file."""
    words = ["-v", "error", "-show_entries", "stream=codec_name,duration,width,height", "-of", "json"]
    done = subprocess.run(["ffprobe", *words, str(path)], capture_output=True, check=True)
    return {entry["codec_name"]: entry for entry in json.loads(done.stdout)["streams"]}


@pytest.fixture
def sounding_clip(clip, tmp_path):
    """The clip with a tone that is longer than its frames (1.6 s), and an odd width."""
    path = tmp_path / "odd.mp4"
    sound = ["-f", "lavfi", "-i", "sine=frequency=440:duration=3"]
    odd = ["-vf", "format=yuv444p,crop=127:95:0:0,format=yuv420p", "-c:v", "mpeg4", "-q:v", "2"]
    command = ["ffmpeg", "-loglevel", "error", "-i", str(clip), *sound, "-map", "0:v", "-map", "1:a", *odd, str(path)]
    subprocess.run(command, check=True)
    return path


@needs_ffmpeg
def test_h264_with_sound(weights, sounding_clip, tmp_path):
    args = ["--weights", weights, "--video", sounding_clip, "--output", tmp_path / "seg", "--device", "cpu"]
    out = run("eval.py", *args, "--save", "overlay", "--score_threshold", 1)
    assert "(H.264 with the source's sound)" in out
    found = streams(tmp_path / "seg.mp4")
    assert set(found) == {"h264", "aac"}
    assert (found["h264"]["width"], found["h264"]["height"]) == (128, 96)  # players need even sides
    written, rate = frames(tmp_path / "seg.mp4")
    assert len(written) == 20
    assert rate == pytest.approx(12.5, abs=0.01)
    assert np.abs([f[:95, :127].mean() - 12 * i for i, f in enumerate(written)]).max() < 9
    assert float(found["aac"]["duration"]) == pytest.approx(1.6, abs=0.1)  # as long as the frames
    run("eval.py", *args, "--save", "overlay", "--score_threshold", 1, "--max_images", 5)
    assert float(streams(tmp_path / "seg.mp4")["aac"]["duration"]) == pytest.approx(0.4, abs=0.1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "odd.mp4", "seg.mp4"]


@needs_ffmpeg
def test_h264_of_a_silent_video_that_is_interrupted(clip, tmp_path):
    """Ctrl-C reaches every process of a terminal; ffmpeg still completes the frames that were written."""
    args = [sys.executable, ROOT / "eval.py", "--video", clip, "--output", tmp_path / "seg", "--size", "64"]
    process = subprocess.Popen([*map(str, args), "--save", "overlay"], start_new_session=True, cwd=ROOT)
    while not (tmp_path / ".seg.silent.mp4").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) in (0, 130)  # 0: the frames were finished first
    written, _ = frames(tmp_path / "seg.mp4")
    assert written
    assert set(streams(tmp_path / "seg.mp4")) == {"h264"}


def test_without_ffmpeg_mpeg4_is_written_and_said(predictor, clip, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    report = process_video(predictor, str(clip), tmp_path / "seg", ("overlay", "blur"), 3)
    assert "(MPEG-4 without sound; install ffmpeg for H.264 and sound)" in str(report)
    for name in ("seg.mp4", "seg.blur.mp4"):
        written, _ = frames(tmp_path / name)
        assert len(written) == 3


def moving_person(tmp_path, count=12):
    """Two copies of a person: one walks to the right and one stands still; they do not touch."""
    astronaut = cv2.imread(str(ROOT / "data/demo/astronaut.jpg"))
    person = cv2.resize(astronaut, (160, 160))
    path = tmp_path / "walk.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (640, 400))
    for i in range(count):
        frame = np.full((400, 640, 3), 120, np.uint8)
        frame[20:180, 20 + 20 * i : 180 + 20 * i] = person
        frame[220:380, 400:560] = person[:, ::-1]
        writer.write(frame)
    writer.release()
    return path


def test_track_ids_are_stable(tmp_path):
    pytest.importorskip("trackers", reason="needs requirements-tools.txt")
    args = ["eval.py", "--video", moving_person(tmp_path), "--output", tmp_path / "out", "--device", "cpu"]
    options = ["--track", "--save", "json,cutout,blur", "--precision", "fp32", "--size", 512]
    run(*args, *options, "--score_threshold", 0.5)
    results = json.loads((tmp_path / "out.json").read_text())
    tracks = {}
    for result in results:
        row = "upper" if result["bbox"][1] + result["bbox"][3] / 2 < 200 else "lower"
        if result["frame"] > 0:  # ByteTrack starts tracks with the second frame
            tracks.setdefault(row, []).append((result["frame"], result.get("track_id")))
    for found in tracks.values():
        assert len({frame for frame, _ in found}) >= 10  # of 12 frames
        assert len({number for _, number in found}) == 1
    assert tracks["upper"][0][1] != tracks["lower"][0][1]
    assert len(list((tmp_path / "out").glob("*.cutout_*.png"))) == len(results)
    assert len(frames(tmp_path / "out.blur.mp4")[0]) == 12


@pytest.mark.parametrize("missing", ["supervision", "trackers"])
def test_tracking_names_the_packages(weights, clip, tmp_path, monkeypatch, missing):
    if missing == "trackers":
        pytest.importorskip("supervision", reason="needs requirements-tools.txt")
    monkeypatch.setitem(sys.modules, missing, None)
    out = run("eval.py", "--weights", weights, "--video", clip, "--output", tmp_path / "x", "--track", code=2)
    assert f"{missing} is not installed; run: pip install -r requirements-tools.txt" in out
    assert "--track has no effect with --image/--images" in run("eval.py", "--image", "a.jpg", "--track", code=2)


def test_a_video_that_ends_early_is_reported(weights, clip, tmp_path):
    """The container counts twenty frames; the data of the last ones are gone."""
    data = bytearray(clip.read_bytes())
    start = data.index(b"mdat") + 4
    middle = start + (data.index(b"moov") - start) // 2 if data.index(b"moov") > start else len(data) // 2
    data[middle : len(data) - 2000 if data.index(b"moov") < start else data.index(b"moov") - 4] = bytes(
        len(data[middle : len(data) - 2000 if data.index(b"moov") < start else data.index(b"moov") - 4])
    )
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    args = ["eval.py", "--weights", weights, "--video", broken, "--output", tmp_path / "out/seg", "--device", "cpu"]
    out = run(*args, "--save", "json", code=1)
    assert "of 20 frames could be read; the file may be damaged" in out
    frames_done = {r["frame"] for r in json.loads((tmp_path / "out/seg.json").read_text())}
    assert 0 < len(frames_done) < 18  # what could be read is kept
    assert "may be damaged" not in run(*args[:4], clip, *args[5:], "--save", "json")
