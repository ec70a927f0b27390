"""Where and in what precision to compute: chosen once, at the top of a script."""

from __future__ import annotations

import ctypes
import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from data.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt, see its manual page
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def keep_memory() -> None:
    """Make this process keep the memory that it frees, and use it again, until it ends.

    glibc gives blocks over 32 MiB back at once, and the next ones come as new pages that the system has to clear: at
    640 pixels `yolact_lite` took 178 ms a picture so, and 126 ms without, on two cores. With other C libraries nothing
    happens. For the top of a script, as it is for the whole process.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def available_devices() -> list[str]:
    """The kinds of device on this machine, fastest first."""
    found = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())]
    return [name for name, there in found if there] + ["cpu"]


def cpu_facts() -> dict[str, Any]:
    """What PyTorch knows of the processor."""
    if hasattr(torch.cpu, "get_capabilities"):  # from PyTorch 2.11 on
        return dict(torch.cpu.get_capabilities())
    names = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    return {fact: bool(getattr(torch.cpu, name, bool)()) for fact, name in names.items()}


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name` (cpu, cuda, cuda:1, mps), or the fastest for "auto"; UserError when it is not there."""
    found = available_devices()
    if name == "auto":
        return torch.device(found[0])
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in found or (index and not (index.isdigit() and int(index) < count)):
        raise UserError(f"no device {name!r} on this machine; there is {', '.join(found)}")
    return torch.device(name)


def bf16_pays(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32; where it only emulates it, it is far slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(cpu_facts().get("amx_bf16") or cpu_facts().get("avx512_bf16"))
    return False


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type to compute in: "auto" is bfloat16 where the hardware has it, float16 on older GPUs, else float32."""
    if name == "auto":
        name = "bf16" if bf16_pays(device) else "fp16" if device.type == "cuda" else "fp32"
    if name not in PRECISIONS:
        raise UserError(f"unknown precision {name!r}; known: auto, {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 is for GPUs; on a CPU take bf16 or fp32")
    return PRECISIONS[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision for the block; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
