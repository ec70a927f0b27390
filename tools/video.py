"""Segment videos. Reading, inference and writing run in parallel through bounded queues; frames stay in order."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from tqdm import tqdm

from data.image import write_image
from inference.detections import Detections
from tools.encoder import H264, MPEG4, Encoder, H264Encoder, Mpeg4Encoder, has_h264
from tools.images import split_output
from tools.outputs import write_results
from tools.track import Tracker
from utils.errors import UserError
from utils.files import atomic_write, write_error

_END = None
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".gif"}


@dataclass
class VideoReport:
    """Statistics of a video. Latency, in seconds, is the time from reading a frame to writing its result."""

    frames: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    missing: int = 0  # frames that the container declares but that could not be read
    latencies: list[float] = field(default_factory=list)
    codec: str = ""  # of the video that was written, if any

    def __str__(self) -> str:
        latency = 1000 * float(np.median(self.latencies)) if self.latencies else 0.0
        rate = self.frames / self.seconds if self.seconds else 0.0
        ending = ", interrupted" if self.interrupted else ""
        codec = f" ({self.codec})" if self.codec else ""
        return f"{self.frames} frames, {rate:.1f} frames/s, median latency {latency:.0f} ms{ending}{codec}"


class VideoSource:
    """Frames of a file or a camera, read ahead in a separate thread."""

    def __init__(self, source: str, ahead: int = 4):
        self.name, self.camera = source, source.isdigit()
        if not (self.camera or "://" in source or Path(source).is_file()):
            raise UserError(f"{source}: {'a folder, not a video' if Path(source).is_dir() else 'no such video'}")
        self.capture = cv2.VideoCapture(int(source) if self.camera else source)
        if not self.capture.isOpened():
            raise UserError(f"{'camera ' if self.camera else ''}{source}: cannot be opened as a video")
        rate = self.capture.get(cv2.CAP_PROP_FPS)
        self.fps = rate if 0 < rate < 1000 else 30.0
        count = self.capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.length = int(count) if count > 0 and not self.camera else None
        self.queue: queue.Queue = queue.Queue(1 if self.camera else ahead)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        more = True
        while more and not self.stop.is_set():
            try:
                more, frame = self.capture.read()
            except cv2.error:
                more = False
            if more and self.camera and self.queue.full():  # keep only the newest frame of a camera
                with contextlib.suppress(queue.Empty):
                    self.queue.get_nowait()
            _put(self.queue, (time.perf_counter(), frame) if more else _END, self.stop)

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
        if not self.thread.is_alive():  # releasing the capture during a read would crash
            self.capture.release()


def _put(items: queue.Queue, item: Any, stop: threading.Event) -> None:
    """Put an item into a bounded queue, waiting while it is full, unless `stop` is set meanwhile."""
    while not stop.is_set():
        try:
            items.put(item, timeout=0.2)
            return
        except queue.Full:
            continue


def frame_files(folder: Path) -> list[Path]:
    """Return the per-frame results of an earlier run in `folder`. No other program uses these names."""
    endings = ("masks.png", "masks.json", "polygons.json", "prototypes.png", "frame.jpg", "cutout_*.png")
    return [path for ending in endings for path in folder.glob("[0-9]" * 6 + "." + ending)]


class VideoWriter:
    """Draw and encode in a separate thread. The files appear under their final names only when `close` succeeds."""

    def __init__(self, output: Path, kinds: Sequence[str], source: VideoSource, report: VideoReport):
        self.output, self.kinds, self.source, self.report = output, kinds, source, report
        self.name = Path(source.name).name
        self.per_frame = [kind for kind in kinds if kind in ("masks", "polygons", "prototypes", "cutout")]
        self.encoders: dict[str, Encoder] = {}  # by the kind of output
        self.files = contextlib.ExitStack()
        self.json: IO[bytes] | None = None
        self.error: BaseException | None = None
        self.queue: queue.Queue = queue.Queue(4)
        self.thread = threading.Thread(target=self._run, daemon=True)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            for file in frame_files(output) if self.per_frame else ():  # an earlier run may have written more frames
                file.unlink()
            if "json" in kinds:  # one line per detection, written at once: a long video has millions
                self.json = self.files.enter_context(atomic_write(output.with_name(output.name + ".json")))
                self.json.write(b"[")
        except OSError as error:
            raise write_error(output, error) from None
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
                except BaseException as error:  # raised again in the main thread
                    self.error = error

    def _write(self, read_at: float, index: int, frame: np.ndarray, detections: Detections) -> None:
        origin = {"video": self.name, "frame": index}
        for kind, draw in (("overlay", detections.draw), ("blur", detections.blur)):
            if kind in self.kinds:
                if kind not in self.encoders:
                    self.encoders[kind] = self._open(video_path(self.output, kind), frame)
                self.encoders[kind].write(draw(frame))
        if self.json is not None:
            for result in detections.to_coco(index):
                self.json.write(
                    (b",\n" if self.json.tell() > 1 else b"\n") + json.dumps(origin | result, allow_nan=False).encode()
                )
        if self.per_frame:
            path = self.output / f"{index:06d}"
            if "polygons" in self.per_frame:  # LabelMe needs the frame to show them on
                origin["file_name"] = str(path.with_suffix(".frame.jpg"))
                write_image(path.with_suffix(".frame.jpg"), frame, mark=False)
            write_results(frame, detections, path, self.per_frame, origin, ".jpg")
        self.report.latencies.append(time.perf_counter() - read_at)

    def _open(self, path: Path, frame: np.ndarray) -> Encoder:
        size = (frame.shape[0], frame.shape[1])
        if has_h264():
            self.report.codec = H264
            # The sound is read when the frames are complete, so only from a file and not from a camera or a stream.
            sound_from = self.source.name if Path(self.source.name).is_file() else None
            return H264Encoder(path, size, self.source.fps, sound_from)
        self.report.codec = MPEG4
        return Mpeg4Encoder(path, size, self.source.fps)

    def close(self) -> None:
        """Finish the video and JSON files. If an error occurred, discard all of them and raise it."""
        self.queue.put(_END)
        self.thread.join()
        try:
            with self.files:
                if self.error is None and self.json is not None:
                    self.json.write(b"\n]\n")
                for encoder in self.encoders.values():
                    try:
                        encoder.close(complete=self.error is None)
                    except BaseException as error:
                        self.error = self.error or error
                if self.error is not None:
                    raise self.error  # inside the block, so that the JSON file is discarded, too
        except OSError as error:
            raise write_error(self.output, error) from None


def video_path(output: Path, kind: str) -> Path:
    """Return the path of the video with the overlay or the blurred instances."""
    return output.with_name(output.name + {"overlay": ".mp4", "blur": ".blur.mp4"}[kind])


def process_video(
    predictor: Callable[[np.ndarray], Detections],
    source: str,
    output: Path,
    kinds: Sequence[str],
    max_frames: int | None = None,
    track: bool = False,
) -> VideoReport:
    """Segment a video file, or a camera given by its number, and return statistics.

    Results are `output` + ".mp4", ".blur.mp4" and ".json", and a folder `output` of per-frame files, depending on
    `kinds`. With `track`, objects are numbered across frames.
    On Ctrl-C the frames that were read are still written and the files are completed. At most `max_frames` frames are
    processed. Raises UserError if the source cannot be opened or has no frames, or a result cannot be written.
    """
    if Path(source).resolve() in (video_path(output, kind).resolve() for kind in ("overlay", "blur")):
        raise UserError(f"{source}: the result would replace the video itself; choose another --output")
    report = VideoReport()
    video = VideoSource(source)
    try:
        tracker = Tracker(video.fps) if track else None
        writer = VideoWriter(output, kinds, video, report)
    except UserError:
        video.close()
        raise

    def interrupt(*_: Any) -> None:
        report.interrupted = True
        video.stop.set()

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, interrupt) if in_main else None
    started = time.perf_counter()
    try:
        for read_at, frame in tqdm(video, total=max_frames or video.length, desc="frames", disable=None):
            found = predictor(frame)
            writer.put((read_at, report.frames, frame, tracker(found) if tracker else found))
            report.frames += 1
            if report.frames == max_frames:
                break
        if report.frames == 0 and not report.interrupted:
            raise UserError(f"{source}: no frame could be read from this video")
    except BaseException as error:  # `writer.close` discards the unfinished files and raises it
        writer.error = writer.error or error
    finally:
        video.close()
        try:
            writer.close()
        finally:
            if in_main:
                signal.signal(signal.SIGINT, before)
    report.seconds = time.perf_counter() - started
    if video.length is not None and max_frames is None and not report.interrupted:
        # Containers may declare a frame or two too many; a larger difference means that the file ends early.
        short = video.length - report.frames
        report.missing = short if short > max(2, video.length // 100) else 0
    return report


def video_name(path: str) -> str:
    """Return the name of a video without its suffix, keeping other dots."""
    return Path(path).stem if Path(path).suffix.lower() in VIDEO_SUFFIXES else Path(path).name


def segment_video(
    predictor: Callable[[np.ndarray], Detections],
    video: str,
    folder: Path | None,
    kinds: Sequence[str],
    max_frames: int | None,
    track: bool,
) -> int:
    """Segment eval.py's --video; return 130 if interrupted, 1 if it ended before the expected number of frames, else 0.

    Args:
        video: a file, the number of a camera, or in:out.
        folder: eval.py's --output.
        kinds: what to save.
    """
    source, target = split_output(video)
    output = Path(folder or target or "results")
    if output.suffix.lower() in VIDEO_SUFFIXES - {".mp4"} and not output.is_dir():
        raise UserError(f"{output}: videos are written as .mp4; name it {output.with_suffix('.mp4').name}")
    # If `output` is an existing folder, the results go into it, named after the video. If that folder holds the frames
    # of an earlier run, it was created by that run, and `output` is again used as the name of the results.
    if (output.is_dir() and not frame_files(output)) or (folder or target) is None:
        output = output / (f"camera{source}" if source.isdecimal() else video_name(source))
        if video_path(output, "overlay").resolve() == Path(source).resolve():
            output = output.with_name(output.name + ".yolact")
    output = output.with_name(video_name(str(output)))
    report = process_video(predictor, source, output, kinds, max_frames, track)
    print(f"{source} -> {output}{'.mp4' if 'overlay' in kinds else ''}: {report}")
    if report.missing:
        expected = report.frames + report.missing
        print(f"{source}: {report.frames} of {expected} frames could be read; the file may be damaged", file=sys.stderr)
    # Matroska does not store the number of frames, so the count that OpenCV reports is an estimate.
    damaged = report.missing and Path(source).suffix.lower() not in (".mkv", ".webm")
    return 130 if report.interrupted else 1 if damaged else 0
