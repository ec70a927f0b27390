"""Predict detections for images; README.md has an example."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from config import Config, with_detection
from data.image import ImageLike, as_image, input_size, to_network
from inference.detections import Detections
from inference.optimize import Backend, GraphedCall, pytorch_backend
from inference.runtime import ExportedNetwork, exported_backend, is_exported
from layers.detect import detect, take
from layers.masks import mask_scores, soft_masks
from layers.nms import NMS
from layers.structures import Predictions, Selected
from utils.device import float32_math
from utils.errors import UserError, look_up
from weights import load_model
from yolact import Yolact

MAX_BATCH = 16  # largest batch; longer lists are split


class Predictor:
    """Predict the `Detections` of an image, such as uint8 BGR [H, W, 3] as cv2.imread returns it, or of several images.

    The model is copied, so later changes to its weights have no effect.

    By default, the detections are those for people, see `config.DISPLAY`. `evaluation.evaluate` asks for `published()`,
    the configuration's own setting. Options that are given here hold in both.

    Args:
        model: a trained model, or an `ExportedNetwork`, for which `size`, `compile` and `optimize` are fixed.
        device: "auto", "cpu", "cuda", "cuda:1", "mps", or a torch.device.
        precision: "auto", "fp32", "tf32", "bf16", "fp16", or a torch.dtype, see `utils.device.choose_precision`.
        size: (height, width) of the network's input, or one number, by default the configuration's `max_size`. One
            number means a square or, with the configuration's `preserve_aspect_ratio`, an input of that area for each
            image, see data.image.input_size.
        compile: compile the network, for square inputs unless `size` states both sides. Compilation takes seconds to
            minutes, here and again for each new batch size, and needs a C++ compiler.
        optimize: fold batch norm and use channels_last, see inference.optimize. If False, the model runs unchanged in
            float32.
        detection: any field of DetectionConfig, such as `score_threshold`, `top_k`, `nms` or `crop`. A score threshold
            other than the configuration's own applies to every detection; with the configuration's own one, only the
            best class of an anchor has to exceed it, as in the published evaluation (`strict_threshold` states it).

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
        self.own_config, self.given, self.display = model.config, detection, True
        self._graph: GraphedCall | None = None
        self.config = self._with_detection()
        if isinstance(model, ExportedNetwork):
            if compile or not optimize:
                raise UserError(f"{model.path}: compile and optimize do not apply to an exported model")
            self.backend: Backend = exported_backend(model, device, precision, size)
        else:
            self.backend = pytorch_backend(model, device, precision, size, compile, optimize)
        self.device, self.dtype = self.backend.device, self.backend.dtype
        # Computing the anchors of an input size takes a millisecond, so they are kept.
        self._anchors: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def from_weights(cls, path_or_name: str | Path, **options: Any) -> Predictor:
        """Load a checkpoint, released weights by file or name, or an exported .onnx or .xml file.

        `options` are passed to the constructor.
        """
        model = ExportedNetwork(path_or_name) if is_exported(path_or_name) else load_model(path_or_name)
        return cls(model, **options)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_graph": None}  # captured again on the first call

    def with_detection(self, **detection: Any) -> Predictor:
        """Return a predictor with other values for fields of DetectionConfig; it shares the network.

        Raises UserError for an unknown field or a value out of range.
        """
        other = copy.copy(self)
        other.given = self.given | detection
        other.config = other._with_detection()
        return other

    def published(self) -> Predictor:
        """Return a predictor with the configuration's own setting, for computing AP; it shares the network."""
        other = copy.copy(self)
        other.display = False
        other.config = other._with_detection()
        return other

    def _with_detection(self) -> Config:
        """Return the configuration with the detection options of this predictor. Raises UserError if one is invalid."""
        self._graph = None  # it contains the options
        config = with_detection(self.own_config, self.given, self.display)
        look_up("nms", config.detection.nms, NMS)
        return config

    @overload
    def __call__(self, images: ImageLike, channels: str = "bgr") -> Detections: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], channels: str = "bgr") -> list[Detections]: ...

    @overload
    def __call__(self, images: Iterator[Any], channels: str = "bgr") -> Iterator[Detections]: ...

    def __call__(self, images: Any, channels: str = "bgr") -> Any:
        """Return the detections of an image, or a list of detections for a list of images, whose sizes may differ.

        For an iterator of images, return an iterator that reads and predicts one image at a time. Images are uint8
        arrays [H, W, 3], PIL images, or paths; see data.image.as_image for `channels` and errors.
        """
        if isinstance(images, Iterator):
            return (self(image, channels) for image in images)
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

    def _predict_batch(self, images: list[np.ndarray]) -> list[Detections]:
        """Return the detections of images with the same input size."""
        with torch.inference_mode():
            selected, prototypes = self.run(torch.stack([self.preprocess(image) for image in images]))
        found = self.postprocess(selected, prototypes, [image.shape[:2] for image in images])
        for detections, image in zip(found, images, strict=True):
            detections.image = image
        return found

    def run(self, batch: Tensor) -> tuple[Selected, Tensor]:
        """Return the detections and the prototypes [B, h, w, K] for normalised RGB images [B, 3, h, w].

        If the network is compiled for a GPU, this is one CUDA graph; the next call overwrites the results.
        """
        waits = self.config.detection.nms == "standard"  # for the GPU, between its decisions
        if self.device.type != "cuda" or not self.backend.compile_seconds or waits:
            return self._network_and_detect(batch)
        if self._graph is None:
            self._graph = GraphedCall(self._network_and_detect)
        return self._graph(batch)

    def _network_and_detect(self, batch: Tensor) -> tuple[Selected, Tensor]:
        predictions = self.predict(batch)
        return self.detect(predictions), predictions.prototypes

    def input_size(self, image: np.ndarray) -> tuple[int, int]:
        """Return (height, width) of the network's input for an image [H, W, 3]."""
        size = self.backend.size
        return input_size(image.shape[:2], size) if isinstance(size, int) else size

    def preprocess(self, image: np.ndarray) -> Tensor:
        """Resize and normalise uint8 BGR [H, W, 3] to float32 RGB [3, h, w], the network's input, on the device."""
        return to_network(image, self.input_size(image), self.config.model, self.device)

    def predict(self, batch: Tensor) -> Predictions:
        """Return the network's raw outputs for normalised RGB images [B, 3, h, w]."""
        with float32_math(self.backend.tf32):
            return self.backend.network(batch.to(self.dtype, memory_format=torch.channels_last))

    def detect(self, predictions: Predictions) -> Selected:
        """Decode raw outputs and apply NMS; returns at most `top_k` slots per image, unused ones with the score -1."""
        # Sides of inputs that depend on the image are multiples of 32, and thus four times those of the prototypes.
        rows, columns = predictions.prototypes.shape[1:3]
        size = (4 * rows, 4 * columns) if isinstance(self.backend.size, int) else self.backend.size
        if size not in self._anchors:
            self._anchors[size] = self.backend.anchors(*size)
        function = self.backend.detect if self.config.detection.nms in ("fast", "cross_class") else detect
        return function(
            predictions, self._anchors[size], self.config.detection, drop_weak_anchors=self.device.type == "cpu"
        )

    @torch.no_grad()
    def postprocess(self, selected: Selected, prototypes: Tensor, sizes: Sequence[tuple[int, ...]]) -> list[Detections]:
        """Return the detections in the used slots of each image.

        Args:
            selected: the output of `detect` for B images.
            prototypes: [B, h, w, K].
            sizes: (H, W) of each image in pixels, to which its boxes are scaled.
        """
        selected, mask_scores = self._rescore(selected, prototypes)
        # What is read one by one moves to the host in one copy, for which alone the host waits for a GPU.
        scored = torch.stack((selected.scores, mask_scores, selected.labels), dim=2)
        values = torch.cat((selected.boxes, scored), dim=2).cpu()
        detections = []
        for i, (count, (height, width)) in enumerate(zip((values[..., 4] > 0).sum(dim=1).tolist(), sizes, strict=True)):
            corners, class_scores, ranks, labels = values[i, :count].split((4, 1, 1, 1), dim=1)
            detections.append(
                Detections(
                    boxes=corners.clamp(0, 1) * torch.tensor([width, height, width, height]),
                    scores=class_scores[:, 0].clone(),  # a view would keep the whole batch in memory
                    mask_scores=ranks[:, 0].clone(),
                    labels=labels[:, 0].long(),
                    class_names=self.config.class_names,
                    category_ids=self.config.category_ids,
                    size=(height, width),
                    coefficients=selected.coefficients[i, :count].clone(),
                    prototypes=prototypes[i].clone(),
                    relative_boxes=corners.clone(),
                    config=self.config.detection,
                )
            )
        return detections

    def _rescore(self, selected: Selected, prototypes: Tensor) -> tuple[Selected, Tensor]:
        """Return the detections and their mask scores [B, M]: class scores times the mask IoU and maskness, if enabled.

        With `strict_threshold`, the threshold then also applies to the mask scores, as in the authors' code for images,
        and detections are sorted by them.
        """
        detection, mask_iou = self.config.detection, self.backend.mask_iou
        if mask_iou is None and not detection.maskness:
            return selected, selected.scores
        if self.device.type == "cpu":  # on a GPU, reading how many slots are used would be a wait
            used = max(1, int((selected.scores > 0).sum(dim=1).amax()))
            selected = Selected(*(field[:, :used] for field in selected))
        ranks = []
        for boxes, scores, labels, coefficients, planes in zip(*selected, prototypes, strict=True):
            soft = soft_masks(planes, coefficients, boxes if detection.crop else None)
            ranks.append(mask_scores(scores, labels, soft, detection, mask_iou))
        ranked = torch.stack(ranks)
        if not detection.strict_threshold:
            return selected, ranked
        weak = (ranked < detection.score_threshold) | (selected.scores <= 0)
        order = ranked.masked_fill(weak, -1.0).argsort(dim=1, descending=True)
        selected = selected._replace(scores=selected.scores.masked_fill(weak, -1.0))
        return Selected(*(take(field, order) for field in selected)), ranked.gather(1, order)
