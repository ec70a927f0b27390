"""Read and write checkpoints. Files are written atomically, and reading a file never executes code from it.

A checkpoint of this project is `{"yolact": 2, "config": {...}, "model": state_dict, "training": {...}}`. It includes
the configuration with the class names, so a single file is enough to predict. `training` is optional and holds the
state of the run for resuming.
"""

from __future__ import annotations

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
    """Write `model` and its configuration to `path`, with `half` in float16, which halves the size of the file.

    `training` is the state for resuming: tensors, numbers, strings, and containers of these. Raises UserError if the
    disk is full or the folder is not writable. An existing file at `path` is then unchanged.
    """
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    content: dict[str, Any] = {"yolact": FORMAT, "config": to_dict(model.config), "model": state}
    if training is not None:
        content["training"] = training
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
    if head[:2] != b"PK" and head[:1] != b"\x80":  # a zip archive, or a pickle as PyTorch wrote before 1.6
        raise UserError(f"{path}: {'not a PyTorch weights file' if head else 'the file is empty'}")
    damaged = UserError(f"{path}: damaged or truncated; delete it, and download or copy it again")
    try:
        # `torch.load` does not verify the checksums of the zip archive.
        if head[:2] == b"PK" and zipfile.ZipFile(path).testzip() is not None:
            raise damaged
        content = torch.load(path, map_location="cpu", weights_only=True)
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
