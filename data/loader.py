"""Training batches, in an order that depends only on the seed."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config import Config, ModelConfig
from data.annotation import Sample
from data.augment import Augment, Distortion, copy_paste, distort
from data.coco import CocoDataset
from data.image import normalise
from layers.structures import Target
from utils.distributed import ALONE, Ranks
from utils.errors import UserError

SHARED_MEMORY = Path("/dev/shm")  # through which workers pass batches on Linux; Docker's has 64 MiB
LONGEST_WARPED = 32766  # pixels; OpenCV 4 does not warp longer sides
TIMEOUT = 600  # seconds to wait for a batch
Item = tuple["tuple[Tensor, Distortion, Target] | None", int, list[str]]


class TrainingSet(Dataset[Item]):
    """Augmented samples. Randomness depends only on the seed and the key (epoch, index), not on the process."""

    def __init__(self, dataset: CocoDataset, config: Config, seed: int):
        self.dataset = dataset
        self.augment = Augment(config)
        self.copy_paste = config.augmentation.copy_paste
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        """Return a sample, its image id, and messages about unusable images.

        An unusable image is replaced by a random other one. After ten in a row the sample is None and the id -1.
        """
        epoch, index = key
        problems: list[str] = []
        for attempt in range(10):
            rng = np.random.default_rng((self.seed, epoch, index, attempt))
            chosen = index if attempt == 0 else int(rng.integers(len(self.dataset)))
            try:
                sample = self._read(chosen)
                if self.copy_paste and rng.random() < self.copy_paste:
                    sample = copy_paste(sample, self._read(int(rng.integers(len(self.dataset)))), rng)
            except UserError as error:
                problems.append(str(error))
                continue
            return self.augment(sample, rng), self.dataset.image_ids[chosen], problems
        return None, -1, problems

    def _read(self, index: int) -> Sample:
        sample = self.dataset[index]
        if max(sample.image.shape) > LONGEST_WARPED:
            path = self.dataset.image_path(index)
            raise UserError(f"{path}: a side of more than {LONGEST_WARPED} pixels; cut the image into parts")
        return sample


def endless_shuffle(
    count: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, int]]:
    """Yield keys (epoch, index) endlessly; each epoch is a permutation that depends only on the seed.

    Args:
        count: the number of images.
        start: number of keys to skip, counted over all processes.
        rank, world_size: of every `world_size` consecutive keys, this process gets one.
    """
    position = start
    while True:
        epoch, offset = divmod(position, count)
        for index in np.random.default_rng((seed, epoch)).permutation(count)[offset:]:
            if position % world_size == rank:
                yield epoch, int(index)
            position += 1


@dataclass
class Batch:
    """A batch, or one of the micro-batches that it is split into."""

    images: Tensor  # uint8 BGR [B, S, S, 3]; empty if ten images in a row were unusable
    distortions: Tensor  # float32 [B, 9], the `Distortion` of each image
    targets: list[Target]
    image_ids: list[int]
    problems: list[str]  # about images that could not be used and were replaced

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors to a device, except the seeds, which the loss reads on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def normalised(self, config: ModelConfig) -> Tensor:
        """Return the images with distorted colours as the network takes them, float32 RGB [B, 3, S, S]."""
        return normalise(distort(self.images, self.distortions), config)

    def split(self, parts: int) -> list[Batch]:
        """Split into `parts` micro-batches of equal size, as far as the size allows."""
        cuts = [round(i * len(self.images) / parts) for i in range(parts + 1)]
        return [
            Batch(self.images[a:b], self.distortions[a:b], self.targets[a:b], self.image_ids[a:b], [])
            for a, b in itertools.pairwise(cuts)
            if b > a
        ]

    def pin_memory(self) -> Batch:
        """Pin the tensors in memory, for faster copies to a GPU. The DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        targets = [{k: v if k == "seed" else move(v) for k, v in target.items()} for target in self.targets]
        return Batch(move(self.images), move(self.distortions), targets, self.image_ids, self.problems)


