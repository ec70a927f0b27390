"""A pretended CUDA device: real code runs with real values, and errors and waits of a GPU show without one.

A `Pretended` tensor says that it is on cuda:0 and holds its values in a tensor on the CPU. While `pretended_cuda` is
active, every operation passes through `PretendedDevice`, which computes it there. It refuses to mix tensors of the two
devices, as CUDA does, and counts each operation in which the host waits for the device under the line that caused it.

Backward passes cannot run on it, because autograd's engine asks the driver for streams.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda:0")
aten = torch.ops.aten
# Operations whose result has a size that only the device knows, or that return a value to the host.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.equal, aten.is_nonzero,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}


class Pretended(Tensor):
    """A tensor on cuda:0 whose values are in `inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=CUDA
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: the pretended device is not active")

    def tolist(self) -> Any:
        device().wait("tolist")
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def __repr__(self) -> str:  # type: ignore[override]
        device().wait("repr")
        return f"Pretended({self.inner})"


class PretendedDevice(TorchDispatchMode):
    """Computes operations of `Pretended` tensors. `waits` counts the host's waits by line, `operations` everything."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # so that device="cuda" does not initialise a driver

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations = 0
        self.pinned: list[Tensor] = []

    def wait(self, reason: str) -> None:
        """Count a wait under the innermost line of the project outside its tests."""
        lines = [
            f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT)) and "/tests/" not in f.filename
        ]
        where = f"{Path(lines[-1].filename).relative_to(ROOT)}:{lines[-1].lineno}" if lines else "tests"
        self.waits[f"{where} {reason}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        # In inference mode, PyTorch does not take composite operations apart.
        if (
            packet not in COPIES
            and func._can_decompose()
            and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        ):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        pretended = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        to_cuda = bool(pretended)
        if kwargs.get("device") is not None:
            to_cuda = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = torch.device("cpu")
        pin = kwargs.pop("pin_memory", None)
        self.check(func, packet, tensors, pretended)
        self.count(packet, args, kwargs, to_cuda, pretended)
        out = REPLACED.get(packet, func)(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if pin:
            self.pinned.append(out)
        own = {id(tensor.inner): tensor for tensor in pretended}
        if packet is aten.copy_:
            return args[0]

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return own[id(value)] if id(value) in own else Pretended(value)

        return tree_map(wrap, out) if to_cuda else out

    def check(self, func: Any, packet: Any, tensors: list[Tensor], pretended: list[Pretended]) -> None:
        """Raise RuntimeError if an operation mixes devices. Single values, and indices, may come from the CPU."""
        others = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim()]
        allowed = packet in COPIES or (packet in INDEXING and isinstance(tensors[0], Pretended))
        if pretended and others and not allowed:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")

    def count(self, packet: Any, args: Any, kwargs: Any, to_cuda: bool, pretended: list[Pretended]) -> None:
        """Count an operation, and a wait if the host cannot go on before it has ended."""
        if packet in COPIES:
            source = (
                args[-1] if packet is aten.copy_ and len(args) < 3 else args[1] if packet is aten.copy_ else args[0]
            )
            target = to_cuda if packet is aten._to_copy else isinstance(args[0], Pretended)
            asynchronous = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
            if isinstance(source, Pretended) != target:
                host = args[0] if packet is aten.copy_ and not target else source
                # A copy to the host in pinned memory does not wait; without it, `copy_` does.
                is_pinned = any(host.data_ptr() == tensor.data_ptr() for tensor in self.pinned)
                if not (asynchronous and (is_pinned or (packet is aten._to_copy and not target))):
                    self.wait("copy to the device" if target else "copy to the host")
        elif pretended and packet in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("index with booleans")
            if not all(isinstance(index, Pretended) for index in indices):
                self.wait("index from the host")
        elif pretended and (packet in WAITING or str(packet) in ("torchvision.nms", "aten.repeat_interleave")):
            self.wait(str(packet))
        self.operations += bool(pretended or to_cuda)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def _conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()


def _conv_add_relu(x: Tensor, weight: Tensor, z: Tensor, alpha: float, *options: Any) -> Tensor:
    return (F.conv2d(x, weight, *options) + alpha * z).relu()


def _batch_norm(*args: Any) -> tuple[Tensor, ...]:
    return *torch.native_batch_norm(*args), torch.empty(0, dtype=torch.uint8)


# Operations that exist for CUDA only.
REPLACED = {
    aten.cudnn_convolution_relu: _conv_relu,
    aten.cudnn_convolution_add_relu: _conv_add_relu,
    aten.cudnn_batch_norm: _batch_norm,
}
_ACTIVE: list[PretendedDevice] = []


def device() -> PretendedDevice:
    """Return the active device."""
    return _ACTIVE[-1]


@contextmanager
def pretended_cuda() -> Iterator[PretendedDevice]:
    """Pretend that this machine has one GPU."""
    torch._C._ensureCUDADeviceGuardSet()
    current = PretendedDevice()

    def pin(tensor: Tensor) -> Tensor:
        current.pinned.append(tensor.clone())
        return current.pinned[-1]

    def synchronize(*_: Any) -> None:
        current.wait("synchronize")

    with pytest.MonkeyPatch.context() as patch:
        stream = SimpleNamespace(synchronize=synchronize)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "current_stream", lambda *_: stream)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        patch.setattr(Tensor, "pin_memory", pin)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(values, device="cuda") is a copy, which can be seen
        _ACTIVE.append(current)
        try:
            with current:
                yield current
        finally:
            _ACTIVE.pop()
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(False)
