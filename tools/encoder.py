"""Write frames to a video file: H.264 with the source's sound by ffmpeg, or MPEG-4 without sound by OpenCV."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from utils.errors import UserError

FFMPEG = ["ffmpeg", "-y", "-nostdin", "-loglevel", "error"]
H264, MPEG4 = "H.264 with the source's sound", "MPEG-4 without sound; install ffmpeg for H.264 and sound"


class Encoder(Protocol):
    """Receives the frames of a video, and completes the file when it is closed."""

    def write(self, frame: np.ndarray) -> None:
        """Add a frame, uint8 BGR [H, W, 3] of the same size as the first."""
        ...

    def close(self, complete: bool) -> None:
        """Finish the file under its final name, or remove it unless it is `complete`."""
        ...


def has_h264() -> bool:
    """Return whether ffmpeg is installed and can encode H.264."""
    if shutil.which("ffmpeg") is None:
        return False
    listed = subprocess.run(["ffmpeg", "-hide_banner", "-encoders"], capture_output=True, text=True, check=False)
    return "libx264" in listed.stdout


class H264Encoder:
    """Pipes frames to ffmpeg, and adds the sound of `sound_from` when it is closed."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float, sound_from: str | None):
        self.path, self.fps, self.sound_from, self.frames = path, fps, sound_from, 0
        self.silent = path.with_name(f".{path.stem}.silent.mp4")
        self.part = path.with_name(f".{path.stem}.part.mp4")
        height, width = size
        # Players need 4:2:0, whose sides are even; an odd side is padded by one pixel.
        source = ["-f", "rawvideo", "-pix_fmt", "bgr24", "-s", f"{width}x{height}", "-r", f"{fps:.6f}", "-i", "pipe:0"]
        codec = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-pix_fmt", "yuv420p"]
        even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"]
        # In a session of its own, ffmpeg does not receive Ctrl-C, and completes the frames that were written.
        self.process = subprocess.Popen(
            [*FFMPEG, *source, *codec, *even, str(self.silent)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=sys.platform != "win32",
        )

    def write(self, frame: np.ndarray) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            raise self._failed() from None
        self.frames += 1

    def close(self, complete: bool) -> None:
        try:
            _, errors = self.process.communicate()  # closes the pipe and waits
            if complete and self.process.returncode:
                raise self._failed(errors)
            if complete:
                self._add_sound()
                self.part.replace(self.path)
        finally:
            for left in (self.silent, self.part):
                left.unlink(missing_ok=True)

    def _add_sound(self) -> None:
        sound = ["-i", self.sound_from] if self.sound_from else []
        # "1:a?" allows a source without sound. The sound ends with the frames if only some of them were processed.
        streams = ["-map", "0:v", *(["-map", "1:a?", "-c:a", "aac"] if sound else []), "-c:v", "copy"]
        limits = ["-t", f"{self.frames / self.fps:.6f}", "-movflags", "+faststart"]
        command = [*FFMPEG, "-i", str(self.silent), *sound, *streams, *limits, str(self.part)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            raise self._failed(done.stderr)

    def _failed(self, errors: bytes | None = None) -> UserError:
        if errors is None and self.process.stderr is not None:
            errors = self.process.stderr.read()
        reason = (errors or b"").decode("utf-8", "replace").strip().splitlines()[-1:] or ["is the disk full?"]
        return UserError(f"{self.path}: cannot be written completely by ffmpeg ({reason[0][:120]})")


class Mpeg4Encoder:
    """Writes MPEG-4 with OpenCV, which every installation can do."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float):
        self.path = path
        self.part = path.with_name(f".{path.stem}.part.mp4")
        self.writer = cv2.VideoWriter(str(self.part), cv2.VideoWriter.fourcc(*"mp4v"), fps, size[::-1])
        if not self.writer.isOpened():
            self.part.unlink(missing_ok=True)
            raise UserError(f"{path}: cannot be written as a video")

    def write(self, frame: np.ndarray) -> None:
        self.writer.write(frame)

    def close(self, complete: bool) -> None:
        self.writer.release()
        try:
            if complete:
                self._check()
                self.part.replace(self.path)
        finally:
            self.part.unlink(missing_ok=True)

    def _check(self) -> None:
        """Open the file again, because OpenCV does not report a full disk."""
        check = cv2.VideoCapture(str(self.part))
        playable = check.isOpened()
        check.release()
        if not playable:
            raise UserError(f"{self.path}: cannot be written completely; is the disk full?")
