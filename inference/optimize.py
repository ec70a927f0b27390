"""Optimise a model for inference. All optimisations are applied here, and none changes the function it computes.

Batch norm is folded into convolutions, tensors are channels_last, weights are cast once, and the network is optionally
compiled with `torch.compile`. An earlier version also had Winograd convolutions, 1x1 convolutions as matrix products
and a merged head. They helped on a processor with AVX2, but not with AVX-512: ResNet-50 at 550 px in float32, from an
image of 480x640 to masks on two cores of an AMD EPYC, takes 275 ms without them and 325 ms with them (in one run).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from layers.structures import Predictions
from utils.errors import UserError
from yolact import Yolact


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
    for name, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_floating_point():
            module.register_buffer(name, buffer.to(dtype))


def compile_network(model: Yolact, size: tuple[int, int]) -> tuple[Callable[[Tensor], Predictions], float]:
    """Compile `model` for inputs of `size` (H, W); return it and the seconds that compiling took.

    On a CPU the weights are frozen to constants. On a GPU the mode "reduce-overhead" captures CUDA graphs, which has
    not been tested on a GPU yet. Raises UserError if compilation fails on this machine.
    """
    weight = model.fpn.lateral[0].weight
    assert isinstance(weight, Tensor)
    started = time.perf_counter()
    try:
        if weight.device.type == "cpu":
            network = torch.compile(model, options={"freezing": True})
        else:
            network = torch.compile(model, mode="reduce-overhead")
        with torch.inference_mode():
            network(weight.new_zeros(1, 3, *size).contiguous(memory_format=torch.channels_last))
    except Exception as error:  # its type depends on what is missing: a C++ compiler, Python's headers, Triton
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"this machine cannot compile the network ({reason[0][:120]}); install a C++ compiler, or run without it"
        ) from None
    return network, time.perf_counter() - started
