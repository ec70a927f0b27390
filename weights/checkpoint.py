"""Read and write checkpoints. Files are written atomically, and reading a file never executes code from it.

A checkpoint of this project is `{"yolact": 2, "config": {...}, "model": state_dict, "digest": ..., "training": {...}}`.
It includes the configuration with the class names, so a single file is enough to predict. `training` is optional and
holds the state of the run for resuming. Format 1 has no digest, and contains configuration keys that have since become
constants.
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
    """Write `model` and its configuration to `path`.

    Args:
        training: the training state for resuming: tensors, numbers, strings, and containers of these.
        half: store the weights in float16, which halves the size of the file.

    Raises:
        UserError: if the disk is full or the folder is not writable. An existing file at `path` is then unchanged.
    """
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    content: dict[str, Any] = {"yolact": FORMAT, "config": to_dict(model.config), "model": state}
    content["digest"] = state_digest(state)
    if training is not None:
        content["training"] = training
    write_checkpoint(path, content)


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write what `read_checkpoint` returns. Raises UserError if that fails; an existing file is then unchanged."""
    try:
        with atomic_write(path) as out:
            torch.save(content, out)
    except (OSError, RuntimeError) as error:  # `torch.save` raises RuntimeError if a write fails
        raise UserError(f"{write_error(path, error)}; an existing file is unchanged") from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a file, without executing code from it.

    Raises UserError if the file is missing, damaged, not a PyTorch file, or contains objects other than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such weights file'}")
    if path.suffix in (".onnx", ".xml"):
        raise UserError(f"{path}: an exported model has no weights to load; give the .pth it was exported from")
    with path.open("rb") as file:
        head = file.read(64)
    problem = not_pytorch(head)
    if problem:
        raise UserError(f"{path}: {problem}")
    damaged = UserError(f"{path}: damaged or truncated; delete it, and download or copy it again")
    try:
        # `torch.load` does not verify the checksums of the zip archive.
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
            f"{path}: refused, because the file contains code or objects other than weights ({found[1]}); "
            "ask its author for a file with the state_dict only"
        ) from None
    except Exception:  # a damaged file can fail in any part of a parser
        raise damaged from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not weights")
    return content


def not_pytorch(head: bytes) -> str:
    """Return why a file that starts with `head` cannot be a PyTorch file, or "" if it may be one."""
    if not head:
        return "the file is empty"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return ""
    text = all(31 < byte < 127 or byte in b"\t\r\n" for byte in head)
    return f"not a PyTorch weights file but {'a text file' if text else 'a file of an unknown format'}"


def check_version(content: dict[str, Any], path: str | Path) -> None:
    """Raise UserError if the checkpoint's format is not supported by this version."""
    version = content["yolact"]
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise UserError(f"{path}: has format {version!r}, but this version reads 1 to {FORMAT}; update the project")


def state_digest(state: State) -> str:
    """Return the SHA-256 of all names and values, which is stored in the file to detect changed weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_values(state: dict[str, Any], path: str | Path) -> State:
    """Return the weights in float32 and the batch counters unchanged.

    Raises UserError for entries that are not tensors, larger than their storage, not floating point, or not finite.
    """
    checked: State = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # With strides of 0, a tensor of a few bytes can have a shape of terabytes, which `float` would allocate.
            raise UserError(f"{path}: {name} has a shape of {value.numel()} values but fewer are stored; damaged file")
        if name.endswith("num_batches_tracked"):
            checked[name] = value
            continue
        if not value.is_floating_point():
            raise UserError(f"{path}: {name} has the dtype {value.dtype}, but weights must be floating point")
        if not bool(value.isfinite().all()):
            raise UserError(f"{path}: {name} contains values that are not finite; the training run has diverged")
        checked[name] = value.float()
    return checked
