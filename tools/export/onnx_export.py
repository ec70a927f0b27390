"""Yolact -> torch.export program -> ONNX file."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from config import DetectionConfig, to_dict
from inference.runtime import EXTRA, IMAGE, METADATA, NORMALISED, RAW, VERSION
from tools.export.graph import DetectionGraph, RawNetwork
from utils.errors import UserError, require
from yolact import Yolact

OPSET = 20  # DeformConv needs 19
EXPORTABLE_NMS = ("fast", "cross_class", "cluster", "cluster_penalty")  # the shapes of "standard" depend on values
LARGEST_SIDE = 16384


def export_program(model: Yolact, size: int | tuple[int, int], detection: DetectionConfig) -> ExportedProgram:
    """Return the whole way from uint8 RGB [B, 3, H, W] to detections as one torch.export program.

    Batch, height and width of the images are dynamic; see `DetectionGraph.forward` for the outputs.

    Raises:
        UserError: for an NMS whose shapes depend on values.
    """
    check_nms(detection)
    return _program(DetectionGraph(model, size, detection))


def check_nms(detection: DetectionConfig) -> None:
    """Raise UserError for an NMS that cannot be exported."""
    if detection.nms not in EXPORTABLE_NMS:
        raise UserError(f"nms {detection.nms!r} cannot be exported; use --nms {' or '.join(EXPORTABLE_NMS)}")


def _program(module: DetectionGraph | RawNetwork, size: tuple[int, int] | None = None) -> ExportedProgram:
    """Trace a module, with an example whose sizes differ, so that none is taken for a constant."""
    batch = Dim("batch", min=1, max=4096)
    if isinstance(module, RawNetwork):
        assert size is not None
        example, dynamic = torch.zeros(2, 3, *size), {0: batch}
    else:
        height, width = Dim("height", min=2, max=LARGEST_SIDE), Dim("width", min=2, max=LARGEST_SIDE)
        example, dynamic = torch.zeros(2, 3, 75, 90, dtype=torch.uint8), {0: batch, 2: height, 3: width}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch's own deprecations
        return torch.export.export(module.eval(), (example,), dynamic_shapes=(dynamic,), strict=False)


def to_onnx(
    model: Yolact, size: int | tuple[int, int], detection: DetectionConfig, raw: bool = False, cropped: bool = False
) -> Any:
    """Return an onnx.ModelProto.

    Args:
        model: the model to export.
        size: of the network's input, see `DetectionGraph`; height and width if `raw`.
        detection: baked into the graph. The model's own settings are stored beside it, for `Predictor`.
        raw: the network alone, from normalised images to raw outputs.
        cropped: with the output masks_cropped, see `DetectionGraph`.

    Raises:
        UserError: if a package is missing, or the NMS cannot be exported.
    """
    with require("onnx", "onnxscript", install=EXTRA):
        import onnx
    if raw:
        assert not isinstance(size, int)
        program, names = _program(RawNetwork(model), size), list(RAW)
        visible = len(names)
    else:
        check_nms(detection)
        graph = DetectionGraph(model, size, detection, expose=True, cropped=cropped)
        program, names = _program(graph), list(graph.output_names())
        visible = len(names) - len(graph.cut_points())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[NORMALISED if raw else IMAGE],
            output_names=names,
            custom_translation_table=_translations(),
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    # The cut points were outputs for the exporter to give them their names. Now they become ordinary values inside.
    inside = list(proto.graph.output)[visible:]
    del proto.graph.output[visible:]
    known = {value.name for value in proto.graph.value_info}
    proto.graph.value_info.extend(value for value in inside if value.name not in known)
    onnx.helper.set_model_props(proto, describe(model, size, detection, raw))
    onnx.checker.check_model(proto)
    return proto


def describe(
    model: Yolact, size: int | tuple[int, int], detection: DetectionConfig, raw: bool, precision: str = "fp32"
) -> dict[str, str]:
    """Return what is stored in an exported file: for `Predictor`, for other programs, and for people."""
    settings = model.config.model
    description = {
        "version": VERSION,
        "config": to_dict(model.config),
        "size": size,
        "raw": raw,
        "precision": precision,
        "detection": vars(detection),
    }
    image = "uint8 RGB [batch, 3, height, width] of any size"
    tensor = (
        f"float32 RGB [batch, 3, height, width] of {size}, (value - mean) / std of values 0..255 with mean "
        f"{list(settings.mean)} and std {list(settings.std)}; the image is resized bilinearly without antialiasing"
    )
    return {
        METADATA: json.dumps(description),
        "class_names": json.dumps(list(model.config.class_names)),
        "category_ids": json.dumps(list(model.config.category_ids)),
        "input": tensor if raw else image,
    }


def _translations() -> dict[Any, Any]:
    """Return how operators that PyTorch's exporter does not know become ONNX operators."""
    from onnxscript import opset20 as op

    def deform_conv2d(
        x: Any,
        weight: Any,
        offset: Any,
        mask: Any,
        bias: Any,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        groups: int,
        offset_groups: int,
        use_mask: bool,
    ) -> Any:
        return op.DeformConv(
            x,
            weight,
            offset,
            bias,
            mask,
            strides=[stride_h, stride_w],
            pads=[pad_h, pad_w, pad_h, pad_w],
            dilations=[dilation_h, dilation_w],
            group=groups,
            offset_group=offset_groups,
        )

    return {torch.ops.torchvision.deform_conv2d.default: deform_conv2d}
