"""ONNX model -> OpenVINO IR, with weights in float16, or quantised to int8 by NNCF."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.runtime import EXTRA, RAW
from utils.errors import UserError, require
from utils.files import write_bytes


def to_openvino(proto: Any, metadata: dict[str, str]) -> Any:
    """Return an openvino.Model of an onnx.ModelProto, with `metadata` as its runtime information.

    Raises:
        UserError: if OpenVINO is not installed or has no operator for a part of the model.
    """
    with require("openvino", install=EXTRA):
        import openvino
        from openvino.frontend.onnx import ConversionExtension

    core = openvino.Core()
    core.add_extension(ConversionExtension("DeformConv", _deform_conv))
    try:
        model = core.read_model(io.BytesIO(proto.SerializeToString()))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"OpenVINO {openvino.__version__} cannot convert this model: {reason}") from None
    for key, value in metadata.items():
        model.set_rt_info(value, [key])
    return model


def _deform_conv(node: Any) -> list[Any]:
    """Translate ONNX's DeformConv, which OpenVINO's reader does not know, into OpenVINO's own operator."""
    from openvino import opset8

    x, weight, offset, bias, mask = (node.get_input(i) for i in range(5))
    pads = node.get_attribute("pads")
    convolution = opset8.deformable_convolution(
        x,
        offset,
        weight,
        strides=node.get_attribute("strides"),
        pads_begin=pads[:2],
        pads_end=pads[2:],
        dilations=node.get_attribute("dilations"),
        mask=mask,
        group=node.get_attribute("group"),
        deformable_group=node.get_attribute("offset_group"),
        bilinear_interpolation_pad=True,  # as torchvision: samples outside of the map are zero
    )
    return [opset8.add(convolution, opset8.unsqueeze(bias, np.array([0, 2, 3]))).output(0)]


def quantise(model: Any, images: Sequence[np.ndarray]) -> Any:
    """Return the model with its network in int8, after calibration on images.

    Decoding, NMS and mask assembly, which follow the network's outputs, stay in floating point. Keeping the last
    layer of the box branch in floating point as well changed neither box AP nor mask AP by 0.1, so it is quantised.

    Args:
        model: an openvino.Model.
        images: what the model takes: uint8 RGB [1, 3, H, W], or normalised tensors for a raw model.

    Raises:
        UserError: if NNCF is not installed.
    """
    with require("nncf", install=EXTRA), _quiet():
        import nncf

    with _quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset.MIXED,  # asymmetric activations, which ReLU6 and coefficients need
            subset_size=len(images),
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=sorted(_names_after(model, RAW))),
        )


def _names_after(model: Any, values: Iterable[str]) -> set[str]:
    """Return the names of all operators that depend on one of the values."""
    names: set[str] = set()
    ports = {name: port for op in model.get_ops() for port in op.outputs() for name in port.get_names()}
    waiting = [target.get_node() for value in values for target in ports[value].get_target_inputs()]
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() not in names and node.get_type_name() != "Result":
            names.add(node.get_friendly_name())
            waiting += [target.get_node() for port in node.outputs() for target in port.get_target_inputs()]
    return names


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bars and messages from the terminal."""
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def write_openvino(model: Any, path: Path) -> None:
    """Write an IR, .xml and .bin; floating-point weights are stored in float16. The .xml appears last."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / path.name
        openvino.save_model(model, temporary, compress_to_fp16=True)
        write_bytes(path.with_suffix(".bin"), temporary.with_suffix(".bin").read_bytes())
        write_bytes(path, temporary.read_bytes())
