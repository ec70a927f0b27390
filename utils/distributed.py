"""Distributed training and evaluation with torchrun: one process per device. In a single process, all are no-ops."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.device import choose_device
from utils.errors import UserError

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of processes, and the collective operations between them."""

    device: torch.device = CPU
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints, writes files and computes metrics for the group."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return `value` summed over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. The result is the same in all, so that they leave a loop together."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.size > 1 else flag

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all processes in the main process, and an empty list in the others."""
        if self.size == 1:
            return items
        everyone: list[list[T]] | None = [[] for _ in range(self.size)] if self.is_main else None
        dist.gather_object(items, everyone)
        return [item for some in everyone or [] for item in some]

    def raise_in_all(self, error: UserError | None) -> None:
        """Raise UserError in every process if `error` is given in any, so that none waits for one that failed."""
        if self.any(error is not None):
            raise error or UserError("another process has reported an error")

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors`, in place, with those of the main process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process before the others, which then find what it has downloaded."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self) -> None:
        """Wait until every process has reached this point."""
        if self.size > 1:
            self.sum(torch.zeros(()))


ALONE = Ranks()  # a single process


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that torchrun started, or run alone if there is no torchrun.

    Each process uses the GPU of its local rank. Only the main process writes to standard output. Raises UserError if
    there are fewer GPUs than processes, or if the device type does not support several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks(choose_device(device))
        return
    chosen = choose_device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"several processes need cuda or cpu, not {chosen}; choose one with --device")
    if chosen.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"no GPU for local rank {local}: this machine has {count}; lower --nproc_per_node")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    # Gradients are reduced with NCCL. Counters and results are CPU tensors and use gloo, which does not synchronise
    # with the GPU. The timeout is long enough for the main process to compute metrics on a large validation set.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    ranks = Ranks(chosen, dist.get_rank(), dist.get_world_size())
    with contextlib.ExitStack() as stack:
        if not ranks.is_main:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield ranks
    # Not in a finally block: after an error, this would wait for the processes that did not fail.
    dist.destroy_process_group()


class StopSignal:
    """Note Ctrl-C and SIGTERM in this block, so that the current step can be completed and saved.

    A second signal more than two seconds later raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.first = 0.0

    @property
    def received(self) -> bool:
        return self.first > 0

    def __call__(self, _number: int, _frame: object) -> None:
        now = time.monotonic()
        # torchrun forwards signals that its processes have already received; that is not a second Ctrl-C.
        if self.first and now > self.first + 2:
            raise KeyboardInterrupt
        self.first = self.first or now

    def __enter__(self) -> StopSignal:
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
