"""Load models from weights files of any supported layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from config import CONFIGS, Config, differences, from_dict
from utils.errors import UserError, join_names
from weights.checkpoint import FORMAT, check_values, read_checkpoint
from weights.convert import Weights, convert, visible_in_state_dict
from weights.released import find_weights
from yolact import Yolact


def load_model(path_or_name: str | Path, config: Config | None = None) -> Yolact:
    """Load a model, in evaluation mode on the CPU.

    `path_or_name` is a checkpoint of this project, the folder of a run, a released file, or the name of released
    weights, which are downloaded once. A `config` used instead of the file's must agree in all fields that the weights
    depend on; with a checkpoint of this project, the class names remain those of the file. Raises UserError if the file
    is missing, damaged, of an unknown format, or does not match `config`.
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
    load_state(model, weights, path)
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
    load_state(model, weights, path)


def read_weights(path: str | Path) -> Weights:
    """Read a weights file of any supported layout. Raises UserError if it is missing, damaged or unsupported."""
    content = read_checkpoint(path)
    if "yolact" not in content:
        return convert(content, str(path))
    if not isinstance(content["yolact"], int) or content["yolact"] != FORMAT:
        raise UserError(f"{path}: has format {content['yolact']!r}, but this version reads {FORMAT}")
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: incomplete, because it has no configuration or no weights")
    try:
        config = from_dict(content["config"])
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: its configuration cannot be used: {error}") from None
    training = content.get("training")
    state = check_values(content["model"], path)
    return Weights(state, "own", config, training=training if isinstance(training, dict) else None)


def _reconcile(config: Config, weights: Weights, path: Path) -> Config:
    """Return `config`, with the classes of the file unless a released file has as many as `config`.

    Raises UserError if the weights were trained with a different architecture, anchors or preprocessing.
    """
    stored = weights.config
    ours, theirs = visible_in_state_dict(config), visible_in_state_dict(stored)
    if weights.layout == "own":
        different = differences(config.model, stored.model)
        if different:
            raise UserError(
                f"{path}: trained with configuration {stored.name!r}, which has other {', '.join(different)} than "
                f"{config.name!r}; omit --config to use the configuration in the file"
            )
    elif ours != theirs:
        wrong = [f"{key} is {value}" for key, value in theirs.items() if ours[key] != value]
        raise _wrong_configuration(config, weights, path, f": their {', '.join(wrong)}")
    elif config.num_classes == stored.num_classes:
        # If no named configuration has this number of classes, the weights were trained on custom data. The file does
        # not store their anchors and preprocessing, so those of `config` are used.
        same = [c for c in CONFIGS.values() if c.num_classes == config.num_classes]
        fitting = [c for c in same if visible_in_state_dict(c) == theirs]
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


def load_state(model: Yolact, weights: Weights, path: str | Path) -> None:
    """Load weights into `model`, in place. Raises UserError unless all names and shapes match."""
    own = model.state_dict()
    # The batch counters are not used, and files written before PyTorch 0.4.1 do not have them.
    state = {**{k: v for k, v in own.items() if k.endswith("num_batches_tracked")}, **weights.state}
    wrong = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of a different shape": [k for k in own if k in state and own[k].shape != state[k].shape],
    }
    problems = [f"{len(names)} {what}: {join_names(names, 3)}" for what, names in wrong.items() if names]
    if problems:
        raise _wrong_configuration(model.config, weights, path, f" ({'; '.join(problems)})")
    model.load_state_dict(state)
