"""Images in, detections out."""

from inference.detections import Detections
from inference.predictor import Predictor

__all__ = ["Detections", "Predictor"]
