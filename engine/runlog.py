"""What a run leaves to look at: a JSON line a step, pictures, and TensorBoard for those who have it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from engine.checkpoint import atomic_write
from engine.outputs import write_image


class RunLog(contextlib.AbstractContextManager):
    """`folder/log.jsonl`, `folder/*.jpg`, and with `tensorboard` its event files in the same folder.

    A run that goes on at `step` drops the lines after it, which it is about to write again. `writes` is False in all
    but the main process. Raises UserError when TensorBoard is not installed, or the disk is full.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False, writes: bool = True):
        self.folder = folder
        self.writes = writes
        self.board = None
        if tensorboard and writes:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs the package: pip install tensorboard") from None
            self.board = SummaryWriter(str(folder))
        path = folder / "log.jsonl" if writes else Path(os.devnull)
        if writes and path.exists():
            _cut(path, step)
        self.file = path.open("a", buffering=1, encoding="utf-8")  # line by line: a killed run leaves whole ones

    def line(self, step: int, values: dict[str, Any]) -> None:
        """A line of numbers, or of dictionaries of numbers, at `step`."""
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"{self.file.name}: cannot be written ({error.strerror or error})") from None
        if self.board is None:
            return
        for name, value in values.items():
            for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, (int, float)):
                    self.board.add_scalar(f"{name}/{part}" if part else f"train/{name}", number, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A BGR picture, written over the last one of that name."""
        if not self.writes:
            return
        write_image(self.folder / f"{name}.jpg", image)
        if self.board is not None:
            self.board.add_image(name, np.ascontiguousarray(image[..., ::-1]), step, dataformats="HWC")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        if self.board is not None:
            self.board.close()


def _cut(path: Path, step: int) -> None:
    """Keep the lines of a log up to `step`."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        with atomic_write(path) as out:
            out.write("".join(kept).encode())
