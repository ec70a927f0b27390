"""Load and save checkpoints, convert released weights, and initialise training from them."""

from weights.load import load_model, load_weights

__all__ = ["load_model", "load_weights"]
