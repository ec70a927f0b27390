"""COCO metrics of a predictor on a data set."""

from evaluation.evaluator import evaluate

__all__ = ["evaluate"]
