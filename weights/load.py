"""Load models from weights files of any supported layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from config import CONFIGS, Config, differences, from_dict
from utils.errors import UserError, shorten
from weights.checkpoint import check_values, check_version, read_checkpoint, state_digest, write_checkpoint
from weights.convert import Weights, convert, facts
from weights.released import find_weights
from yolact import Yolact


def load_model(path_or_name: str | Path, config: Config | None = None) -> Yolact:
    """Load a model, in evaluation mode on the CPU.

    Args:
        path_or_name: a checkpoint of this project, the folder of a run, a released file, or the name of released
            weights, which are downloaded once.
        config: a configuration to use instead of the file's. It must agree in all fields that the weights depend on.
            With a checkpoint of this project, the class names remain those of the file.

    Raises:
        UserError: if the file is missing, damaged, of an unknown format, or does not match `config`.
    """
    path = find_weights(path_or_name)
    weights = read_weights(path)
    if config is None:
        config = weights.config
        if weights.ambiguous:
            others = ", ".join(weights.ambiguous)
            print(
                f"{path}: these weights fit {others}; using {config.name} with {config.num_classes} classes "
                "(select another one with --config)"
            )
    else:
        config = _reconcile(config, weights, path)
    model = Yolact(config)
    _load_strictly(model, weights, path)
    return model.eval()


def load_weights(model: Yolact, path: str | Path) -> None:
    """Load a weights file of any supported layout into `model`, in place.

    Raises UserError unless all names and shapes match, and the configurations agree in all fields that weights depend
    on. To load only the weights that match, use `weights.transfer`.
    """
    weights = read_weights(path)
    _reconcile(model.config, weights, Path(path))
    if weights.layout == "own" and weights.config.class_names != model.config.class_names:
        raise UserError(f"{path}: its class names differ from the model's; see weights.transfer")
    _load_strictly(model, weights, path)


def read_weights(path: str | Path) -> Weights:
    """Read a weights file of any supported layout. Raises UserError if it is missing, damaged or unsupported."""
    return weights_from(read_checkpoint(path), path)


def weights_from(content: dict[str, Any], path: str | Path) -> Weights:
    """Return the weights in `content`, which `read_checkpoint` returned for `path`.

    Raises UserError if the content is incomplete, damaged, or of an unsupported version or layout.
    """
    if "yolact" not in content:
        return convert(content, str(path))
    check_version(content, path)
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: incomplete, because it has no configuration or no weights")
    try:
        config = from_dict(content["config"])
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: its configuration cannot be used: {error}") from None
    state = check_values(content["model"], path)
    if content.get("digest") not in (None, state_digest(content["model"])):  # files of format 1 have none
        raise UserError(f"{path}: damaged, because its weights do not match the stored digest; use another copy")
    return Weights(state, "own", config)


def store_threshold(path_or_name: str | Path | None, threshold: float) -> Path:
    """Store the best score threshold in a checkpoint of this project, and return its path.

    Raises UserError for a file of another kind.
    """
    if path_or_name is None:
        raise UserError("--store_threshold: give --weights, the bundled file is not changed")
    path = find_weights(path_or_name)
    content = read_checkpoint(path)
    if "yolact" not in content:
        raise UserError(f"{path}: not a checkpoint of this project; only those can store a threshold")
    weights_from(content, path)
    content["config"]["best_score_threshold"] = threshold
    write_checkpoint(path, content)
    return path


def build_model(weights: Weights, path: str | Path) -> Yolact:
    """Build the model of a file's configuration and load its weights. Raises UserError if they do not match."""
    model = Yolact(weights.config)
    _load_strictly(model, weights, path)
    return model


def _reconcile(config: Config, weights: Weights, path: Path) -> Config:
    """Return `config`, with the classes of the file unless a released file has as many as `config`.

    Raises UserError if the weights were trained with a different architecture, anchors or preprocessing.
    """
    stored = weights.config
    if weights.layout == "own":
        different = differences(config.model, stored.model)
        if different:
            raise UserError(
                f"{path}: trained with configuration {stored.name!r}, which has other {', '.join(different)} than "
                f"{config.name!r}; omit --config to use the configuration in the file"
            )
    elif facts(config) != facts(stored):
        wrong = [f"{key} is {value}" for key, value in facts(stored).items() if facts(config)[key] != value]
        raise _wrong_configuration(config, weights, path, f": their {', '.join(wrong)}")
    elif config.num_classes == stored.num_classes:
        # If no named configuration has this number of classes, the weights were trained on custom data. The file does
        # not store their anchors and preprocessing, so those of `config` are used.
        fitting = [c for c in CONFIGS.values() if facts(c) == facts(stored) and c.num_classes == config.num_classes]
        if fitting and all(differences(config.model, known.model) for known in fitting):
            different = differences(config.model, fitting[0].model)
            raise UserError(
                f"{path}: these are weights of {fitting[0].name!r}, which has other {', '.join(different)} than "
                f"{config.name!r}"
            )
        return config
    elif stored == CONFIGS[stored.name]:  # the classes are those of a released configuration, and fewer or more
        raise _wrong_configuration(config, weights, path, "")
    return dataclasses.replace(config, class_names=stored.class_names, category_ids=stored.category_ids)


def _wrong_configuration(config: Config, weights: Weights, path: str | Path, details: str) -> UserError:
    stored = weights.config
    return UserError(
        f"{path}: does not fit configuration {config.name!r} with {config.num_classes} classes; these are weights of "
        f"{stored.name!r} with {stored.num_classes} classes{details}"
    )


def _load_strictly(model: Yolact, weights: Weights, path: str | Path) -> None:
    own = model.state_dict()
    # The batch counters are not used, and files written before PyTorch 0.4.1 do not have them.
    state = {**{k: v for k, v in own.items() if k.endswith("num_batches_tracked")}, **weights.state}
    problems = []
    for what, names in (
        ("missing", [k for k in own if k not in state]),
        ("unexpected", [k for k in state if k not in own]),
        ("of a different shape", [k for k in own if k in state and own[k].shape != state[k].shape]),
    ):
        if names:
            problems.append(f"{len(names)} {what}: {shorten(names, 3)}")
    if problems:
        raise _wrong_configuration(model.config, weights, path, f" ({'; '.join(problems)})")
    model.load_state_dict(state)
