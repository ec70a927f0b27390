"""Pictures in, detections out.

predictor = Predictor(Yolact.from_weights("yolact_resnet50"))
detections = predictor(cv2.imread("street.jpg"))
for box, score, label in zip(detections.boxes, detections.scores, detections.labels):
    print(detections.class_names[label], float(score), box.tolist())
cv2.imwrite("out.jpg", detections.draw(image))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from torch import Tensor

from data.augment import normalise
from data.errors import UserError, nearest
from engine.devices import choose_device, choose_precision
from engine.inference import CudaGraphs, compiled, prepare
from layers.detect import Candidates, detect
from layers.masks import assemble_masks, combine, maskness
from layers.nms import NMS
from yolact import Predictions, Yolact

MAX_BATCH = 16  # pictures that go through the network at once
STATIC_NMS = ("fast", "cross_class")  # the others wait for values


@dataclass
class Detections:
    """What was found in one picture, best first. Indexing with a number, slice or mask gives fewer of them."""

    boxes: Tensor  # [N, 4] x1, y1, x2, y2 in pixels of the picture; x1 > x2 or y1 > y2 if all of it lies outside
    scores: Tensor  # [N] 0..1
    mask_scores: Tensor  # [N] the same, or re-scored by the mask's quality (YOLACT++, maskness)
    labels: Tensor  # [N] 0..C-1
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    size: tuple[int, int]  # height and width of the picture
    coefficients: Tensor  # [N, K]
    prototypes: Tensor  # [h, w, K]
    relative_boxes: Tensor  # [N, 4] as predicted, relative to the picture
    crop: bool = True
    crop_after_resize: bool = False
    mask_threshold: float = 0.5

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int | slice | Tensor | np.ndarray | Sequence[int]) -> Detections:
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.scores.device)
            if index.ndim == 0 and not -len(self) <= int(index) < len(self):
                raise IndexError(f"detection {int(index)} of {len(self)}")
            index = (index if index.numel() else index.long()).reshape(-1)
        names = ("boxes", "scores", "mask_scores", "labels", "coefficients", "relative_boxes")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    @cached_property
    def masks(self) -> Tensor:
        """[N, H, W] bool, at the picture's size. For many objects on a large picture `iter_masks` needs less memory."""
        chunks = list(self.iter_masks())
        if len(chunks) == 1:
            return chunks[0]
        return torch.cat(chunks) if chunks else self.scores.new_zeros((0, *self.size), dtype=torch.bool)

    def iter_masks(self, budget: int = 256 * 2**20) -> Iterator[Tensor]:
        """The masks in order, as bool chunks [n, H, W] made with about `budget` bytes each."""
        return assemble_masks(
            self.prototypes,
            self.coefficients,
            self.relative_boxes,
            self.size,
            crop=self.crop,
            crop_after_resize=self.crop_after_resize,
            by_window=self.scores.device.type == "cpu",
            threshold=self.mask_threshold,
            budget=budget,
        )

    def encode_masks(self) -> list[dict[str, Any]]:
        """Each mask as a COCO run-length encoding, {"size": [H, W], "counts": text}."""
        encoded = []
        for chunk in self.iter_masks(budget=64 * 2**20):
            for mask in chunk.cpu().numpy():
                code = rle.encode(np.asfortranarray(mask.view(np.uint8)))
                encoded.append({"size": list(code["size"]), "counts": code["counts"].decode()})
        return encoded

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """COCO results, one dictionary a detection: box as x, y, width, height, mask as RLE."""
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
                    "bbox": [x1, y1, max(0.0, x2 - x1), max(0.0, y2 - y1)],
                    "segmentation": segmentation,
                }
            )
        return results

    def draw(self, image: np.ndarray) -> np.ndarray:
        """A copy of the BGR picture with the detections drawn on it."""
        from engine.draw import draw

        return draw(image, self)


