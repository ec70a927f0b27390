"""Use ONNX Runtime or OpenVINO to run the network in a file written by tools.export.

The file contains the whole graph from an image to masks. `Predictor` extracts the network from it and uses its own
code for the rest, so that all detection options work as with a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config, from_dict
from inference.optimize import Backend
from layers.anchors import make_anchors
from layers.structures import Predictions
from utils.device import choose_precision
from utils.errors import UserError, require

SUFFIXES = (".onnx", ".xml")
EXTRA = "requirements-export.txt"  # lists the optional packages

# Names of values in an exported graph. The whole graph maps IMAGE to detections, the network maps NORMALISED to RAW,
# and the mask re-scoring network of YOLACT++ maps SOFT_MASKS to MASK_IOUS.
IMAGE, NORMALISED = "image", "normalised"
RAW = ("raw_boxes", "raw_logits", "raw_coefficients", "prototypes")
SOFT_MASKS, MASK_IOUS = "soft_masks", "mask_ious"
METADATA = "yolact"  # the key under which the description of the model is stored, as JSON
VERSION = 1  # of the description

Call = Callable[..., list[np.ndarray]]  # arrays in, arrays out


class OnnxRuntime:
    """An ONNX file run on the CPU, in the precision of its graph."""

    def __init__(self, path: Path):
        with require("onnx", "onnxruntime", install=EXTRA):
            import onnx
        self.path = path
        with _unreadable(path, "an ONNX model"):
            self.model = onnx.load(path)
            onnx.checker.check_model(self.model)

    def description(self) -> str:
        """Return the JSON text stored under METADATA, or "" if there is none."""
        return next((entry.value for entry in self.model.metadata_props if entry.key == METADATA), "")

    def start(self, inputs: Sequence[str], outputs: Sequence[str], precision: str) -> Call:
        """Compile the subgraph from `inputs` to `outputs`, or the whole graph if both are empty."""
        import onnx.utils
        import onnxruntime

        if precision == "bf16":
            raise UserError(f"{self.path}: ONNX Runtime computes in float32 on a CPU; bf16 needs an OpenVINO export")
        model = onnx.utils.Extractor(self.model).extract_model(list(inputs), list(outputs)) if inputs else self.model
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        with _unreadable(self.path, "a model for ONNX Runtime"):
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return lambda *arrays: session.run(list(outputs) or None, dict(zip(names, arrays, strict=True)))


class OpenVino:
    """An OpenVINO IR file, .xml with its .bin, on the CPU. The methods are those of `OnnxRuntime`."""

    def __init__(self, path: Path):
        with require("openvino", install=EXTRA):
            import openvino
        self.path = path
        if not path.with_suffix(".bin").is_file():
            raise UserError(f"{path}: the weights are missing; copy {path.with_suffix('.bin').name} to the same folder")
        self.core = openvino.Core()
        with _unreadable(path, "an OpenVINO model"):
            self.model = self.core.read_model(path)

    def description(self) -> str:
        return str(self.model.get_rt_info([METADATA]).value) if self.model.has_rt_info([METADATA]) else ""

    def start(self, inputs: Sequence[str], outputs: Sequence[str], precision: str) -> Call:
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        }
        with _unreadable(self.path, "a model for OpenVINO"):
            model = self._part(inputs, outputs) if inputs else self.model
            request = self.core.compile_model(model, "CPU", hints).create_infer_request()

        def call(*arrays: np.ndarray) -> list[np.ndarray]:
            request.infer(list(arrays), share_inputs=True)
            # Copies, because the request writes its next results into the same memory.
            return [request.get_output_tensor(i).data.copy() for i in range(len(request.model_outputs))]

        return call

    def _part(self, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
        """Return the subgraph between named values as a new model; the original model is not modified."""
        import openvino
        from openvino import opset13

        model = self.model.clone()
        values = {name: port for op in model.get_ops() for port in op.outputs() for name in port.get_names()}
        parameters = []
        for port in (values[name] for name in inputs):
            parameters.append(opset13.parameter(port.get_partial_shape(), port.get_element_type()))
            for target in port.get_target_inputs():
                target.replace_source_output(parameters[-1].output(0))
        return openvino.Model([values[name] for name in outputs], parameters)


class ExportedNetwork:
    """A network in an exported file, which `Predictor` accepts in place of a `Yolact`.

    Args:
        path: an .onnx file, or an .xml file with its .bin beside it.

    Raises:
        UserError: if the file is missing, damaged or not written by tools.export, or a package is not installed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file")
        self.runtime = OnnxRuntime(self.path) if self.path.suffix == ".onnx" else OpenVino(self.path)
        text = self.runtime.description()
        if not text:
            raise UserError(f"{path}: not written by tools.export: it has no description of the model")
        try:
            values = json.loads(text)
            if values["version"] != VERSION:
                raise UserError(f"{path}: its description has version {values['version']}, not {VERSION}; export again")
            self.config: Config = from_dict(values["config"])
            size = values["size"]
            # As in `Backend`: a fixed height and width, or the side of a square whose area the input of each image has.
            self.size: int | tuple[int, int] = size if isinstance(size, int) else (size[0], size[1])
            self.precision: str = values["precision"]  # of the weights in the file: fp32, fp16 or int8
            self.raw: bool = values["raw"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}: its description is damaged ({error}); export it again") from None

    def __reduce__(self) -> Any:
        """Pickle the path: a process that unpickles opens the file again."""
        return ExportedNetwork, (self.path,)

    def computed_in(self, precision: str | torch.dtype) -> str:
        """Return the precision of floating-point operations, "fp32" or "bf16", for the requested `precision`.

        Raises UserError for any other, and for "bf16" with ONNX Runtime.
        """
        if precision == "auto" and isinstance(self.runtime, OnnxRuntime):
            return "fp32"  # ONNX exports are float32
        dtype = choose_precision(precision, torch.device("cpu"))
        if dtype == torch.float16:
            raise UserError("precision fp16 is for GPUs; on a CPU use bf16 or fp32")
        return "bf16" if dtype == torch.bfloat16 else "fp32"


