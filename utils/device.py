"""Devices and precisions: chosen once, at the top of a script."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import torch
from torch import Tensor

from utils.errors import UserError

# Parameters of glibc's mallopt, see its manual page.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def keep_memory() -> None:
    """Make glibc keep freed memory for reuse until the process ends. Has no effect with other C libraries.

    By default, glibc returns blocks of more than 32 MiB to the system at once, so the kernel has to clear the pages of
    every large activation. At 640 pixels, `yolact_lite` took 178 ms per image by default and 126 ms with this setting
    (two cores). The setting affects the whole process, so scripts call this function and the library does not.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def configure_process(threads: int | None = None) -> None:
    """Configure the process of a script: reuse freed memory, and disable OpenCV's own log messages.

    Args:
        threads: the number of threads for PyTorch, OpenCV and exported models. Default: their own choice.
    """
    keep_memory()
    if threads is not None:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
    logging: Any = getattr(cv2.utils, "logging", cv2)  # the location differs between OpenCV 4 and 5
    logging.setLogLevel(0)


def cpu_features() -> dict[str, Any]:
    """Return what PyTorch reports about the processor, such as `avx512_bf16` and `cpu_name`."""
    if hasattr(torch.cpu, "get_capabilities"):  # from PyTorch 2.11 on
        return dict(torch.cpu.get_capabilities())
    names = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    return {feature: bool(getattr(torch.cpu, name, bool)()) for feature, name in names.items()}


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device named "cpu", "cuda", "cuda:1" or "mps", or the fastest one for "auto".

    Raises UserError if this machine has no such device.
    """
    if isinstance(device, torch.device):
        return device
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [name for name in present if present[name]]  # fastest first
    if device == "auto":
        return torch.device(found[0])
    kind, _, index = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in found or (index and not (index.isdecimal() and int(index) < count)):
        raise UserError(f"device {device!r} is not available on this machine; available: {', '.join(found)}")
    return torch.device(device)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has hardware support for bfloat16. Emulated bfloat16 is much slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(cpu_features().get("amx_bf16") or cpu_features().get("avx512_bf16"))
    return False


def choose_precision(precision: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in.

    "auto" is bfloat16 where the hardware supports it, float16 on older CUDA GPUs, and float32 otherwise. "tf32" is
    float32 with the products of convolutions rounded to 10 bits, which NVIDIA GPUs compute several times faster; "fp32"
    is exact. Raises UserError for an unknown precision, and for "fp16" and "tf32" on a CPU.
    """
    if isinstance(precision, torch.dtype):
        return precision
    if precision == "auto":
        if has_fast_bf16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; known: auto, {', '.join(PRECISIONS)}")
    if precision in ("fp16", "tf32") and device.type == "cpu":
        raise UserError(f"precision {precision} is for GPUs; on a CPU use bf16 or fp32")
    return PRECISIONS[precision]


@contextmanager
def float32_math(tf32: bool) -> Iterator[None]:
    """Allow cuDNN to use TF32 in this block, or forbid it. PyTorch's default, for the whole process, allows it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU. From a CUDA device it is copied to pinned memory, which is several times faster."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device. A CUDA device copies it from pinned memory, without waiting for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
