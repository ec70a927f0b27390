"""Videos: length, rate and order kept, nothing lost when they are interrupted, broken or the disk is full."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, run, spawn

from tools import video
from tools.track import Tracker
from tools.video import process_video
from utils.errors import UserError

av = pytest.importorskip("av", reason="needs requirements-tools.txt")


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

    monkeypatch.setattr(video.VideoFile, "write", fail)
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
    for source in (str(tmp_path / "bad.mp4"), "99999999999"):  # a file, and the number of a camera
        with pytest.raises(UserError, match="cannot be opened"):
            process_video(predictor, source, tmp_path / "out", ("overlay",))


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


def write_video(path, times, size=(96, 128), sound=0.0, codec="aac", options=None):
    """Grey frames that get brighter by 12, at `times` in seconds, and a tone of `sound` seconds."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", options={"crf": "10"})
        (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        tone = container.add_stream(codec, rate=44100, layout="mono") if sound else None
        for number, seconds in enumerate(times):
            pixels = np.full((*size, 3), 12 * number % 256, np.uint8)
            pixels[: size[0] // 2, : size[1] // 2] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="bgr24")
            frame.pts, frame.time_base = round(1000 * seconds), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if tone is not None:
            wave = (0.5 * np.sin(np.arange(int(44100 * sound)) / 16)).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 0
            container.mux(tone.encode(frame))
            container.mux(tone.encode())
    return path


def read_times(path):
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


def sound_of(path):
    """Codec and seconds of the sound of a file, or None."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        last = max(float((p.pts + p.duration) * p.time_base) for p in container.demux(stream) if p.pts is not None)
        return stream.codec_context.name, last


def test_frames_keep_their_times_and_sound_its_length(weights, tmp_path):
    """Two seconds of 30 frames and two of 5, as phones record in the dark, and a tone of four seconds."""
    times = [i / 30 for i in range(60)] + [2 + i / 5 for i in range(10)]
    source = write_video(tmp_path / "in.mp4", times, sound=4.0)
    args = ["--weights", weights, "--video", source, "--output", tmp_path / "seg", "--device", "cpu", "--size", 64]
    out = run("eval.py", *args, "--save", "overlay,json", "--score_threshold", 1)
    assert "70 frames" in out
    assert "(with the source's sound)" in out
    assert "latency" not in out  # of a file it would be the length of the queue
    assert read_times(tmp_path / "seg.mp4") == pytest.approx(times, abs=2e-3)
    codec, seconds = sound_of(tmp_path / "seg.mp4")
    assert codec == "aac"
    assert seconds == pytest.approx(4.0, abs=0.1)
    run("eval.py", *args, "--save", "overlay", "--score_threshold", 1, "--max_images", 30)
    assert sound_of(tmp_path / "seg.mp4")[1] == pytest.approx(1.0, abs=0.1)  # it ends with the frames
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "seg.json", "seg.mp4"]


def test_a_stream_that_does_not_begin_at_zero(predictor, tmp_path):
    source = write_video(tmp_path / "in.ts", [i / 10 for i in range(10)], sound=1.0)
    assert read_times(source)[0] > 0.1
    process_video(predictor, str(source), tmp_path / "seg", ("overlay",))
    assert read_times(tmp_path / "seg.mp4") == pytest.approx([i / 10 for i in range(10)], abs=0.06)
    assert sound_of(tmp_path / "seg.mp4")[1] == pytest.approx(1.0, abs=0.1)


def test_odd_sides_and_sound_that_mp4_does_not_take(predictor, tmp_path):
    source = write_video(tmp_path / "in.mov", [0, 0.1, 0.2], sound=0.3, codec="pcm_s16le")
    report = process_video(predictor, str(source), tmp_path / "seg", ("overlay",))
    assert "without its sound: an MP4 file cannot have pcm_s16le" in str(report)
    assert sound_of(tmp_path / "seg.mp4") is None
    with contextlib.ExitStack() as files:
        odd = video.VideoFile(tmp_path / "odd.mp4", (95, 127), 10, None, 0.0, files)
        for i in range(3):
            odd.write(i / 10, np.full((95, 127, 3), 80 * i, np.uint8))
        odd.write(0.3, np.full((48, 64, 3), 240, np.uint8))  # the stream changes its resolution
        odd.complete(whole=True)
    written, _ = frames(tmp_path / "odd.mp4")
    assert [frame.shape for frame in written] == [(96, 128, 3)] * 4
    assert [frame.mean() for frame in written] == pytest.approx([0, 80, 160, 240], abs=3)


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
def test_rotated_videos_are_turned(tmp_path, matrix):
    """Phones store a matrix in the track header; the frames are those that OpenCV shows."""
    data = bytearray(write_video(tmp_path / "in.mp4", [0, 0.1]).read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = (value * 65536 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    found = [frame.image for frame in video.VideoSource(str(tmp_path / "turned.mp4"), lambda: False)]
    wanted, _ = frames(tmp_path / "turned.mp4")
    assert len(found) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 3  # each turns yuv into bgr in its own way


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_video_without_leftovers(clip, tmp_path, number):
    args = [sys.executable, ROOT / "eval.py", "--video", clip, "--output", tmp_path / "seg", "--size", "64"]
    process = subprocess.Popen([*map(str, args), "--save", "overlay,json"], start_new_session=True, cwd=ROOT)
    while not list(tmp_path.glob(".seg.mp4.*.part")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert process.wait(60) in (0, 130)  # 0: the frames were finished first
    assert frames(tmp_path / "seg.mp4")[0]
    json.loads((tmp_path / "seg.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "seg.json", "seg.mp4"]


def test_a_live_source_gives_its_newest_frame(predictor, clip, tmp_path, monkeypatch):
    """Inference takes three times as long as the source's frames; the result does not fall behind."""

    class Camera:
        count = 0

        def isOpened(self):
            return True

        def read(self):
            time.sleep(0.02)
            self.count += 1
            return self.count <= 60, np.full((64, 64, 3), 4 * self.count % 256, np.uint8)

        def release(self):
            pass

    monkeypatch.setattr(video.cv2, "VideoCapture", lambda _: Camera())
    found = predictor(np.zeros((64, 64, 3), np.uint8))
    seen = []

    def slow(image):
        time.sleep(0.06)
        seen.append(int(image[0, 0, 0]) // 4)
        return found

    report = process_video(slow, "0", tmp_path / "cam", ("json",))
    assert 10 < report.frames < 30
    assert seen[-1] >= 56  # of 60
    assert "median latency" in str(report)
    assert np.median(report.latencies) < 0.3


def test_without_pyav_the_install_is_named(weights, clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    out = run("eval.py", "--weights", weights, "--video", clip, "--output", tmp_path / "x", code=2)
    assert "av is not installed; run: pip install -r requirements-tools.txt" in out


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
        tracks.setdefault(row, []).append((result["frame"], result.get("track_id")))
    for found in tracks.values():
        assert len({frame for frame, _ in found}) >= 10  # of 12 frames
        assert len({number for _, number in found}) == 1
        assert None not in dict(found).values()  # also in the first frame
    assert tracks["upper"][0][1] != tracks["lower"][0][1]
    assert len(list((tmp_path / "out").glob("*.cutout_*.png"))) == len(results)
    assert len(frames(tmp_path / "out.blur.mp4")[0]) == 12


def test_tracks_end_at_a_cut(predictor):
    pytest.importorskip("trackers", reason="needs requirements-tools.txt")
    image = np.full((64, 64, 3), 40, np.uint8)
    template = predictor.with_detection(score_threshold=0.0)(image)[:2]
    found = replace(
        template,
        boxes=torch.tensor([[2.0, 2, 30, 30], [30, 30, 60, 60]]),
        scores=torch.ones(2),
        labels=torch.zeros(2).long(),
    )
    found = replace(found, mask_scores=torch.tensor([0.9, 0.8]))
    tracker = Tracker(25)
    scenes = [tracker(found, image + np.uint8(i)).track_ids.tolist() for i in range(3)]
    scenes += [tracker(found, 255 - image).track_ids.tolist() for _ in range(3)]
    assert scenes == [[0, 1]] * 3 + [[2, 3]] * 3


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