class Predictor:
    """`predictor(image)` -> Detections, `predictor([image, ...])` -> list of them; images as cv2 reads them.

    device: auto, cpu, cuda, cuda:1, mps. precision: auto, fp32, bf16, fp16. size: (height, width) of the network's
    input, the configuration's by default. score_threshold: with a higher one than the configuration's, no detection
    scores less; at the configuration's own (0.05) detections are those of the published evaluation, where the second
    best class of an object may score less. top_k: detections a picture. nms: a key of layers.nms.NMS. `crop` and
    `crop_after_resize` are for the masks, see layers.masks.assemble_masks. maskness: masks are ranked by their score
    times how sure they are of their pixels. Of top_k, crop_after_resize and maskness None is what the configuration
    says. `compile` takes seconds to minutes, here and for each further number of pictures in a list, and needs a C++
    compiler. `graphs`: on a GPU, pictures of a size that comes often go through a CUDA graph.

    The model is copied: what happens to its weights later is not seen.
    """

    def __init__(
        self,
        model: Yolact,
        device: str = "auto",
        precision: str = "auto",
        compile: bool = False,
        size: tuple[int, int] | None = None,
        score_threshold: float = 0.05,
        top_k: int | None = None,
        nms: str = "fast",
        crop: bool = True,
        crop_after_resize: bool | None = None,
        maskness: bool | None = None,
        graphs: bool = True,
    ):
        if nms not in NMS:
            raise UserError(f"unknown nms {nms!r}{nearest(nms, NMS)}")
        if size is not None and min(size) < 32:
            raise UserError(f"size {size[0]}x{size[1]}: the network needs at least 32 pixels a side")
        if not 0 <= score_threshold <= 1:
            raise UserError(f"score threshold {score_threshold} is not between 0 and 1")
        top_k = model.config.top_k if top_k is None else top_k
        if top_k < 1:
            raise UserError(f"top_k {top_k}: at least one detection must be allowed")
        self.device = choose_device(device)
        self.dtype = choose_precision(precision, self.device)
        self.config = model.config
        self.size = size or (self.config.max_size, self.config.max_size)
        self.model = prepare(model, self.device, self.dtype)
        self.network, self.compile_seconds = compiled(self.model, self.size) if compile else (self.model, 0.0)
        self.score_threshold = score_threshold
        self.top_k = top_k
        self.nms = nms
        self.crop = crop
        self.crop_after_resize = self.config.crop_after_resize if crop_after_resize is None else crop_after_resize
        self.maskness = self.config.maskness if maskness is None else maskness
        self.anchors = self.model.anchors(*self.size)
        self.mean, self.std = (
            torch.tensor(v, dtype=torch.float32, device=self.device)[:, None, None]
            for v in (self.config.mean, self.config.std)
        )
        # torchvision's deformable convolutions run on a stream of their own choice, which a capture does not see.
        captured = self.device.type == "cuda" and nms in STATIC_NMS and not self.config.dcn_interval
        self.graphs = CudaGraphs() if graphs and captured else None

    @torch.inference_mode()
    def __call__(self, images: np.ndarray | list[np.ndarray]) -> Any:
        if images is None or isinstance(images, (str, bytes)):
            raise TypeError(f"expected a picture as cv2.imread gives it, not {images!r}: does the file exist?")
        single = isinstance(images, np.ndarray)
        pictures = [images] if single else list(images)
        if not pictures:
            return []
        for picture in pictures:
            if not isinstance(picture, np.ndarray):
                raise TypeError(f"expected pictures as cv2.imread gives them, not {type(picture).__name__}")
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or picture.size == 0:
                raise ValueError(f"expected a uint8 picture [H, W, 3], not {picture.dtype} {list(picture.shape)}")
        found: list[Detections] = []
        for start in range(0, len(pictures), MAX_BATCH):
            some = pictures[start : start + MAX_BATCH]
            candidates, prototypes = self.locate(some)
            counts = (candidates.scores > 0).sum(dim=1).tolist()  # here, and not before, the device is waited for
            found += [
                self.collect(candidates, prototypes, i, count, picture.shape[:2])
                for i, (picture, count) in enumerate(zip(some, counts, strict=True))
            ]
        return found[0] if single else found

    def locate(self, pictures: Sequence[np.ndarray]) -> tuple[Candidates, Tensor]:
        """uint8 BGR pictures [H, W, 3] -> `top_k` slots for each, and the prototypes [B, h, w, K]."""
        if self.device.type != "cpu" and len({picture.shape for picture in pictures}) == 1:
            *slots, prototypes = self.locate_on_device(torch.from_numpy(np.stack(pictures)).to(self.device))
            return Candidates(*slots), prototypes
        predictions = self.predict(torch.stack([self.preprocess(picture) for picture in pictures]))
        return self.detect(predictions), predictions.prototypes

    @torch.inference_mode()
    def locate_on_device(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """`_locate`, through a CUDA graph where there is one for pictures of this shape."""
        return self._locate(pictures) if self.graphs is None else self.graphs(self._locate, pictures)

    @torch.inference_mode()
    def _locate(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """uint8 BGR pictures [B, H, W, 3] on the device -> the four of Candidates, and the prototypes.

        Shapes are fixed and, but on a CPU, nothing waits for the device."""
        predictions = self.predict(self.normalise(pictures.flip(3).permute(0, 3, 1, 2)))
        return *self.detect(predictions), predictions.prototypes

    def preprocess(self, image: np.ndarray) -> Tensor:
        """uint8 BGR [H, W, 3] -> normalised RGB [3, h, w] at the network's size, on the device."""
        if self.config.resize_uint8 and self.device.type == "cpu":
            resized = cv2.resize(image, self.size[::-1], interpolation=cv2.INTER_LINEAR)
            return torch.from_numpy(normalise(resized, self.config))
        planes = np.stack(cv2.split(image)[::-1])  # plane by plane PyTorch enlarges twice as fast
        return self.normalise(torch.from_numpy(planes).to(self.device)[None])[0]

    def normalise(self, planes: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] -> normalised RGB [B, 3, h, w] at the network's size."""
        resized = F.interpolate(planes.float(), self.size, mode="bilinear", align_corners=False)
        if self.config.resize_uint8:  # as OpenCV does it, to at most one level of 255
            resized = resized.round()
        return resized.sub_(self.mean).div_(self.std)

    def predict(self, batch: Tensor) -> Predictions:
        """[B, 3, h, w] -> the network's raw outputs."""
        return self.network(batch.to(self.dtype, memory_format=torch.channels_last))

    @property
    def strict(self) -> bool:
        """Whether nothing under the threshold may come out."""
        return self.config.clip_boxes or self.score_threshold > self.config.score_threshold

    def detect(self, predictions: Predictions) -> Candidates:
        """Raw outputs -> `top_k` slots a picture."""
        config, threshold = self.config, self.score_threshold
        return detect(
            predictions.boxes,
            predictions.logits,
            predictions.coefficients,
            self.anchors,
            score_threshold=threshold,
            min_score=threshold if self.strict else 0.0,
            iou_threshold=config.nms_threshold,
            nms=self.nms,
            nms_top_k=config.nms_top_k,
            max_detections=self.top_k,
            level_sizes=self.model.level_sizes(*self.size),
            pre_nms_top_k=config.pre_nms_top_k,
            clip_boxes=config.clip_boxes,
            trim=self.device.type == "cpu",
        )

    def collect(
        self, candidates: Candidates, prototypes: Tensor, i: int, count: int, size: tuple[int, int]
    ) -> Detections:
        """The i-th picture's detections, the first `count` slots, for a picture of `size` (H, W)."""
        boxes, scores, labels, coefficients = (field[i, :count] for field in candidates)
        prototypes = prototypes[i]
        height, width = size
        limits = boxes.new_tensor((width, height, width, height))
        mask_scores = scores
        rescored = self.model.mask_iou is not None or self.maskness
        if rescored and len(scores):
            soft = combine(prototypes, coefficients, boxes if self.crop else None)
            if self.model.mask_iou is not None:
                mask_scores = mask_scores * self.model.mask_iou(soft).gather(1, labels[:, None])[:, 0]
            if self.maskness:
                mask_scores = mask_scores * maskness(soft, self.config.mask_threshold)
        found = Detections(
            boxes=torch.cat(
                ((boxes * limits)[:, :2].clamp(min=0), torch.minimum(boxes * limits, limits)[:, 2:]), dim=1
            ),
            scores=scores,
            mask_scores=mask_scores,
            labels=labels,
            class_names=self.config.class_names,
            category_ids=self.config.category_ids,
            size=(height, width),
            coefficients=coefficients,
            prototypes=prototypes,
            relative_boxes=boxes,
            crop=self.crop,
            crop_after_resize=self.crop_after_resize,
            mask_threshold=self.config.mask_threshold,
        )
        if rescored and self.score_threshold > self.config.score_threshold:
            # What a person asked to see is judged by the re-scored value, as the authors' display does it.
            found = found[mask_scores.argsort(descending=True)]
            found = found[found.mask_scores >= self.score_threshold]
        return found
