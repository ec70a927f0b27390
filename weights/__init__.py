"""Weights in files: load them, save them, convert released ones, start training from them."""

from weights.load import load_model, load_weights

__all__ = ["load_model", "load_weights"]
