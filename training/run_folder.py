"""The folder of a run: its lock, its log, and the record of its commands."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config, to_dict
from data.image import write_image
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import write_bytes, write_error, write_json

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

FILES = ("last.pth", "best.pth", "log.jsonl", "run.json", "first_batch.jpg", "validation.jpg", "curves.png")


@contextlib.contextmanager
def claim_folder(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Create and lock a run's folder for the duration of the block.

    The lock ends with the process. On Windows, and on file systems without locks, nothing is locked. Temporary files
    that a killed run left are removed; other files are not touched. Raises UserError if another process is training in
    the folder, or the folder cannot be written.
    """
    problem = None
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if ranks.is_main:
                lock = stack.enter_context((folder / ".lock").open("a"))
                try:
                    if fcntl is not None:  # a POSIX record lock, which forked workers do not inherit
                        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    advice = "wait for it, or choose another --output_dir"
                    raise UserError(f"{folder}: another process is training in it; {advice}") from None
                except OSError:  # a file system without locks
                    pass
                for unfinished in (path for name in FILES for path in folder.glob(f".{name}.*.part")):
                    unfinished.unlink()
        except OSError as error:
            problem = write_error(folder, error)
        except UserError as error:
            problem = error
        ranks.raise_in_all(problem)
        yield


def write_record(folder: Path, args: dict[str, Any], config: Config, resumed: bool) -> None:
    """Write the commands that started and resumed a run, its arguments and its configuration, as `run.json`."""
    path = folder / "run.json"
    try:
        commands = json.loads(path.read_text(encoding="utf-8"))["commands"] if resumed else []
    except (OSError, ValueError, KeyError, TypeError):
        commands = []
    commands = [*commands, shlex.join(["python", *sys.argv])]
    write_json(path, {"commands": commands, "args": args, "config": to_dict(config), "torch": torch.__version__})


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

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        if self.board is not None:
            self.board.close()


def _drop_after(path: Path, step: int, validated: int) -> None:
    """Keep the complete lines of a log up to `step`, and validations up to the step `validated`."""
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for line in lines:
        try:
            values = json.loads(line)
            last = validated if "segm" in values else step  # only validations have this key
            complete = line.endswith("\n") and values["step"] <= last
        except (ValueError, TypeError, KeyError):  # a damaged line
            continue
        kept += [line] if complete else []
    if kept != lines:
        write_bytes(path, "".join(kept).encode())
