"""The command line settings of a run. Checkpoints store them, so that --resume needs no other argument."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError

PATHS = ("train_annotations", "train_images", "val_annotations", "val_images", "output_dir")
# These settings cannot change on --resume, because the result would not be that of one run.
FIXED = ("config", "set", "batch_size", "lr", "init", "seed")


@dataclass(frozen=True)
class Settings:
    """The arguments of train.py, see its help. Learning rate and schedule are in the configuration."""

    config: str | None = None
    train_annotations: Path | None = None
    train_images: Path | None = None
    val_annotations: Path | None = None
    val_images: Path | None = None
    init: str = "imagenet"
    batch_size: int | None = None
    accumulate: int = 1
    lr: float | None = None
    epochs: int | None = None
    max_iter: int | None = None
    device: str = "auto"
    precision: str = "auto"
    workers: int = 2
    val_interval: int | None = None
    patience: int | None = None
    output_dir: Path = Path("runs/run")
    tensorboard: bool = False
    ignore_audit: bool = False
    follow_links: bool = False
    seed: int = 0
    set: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as strings, numbers and lists, which a checkpoint can hold."""
        values = dataclasses.asdict(self)
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        return plain | {"set": list(self.set)}

    @classmethod
    def resumed(cls, stored: dict[str, Any], given: dict[str, Any], folder: Path) -> Settings:
        """Return the `stored` settings of the run in `folder`, updated with those `given` now.

        Raises UserError if a setting in FIXED is given, or the stored settings are damaged.
        """
        for key in FIXED:
            if key in given:
                raise UserError(f"--{key} cannot change in a run that is resumed; start a new one with --init {folder}")
        names = {item.name for item in dataclasses.fields(cls)}
        values = {key: value for key, value in stored.items() if key in names} | {"output_dir": folder}
        # Both set the length, so a new value of one replaces a stored value of the other.
        if {"epochs", "max_iter"} & set(given):
            values |= {"epochs": None, "max_iter": None}
        values |= given
        for key in PATHS:
            values[key] = None if values.get(key) is None else Path(values[key])
        if values["train_annotations"] is None or values["train_images"] is None:
            raise UserError(f"{folder}: the settings of this run are damaged (they name no training data)")
        try:
            return cls(**values | {"set": tuple(values.get("set") or ())})
        except TypeError as error:
            raise UserError(f"{folder}: the settings of this run are damaged ({error})") from None
