"""torchrun and DDP: one process a device. With one process alone, everything here does nothing.

with join("auto") as ranks:       # reads what torchrun left in the environment
    device = ranks.device
    ...
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import UserError
from engine.devices import choose_device

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process speaks, writes and measures for all."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all get the same answer, so none goes on alone."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.size > 1 else flag

    def share(self, items: list[T]) -> list[T]:
        """The items of all processes, in all of them."""
        if self.size == 1:
            return items
        everyone: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, items)
        return [item for some in everyone for item in some]

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` with those of the main process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            self.sum(torch.zeros(()))

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes in the main one, nothing in the others."""
        if self.size == 1:
            return items
        everyone: list[list[T]] | None = [[] for _ in range(self.size)] if self.main else None
        dist.gather_object(items, everyone)
        return [item for some in everyone or [] for item in some]


@contextlib.contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """The processes that torchrun started, this one among them; on its own if it was not torchrun.

    Each takes the GPU of its local rank; all but the first are silent on standard output. Raises UserError when there
    are fewer GPUs than processes, or the device is of a kind that cannot work together.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks(choose_device(device))
        return
    chosen = choose_device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"several processes work together on cuda and on cpu alone, not on {chosen}; give --device")
    if chosen.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"process {local} of this machine has no GPU, there are {there}: lower --nproc_per_node")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    # Pictures and gradients go between GPUs; counters and results between processors, where nothing waits for a GPU.
    # All wait while the main one measures: hours are enough for the largest validation set.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    ranks = Ranks(chosen, dist.get_rank(), dist.get_world_size())
    with contextlib.ExitStack() as stack:
        if not ranks.main:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield ranks
    dist.destroy_process_group()  # not after an error: it would wait for processes that know of none
