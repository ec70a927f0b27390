"""Segment videos. Reading, inference and writing run in parallel, with a few frames between them, in order."""

from __future__ import annotations

import collections
import contextlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from data.image import write_image
from inference.detections import TOOLS, Detections
from tools.encoder import VideoFile
from tools.images import is_foreign, split_output
from tools.outputs import write_results
from tools.track import Tracker
from utils.distributed import StopSignal
from utils.errors import UserError, require
from utils.files import atomic_write, write_error

AHEAD = 4  # frames between two of the three stages
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".gif"}


@dataclass
class VideoReport:
    """Statistics of a video."""

    frames: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    missing: int = 0  # frames that the container declares but that could not be read
    latencies: list[float] = field(default_factory=list)  # of live sources: seconds from reading to writing
    sound: str = ""  # what became of the sound

    def __str__(self) -> str:
        parts = [f"{self.frames} frames", f"{self.frames / self.seconds if self.seconds else 0:.1f} frames/s"]
        if self.latencies:
            parts.append(f"median latency {1000 * float(np.median(self.latencies)):.0f} ms")
        parts += ["interrupted"] if self.interrupted else []
        return ", ".join(parts) + (f" ({self.sound})" if self.sound else "")


@dataclass
class Frame:
    """A frame of a video."""

    seconds: float  # from the start of the video
    image: np.ndarray  # uint8 BGR [H, W, 3]
    read_at: float


