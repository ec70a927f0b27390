"""Predict detections for images and videos."""

from inference.detections import Detections
from inference.predictor import Predictor

__all__ = ["Detections", "Predictor"]
