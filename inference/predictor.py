"""Predict detections for images.

predictor = Predictor.from_weights("yolact_resnet50")
image = cv2.imread("street.jpg")
detections = predictor(image)
for box, score, label in zip(detections.boxes, detections.scores, detections.labels):
    print(detections.class_names[label], float(score), box.tolist())
cv2.imwrite("out.jpg", detections.draw(image))
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from config import Config, override
from data.image import ImageLike, as_image, input_size, normalise, resize
from inference.detections import Detections
from inference.optimize import compile_network
from inference.optimize import optimize as optimized
from inference.runtime import ExportedNetwork, is_exported
from layers.detect import detect
from layers.masks import mask_scores, soft_masks
from layers.nms import find_nms
from layers.structures import Candidates, Predictions
from utils.device import choose_device, choose_precision
from utils.errors import UserError, nearest
from weights import load_model
from yolact import Yolact

MAX_BATCH = 16  # largest batch; longer lists are split


class Predictor:
    """Predict the `Detections` of an image, such as uint8 BGR [H, W, 3] as cv2.imread returns it, or of several images.

    The model is copied, so later changes to its weights have no effect.

    Args:
        model: a trained model, or an `ExportedNetwork`, for which `size`, `compile` and `optimize` are fixed.
        device: "auto", "cpu", "cuda", "cuda:1", "mps", or a torch.device.
        precision: "auto", "fp32", "bf16", "fp16", or a torch.dtype. "auto" selects bfloat16 where the hardware supports
            it, float16 on older CUDA GPUs, and float32 otherwise.
        size: (height, width) of the network's input, or one number, by default the configuration's `max_size`. One
            number means a square or, with the configuration's `preserve_aspect_ratio`, an input of that area for each
            image, see data.image.input_size.
        compile: compile the network, for square inputs unless `size` states both sides. Compilation takes seconds to
            minutes, here and again for each new batch size, and needs a C++ compiler.
        optimize: fold batch norm and use channels_last, see inference.optimize. If False, the model runs unchanged in
            float32.
        detection: any field of DetectionConfig, such as `score_threshold`, `top_k`, `nms` or `crop`, to override the
            configuration's. If `score_threshold` is at most 0.05 (the default), only the best class of an anchor has to
            exceed it, as in the published evaluation. Above 0.05, and in MMDetection's configurations, it applies to
            every detection.

    Raises:
        UserError: if the device is not available, or an option is unknown or out of range.
    """

    def __init__(
        self,
        model: Yolact | ExportedNetwork,
        device: str | torch.device = "auto",
        precision: str | torch.dtype = "auto",
        size: int | tuple[int, int] | None = None,
        compile: bool = False,
        optimize: bool = True,
        **detection: Any,
    ):
        self.config = _with_detection(model.config, detection)
        find_nms(self.config.detection.nms)  # raises for an unknown name here instead of on the first image
        self.compile_seconds = 0.0
        self.model: Yolact | ExportedNetwork
        self.network: Callable[[Tensor], Predictions]
        self.mask_iou: Callable[[Tensor], Tensor] | None
        if isinstance(model, ExportedNetwork):
            if compile or not optimize:
                raise UserError(f"{model.path}: compile and optimize do not apply to an exported model")
            self._start_exported(model, device, precision, size)
        else:
            prepared = self._start_pytorch(model, device, precision, size, optimize)
            if compile:
                self.size_is_fixed = True
                self.network, self.compile_seconds = compile_network(prepared, self.size)
        # Computing the anchors of an input size takes a millisecond, so those of the last sizes are kept.
        self.anchors = functools.lru_cache(maxsize=16)(self.model.anchors)

    def _start_pytorch(
        self,
        model: Yolact,
        device: str | torch.device,
        precision: str | torch.dtype,
        size: int | tuple[int, int] | None,
        optimize: bool,
    ) -> Yolact:
        size = self.config.model.max_size if size is None else size
        self.size = _size(size)
        self.size_is_fixed = not isinstance(size, int) or not self.config.model.preserve_aspect_ratio
        if min(self.size) < 32:
            raise UserError(f"size {self.size[0]}x{self.size[1]}: the network needs at least 32 pixels a side")
        self.device = choose_device(device)
        self.dtype = choose_precision(precision, self.device)
        if optimize:
            prepared = optimized(model, self.device, self.dtype)
        else:
            if precision not in ("auto", "fp32", torch.float32):
                raise UserError(f"precision {precision} needs optimize=True; otherwise the model runs in float32")
            self.dtype = torch.float32
            prepared = copy.deepcopy(model).eval().to(self.device)
        self.model, self.network, self.mask_iou = prepared, prepared, prepared.mask_iou
        return prepared

    def _start_exported(
        self,
        model: ExportedNetwork,
        device: str | torch.device,
        precision: str | torch.dtype,
        size: int | tuple[int, int] | None,
    ) -> None:
        if str(device) not in ("auto", "cpu"):
            raise UserError(f"{model.path}: exported models run on the CPU only, not on {device}")
        if size is not None and _size(size) != model.size:
            height, width = model.size
            raise UserError(f"{model.path}: it was exported for {height}x{width}; export it again with another --size")
        self.size, self.size_is_fixed, self.model = model.size, True, model
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.network = model.start(precision)
        self.mask_iou = model.start_mask_iou(precision)

    def with_detection(self, **detection: Any) -> Predictor:
        """Return a predictor with other values for fields of DetectionConfig; it shares the network.

        Raises UserError for an unknown field or a value out of range.
        """
        other = copy.copy(self)
        other.config = _with_detection(self.config, detection)
        find_nms(other.config.detection.nms)
        return other

    @classmethod
    def from_weights(cls, path_or_name: str | Path, **options: Any) -> Predictor:
        """Load a checkpoint, released weights by file or name, or an exported .onnx or .xml file.

        `options` are passed to the constructor.
        """
        model = ExportedNetwork(path_or_name) if is_exported(path_or_name) else load_model(path_or_name)
        return cls(model, **options)

    @overload
    def __call__(self, images: ImageLike, channels: str = "bgr") -> Detections: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], channels: str = "bgr") -> list[Detections]: ...

    def __call__(
        self, images: ImageLike | list[Any] | tuple[Any, ...], channels: str = "bgr"
    ) -> Detections | list[Detections]:
        """Return the detections of an image, or a list of detections for a list of images, whose sizes may differ.

        Args:
            images: uint8 arrays [H, W, 3], PIL images, or paths.
            channels: the order of the channels of arrays, "bgr" as cv2.imread returns them, or "rgb".

        Raises:
            TypeError or ValueError: if an input is none of these.
            UserError: if a file cannot be read.
        """
        if not isinstance(images, (list, tuple)):
            return self([images], channels)[0]
        arrays = [as_image(image, channels) for image in images]
        groups: dict[tuple[int, int], list[int]] = {}  # the images of a batch need inputs of the same size
        for index, image in enumerate(arrays):
            groups.setdefault(self.input_size(image), []).append(index)
        found: dict[int, Detections] = {}
        for group in groups.values():
            for start in range(0, len(group), MAX_BATCH):
                batch = group[start : start + MAX_BATCH]
                found |= zip(batch, self._predict_batch([arrays[i] for i in batch]), strict=True)
        return [found[i] for i in range(len(arrays))]

    def _predict_batch(self, images: list[np.ndarray]) -> Iterator[Detections]:
        """Yield the detections of images with the same input size."""
        with torch.inference_mode():
            predictions = self.predict(torch.stack([self.preprocess(image) for image in images]))
            candidates = self.detect(predictions)
            counts = (candidates.scores > 0).sum(dim=1).tolist()  # synchronises with the device
        for i, image in enumerate(images):
            yield self.postprocess(candidates, predictions.prototypes, i, counts[i], image.shape[:2])

    def input_size(self, image: np.ndarray) -> tuple[int, int]:
        """Return (height, width) of the network's input for an image [H, W, 3]."""
        return self.size if self.size_is_fixed else input_size(image.shape[:2], self.size[0])

    def preprocess(self, image: np.ndarray) -> Tensor:
        """Resize and normalise uint8 BGR [H, W, 3] to float32 RGB [3, h, w], the network's input, on the device."""
        model = self.config.model
        resized = resize(image, self.input_size(image), model.resize_uint8)
        return torch.from_numpy(normalise(resized, model.mean, model.std)).to(self.device)

    def predict(self, batch: Tensor) -> Predictions:
        """Return the network's raw outputs for normalised RGB images [B, 3, h, w]."""
        return self.network(batch.to(self.dtype, memory_format=torch.channels_last))

    def detect(self, predictions: Predictions) -> Candidates:
        """Decode raw outputs and apply NMS; returns at most `top_k` slots per image, unused ones with the score -1."""
        # Sides of inputs that depend on the image are multiples of 32, and thus four times those of the prototypes.
        rows, columns = predictions.prototypes.shape[1:3]
        anchors = self.anchors(*(self.size if self.size_is_fixed else (4 * rows, 4 * columns)))
        return detect(predictions, anchors, self.config.detection, drop_weak_anchors=self.device.type == "cpu")

    def postprocess(
        self, candidates: Candidates, prototypes: Tensor, i: int, count: int, size: tuple[int, ...]
    ) -> Detections:
        """Return the detections in the first `count` slots of image `i` of the batch.

        Args:
            candidates: the output of `detect`.
            prototypes: [B, h, w, K].
            i: index of the image in the batch.
            count: number of used slots of the image.
            size: (H, W) of the image in pixels, to which the boxes are scaled.
        """
        # Cloned, because inference tensors cannot be modified in place, and views would keep the batch in memory.
        boxes, scores, labels, coefficients = (field[i, :count].clone() for field in candidates)
        height, width = size
        limits = boxes.new_tensor((width, height, width, height))
        found = Detections(
            boxes=(boxes * limits).clamp(min=0).minimum(limits),
            scores=scores,
            mask_scores=scores.clone(),
            labels=labels,
            class_names=self.config.class_names,
            category_ids=self.config.category_ids,
            size=(height, width),
            coefficients=coefficients,
            prototypes=prototypes[i].clone(),
            relative_boxes=boxes,
            config=self.config.detection,
        )
        return self._rescore(found) if len(found) else found

    @torch.no_grad()
    def _rescore(self, found: Detections) -> Detections:
        """Set `mask_scores` to the class scores times the mask IoU that YOLACT++ predicts and maskness, where enabled.

        If the score threshold is above 0.05 (config.PUBLISHED_THRESHOLD), detections are also sorted and filtered by
        mask score.
        """
        detection = self.config.detection
        if self.mask_iou is None and not detection.maskness:
            return found
        soft = soft_masks(found.prototypes, found.coefficients, found.relative_boxes if detection.crop else None)
        found.mask_scores = mask_scores(found.scores, found.labels, soft, detection, self.mask_iou)
        if detection.above_published:
            # As in the authors' code, the score threshold then also applies to the mask scores.
            found = found[found.mask_scores.argsort(descending=True)]
            found = found[found.mask_scores >= detection.score_threshold]
        return found


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _with_detection(config: Config, detection: dict[str, Any]) -> Config:
    """Return `config` with fields of its detection section overridden. Raises UserError for any other name."""
    known = set(vars(config.detection))
    for key in detection:
        if key not in known:
            options = sorted(known | {"device", "precision", "size", "compile", "optimize"})
            raise UserError(f"unknown option {key!r}{nearest(key, options)}")
    return override(config, **detection)
