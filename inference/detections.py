"""The detections of an image, with masks that are computed on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from config import DetectionConfig
from layers.masks import MASK_BUDGET, assemble_masks
from utils.draw import draw_objects


@dataclass(eq=False)
class Detections:
    """The detections of one image, best first. Indexing with an integer, slice, list or mask returns a subset.

    Masks are computed from prototypes and coefficients on access. `Predictor` clones the tensors, so they can be
    modified in place and do not keep the rest of the batch in memory.
    """

    boxes: Tensor  # [N, 4] x1, y1, x2, y2 in pixels, clipped to the image
    scores: Tensor  # [N] 0..1
    mask_scores: Tensor  # [N] the same, or re-scored by the mask's quality (YOLACT++, maskness)
    labels: Tensor  # [N] 0..C-1
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    size: tuple[int, int]  # height and width of the image
    coefficients: Tensor  # [N, K]
    prototypes: Tensor  # [h, w, K]
    relative_boxes: Tensor  # [N, 4] as predicted, relative to the image, not clipped
    config: DetectionConfig = field(default_factory=DetectionConfig)  # how masks are cropped and thresholded

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int | slice | Tensor | np.ndarray | Sequence[int] | Sequence[bool]) -> Detections:
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.scores.device)
            if index.ndim == 0 and not -len(self) <= int(index) < len(self):
                raise IndexError(f"index {int(index)} is out of range for {len(self)} detections")
            # as_tensor([]) is a float tensor, which cannot index; an integer is kept as a dimension of size 1.
            index = (index if index.numel() else index.long()).reshape(-1)
        names = ("boxes", "scores", "mask_scores", "labels", "coefficients", "relative_boxes")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    @cached_property
    def masks(self) -> Tensor:
        """All masks, bool [N, H, W] at the image's size.

        For many objects in large images, `iter_masks` needs less memory.
        """
        chunks = list(self._chunks(MASK_BUDGET))
        if len(chunks) == 1:
            return chunks[0]
        return torch.cat(chunks) if chunks else self.scores.new_zeros((0, *self.size), dtype=torch.bool)

    def iter_masks(self, budget: int = MASK_BUDGET // 4) -> Iterator[np.ndarray]:
        """Yield the masks in order, each bool [H, W], computed in chunks of about `budget` bytes."""
        for chunk in self._chunks(budget):
            yield from chunk.cpu().numpy()

    def _chunks(self, budget: int) -> Iterator[Tensor]:
        prototypes, coefficients = self.prototypes.detach(), self.coefficients.detach()
        return assemble_masks(prototypes, coefficients, self.relative_boxes, self.size, self.config, budget)

    def encode_masks(self) -> list[dict[str, Any]]:
        """Return each mask as a COCO run-length encoding, {"size": [H, W], "counts": text}."""
        encoded = []
        for mask in self.iter_masks():
            code = rle.encode(np.asfortranarray(mask.view(np.uint8)))
            encoded.append({"size": list(code["size"]), "counts": code["counts"].decode()})
        return encoded

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """Return COCO results, one dictionary per detection. "bbox" is (x, y, width, height), "segmentation" an RLE."""
        boxes, scores, mask_scores = self.boxes.tolist(), self.scores.tolist(), self.mask_scores.tolist()
        results = []
        for i, (label, segmentation) in enumerate(zip(self.labels.tolist(), self.encode_masks(), strict=True)):
            x1, y1, x2, y2 = boxes[i]
            results.append(
                {
                    "image_id": image_id,
                    "category_id": self.category_ids[label],
                    "category_name": self.class_names[label],
                    "score": scores[i],
                    "mask_score": mask_scores[i],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": segmentation,
                }
            )
        return results

    def draw(self, image: np.ndarray, alpha: float = 0.45) -> np.ndarray:
        """Draw masks, boxes, class names and scores on a copy of `image`, uint8 BGR [H, W, 3].

        `alpha` is the opacity of the masks, 0..1. Raises ValueError if the image is not of the detections' size.
        """
        if image.shape[:2] != tuple(self.size):
            raise ValueError(f"the detections are of an image of {self.size}, not {image.shape[:2]}")
        texts = [
            f"{self.class_names[label]} {score:.2f}"
            for label, score in zip(self.labels.tolist(), self.mask_scores.tolist(), strict=True)
        ]
        worst_first = list(range(len(self)))[::-1]  # the best detection is drawn last, on top
        boxes = self.boxes.cpu().numpy()[worst_first]
        return draw_objects(image, self[worst_first].iter_masks(), boxes, texts[::-1], worst_first, alpha)
