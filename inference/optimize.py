"""Optimise a model for inference. All optimisations are applied here, and none changes the function it computes.

Batch norm is folded into convolutions, tensors are channels_last, weights are cast once, and the network is optionally
compiled with `torch.compile`. If it is not, ReLU becomes a part of convolutions on a GPU, see `inference.fusion`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from inference.fusion import fuse
from layers.detect import detect
from layers.structures import Predictions, Selected
from utils.device import choose_device, choose_precision
from utils.errors import UserError
from yolact import Yolact


@dataclass
class Backend:
    """A network that is ready to run, and what `Predictor` has to know about it."""

    network: Callable[[Tensor], Predictions]  # normalised RGB [B, 3, h, w]
    mask_iou: Callable[[Tensor], Tensor] | None  # soft masks [N, h, w] to IoUs [N, C], for YOLACT++
    anchors: Callable[[int, int], Tensor]  # of an input of height and width
    size: tuple[int, int] | int  # height and width of the input, or the side of a square with the input's area
    device: torch.device
    dtype: torch.dtype
    tf32: bool = False
    model: Yolact | None = None  # the optimised model, unless the network is in an exported file
    detect: Callable[..., Selected] = detect  # layers.detect.detect, compiled or not
    compile_seconds: float = 0.0


def pytorch_backend(
    model: Yolact,
    device: str | torch.device,
    precision: str | torch.dtype,
    size: int | tuple[int, int] | None,
    compile: bool,
    optimized: bool,
) -> Backend:
    """Prepare a copy of `model`; see `Predictor` for the arguments and errors."""
    device = choose_device(device)
    dtype = choose_precision(precision, device)
    if not optimized:
        if precision not in ("auto", "fp32", torch.float32):
            raise UserError(f"precision {precision} needs optimize=True; otherwise the model runs in float32")
        dtype = torch.float32
    size = model.config.model.max_size if size is None else size
    sides = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(sides) < 32:
        raise UserError(f"size {sides[0]}x{sides[1]}: the network needs at least 32 pixels a side")
    follows_image = isinstance(size, int) and model.config.model.preserve_aspect_ratio and not compile
    prepared = optimize(model, device, dtype) if optimized else copy.deepcopy(model).eval().to(device)
    uses_cudnn = device.type == "cuda" and torch.version.cuda is not None and torch.backends.cudnn.is_available()
    backend = Backend(
        network=fuse(prepared) if uses_cudnn and optimized and not compile else prepared,
        mask_iou=prepared.mask_iou,
        anchors=prepared.anchors,
        size=sides[0] if follows_image else sides,
        device=device,
        dtype=dtype,
        tf32=precision == "tf32",
        model=prepared,
    )
    if compile:
        backend.network, backend.compile_seconds = compile_network(prepared, sides)
        if device.type == "cuda":
            # Otherwise every operation on the scores of 80 classes, or on overlaps, reads and writes them in memory.
            # Batch 32 on an H200: 2.2 ms instead of 6.5. `Predictor` does not use it for the loop of Cluster-NMS.
            backend.detect = torch.compile(detect, dynamic=False)
    return backend


def optimize(model: Yolact, device: torch.device, dtype: torch.dtype) -> Yolact:
    """Return a copy of `model` for inference in `dtype` on `device`; the model itself is not modified.

    Modules that declare `keep_float32` keep float32: the mask re-scoring network and deformable convolutions.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norm(fast)
    _cast(fast, dtype)
    # Convolution kernels compute in channels_last; with another layout each of them would convert its input first.
    return fast.to(memory_format=torch.channels_last).to(device)


def fold_batch_norm(model: nn.Module) -> None:
    """Fold each batch norm into its convolution, for the pairs that modules declare in `conv_norm_pairs`."""
    for module in model.modules():
        for conv, norm in getattr(module, "conv_norm_pairs", ()):
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point parameters and buffers of a module, except below one that keeps float32."""
    if getattr(module, "keep_float32", False):
        return
    for child in module.children():
        _cast(child, dtype)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def compile_network(model: Yolact, size: tuple[int, int]) -> tuple[Callable[[Tensor], Predictions], float]:
    """Compile `model` for inputs of `size` (H, W); return it and the seconds that compiling took.

    On a CPU the weights are frozen to constants. Raises UserError if compilation fails on this machine.
    """
    weight = model.fpn.lateral[0].weight
    assert isinstance(weight, Tensor)
    started = time.perf_counter()
    try:
        options: Any = {"options": {"freezing": True}} if weight.device.type == "cpu" else {"dynamic": False}
        network = torch.compile(model, **options)
        with torch.inference_mode():
            network(weight.new_zeros(1, 3, *size).contiguous(memory_format=torch.channels_last))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # its type depends on what is missing: a C++ compiler, Python's headers, Triton
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"this machine cannot compile the network ({reason[0][:120]}); install a C++ compiler, or run without it"
        ) from None
    return network, time.perf_counter() - started


class GraphedCall:
    """Capture a function of one CUDA tensor as a CUDA graph, once for each shape, and replay it.

    A replay launches all kernels at once, which otherwise takes the processor longer than the GPU computes. The results
    are overwritten by the next call.
    """

    def __init__(self, function: Callable[[Tensor], Any]):
        self.function = function
        self.captured: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Any]] = {}

    def __call__(self, batch: Tensor) -> Any:
        if batch.shape not in self.captured:
            self.captured[batch.shape] = self._capture(batch)
        graph, given, results = self.captured[batch.shape]
        given.copy_(batch)
        graph.replay()
        return results

    def _capture(self, batch: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Any]:
        given, stream = batch.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: libraries select kernels and allocate workspaces
            for _ in range(3):
                self.function(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.function(given)
        return graph, given, results
