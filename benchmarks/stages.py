"""Time every stage from an image file to a drawn image, and compare the network with the peak of the hardware.

python eval.py --config yolact_resnet50 --benchmark
"""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from config import Config
from inference import Detections, Predictor
from layers.structures import Predictions, Selected
from utils.device import cpu_features
from yolact import Yolact

WARM_UP = 3  # minimum number of warm-up passes, in which torch.compile and libraries select kernels
STAGES = (
    "read", "resize and normalise", "backbone", "FPN", "prototypes", "head", "detect", "masks", "copy to host", "draw",
)  # fmt: skip
WHOLES = ("network", "network to masks", "image to masks")  # several stages, without synchronisation between them


def benchmark(
    predictor: Predictor,
    batch_size: int = 1,
    provide: int = 0,
    image_size: tuple[int, int] = (480, 640),
    repeats: int = 30,
) -> dict[str, Any]:
    """Return medians and 10th and 90th percentiles in ms of every stage, after warm-up, for one image size.

    The report also contains frames per second (of the network, and from image to masks in memory), peak memory in MiB,
    and the measured peak of the hardware in GFLOP/s with the fraction that the network reaches.

    Args:
        predictor: the predictor to measure.
        batch_size: number of images per batch.
        provide: if not 0, replace the detections by this many synthetic ones. Random weights detect nothing.
        image_size: (height, width) of the image in pixels.
        repeats: number of measured passes.
    """
    image = _test_image(*image_size)
    encoded = cv2.imencode(".jpg", image)[1]
    rng = np.random.default_rng(0)
    provided = _provided(predictor, rng, provide) if provide else None
    times: dict[str, list[float]] = {stage: [] for stage in (*STAGES, *WHOLES)}
    with torch.inference_mode():
        for repeat in range(-max(WARM_UP, repeats // 5), repeats):
            measured = _one_pass(predictor, encoded, image, batch_size, provided)
            if repeat >= 0:
                for stage, seconds in measured.items():
                    times[stage].append(1000 * seconds)
    # Stages that were not measured are left out: an exported network runs as a whole.
    stages = {stage: dict(zip(("p10", "median", "p90"), np.percentile(v, (10, 50, 90)).tolist(), strict=True))
              for stage, v in times.items() if v}  # fmt: skip
    memory = _peak_memory(predictor.device)  # before the measurements below allocate memory
    size = predictor.input_size(image)
    flops = network_flops(predictor.config, size, batch_size)
    peak = compute_peak(predictor.device, predictor.dtype)
    seconds = stages["network"]["median"] / 1000
    return {
        "command": " ".join(sys.argv),
        "configuration": predictor.config.name,
        "size": list(size),
        "image": list(image_size),
        "batch_size": batch_size,
        "provided_detections": provide,
        "device": device_name(predictor.device),
        "precision": str(predictor.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cv2": cv2.__version__},
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "compiled": predictor.backend.compile_seconds > 0,
        "seconds_to_compile": predictor.backend.compile_seconds,
        "stages_ms": stages,
        "paper_fps": 1000 * batch_size / stages["network to masks"]["median"],
        "network_fps": batch_size / seconds,
        "image_to_masks_fps": 1000 * batch_size / stages["image to masks"]["median"],
        "gflop": flops / 1e9,
        "gflops_reached": flops / seconds / 1e9,
        "peak_gflops": peak / 1e9,
        "share_of_peak": flops / seconds / peak,
        "memory_copy_gb_s": copy_peak(predictor.device) / 1e9,
        "peak_memory_mib": memory,
    }


def _one_pass(
    predictor: Predictor, encoded: np.ndarray, image: np.ndarray, batch_size: int, provided: Selected | None
) -> dict[str, float]:
    """Seconds for each stage of one pass, synchronising with the device after each."""
    clock = _Clock(predictor.device)
    model, images = predictor.backend.model, [image] * batch_size
    clock.time("read", lambda: cv2.imdecode(encoded, cv2.IMREAD_COLOR))
    batch = clock.time("resize and normalise", lambda: torch.stack([predictor.preprocess(x) for x in images]))
    if model is not None:
        # The parts are timed one by one, and then the whole network without synchronisation between the parts; their
        # times may not add up to it.
        inputs = batch.to(predictor.dtype, memory_format=torch.channels_last)
        features = clock.time("backbone", lambda: model.backbone(inputs))
        levels = clock.time("FPN", lambda: model.fpn(features))
        clock.time("prototypes", lambda: model.protonet(levels[0]))
        clock.time("head", lambda: [torch.cat(x, dim=1) for x in zip(*map(model.head, levels), strict=True)])
    predictions: Predictions = clock.time("network", lambda: predictor.predict(batch))
    candidates = clock.time("detect", lambda: predictor.detect(predictions))

    def postprocess(candidates: Selected, prototypes: Tensor) -> list[Detections]:
        if provided is not None:
            candidates = Selected(*(field.expand(batch_size, *field.shape[1:]) for field in provided))
        return predictor.postprocess(candidates, prototypes, [image.shape[:2]] * batch_size)

    def network_to_masks() -> list[Tensor]:
        return [d.masks for d in postprocess(*predictor.run(batch))]

    def image_to_masks() -> list[Tensor]:
        selected, prototypes = predictor.run(torch.stack([predictor.preprocess(x) for x in images]))
        return [d.masks.cpu() for d in postprocess(selected, prototypes)]

    found = postprocess(candidates, predictions.prototypes)
    masks = clock.time("masks", lambda: [d.masks for d in found])
    clock.time("copy to host", lambda: [m.cpu() for m in masks])
    clock.time("draw", lambda: [d.draw(image) for d in found])
    clock.time("network to masks", network_to_masks)
    clock.time("image to masks", image_to_masks)
    return clock.seconds


class _Clock:
    """Time calls, synchronising with the device before and after each."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, call: Callable[[], Any]) -> Any:
        synchronise(self.device)
        started = time.perf_counter()
        result = call()
        synchronise(self.device)
        self.seconds[stage] = time.perf_counter() - started
        return result


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _test_image(height: int, width: int) -> np.ndarray:
    """Return a smooth colour image with noise, uint8 BGR, so that JPEG decoding takes a realistic time."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    noise = rng.integers(-8, 9, (height, width, 3))
    return (cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC) + noise).clip(0, 255).astype(np.uint8)


def _provided(predictor: Predictor, rng: np.random.Generator, count: int) -> Selected:
    """Return `count` synthetic detections with boxes of various sizes and random mask coefficients."""
    low = rng.uniform(0, 0.7, (count, 2))
    boxes = np.concatenate((low, low + rng.uniform(0.05, 0.3, (count, 2))), axis=1)
    config = predictor.config
    values = (
        boxes,
        np.linspace(0.9, 0.4, count),
        rng.integers(0, config.num_classes, count),
        rng.uniform(-1, 1, (count, config.model.num_prototypes)),
    )
    tensors = [torch.from_numpy(v)[None].to(predictor.device) for v in values]
    return Selected(tensors[0].float(), tensors[1].float(), tensors[2], tensors[3].float())


def network_flops(config: Config, size: tuple[int, int], batch_size: int = 1) -> float:
    """Return the number of floating-point operations of a batch; a multiply-add counts as two."""

    def deformable(_x: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    # Counting needs only shapes (meta tensors), but torchvision's deformable convolution needs real tensors.
    with torch.device("cpu" if config.model.dcn_interval else "meta"), torch.no_grad():
        model = Yolact(config).eval()
        with FlopCounterMode(
            display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: deformable}
        ) as counter:
            model(torch.zeros(1, 3, *size))
    return float(batch_size * counter.get_total_flops())


def compute_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured peak in operations per second: the fastest of six large matrix products or convolutions.

    Both are measured because either can be the slower one: PyTorch's float32 product reaches less than half of its
    convolution on some processors. int8 has a matrix product only.
    """
    side = 8192 if device.type == "cuda" else 2048
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 127, (side, side), dtype=dtype, device=device) for _ in range(2))
        return 2 * side**3 / min(_timed(device, lambda: torch._int_mm(a, b)) for _ in range(6))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    channels, batch = 256, 32 if device.type == "cuda" else 1
    image = torch.randn(batch, channels, 128, 128, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    product = 2 * side**3 / min(_timed(device, lambda: a @ b) for _ in range(6))
    with torch.inference_mode():
        seconds = min(_timed(device, lambda: torch.conv2d(image, weight, padding=1)) for _ in range(6))
    return max(product, 2 * image.numel() * channels * 9 / seconds)


def copy_peak(device: torch.device) -> float:
    """Return the measured memory bandwidth in bytes/s (reads plus writes) of the fastest of six large copies."""
    size = 2**28 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(_timed(device, lambda: target.copy_(source)) for _ in range(6))


def _timed(device: torch.device, call: Callable[[], Any]) -> float:
    clock = _Clock(device)
    clock.time("it", call)
    return clock.seconds["it"]


def device_name(device: torch.device) -> str:
    """Return the name of the device; for a CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = cpu_features().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _peak_memory(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def format_report(report: dict[str, Any]) -> str:
    """Return the report as a table."""
    size, image = "x".join(map(str, report["size"])), "x".join(map(str, report["image"]))
    lines = [
        f"{report['paper_fps']:.1f} frames/s as the paper counts: network, NMS and masks at the image's size, without "
        "reading and drawing",
        f"{report['configuration']}, {size} input, {image} image, batch {report['batch_size']}, "
        f"{report['precision']}{', compiled' if report['compiled'] else ''} on {report['device']}, "
        f"{report['repeats']} repeats",
        f"{'stage':<24}{'p10':>10}{'median':>10}{'p90':>10}   ms",
    ]
    for stage, row in report["stages_ms"].items():
        lines.append(f"{stage:<24}{row['p10']:>10.2f}{row['median']:>10.2f}{row['p90']:>10.2f}")
    lines += [
        f"network {report['network_fps']:.1f} frames/s, image in memory to masks in memory "
        f"{report['image_to_masks_fps']:.1f} frames/s",
        f"{report['gflop']:.1f} GFLOP per batch, {report['gflops_reached']:.0f} of "
        f"{report['peak_gflops']:.0f} GFLOP/s measured peak "
        f"({100 * report['share_of_peak']:.0f} %), memory copy {report['memory_copy_gb_s']:.1f} GB/s",
        f"peak memory {report['peak_memory_mib'] or 0:.0f} MiB",
    ]
    if report["compiled"]:
        lines.append(f"compiled in {report['seconds_to_compile']:.0f} s; stages are timed uncompiled")
    return "\n".join(lines)
