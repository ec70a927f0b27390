"""Write H.264 videos with the timestamps and the sound of their source, with PyAV."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np

from inference.detections import TOOLS
from utils.errors import require
from utils.files import atomic_write

TIME_BASE = Fraction(1, 90_000)  # seconds; the resolution of timestamps
QUALITY = {"preset": "veryfast", "crf": "20"}
COPIED = {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"}  # codecs of sound that players accept in an MP4 file


class _CheckedFile:
    """Passes writes on to a file and keeps the first error, which FFmpeg would not report, as of a full disk."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None
        self.name, self.read = file.name, file.read

    def write(self, data: bytes) -> int:
        try:
            if self.error is None:
                self.file.write(data)
                self.file.flush()  # FFmpeg opens the file again by its name, to move the index to the front
        except OSError as error:
            self.error = error
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence) if self.error is None else 0

    def tell(self) -> int:
        return self.file.tell() if self.error is None else 0

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class VideoFile:
    """An MP4 file in which every frame has its own time. Sound is copied from `source`, without encoding it again.

    The file appears under its name when `files` is closed without an error, after `complete`.

    Args:
        path: the file to write.
        size: (height, width) of the frames. Players need even sides, so an odd one is padded by a pixel.
        fps: the source's rate; the last frame is shown for 1 / fps seconds.
        source: the file to copy sound from, or None.
        start: the timestamp of the beginning of the source, in seconds.
        files: receives the open files.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, ...],
        fps: float,
        source: Path | None,
        start: float,
        files: contextlib.ExitStack,
    ):
        with require("av", install=TOOLS):
            import av
        self.av, self.size, self.start, self.frame_time = av, size, start, 1 / fps
        self.output = _CheckedFile(files.enter_context(atomic_write(path)))
        self.container = av.open(self.output, "w", format="mp4", options={"movflags": "+faststart"})
        files.push(self._close)
        self.video: Any = self.container.add_stream("libx264", options=QUALITY)
        self.video.height, self.video.width = size[0] + size[0] % 2, size[1] + size[1] % 2
        self.video.pix_fmt, self.video.codec_context.time_base = "yuv420p", TIME_BASE
        self.last = -1  # timestamp of the last frame
        self.sound: Any = None
        self.packets: Any = iter(())
        self.next_packet: Any = None
        self.sound_note = "without sound"
        if source is not None:
            self._open_sound(files.enter_context(av.open(str(source))))

    def _open_sound(self, container: Any) -> None:
        if not container.streams.audio:
            return
        stream = container.streams.audio[0]
        if stream.codec_context.name not in COPIED:
            self.sound_note = f"without its sound: an MP4 file cannot have {stream.codec_context.name}"
            return
        self.sound = self.container.add_stream_from_template(stream)
        self.packets = container.demux(stream)
        self.next_packet = next(self.packets, None)
        self.sound_note = "with the source's sound"

    def write(self, seconds: float, image: np.ndarray) -> None:
        """Add a frame, uint8 BGR [H, W, 3], at a time from the start of the video."""
        if image.shape[:2] != tuple(self.size):  # a stream may change its resolution
            image = cv2.resize(image, (self.size[1], self.size[0]))
        image = np.pad(image, ((0, self.size[0] % 2), (0, self.size[1] % 2), (0, 0)), mode="edge")
        frame = self.av.VideoFrame.from_ndarray(image, format="bgr24")
        self.last = max(round(seconds / TIME_BASE), self.last + 1)
        frame.pts, frame.time_base = self.last, TIME_BASE
        self._mux(frame)
        self._copy_sound(seconds)

    def _copy_sound(self, until: float) -> None:
        """Copy the sound up to a time, so that sound and frames are near each other in the file."""
        while self.next_packet is not None:
            packet = self.next_packet
            if packet.dts is not None:  # the last packet of a file is empty
                if float(packet.dts * packet.time_base) - self.start > until:
                    return
                shift = round(self.start / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = self.sound
                self.container.mux(packet)
            self.next_packet = next(self.packets, None)

    def _mux(self, frame: Any) -> None:
        for packet in self.video.encode(frame):
            packet.duration = round(self.frame_time / TIME_BASE)  # only that of the last one is used
            self.container.mux(packet)
        self.output.check()

    def complete(self, whole: bool) -> None:
        """Write what is left. Unless the `whole` source was read, the sound ends with the last frame."""
        self._copy_sound(math.inf if whole else float(self.last * TIME_BASE) + self.frame_time)
        self._mux(None)
        self.container.close()
        self.output.check()

    def _close(self, kind: Any, *_: Any) -> None:
        if kind is not None:  # after an error; the file is discarded
            with contextlib.suppress(Exception):
                self.container.close()
