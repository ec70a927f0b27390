"""Files that are written whole or not at all."""

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

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears at `path` when the block ends without an error, and not at all otherwise.

    The data goes to a temporary file in the same folder, is flushed to the disk and renamed. The new file has the
    permissions that the user's umask gives.
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


@contextmanager
def exclusive(path: Path, message: str) -> Iterator[None]:
    """Hold a lock file; UserError with `message` if another process holds it.

    The system releases the lock when its process ends, however it ends. Where there is no `fcntl`, as on Windows,
    nothing is locked.
    """
    if fcntl is None:
        yield
        return
    try:
        file = path.open("a")
    except OSError as error:
        raise write_error(path, error) from None
    with file:
        try:
            # A record lock, because a forked worker would inherit the other kind and keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(message) from None
        except OSError:  # a file system without locks
            pass
        yield


def write_error(path: str | Path, error: BaseException) -> UserError:
    """Describe a failed write to `path` in one line."""
    number = getattr(error, "errno", None)
    # torch.save reports a full disk as a RuntimeError about an unexpected file position.
    if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or "unexpected pos" in str(error):
        return UserError(f"{path}: cannot be written, the disk or quota is full")
    return UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, creating its folder. Raises UserError if the disk or the permissions do not allow it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as out:
            out.write(data)
    except OSError as error:
        raise write_error(path, error) from None


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON: dictionaries indented, lists on one line. NaN is an error, as JSON does not know it."""
    indent = 1 if isinstance(content, dict) else None
    write_bytes(path, json.dumps(content, indent=indent, allow_nan=False).encode() + b"\n")
