"""The detections of an image, with masks that are computed on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from config import DetectionConfig
from data.image import write_image
from inference.polygons import POLYGON_TOLERANCE, polygon_iou, rings
from layers.masks import MASK_BUDGET, assemble_masks, mask_windows
from utils.device import to_device, to_host
from utils.draw import draw_objects
from utils.errors import count, require
from utils.windows import MaskWindow

TOOLS = "requirements-tools.txt"  # the optional packages of this module
# The keys of `to_dicts`, except that of tracking.
COLUMNS = ("class", "category_id", "score", "mask_score", "x1", "y1", "x2", "y2", "area", "centroid_x", "centroid_y")
BLUR_CELLS = 8  # an instance is blurred to at most this many independent values along its longer side
# The fields with one entry per detection.
PER_DETECTION = ("boxes", "scores", "mask_scores", "labels", "coefficients", "relative_boxes", "track_ids")
Index = int | slice | Tensor | np.ndarray | Sequence[int] | Sequence[bool]


@dataclass(eq=False, repr=False)
class Detections:
    """The detections of one image, best first. Indexing with an integer, slice, list or mask returns a subset.

    Masks are computed from prototypes and coefficients on access, on the device of the network. `Predictor` clones the
    tensors, so they can be modified in place and do not keep the rest of the batch in memory.
    """

    # Boxes, scores and labels are on the CPU, because they are read one by one.
    boxes: Tensor  # [N, 4] x1, y1, x2, y2 in pixels, clipped to the image
    scores: Tensor  # [N] of the class, 0..1
    mask_scores: Tensor  # [N] the same, or re-scored by the mask's quality (YOLACT++, maskness); ranks the detections
    labels: Tensor  # [N] 0..C-1
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    size: tuple[int, int]  # height and width of the image
    coefficients: Tensor  # [N, K]
    prototypes: Tensor  # [h, w, K]
    relative_boxes: Tensor  # [N, 4] as predicted, relative to the image, not clipped; on the CPU
    config: DetectionConfig = field(default_factory=DetectionConfig)  # how masks are cropped and thresholded
    track_ids: Tensor | None = None  # [N] numbers of objects across frames, -1 for none, see tools.track
    image: np.ndarray | None = None  # the image itself, uint8 BGR [H, W, 3], as `Predictor` received it

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        """Return for example "Detections(3: 2 persons, 1 dog; 640x480)"."""
        return f"Detections({len(self)}{f': {self.summary()}' if len(self) else ''}; {self.size[1]}x{self.size[0]})"

    def summary(self) -> str:
        """Return how many there are of each class, for example "2 persons, 1 dog"; "nothing" for none."""
        names = Counter(self.class_names[label] for label in self.labels.tolist())
        return ", ".join(count(number, name) for name, number in names.most_common()) or "nothing"

    def __getitem__(self, index: Index) -> Detections:
        chosen = self._positions(index)
        return self._map(PER_DETECTION, lambda value: value[to_device(chosen, value.device)])

    def _positions(self, index: Index) -> Tensor:
        """Return the positions [n] that an index selects. Raises IndexError for one that does not fit."""
        chosen = np.arange(len(self))[index.cpu().numpy() if isinstance(index, Tensor) else index]
        return torch.from_numpy(np.array(chosen).reshape(-1))  # a copy, because tensors have no negative strides

    def cpu(self) -> Detections:
        """Return the detections with all tensors on the CPU."""
        return self._map((*PER_DETECTION, "prototypes"), to_host)

    def _map(self, names: Sequence[str], function: Any) -> Detections:
        return replace(self, **{name: function(value) for name in names if (value := getattr(self, name)) is not None})

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
            yield from to_host(chunk).numpy()

    def windows(self) -> Iterator[MaskWindow]:
        """Yield each mask, in order, as the part of it around the object: for large images the fastest form."""
        if self.config.crop:
            fields = self.prototypes.detach(), self.coefficients.detach(), self.relative_boxes
            yield from mask_windows(*fields, self.size, self.config)
        else:
            yield from map(MaskWindow.around, self.iter_masks())

    def _chunks(self, budget: int) -> Iterator[Tensor]:
        prototypes, coefficients = self.prototypes.detach(), self.coefficients.detach()
        return assemble_masks(prototypes, coefficients, self.relative_boxes, self.size, self.config, budget)

    def draw(self, image: np.ndarray | None = None, alpha: float = 0.45) -> np.ndarray:
        """Draw masks, boxes, class names and scores on a copy of `image`, uint8 BGR [H, W, 3], by default their own.

        `alpha` is the opacity of the masks, 0..1. Raises ValueError if the image is not of the detections' size.
        """
        image = self._own(image)
        named = zip(self.labels.tolist(), self.mask_scores.tolist(), strict=True)
        texts = [f"{self.class_names[label]} {score:.2f}" for label, score in named]
        # By class if there are several, otherwise by object.
        colors = self.labels.tolist() if len(set(self.labels.tolist())) > 1 else list(range(len(self)))
        if self.track_ids is not None:
            for i, number in enumerate(self.track_ids.tolist()):
                if number >= 0:  # a track keeps its colour
                    colors[i], texts[i] = number, f"#{number} {texts[i]}"
        worst_first = list(range(len(self)))[::-1]  # the best detection is drawn last, on top
        boxes = self.boxes.cpu().numpy()[worst_first]
        return draw_objects(image, self[worst_first].windows(), boxes, texts[::-1], colors[::-1], alpha)

    def save(self, path: str | Path, image: np.ndarray | None = None) -> None:
        """Draw the detections, see `draw`, and write the result in the format of the path's suffix.

        Raises UserError if the file cannot be written, and ValueError if the image is not of the detections' size.
        """
        write_image(Path(path), self.draw(image))

    def encode_masks(self) -> list[dict[str, Any]]:
        """Return each mask as a COCO run-length encoding, {"size": [H, W], "counts": text}."""
        codes = (window.encode(self.size) for window in self.windows())
        return [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in codes]

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """Return COCO results, one dictionary per detection. "bbox" is (x, y, width, height), "segmentation" an RLE."""
        fields = (value.tolist() for value in (self.labels, self.scores, self.mask_scores, self.boxes))
        rows = zip(*fields, self.encode_masks(), strict=True)
        return [
            {
                "image_id": image_id if isinstance(image_id, str) else int(image_id),
                **self._track(i),
                "category_id": self.category_ids[label],
                "category_name": self.class_names[label],
                "score": score,
                "mask_score": mask_score,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": segmentation,
            }
            for i, (label, score, mask_score, (x1, y1, x2, y2), segmentation) in enumerate(rows)
        ]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one flat dictionary per detection, with the mask's area and centroid in pixels.

        The keys are COLUMNS, and track_id after tracking. The centre of the first pixel is at 0.5; an empty mask has
        the centre of its box.
        """
        rows = []
        for i, window in enumerate(self.windows()):
            x1, y1, x2, y2 = self.boxes[i].tolist()
            ys, xs = np.nonzero(window.pixels)
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            if len(xs):
                x, y = window.x + xs.mean() + 0.5, window.y + ys.mean() + 0.5
            label = int(self.labels[i])
            scores = float(self.scores[i]), float(self.mask_scores[i])
            values = (self.class_names[label], self.category_ids[label], *scores, x1, y1, x2, y2)
            row = dict(zip(COLUMNS, (*values, len(xs), float(x), float(y)), strict=True))
            rows.append(self._track(i) | row)
        return rows

    def to_pandas(self) -> Any:
        """Return `to_dicts` as a pandas.DataFrame. Raises UserError if pandas is not installed."""
        with require("pandas", install=TOOLS):
            import pandas
        return pandas.DataFrame(self.to_dicts(), columns=None if len(self) else COLUMNS)

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
        labels, scores = self.labels.tolist(), self.mask_scores.tolist()
        for index, window in enumerate(self.windows()):
            found = rings(window.pixels, tolerance)
            quality = f"score {scores[index]:.4f}, IoU with the mask {polygon_iou(window.pixels, found):.3f}"
            common = {"label": self.class_names[labels[index]], "group_id": index + 1, "shape_type": "polygon"}
            for points, hole in found:
                placed = (points + np.array((window.x, window.y))).astype(float).tolist()
                shape = {"points": placed, "flags": {"hole": bool(hole)}}
                shapes.append(common | shape | {"description": quality})
        height, width = self.size
        header: dict[str, Any] = {"version": "5.0.1", "flags": {}, "imagePath": image_path, "imageData": None}
        return header | {"shapes": shapes, "imageHeight": height, "imageWidth": width}

    def crops(self, image: np.ndarray | None = None) -> list[np.ndarray]:
        """Cut out each instance of `image`, uint8 BGR [H, W, 3], best first.

        Returns:
            For each detection uint8 BGRA [h, w, 4]: the smallest rectangle around its mask, transparent outside the
            mask; [0, 0, 4] if the mask is empty.

        Raises ValueError if the image is not of the detections' size.
        """
        image = self._own(image)
        tight = (window.tight() for window in self.windows())
        return [np.dstack((image[window.place], window.pixels.astype(np.uint8) * 255)) for window in tight]

    def blur(self, image: np.ndarray | None = None) -> np.ndarray:
        """Return a copy of `image`, uint8 BGR [H, W, 3], in which every instance is blurred.

        The image is reduced until the longer side of the instance's box has BLUR_CELLS pixels, and upsampled again, so
        the blur grows with the instance. Raises ValueError if the image is not of the detections' size.
        """
        image = self._own(image)
        out = image.copy()
        for window in self.windows():
            tight = window.tight()
            part = image[tight.place]
            if part.size:
                scale = min(1, BLUR_CELLS / max(part.shape[:2]))
                size = max(1, round(part.shape[1] * scale)), max(1, round(part.shape[0] * scale))
                small = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
                smooth = cv2.resize(small, part.shape[1::-1], interpolation=cv2.INTER_LINEAR)
                out[tight.place] = np.where(tight.pixels[..., None], smooth, out[tight.place])
        return out

    def _track(self, i: int) -> dict[str, int]:
        """Return the entry "track_id" of detection `i`, if it has one."""
        number = -1 if self.track_ids is None else int(self.track_ids[i])
        return {"track_id": number} if number >= 0 else {}

    def _own(self, image: np.ndarray | None) -> np.ndarray:
        """Return `image`, or that of the detections. Raises ValueError if there is none or its size is another."""
        image = self.image if image is None else image
        if image is None:
            raise ValueError("these detections do not have their image; pass it")
        if image.shape[:2] != tuple(self.size):
            raise ValueError(f"the detections are of an image of {self.size}, not {image.shape[:2]}")
        return image
