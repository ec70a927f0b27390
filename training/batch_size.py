"""Find the largest batch that fits into a GPU's memory, for --batch_size auto. It has not been run on a GPU yet."""

from __future__ import annotations

from collections.abc import Callable

import torch

from config import Config
from layers.loss import MultiBoxLoss
from utils.device import autocast
from utils.errors import UserError
from yolact import Yolact

LARGEST = 256
SHARE = 0.9  # of the memory; the rest is for fragmentation and for images with many objects
OBJECTS = 20  # per image


def fitting_batch_size(config: Config, device: torch.device, dtype: torch.dtype) -> int:
    """Return the largest power of two with which a training step takes at most SHARE of the GPU's memory.

    Raises UserError unless the device is a CUDA GPU, or if not even one image fits.
    """
    if device.type != "cuda":
        raise UserError(f"--batch_size auto needs a CUDA GPU, not {device}; give a number")
    model = Yolact(config).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    limit = SHARE * torch.cuda.get_device_properties(device).total_memory

    def fits(size: int) -> bool:
        try:
            torch.cuda.reset_peak_memory_stats(device)
            training_step(model, optimizer, size, device, dtype)
            return torch.cuda.max_memory_allocated(device) <= limit
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    size = largest_that_fits(fits)
    if size == 0:
        raise UserError("--batch_size auto: not even one image fits into the GPU's memory; lower max_size")
    return size


def largest_that_fits(fits: Callable[[int], bool]) -> int:
    """Return the largest power of two up to LARGEST for which `fits` is true, trying 1, 2, 4, ...; 0 if none is."""
    best, size = 0, 1
    while size <= LARGEST and fits(size):
        best, size = size, 2 * size
    return best


def training_step(
    model: Yolact, optimizer: torch.optim.Optimizer, batch_size: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Take one step on random images with OBJECTS objects each, as large as training steps are."""
    side = model.config.train_size
    images = torch.randn(batch_size, 3, side, side, device=device)
    low = torch.rand(OBJECTS, 2, device=device) * 0.5
    target = {
        "boxes": torch.cat((low, low + 0.4), dim=1),
        "labels": torch.zeros(OBJECTS, dtype=torch.long, device=device),
        "masks": torch.ones(OBJECTS, side // 4, side // 4, device=device),
        "crowds": torch.zeros(0, 4, device=device),
    }
    with autocast(device, dtype):
        predictions = model(images)
    anchors, targets = model.anchors(side, side), [target] * batch_size
    loss = MultiBoxLoss(model.config.loss)(predictions, anchors, targets, model.mask_iou)
    sum(loss.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
