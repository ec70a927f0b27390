"""Export a model to ONNX or OpenVINO."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from config import DetectionConfig
from data.image import input_size, resize, to_network
from tools.export.onnx_export import describe, to_onnx
from tools.export.openvino_export import quantise, to_openvino, write_openvino
from utils.errors import UserError
from utils.files import write_bytes
from yolact import Yolact


def write_export(
    model: Yolact,
    path: Path,
    size: int | tuple[int, int],
    detection: DetectionConfig,
    raw: bool = False,
    calibration: Iterable[np.ndarray] | None = None,
    cropped: bool = False,
) -> int:
    """Export a model to ONNX or OpenVINO, depending on the suffix of `path`.

    Args:
        model: the model. Its own configuration is stored in the file.
        path: an .onnx file, or an .xml file, beside which a .bin file is written. `tools.export.parity` checks them.
        size: of the network's input, see `tools.export.graph.DetectionGraph`; height and width if `raw`.
        detection: the thresholds, NMS and limits of the exported graph.
        raw: export the network alone, from normalised images to raw outputs.
        calibration: uint8 BGR images [H, W, 3] for quantising the network to int8 (OpenVINO only). None: no int8.
        cropped: with the output masks_cropped, see `tools.export.graph.DetectionGraph`.

    Returns:
        The number of calibration images.

    Raises:
        UserError: if a package is missing, the NMS cannot be exported, there are no calibration images, or the file
            cannot be written.
    """
    batches = [_graph_input(image, model, size, raw) for image in calibration or ()]
    if calibration is not None and not batches:
        raise UserError("int8 needs calibration images, and none could be read")
    proto = to_onnx(model, size, detection, raw, cropped)
    if path.suffix == ".onnx":
        write_bytes(path, proto.SerializeToString())
        return 0
    precision = "int8" if batches else "fp16"
    converted = to_openvino(proto, describe(model, size, detection, raw, precision))
    write_openvino(quantise(converted, batches) if batches else converted, path)
    return len(batches)


def _graph_input(image: np.ndarray, model: Yolact, size: int | tuple[int, int], raw: bool) -> np.ndarray:
    """Return an image as the exported graph takes it: [1, 3, h, w] at the network's size."""
    settings = model.config.model
    if isinstance(size, int):
        size = input_size(image.shape[:2], size)
    if raw:
        return to_network(image, size, settings, torch.device("cpu")).numpy()[None]
    return np.ascontiguousarray(resize(image, size, uint8=True)[None, :, :, ::-1].transpose(0, 3, 1, 2))
