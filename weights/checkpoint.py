"""The files: own ones are written whole or not at all, and nothing in any file is executed.

An own file is `{"yolact": 2, "config": {...}, "model": state_dict, "digest": ..., "training": {...}}`. The
configuration with the class names is inside, so one file is enough to predict, and `training` is what resuming needs.
Format 1 has no digest, and configuration keys that have become constants.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import to_dict
from utils.errors import UserError
from utils.files import atomic_write, write_error
from yolact import Yolact

FORMAT = 2
State = dict[str, Tensor]


def save_checkpoint(
    path: str | Path, model: Yolact, training: dict[str, Any] | None = None, half: bool = False
) -> None:
    """Write `model` with its configuration.

    Args:
        training: what resuming needs: tensors, numbers, text, and containers of them.
        half: store the weights in float16, which halves the file.

    Raises:
        UserError: if the disk is full or the folder cannot be written. A file that was at `path` is then unchanged.
    """
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    content: dict[str, Any] = {"yolact": FORMAT, "config": to_dict(model.config), "model": state}
    content["digest"] = state_digest(state)
    if training is not None:
        content["training"] = training
    try:
        with atomic_write(path) as out:
            torch.save(content, out)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise UserError(f"{write_error(path, error)}; the file that was there is unchanged") from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what is in a file, without executing anything in it. Raises UserError that says what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such weights file'}")
    if path.suffix in (".onnx", ".xml"):
        raise UserError(f"{path}: exported models can be run but not loaded as weights; give the .pth it was made from")
    with path.open("rb") as file:
        head = file.read(64)
    problem = not_pytorch(head)
    if problem:
        raise UserError(f"{path}: {problem}")
    damaged = UserError(f"{path}: damaged or truncated; delete it, and download or copy it again")
    try:
        # PyTorch does not compare the checksums that the format has.
        if head[:2] == b"PK" and zipfile.ZipFile(path).testzip() is not None:
            raise damaged
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise damaged from None
        raise UserError(
            f"{path}: refused, the file contains code or objects beside weights ({found[1]}); "
            "ask its author for the state_dict only"
        ) from None
    except Exception:  # a damaged file can fail in any part of a parser
        raise damaged from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not weights")
    return content


def not_pytorch(head: bytes) -> str:
    """Return what is wrong with a file that begins with `head` but is not PyTorch's, or "" if it may be."""
    if not head:
        return "the file is empty"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return ""
    text = all(31 < byte < 127 or byte in b"\t\r\n" for byte in head)
    return f"not a PyTorch weights file, it is {'a text file' if text else 'of an unknown format'}"


def check_version(content: dict[str, Any], path: str | Path) -> None:
    """Raise UserError unless an own file is of a format that this version reads."""
    version = content["yolact"]
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise UserError(f"{path}: has format {version!r}, this version reads 1 to {FORMAT}; update the project")


def state_digest(state: State) -> str:
    """Return the SHA-256 of names and values. A file carries it, to show that its weights are those that were saved."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_values(state: dict[str, Any], path: str | Path) -> State:
    """Return weights as float32, and counters as they are. Raises UserError for NaN, complex or integer weights."""
    checked: State = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # Strides of 0 let a few bytes claim terabytes, which the next operation would allocate.
            raise UserError(f"{path}: {name} claims {value.numel()} values and has fewer; the file is damaged")
        if name.endswith("num_batches_tracked"):
            checked[name] = value
            continue
        if not value.is_floating_point():
            raise UserError(f"{path}: {name} has the type {value.dtype}, weights must be floating point")
        if not bool(value.isfinite().all()):
            raise UserError(f"{path}: {name} contains values that are not finite; the training that wrote it failed")
        checked[name] = value.float()
    return checked