class Part:
    """A part of an exported graph as a function of tensors. It is compiled again when it is unpickled."""

    def __init__(self, network: ExportedNetwork, inputs: Sequence[str], outputs: Sequence[str], precision: str):
        self.arguments = network, inputs, outputs, precision
        self.run = network.runtime.start(inputs, outputs, precision)

    def __call__(self, value: Tensor) -> Any:
        results = [torch.from_numpy(array) for array in self.run(value.contiguous().numpy())]
        if len(results) == 1:
            return results[0]
        boxes, logits, coefficients, prototypes = results
        return Predictions(boxes, logits, coefficients, prototypes, semantic=None)

    def __reduce__(self) -> Any:
        return Part, self.arguments


def exported_backend(
    model: ExportedNetwork, device: str | torch.device, precision: str | torch.dtype, size: int | tuple[int, int] | None
) -> Backend:
    """Prepare an exported network; see `Predictor` for the arguments and errors."""
    if str(device) not in ("auto", "cpu"):
        raise UserError(f"{model.path}: exported models run on the CPU only, not on {device}")
    if size is not None and size != model.size and (size, size) != model.size:
        own = model.size if isinstance(model.size, int) else "x".join(map(str, model.size))
        raise UserError(f"{model.path}: it was exported for {own}; export it again with another --size")
    computed_in = model.computed_in(precision)
    mask_iou = None
    if model.config.model.mask_iou:
        if model.raw:
            raise UserError(f"{model.path}: a raw export lacks the mask re-scoring network; export without --raw")
        mask_iou = Part(model, (SOFT_MASKS,), (MASK_IOUS,), computed_in)
    network = Part(model, (NORMALISED,), RAW, computed_in)
    anchors = functools.partial(make_anchors, config=model.config.model)
    return Backend(network, mask_iou, anchors, model.size, torch.device("cpu"), torch.float32)


def is_exported(path: str | Path) -> bool:
    """Return whether a path has the suffix of an exported model."""
    return Path(path).suffix in SUFFIXES


@contextlib.contextmanager
def _unreadable(path: Path, kind: str) -> Iterator[None]:
    """Convert any exception of a runtime about a file into a UserError. The runtimes share no exception class."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path}: cannot be used as {kind} ({reason[:160]}); export it again") from None
