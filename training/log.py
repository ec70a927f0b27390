"""The log of a run: one JSON line per step, images, and optionally TensorBoard event files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.image import write_image
from training.curves import draw_curves
from utils.errors import UserError
from utils.files import write_bytes, write_error


class RunLog(contextlib.AbstractContextManager["RunLog"]):
    """Write `folder/log.jsonl`, `folder/*.jpg` and, with `tensorboard`, event files in the same folder.

    A run that resumes at `step` writes later steps, and validations after the step `validated`, again; their lines are
    dropped from the log. `writes` is False in all processes except the main one. Raises UserError if TensorBoard is not
    installed or the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int = 0, validated: int = 0, tensorboard: bool = False, writes: bool = True):
        self.folder = folder
        self.writes = writes
        self.board: Any = None
        if tensorboard and writes:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs a package: pip install tensorboard") from None
            self.board = SummaryWriter(str(folder))
        path = folder / "log.jsonl" if writes else Path(os.devnull)
        try:
            if writes and path.exists():
                _drop_after(path, step, validated)
            self.file = path.open("a", buffering=1, encoding="utf-8")  # line-buffered: a killed run leaves whole lines
        except OSError as error:
            raise write_error(path, error) from None

    def line(self, step: int, values: dict[str, Any]) -> None:
        """Write one line of numbers, or of dictionaries of numbers."""
        try:
            self.file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        except OSError as error:
            raise write_error(self.file.name, error) from None
        if self.board is None:
            return
        for name, value in values.items():
            for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, (int, float)):
                    self.board.add_scalar(f"{name}/{part}" if part else f"train/{name}", number, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a BGR image, uint8 [H, W, 3], as `name`.jpg, replacing the previous one."""
        if not self.writes:
            return
        write_image(self.folder / f"{name}.jpg", image)
        if self.board is not None:
            self.board.add_image(name, np.ascontiguousarray(image[..., ::-1]), step, dataformats="HWC")

    def curves(self) -> None:
        """Draw `curves.png` from the log, if matplotlib is installed."""
        if self.writes:
            draw_curves(self.folder / "log.jsonl", self.folder / "curves.png")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        if self.board is not None:
            self.board.close()


def _drop_after(path: Path, step: int, validated: int) -> None:
    """Keep the complete lines of a log up to `step`, and validations up to the step `validated`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    # Only validation lines have the key "segm".
    kept = [
        line for line in lines if line.endswith("\n") and _step_of(line) <= (validated if '"segm"' in line else step)
    ]
    if kept != lines:
        write_bytes(path, "".join(kept).encode())


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity if the line is damaged, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
