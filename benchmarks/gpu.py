"""Measure the network and NMS on a GPU, as a share of its peak; part of gpu.sh.

python benchmarks/gpu.py --output gpu.json

For each configuration: frames per second of network and NMS on images that are already on the device, as the original's
`--benchmark` counts, in batches of 1 and 32. Then NMS alone: 200 boxes of each of 80 classes, and 1000 of one class.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torchvision.ops import batched_nms

from benchmarks.stages import compute_peak, copy_peak, device_name, network_flops, synchronise
from config import get_config
from inference import Predictor
from layers.nms import NMS
from utils.errors import run_main
from yolact import Yolact

CONFIGS = ["yolact_resnet50", "yolact_base", "yolact_lite", "yolact_plus_resnet50"]


def median_ms(device: torch.device, call: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call, after three warm-up calls."""
    times = []
    with torch.inference_mode():
        for number in range(repeats + 3):
            synchronise(device)
            started = time.perf_counter()
            call()
            synchronise(device)
            times += [1000 * (time.perf_counter() - started)] if number >= 3 else []
    return round(statistics.median(times), 3)


def networks(device: torch.device, args: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """Return the time of network and NMS for each configuration, uncompiled and compiled."""
    rows = []
    for name in args.configs:
        model = Yolact(get_config(name)).eval()
        side = model.config.model.max_size
        for options in ({}, {"compile": True}):
            predictor = Predictor(model, device, size=(side, side), score_threshold=0.05, **options)
            for batch in args.batches:
                images = torch.randn(batch, 3, side, side, device=device)
                ms = median_ms(device, lambda p=predictor, i=images: p.run(i), args.repeats)
                flops = network_flops(model.config, (side, side), batch)
                row = {"configuration": name, "size": side, "batch": batch, "ms": ms}
                row["precision"] = str(predictor.dtype).removeprefix("torch.") + (" compiled" if options else "")
                row |= {"fps": round(1000 * batch / ms, 1), "share_of_peak": round(1000 * flops / ms / peak, 3)}
                print(row, flush=True)
                rows.append(row)
    return rows


def suppression(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Return the time of every NMS, and of torchvision's on the same boxes."""
    rows: list[dict[str, Any]] = []
    for classes, count in ((80, 200), (1, 1000)):
        low = torch.rand(1, count, 2, device=device) * 0.8
        boxes = torch.cat((low, low + 0.05 + 0.15 * torch.rand(1, count, 2, device=device)), dim=2)
        scores = torch.rand(1, classes, count, device=device)
        labels = torch.arange(classes, device=device).repeat_interleave(count)
        given = (boxes, scores, 0.5, count, 100)
        calls: dict[str, Any] = {name: partial(function, *given) for name, function in NMS.items()}
        flat = boxes[0].repeat(classes, 1), scores.flatten(), labels
        calls["torchvision batched_nms"] = partial(batched_nms, *flat, 0.5)
        for name, call in calls.items():
            rows.append({"nms": name, "classes": classes, "boxes": count, "ms": median_ms(device, call, repeats)})
            print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cudnn.allow_tf32 = False
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak = compute_peak(device, dtype)
    report: dict[str, Any] = {
        "command": f"python benchmarks/gpu.py --configs {' '.join(args.configs)} "
        f"--batches {' '.join(map(str, args.batches))} --repeats {args.repeats}",
        "device": device_name(device),
        "torch": torch.__version__,
        "peak_tflops": round(peak / 1e12, 1),
        "copy_gb_s": round(copy_peak(device) / 1e9),
    }
    report["nms"] = suppression(device, args.repeats)
    report["networks"] = networks(device, args, peak)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
