"""Video in, video out: reading, network and writing overlap in bounded queues, frames stay in order."""

from __future__ import annotations

import json
import queue
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.errors import UserError
from engine.checkpoint import atomic_write
from engine.outputs import write_results
from engine.predictor import Detections, Predictor

_END = None


@dataclass
class VideoReport:
    """How it went. Latency is from a frame read to its result written, throughput is frames over the whole time."""

    frames: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    latencies: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        latency = 1000 * float(np.median(self.latencies)) if self.latencies else 0.0
        rate = self.frames / self.seconds if self.seconds else 0.0
        ending = ", interrupted" if self.interrupted else ""
        return f"{self.frames} frames, {rate:.1f} frames/s, median latency {latency:.0f} ms{ending}"


class VideoSource:
    """Frames of a file or a camera, read ahead in a thread of its own."""

    def __init__(self, source: str, ahead: int = 4):
        self.camera = source.isdigit()
        if not (self.camera or "://" in source or Path(source).is_file()):
            raise UserError(f"{source}: no such video")
        self.capture = cv2.VideoCapture(int(source) if self.camera else source)
        if not self.capture.isOpened():
            raise UserError(f"{'camera ' * self.camera}{source}: cannot be opened as a video")
        rate = self.capture.get(cv2.CAP_PROP_FPS)
        self.fps = rate if 0 < rate < 1000 else 30.0
        count = self.capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.length = int(count) if count > 0 and not self.camera else None
        self.queue: queue.Queue = queue.Queue(1 if self.camera else ahead)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        while not self.stop.is_set():
            there, frame = self.capture.read()
            item = (time.perf_counter(), frame) if there else _END
            if self.camera and self.queue.full():  # a camera's old frames are worth nothing
                with _ignore_empty():
                    self.queue.get_nowait()
            _put(self.queue, item, self.stop)
            if item is _END:
                return

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        while True:
            try:
                item = self.queue.get(timeout=0.2)
            except queue.Empty:
                if self.stop.is_set():
                    return
                continue
            if item is _END:
                return
            yield item

    def close(self) -> None:
        self.stop.set()
        self.thread.join(timeout=5)
        self.capture.release()


class _ignore_empty:
    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, *_: Any) -> bool:
        return kind is queue.Empty


def _put(items: queue.Queue, item: Any, stop: threading.Event) -> None:
    """Put, but give up when told to stop."""
    while not stop.is_set():
        try:
            items.put(item, timeout=0.2)
            return
        except queue.Full:
            continue


class VideoWriter:
    """Draws and encodes in a thread of its own, and writes one JSON of all frames. `close` ends the files properly."""

    def __init__(self, output: Path, kinds: tuple[str, ...], name: str, fps: float, report: VideoReport):
        self.output, self.kinds, self.name, self.fps, self.report = output, kinds, name, fps, report
        self.encoder: cv2.VideoWriter | None = None
        self.results: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.queue: queue.Queue = queue.Queue(4)
        self.thread = threading.Thread(target=self._run, daemon=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        self.thread.start()

    def put(self, item: tuple[float, int, np.ndarray, Detections]) -> None:
        while self.error is None:
            try:
                return self.queue.put(item, timeout=0.2)
            except queue.Full:
                continue
        raise self.error

    def _run(self) -> None:
        while (item := self.queue.get()) is not _END:
            if self.error is None:
                try:
                    self._write(*item)
                except BaseException as error:  # shown by the main thread
                    self.error = error

    def _write(self, read_at: float, index: int, frame: np.ndarray, detections: Detections) -> None:
        origin = {"video": self.name, "frame": index}
        if "overlay" in self.kinds:
            if self.encoder is None:
                self.encoder = self._open(frame)
            self.encoder.write(detections.draw(frame))
        if "json" in self.kinds:
            self.results += [origin | result for result in detections.to_coco(index)]
        per_frame = tuple(kind for kind in self.kinds if kind in ("masks", "polygons", "prototypes"))
        if per_frame:
            write_results(frame, detections, self.output / f"{index:06d}", per_frame, origin, ".jpg")
        self.report.latencies.append(time.perf_counter() - read_at)

    def _open(self, frame: np.ndarray) -> cv2.VideoWriter:
        path = str(self.output.with_name(self.output.name + ".mp4"))
        encoder = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), self.fps, frame.shape[1::-1])
        if not encoder.isOpened():
            raise UserError(f"{path}: cannot be written as a video")
        return encoder

    def close(self) -> None:
        self.queue.put(_END)
        self.thread.join()
        if self.encoder is not None:
            self.encoder.release()
        if "json" in self.kinds:
            with atomic_write(self.output.with_name(self.output.name + ".json")) as out:
                out.write(json.dumps(self.results).encode())


def process_video(
    predictor: Predictor, source: str, output: Path, kinds: tuple[str, ...], max_frames: int | None = None
) -> VideoReport:
    """Segment a video file, or a camera by its number, into `output` + .mp4, .json and a folder of per-frame files.

    The first Ctrl-C ends it: what was read is written and the files are closed. Raises UserError for a source that
    cannot be opened.
    """
    report = VideoReport()
    video = VideoSource(source)
    writer = VideoWriter(output, kinds, Path(source).name, video.fps, report)

    def interrupt(*_: Any) -> None:
        report.interrupted = True
        video.stop.set()

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, interrupt) if in_main else None
    started = time.perf_counter()
    try:
        for read_at, frame in video:
            writer.put((read_at, report.frames, frame, predictor(frame)))
            report.frames += 1
            if report.frames == max_frames:
                break
    finally:
        video.close()
        writer.close()
        if in_main:
            signal.signal(signal.SIGINT, before)
    report.seconds = time.perf_counter() - started
    if writer.error is not None:
        raise writer.error
    if report.frames == 0 and not report.interrupted:
        raise UserError(f"{source}: no frame could be read from this video")
    return report
