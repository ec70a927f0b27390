"""The detections of an image, with masks that are computed on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from config import DetectionConfig
from inference.polygons import POLYGON_TOLERANCE, polygon_iou, rings
from layers.masks import MASK_BUDGET, assemble_masks
from utils.draw import draw_objects
from utils.errors import require

TOOLS = "requirements-tools.txt"  # the optional packages of this module
BLUR_CELLS = 8  # an instance is blurred to at most this many independent values along its longer side


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
    track_ids: Tensor | None = None  # [N] numbers of objects across frames, -1 for none, see tools.track

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int | slice | Tensor | np.ndarray | Sequence[int] | Sequence[bool]) -> Detections:
        index = self._selection(index)
        names = ["boxes", "scores", "mask_scores", "labels", "coefficients", "relative_boxes"]
        names += ["track_ids"] if self.track_ids is not None else []
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def _selection(self, index: int | slice | Tensor | np.ndarray | Sequence[int] | Sequence[bool]) -> slice | Tensor:
        """Return the index as a slice or a tensor of one dimension. Raises IndexError for an integer out of range."""
        if isinstance(index, slice):
            return index
        index = torch.as_tensor(index, device=self.scores.device)
        if index.ndim == 0 and not -len(self) <= int(index) < len(self):
            raise IndexError(f"index {int(index)} is out of range for {len(self)} detections")
        # as_tensor([]) is a float tensor, which cannot index; an integer is kept as a dimension of size 1.
        return (index if index.numel() else index.long()).reshape(-1)

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
                    **self._track(i),
                    "category_id": self.category_ids[label],
                    "category_name": self.class_names[label],
                    "score": scores[i],
                    "mask_score": mask_scores[i],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": segmentation,
                }
            )
        return results

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one flat dictionary per detection, with the mask's area and centroid in pixels.

        The keys are class, category_id, score, mask_score, x1, y1, x2, y2, area, centroid_x and centroid_y, and
        track_id after tracking. The centre of the first pixel is at 0.5; an empty mask has the centre of its box.
        """
        rows = []
        for i, mask in enumerate(self.iter_masks()):
            x1, y1, x2, y2 = self.boxes[i].tolist()
            ys, xs = np.nonzero(mask)
            x, y = (xs.mean() + 0.5, ys.mean() + 0.5) if len(xs) else ((x1 + x2) / 2, (y1 + y2) / 2)
            label = int(self.labels[i])
            row = {"class": self.class_names[label], "category_id": self.category_ids[label]}
            row |= {"score": float(self.scores[i]), "mask_score": float(self.mask_scores[i])}
            row |= {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
            row |= {"area": len(xs), "centroid_x": float(x), "centroid_y": float(y)}
            rows.append(self._track(i) | row)
        return rows

    def to_pandas(self) -> Any:
        """Return `to_dicts` as a pandas.DataFrame. Raises UserError if pandas is not installed."""
        with require("pandas", install=TOOLS):
            import pandas
        return pandas.DataFrame(self.to_dicts())

    def to_supervision(self) -> Any:
        """Return a supervision.Detections for its annotators, with masks, `mask_scores` as confidence and class names.

        Raises UserError if supervision is not installed.
        """
        with require("supervision", install=TOOLS):
            import supervision
        return supervision.Detections(
            xyxy=self.boxes.cpu().numpy(),
            mask=self.masks.cpu().numpy(),
            confidence=self.mask_scores.float().cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            tracker_id=None if self.track_ids is None else self.track_ids.cpu().numpy(),
            data={"class_name": np.array([self.class_names[label] for label in self.labels.tolist()], dtype=str)},
        )

    def to_labelme(self, image_path: str, tolerance: float = POLYGON_TOLERANCE) -> dict[str, Any]:
        """Return the detections in LabelMe's format, to be stored as JSON next to the image.

        The polygons of an instance share a group_id; holes have a flag. The description of a shape states its score,
        and the IoU of the mask with the polygons of the instance.

        Args:
            image_path: the image, relative to the folder of the JSON file.
            tolerance: by how many pixels a polygon may deviate from the outline of its mask.
        """
        shapes = []
        labels, scores = self.labels.tolist(), self.scores.tolist()
        for index, mask in enumerate(self.iter_masks()):
            found = rings(mask, tolerance)
            iou = polygon_iou(mask, found)
            for points, hole in found:
                shapes.append(
                    {
                        "label": self.class_names[labels[index]],
                        "points": points.astype(float).tolist(),
                        "group_id": index + 1,
                        "shape_type": "polygon",
                        "flags": {"hole": bool(hole)},
                        "description": f"score {scores[index]:.4f}, IoU with the mask {iou:.3f}",
                    }
                )
        height, width = self.size
        common: dict[str, Any] = {"version": "5.0.1", "flags": {}, "imagePath": image_path, "imageData": None}
        return common | {"shapes": shapes, "imageHeight": height, "imageWidth": width}

    def crops(self, image: np.ndarray) -> list[np.ndarray]:
        """Cut out each instance of `image`, uint8 BGR [H, W, 3], best first.

        Returns:
            For each detection uint8 BGRA [h, w, 4]: the smallest rectangle around its mask, transparent outside the
            mask; [0, 0, 4] if the mask is empty.

        Raises ValueError if the image is not of the detections' size.
        """
        self._check_size(image)
        found = []
        for mask in self.iter_masks():
            ys, xs = np.nonzero(mask)
            window = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] if len(xs) else np.s_[:0, :0]
            alpha = mask[window][..., None].astype(np.uint8) * 255
            found.append(np.concatenate((image[window], alpha), axis=2))
        return found

    def blur(self, image: np.ndarray) -> np.ndarray:
        """Return a copy of `image`, uint8 BGR [H, W, 3], in which every instance is blurred.

        The image is reduced until the longer side of the instance's box has BLUR_CELLS pixels, and upsampled again, so
        the blur grows with the instance. Raises ValueError if the image is not of the detections' size.
        """
        self._check_size(image)
        out = image.copy()
        for mask in self.iter_masks():
            ys, xs = np.nonzero(mask)
            if not len(xs):
                continue
            window = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            part = image[window]
            scale = min(1, BLUR_CELLS / max(part.shape[:2]))
            size = max(1, round(part.shape[1] * scale)), max(1, round(part.shape[0] * scale))
            small = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
            smooth = cv2.resize(small, part.shape[1::-1], interpolation=cv2.INTER_LINEAR)
            out[window] = np.where(mask[window][..., None], smooth, out[window])
        return out

    def _track(self, i: int) -> dict[str, int]:
        """Return the entry "track_id" of detection `i`, if it has one."""
        number = -1 if self.track_ids is None else int(self.track_ids[i])
        return {"track_id": number} if number >= 0 else {}

    def _check_size(self, image: np.ndarray) -> None:
        if image.shape[:2] != tuple(self.size):
            raise ValueError(f"the detections are of an image of {self.size}, not {image.shape[:2]}")

    def draw(self, image: np.ndarray, alpha: float = 0.45) -> np.ndarray:
        """Draw masks, boxes, class names and scores on a copy of `image`, uint8 BGR [H, W, 3].

        `alpha` is the opacity of the masks, 0..1. Raises ValueError if the image is not of the detections' size.
        """
        self._check_size(image)
        texts = [
            f"{self.class_names[label]} {score:.2f}"
            for label, score in zip(self.labels.tolist(), self.mask_scores.tolist(), strict=True)
        ]
        colors = list(range(len(self)))
        if self.track_ids is not None:
            numbers = self.track_ids.tolist()
            colors = [number if number >= 0 else i for i, number in enumerate(numbers)]  # a track keeps its colour
            texts = [f"#{number} {text}" * (number >= 0) or text for number, text in zip(numbers, texts, strict=True)]
        worst_first = list(range(len(self)))[::-1]  # the best detection is drawn last, on top
        boxes = self.boxes.cpu().numpy()[worst_first]
        return draw_objects(image, self[worst_first].iter_masks(), boxes, texts[::-1], colors[::-1], alpha)
