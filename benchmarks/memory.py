"""Compute, without a GPU, the memory of a training step and the bounds that a processor sets for inference.

python benchmarks/memory.py --output benchmarks/memory.json

A training step runs under PyTorch's FakeTensorMode: tensors have shapes and no data, so nothing is computed and no
device is needed, and PyTorch's memory tracker counts what would be allocated. Not included are the CUDA context, the
allocator's fragmentation and cuDNN's workspaces. For inference, the operations and bytes of every layer of ResNet-50
give the shortest possible time at the measured peaks of this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.stages import compute_peak, copy_peak, device_name
from config import get_config
from utils.errors import run_main
from yolact import Yolact

CONFIGS = ("yolact_resnet50", "yolact_base")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    training = [
        training_memory(config, args.batch_size, precision) for config in CONFIGS for precision in ("fp32", "bf16")
    ]
    for row in training:
        print(row)
    inference = [inference_bound(dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8)]
    for row in inference:
        print({key: value for key, value in row.items() if key != "layers"})
    report = {
        "command": f"python benchmarks/memory.py --batch_size {args.batch_size}",
        "torch": torch.__version__,
        "machine": device_name(torch.device("cpu")),
        "training": training,
        "inference": inference,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def training_memory(name: str, batch_size: int, precision: str) -> dict[str, Any]:
    """Return the peak memory in MiB of one training step with SGD, by category."""
    config = get_config(name)
    side = config.train_size
    rows = 2 * -(-side // 8)
    tracker = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Yolact(config).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):  # the first step creates the momentum
                step(model, optimizer, batch_size, side, rows, precision)
                tracker.reset_mod_stats()
    peak = tracker.get_tracker_snapshot("peak")
    total = next(iter(peak.values()))
    parts = {getattr(key, "value", str(key)): round(value / 2**20) for key, value in total.items() if value}
    return {
        "configuration": name,
        "batch_size": batch_size,
        "precision": precision,
        "peak_mib": parts.pop("Total"),
        "parts_mib": parts,
    }


def step(model: Yolact, optimizer: Any, batch_size: int, side: int, rows: int, precision: str) -> None:
    """Take one training step on images and masks without data.

    The loss is reduced to its dense terms: matching depends on values, which fake tensors do not have. Its own memory
    is small beside the network's: the logits, their gradient and the masks of 100 positives per image.
    """
    images = torch.zeros(batch_size, 3, side, side)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        predictions = model(images)
    boxes, logits, coefficients, prototypes, semantic = (x.float() for x in predictions if x is not None)
    classes = torch.zeros(logits.shape[:2], dtype=torch.long)
    positives = min(model.config.loss.masks_to_train, logits.shape[1])
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), classes)
    loss = loss + nn.functional.smooth_l1_loss(boxes, torch.zeros_like(boxes))
    truth = torch.zeros(positives, rows, rows)
    for b in range(batch_size):
        masks = coefficients[b, :positives] @ prototypes[b].flatten(0, 1).T
        loss = loss + nn.functional.binary_cross_entropy_with_logits(masks.view(positives, rows, rows), truth)
    loss = loss + nn.functional.binary_cross_entropy_with_logits(semantic, torch.zeros_like(semantic))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def inference_bound(dtype: torch.dtype, name: str = "yolact_resnet50") -> dict[str, Any]:
    """Return the operations and bytes of each convolution, and the time that they take at least on this machine.

    A layer cannot be faster than its operations at the measured peak, nor than reading its input and
    weights and writing its output at the speed of a large copy.
    """
    cpu = torch.device("cpu")
    peak, bandwidth = compute_peak(cpu, dtype), copy_peak(cpu)
    layers: list[dict[str, Any]] = []

    def record(label: str) -> Any:
        def hook(conv: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            operations = 2 * output.numel() * conv.weight[0].numel()
            size = dtype.itemsize * (inputs[0].numel() + conv.weight.numel() + output.numel())
            bound = 1000 * max(operations / peak, size / bandwidth)
            layers.append({"layer": label, "gflop": operations / 1e9, "mb": size / 1e6, "bound_ms": bound})

        return hook

    with torch.device("meta"), torch.no_grad():
        model = Yolact(get_config(name)).eval()
        for label, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(record(label))
        model(torch.zeros(1, 3, 550, 550))
    return {
        "configuration": name,
        "precision": str(dtype).removeprefix("torch."),
        "peak_gflops": peak / 1e9,
        "bandwidth_gb_s": bandwidth / 1e9,
        "gflop": sum(layer["gflop"] for layer in layers),
        "mb": sum(layer["mb"] for layer in layers),
        "bound_ms": sum(layer["bound_ms"] for layer in layers),
        "layers": layers,
    }


if __name__ == "__main__":
    run_main(main)