class VideoSource:
    """The frames of a file, a stream or a camera, read in a thread of their own. Iteration ends when `stop` is true.

    Of a live source, one without an end, always the newest frame is returned, and others are dropped.

    Raises UserError if the source cannot be opened or PyAV is not installed.
    """

    def __init__(self, source: str, stop: Callable[[], bool]):
        self.name, self.stop, self.closed = source, stop, threading.Event()
        self.file = Path(source) if Path(source).is_file() else None
        camera = source.isdecimal()
        if not (self.file or camera or "://" in source):
            raise UserError(f"{source}: {'a folder, not a video' if Path(source).is_dir() else 'no such video'}")
        with require("av", install=TOOLS):
            import av
        self.error: Exception | None = None  # of the thread
        self.length: int | None = None  # number of frames, if the container declares it
        self.start = 0.0  # timestamp of the beginning, in seconds
        if camera:
            try:
                capture = cv2.VideoCapture(int(source))
            except (cv2.error, OverflowError):
                capture = cv2.VideoCapture()
            if not capture.isOpened():
                raise UserError(f"camera {source}: cannot be opened as a video")
            self.fps, self.live, self.frames = 30.0, True, _captured(capture)
        else:
            try:
                self.container = av.open(source)
                stream = self.container.streams.video[0]
            except (av.FFmpegError, OSError, IndexError):
                raise UserError(f"{source}: cannot be opened as a video") from None
            stream.thread_type = "AUTO"
            self.fps = float(stream.average_rate or 30)
            self.live = self.file is None and not self.container.duration
            self.length = stream.frames or None
            self.start = (self.container.start_time or 0) / av.time_base
            self.frames = self._decoded(av, stream)
        self.queue: queue.Queue[Frame | None] = queue.Queue(1 if self.live else AHEAD)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _decoded(self, av: Any, stream: Any) -> Iterator[Frame]:
        seconds = 0.0
        packets = self.container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:  # a damaged file, or a broken connection; the missing frames are counted
                return
            if packet is None:
                return
            try:
                decoded = packet.decode()
            except av.FFmpegError:  # a damaged part of the file
                continue
            for frame in decoded:
                seconds = seconds + 1 / self.fps if frame.time is None else frame.time - self.start
                # Phones store a landscape image and its rotation, counted counter-clockwise.
                image = np.rot90(frame.to_ndarray(format="bgr24"), frame.rotation // 90)
                yield Frame(seconds, np.ascontiguousarray(image), time.perf_counter())

    def _read(self) -> None:
        try:
            for frame in self.frames:
                if self.live:
                    with contextlib.suppress(queue.Empty):
                        self.queue.get_nowait()
                self._put(frame)
                if self.closed.is_set():
                    return
        except Exception as error:  # raised again in the main thread
            self.error = error
        self._put(None)

    def _put(self, frame: Frame | None) -> None:
        while not self.closed.is_set():
            with contextlib.suppress(queue.Full):
                return self.queue.put(frame, timeout=0.2)

    def __iter__(self) -> Iterator[Frame]:
        while not self.stop():
            try:
                frame = self.queue.get(timeout=0.2)
            except queue.Empty:
                continue
            if frame is None:
                if self.error is not None:
                    raise self.error
                return
            yield frame

    def close(self) -> None:
        self.closed.set()
        self.thread.join(timeout=5)


def _captured(capture: cv2.VideoCapture) -> Iterator[Frame]:
    """Yield the frames of a camera."""
    started = time.perf_counter()
    while (read := capture.read())[0]:
        now = time.perf_counter()
        yield Frame(now - started, read[1], now)
    capture.release()


def frame_files(folder: Path) -> list[Path]:
    """Return the per-frame results of an earlier run in `folder`. No other program uses these names."""
    endings = ("masks.png", "masks.json", "polygons.json", "prototypes.png", "frame.jpg", "cutout_*.png")
    return [path for ending in endings for path in folder.glob("[0-9]" * 6 + "." + ending)]


class VideoResults:
    """Draws, encodes and writes the results of each frame, which it is called with in order.

    Files appear under their final names when `files` is closed without an error.
    """

    def __init__(
        self, output: Path, kinds: Sequence[str], source: VideoSource, report: VideoReport, files: contextlib.ExitStack
    ):
        self.output, self.kinds, self.source, self.report, self.files = output, kinds, source, report, files
        self.per_frame = [kind for kind in kinds if kind in ("masks", "polygons", "prototypes", "cutout")]
        self.videos: dict[str, VideoFile] = {}  # by the kind of output
        output.parent.mkdir(parents=True, exist_ok=True)
        for file in frame_files(output) if self.per_frame else ():  # an earlier run may have written more frames
            file.unlink()
        self.json: Any = None
        if "json" in kinds:  # one line per detection, written at once: a long video has millions
            self.json = files.enter_context(atomic_write(output.with_name(output.name + ".json")))
            self.json.write(b"[")

    def __call__(self, index: int, frame: Frame, detections: Detections) -> None:
        origin = {"video": Path(self.source.name).name, "frame": index, "seconds": round(frame.seconds, 4)}
        for kind, draw in (("overlay", detections.draw), ("blur", detections.blur)):
            if kind in self.kinds:
                drawn = draw(frame.image)
                if kind not in self.videos:
                    source, path = self.source, video_path(self.output, kind)
                    self.videos[kind] = VideoFile(
                        path, drawn.shape[:2], source.fps, source.file, source.start, self.files
                    )
                    self.report.sound = self.videos[kind].sound_note
                self.videos[kind].write(frame.seconds, drawn)
        if self.json is not None:
            for result in detections.to_coco(index):
                text = json.dumps(origin | result, allow_nan=False).encode()
                self.json.write((b",\n" if self.json.tell() > 1 else b"\n") + text)
        if self.per_frame:
            path = self.output / f"{index:06d}"
            if "polygons" in self.per_frame:  # LabelMe needs the frame to show them on
                origin["file_name"] = str(path.with_suffix(".frame.jpg"))
                write_image(path.with_suffix(".frame.jpg"), frame.image, mark=False)
            write_results(frame.image, detections, path, self.per_frame, origin, ".jpg")
        if self.source.live:
            self.report.latencies.append(time.perf_counter() - frame.read_at)

    def complete(self, whole: bool) -> None:
        """Write the ends of all files; `whole`: all of the source was read."""
        if self.json is not None:
            self.json.write(b"\n]\n")
        for video in self.videos.values():
            video.complete(whole)


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
    """Segment a video file or stream, or a camera given by its number, and return statistics.

    Results are `output` + ".mp4", ".blur.mp4" and ".json", and a folder `output` of per-frame files, depending on
    `kinds`. Videos have the timestamps and the sound of the source. With `track`, objects are numbered across frames.
    On Ctrl-C and SIGTERM the files are completed with the frames so far. At most `max_frames` frames are processed.
    Raises UserError if the source cannot be opened or has no frames, or a result cannot be written.
    """
    if Path(source).resolve() in (video_path(output, kind).resolve() for kind in ("overlay", "blur")):
        raise UserError(f"{source}: the result would replace the video itself; choose another --output")
    if "json" in kinds and is_foreign(file := output.with_name(output.name + ".json")):
        raise UserError(f"{file}: is not a result of an earlier run; choose another --output")
    report, pending = VideoReport(), collections.deque[Future[None]]()
    with StopSignal() as signals, contextlib.ExitStack() as stack:
        video = VideoSource(source, lambda: signals.received)
        stack.callback(video.close)
        tracker = Tracker(video.fps) if track else None
        started = time.perf_counter()
        try:
            with contextlib.ExitStack() as files, ThreadPoolExecutor(1) as pool:
                results = VideoResults(output, kinds, video, report, files)
                for frame in tqdm(video, total=max_frames or video.length, desc="frames", disable=None):
                    found = predictor(frame.image)
                    found = tracker(found, frame.image) if tracker else found
                    if len(pending) == AHEAD:
                        pending.popleft().result()  # raises what went wrong in the thread
                    pending.append(pool.submit(results, report.frames, frame, found))
                    report.frames += 1
                    if report.frames == max_frames:
                        break
                for future in pending:
                    future.result()
                report.interrupted = signals.received
                if report.frames == 0 and not report.interrupted:
                    raise UserError(f"{source}: no frame could be read from this video")
                results.complete(whole=not report.interrupted and report.frames != max_frames)
        except OSError as error:
            raise write_error(output, error) from None
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
        video: a file, a stream, the number of a camera, or in:out.
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
    return 130 if report.interrupted else 1 if report.missing else 0
