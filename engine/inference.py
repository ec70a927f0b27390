"""A model made ready to predict: the same function, in fewer and faster steps. And CUDA graphs of such functions."""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from backbone import DeformConv2d
from data.errors import UserError
from layers.winograd import WinogradConv2d
from yolact import PredictionHead, Predictions, Yolact

OFTEN, MAX_GRAPHS = 8, 4  # a capture costs what several pictures do, and a graph has memory of its own
SMALL = 2048  # pixels; as measured on two cores, a matrix product is then faster than a 1x1 convolution


def prepare(model: Yolact, device: torch.device, dtype: torch.dtype) -> Yolact:
    """A copy of `model` for inference in `dtype` on `device`; the model itself is left as it is.

    Batch norm is folded into the convolutions, the head's three outputs are one convolution, tensors are channels last
    and the weights are cast once. In float32 on a CPU large 3x3 convolutions take Winograd's scheme, and small 1x1
    convolutions are matrix products. The network that re-scores masks and deformable convolutions keep their float32
    weights.
    """
    ready = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norm(ready)
    ready.head = MergedHead(ready.head)
    if device.type == "cpu" and dtype == torch.float32:
        replace_convolutions(ready)
    mask_iou, ready.mask_iou = ready.mask_iou, None
    deformable = [(m, m.weight, m.bias) for m in ready.modules() if isinstance(m, DeformConv2d)]
    ready = ready.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    for module, weight, bias in deformable:
        module.weight, module.bias = (nn.Parameter(p.float().to(device), False) for p in (weight, bias))
    ready.mask_iou = None if mask_iou is None else mask_iou.to(device)
    return ready


def fold_batch_norm(module: nn.Module) -> None:
    """Put each batch norm in evaluation mode into the convolution that is registered just before it."""
    for (name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)


def replace_convolutions(module: nn.Module) -> None:
    """Put in place of convolutions what is faster in float32 on a CPU."""
    for name, child in module.named_children():
        if WinogradConv2d.pays(child):
            setattr(module, name, WinogradConv2d(child))
        elif PointwiseConv2d.fits(child):
            setattr(module, name, PointwiseConv2d(child))
        else:
            replace_convolutions(child)


class PointwiseConv2d(nn.Module):
    """Does what the 1x1 `conv` it is made from does; on small maps as a matrix product, which has less to set up."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.direct = conv
        self.register_buffer("weight", conv.weight.detach().flatten(1).T.contiguous(), persistent=False)

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether `conv` is of the kind that this replaces."""
        if type(conv) is not nn.Conv2d or conv.groups != 1 or conv.kernel_size != (1, 1) or conv.bias is None:
            return False
        return conv.stride == (1, 1) and conv.padding == (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W], channels last."""
        batch, _, height, width = x.shape
        if batch * height * width > SMALL:
            return self.direct(x)
        out = torch.addmm(self.direct.bias, x.permute(0, 2, 3, 1).flatten(0, 2), self.weight)
        return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


class MergedHead(nn.Module):
    """PredictionHead with its three output convolutions as one: three narrow products are slower than a wide one.

    And than one whose channels fill the processor's vectors: spare ones, of zeros, bring them to a multiple of eight.
    """

    def __init__(self, head: PredictionHead):
        super().__init__()
        parts = (head.box, head.cls, head.coeff)
        channels = sum(part.out_channels for part in parts)
        self.sizes = [*(part.out_channels for part in parts), -channels % 8]
        self.depths = (4, head.num_classes + 1, head.num_prototypes)
        self.trunk = head.trunk
        self.outputs = nn.Conv2d(head.trunk.out_channels, sum(self.sizes), 3, padding=1)
        self.outputs.requires_grad_(False)
        for name, parameter in self.outputs.named_parameters():
            parameter.zero_()[:channels] = torch.cat([getattr(part, name) for part in parts])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As PredictionHead's."""
        out = self.outputs(F.relu(self.trunk(x))).permute(0, 2, 3, 1)
        parts = zip(out.split(self.sizes, dim=-1)[:3], self.depths, strict=True)
        box, cls, coeff = (part.reshape(len(x), -1, depth) for part, depth in parts)
        return box, cls, coeff.tanh()


def compiled(model: Yolact, size: tuple[int, int]) -> tuple[Callable[[Tensor], Predictions], float]:
    """`model` compiled for inputs of `size` (H, W), on a CPU with frozen weights, and the seconds that it took.

    Raises UserError where this machine cannot compile.
    """
    example = model.fpn.lateral[0].weight
    started = time.perf_counter()
    try:
        network = torch.compile(model, options={"freezing": True} if example.device.type == "cpu" else None)
        with torch.inference_mode():
            network(example.new_zeros(1, 3, *size).contiguous(memory_format=torch.channels_last))
    except Exception as error:  # of many kinds, by what the compiler lacks: a C++ compiler, Python's headers, Triton
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"this machine cannot compile the network ({reason[0][:120]}); install a C++ compiler, or do without"
        ) from None
    return network, time.perf_counter() - started


class CudaGraph:
    """`function` captured once for inputs like `example`, then replayed: one launch instead of hundreds.

    The function takes one tensor and gives a tuple of tensors, in fixed shapes and without waiting for the device.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], example: Tensor, warmup: int = 3):
        device = example.device
        self.input = example.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # libraries choose their algorithms and take their memory before the capture
                for _ in range(warmup):
                    function(self.input)
            torch.cuda.current_stream(device).wait_stream(side)
            # Other threads may use the GPU meanwhile, as the one that writes a film does.
            with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                self.output = function(self.input)

    def __call__(self, value: Tensor) -> tuple[Tensor, ...]:
        """What the function gives for `value`, which is shaped as the example was; in memory of its own."""
        self.input.copy_(value, non_blocking=True)
        self.graph.replay()
        return tuple(part.clone() for part in self.output)


class CudaGraphs:
    """A CudaGraph for each shape that comes often: for the first few of them, so that memory and captures are few."""

    def __init__(self) -> None:
        self.counts: Counter[torch.Size] = Counter()
        self.graphs: dict[torch.Size, CudaGraph] = {}
        self.lock = threading.Lock()  # a graph has one place for its input

    def __call__(self, function: Callable[[Tensor], tuple[Tensor, ...]], value: Tensor) -> tuple[Tensor, ...]:
        """`function(value)`. Nothing waits for the device, but for a capture."""
        with self.lock:
            self.counts[value.shape] += 1
            if self.counts[value.shape] == OFTEN and len(self.graphs) < MAX_GRAPHS:
                self.graphs[value.shape] = CudaGraph(function, value)
            return self.graphs.get(value.shape, function)(value)
