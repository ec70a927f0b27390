"""Atomic file writes."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends. If the block raises, `path` is unchanged.

    The data is written to a temporary file in the same folder, flushed to disk, and renamed. The permissions follow
    the user's umask.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("x+b") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_error(path: str | Path, error: BaseException) -> UserError:
    """Return a UserError that describes a failed write to `path` in one line."""
    number = getattr(error, "errno", None)
    # On a full disk, `torch.save` raises a RuntimeError about an unexpected file position.
    if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or "unexpected pos" in str(error):
        return UserError(f"{path}: cannot be written, the disk or quota is full")
    return UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and create its folder. Raises UserError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as out:
            out.write(data)
    except OSError as error:
        raise write_error(path, error) from None


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, with dictionaries indented and lists on one line.

    Raises ValueError for NaN and infinity, which JSON cannot represent, and UserError if the file cannot be written.
    """
    indent = 1 if isinstance(content, dict) else None
    write_bytes(path, json.dumps(content, indent=indent, allow_nan=False).encode() + b"\n")