def _collate(samples: list[Item]) -> Batch:
    augmented, image_ids, problems = zip(*samples, strict=True)
    messages = [message for some in problems for message in some]
    if None in augmented:
        return Batch(torch.empty(0), torch.empty(0), [], [], messages)
    images, distortions, targets = zip(*augmented, strict=True)
    rows = torch.tensor(distortions, dtype=torch.float32)
    return Batch(torch.stack(images), rows, list(targets), list(image_ids), messages)


def _start_worker(_worker: int) -> None:
    # One thread per worker: parallelism comes from the processes. A forked worker inherits this setting and must not
    # change it, because OpenCV's thread pool does not survive a fork; only spawned workers set it.
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)
    torch.set_num_threads(1)
    # Ctrl-C and a batch system's SIGTERM reach every process of a run. The main process finishes its step, saves and
    # then ends the workers; they must not end before it. `training_batches` ends them without a signal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def default_workers(ranks: Ranks) -> int:
    """Return 2 on a CPU, and on a GPU one worker for each core of this process, at most 8.

    A worker prepares 150 to 300 images of 512 to 550 px a second, and an H200 trains YOLACT with ResNet-50 on 180.
    """
    if ranks.device.type != "cuda":
        return 2
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def report_unusable(batch: Batch, reported: set[str], num_images: int) -> None:
    """Report the unusable images that were replaced in a batch, each once, and add them to `reported`.

    Raises UserError if more than 1 % of the images (and more than one), or ten in a row, are unusable.
    """
    for problem in batch.problems:
        if problem not in reported:
            tqdm.write(f"warning: {problem}; another image takes its place", file=sys.stderr)
        reported.add(problem)
    if len(reported) > max(1, num_images // 100) or not len(batch.images):
        raise UserError(
            f"{len(reported)} of {num_images} images cannot be used; python -m tools.audit lists them. "
            f"The last problem was: {(batch.problems or [''])[-1]}"
        )


@contextlib.contextmanager
def training_batches(
    dataset: CocoDataset, config: Config, seed: int = 0, start: int = 0, workers: int = 0, ranks: Ranks = ALONE
) -> Iterator[Iterator[Batch]]:
    """Yield endless batches for this process, and end the workers when the block ends, also after an exception.

    Otherwise they would keep the interpreter from exiting: they ignore SIGTERM, and Python's exit handler waits for
    them.

    Args:
        config: its batch size is that of all processes together.
        start: the number of images that the run has already used, over all processes.
    """
    if workers and SHARED_MEMORY.is_dir():
        check_shared_memory(config, workers, ranks)
    loader: DataLoader[Any] = DataLoader(
        TrainingSet(dataset, config, seed),
        batch_size=config.training.batch_size // ranks.size,
        sampler=endless_shuffle(len(dataset), seed, start, ranks.rank, ranks.size),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        pin_memory=ranks.device.type == "cuda",
        timeout=TIMEOUT if workers else 0,
    )
    # A process forked while OpenCV's thread pool is active hangs in its first OpenCV call, so the pool is disabled
    # while the workers start.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    batches: Any = iter(loader)
    cv2.setNumThreads(threads)
    try:
        yield batches
    except RuntimeError as error:
        # PyTorch raises this from a signal handler, wherever the main process is at that moment.
        if "killed by signal" in str(error):
            text = "a worker process was killed by the system, probably because memory ran out"
            raise UserError(f"{text}; lower --workers or max_size") from None
        if "DataLoader timed out" in str(error):
            text = f"no batch arrived for {TIMEOUT} s: the disk does not answer, or {SHARED_MEMORY} is full"
            raise UserError(f"{text}; try --workers 0") from None
        raise
    finally:
        if workers:
            batches._shutdown_workers()


def check_shared_memory(config: Config, workers: int, ranks: Ranks) -> None:
    """Raise UserError if the batches of the workers do not fit. PyTorch would wait for them for ever."""
    # Of all processes on this machine.
    images = config.training.batch_size // ranks.size * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    in_flight = 2 * workers + 1  # PyTorch reads two batches ahead with each worker
    # Three bytes a pixel, and about as much again for the masks of an image.
    needed = int(6 * in_flight * images * config.train_size**2)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free >> 20} MiB free, but {workers} workers pass batches of {needed >> 20} "
            "MiB through it; give Docker --ipc=host or --shm-size, or use --workers 0"
        )
