"""Compare an exported model, run in its target runtime, with `Predictor` on real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from config import DetectionConfig
from inference.detections import Detections
from inference.predictor import Predictor
from inference.runtime import NORMALISED, RAW, ExportedNetwork, Part
from yolact import Yolact

MAX_CROPPED = 1e-3  # share of the pixels of masks_cropped that may differ from those of masks
MIN_SCORE = 0.1  # weaker detections are ignored, because rounding errors can add or remove them
# Detections are compared at several widths and heights of each image, because a graph may depend on the size.
SCALES = ((1.0, 1.0), (0.5, 0.7), (1.5, 1.2))


@dataclass(frozen=True)
class Tolerance:
    """Limits on the differences between an export and the PyTorch model."""

    raw: float  # largest difference of an output, relative to the output's largest value
    iou: float  # minimum IoU of boxes that match
    mask_iou: float  # minimum of the mean IoU of matched masks; single masks of a few pixels may differ more
    score: float  # largest difference of matched scores
    matched: float  # minimum fraction of detections that must be matched


# Exports of trained weights stay far within these limits: for the bundled weights in fp32, raw outputs differ by less
# than 1e-4, and all detections match. Random weights, which give many nearly equal scores, come close. In fp16 exports,
# only the weights are stored in float16. int8 changes detections; evaluate AP to measure the effect.
TOLERANCES = {
    "fp32": Tolerance(raw=1e-2, iou=0.9, mask_iou=0.98, score=0.05, matched=0.95),
    "fp16": Tolerance(raw=5e-2, iou=0.9, mask_iou=0.9, score=0.05, matched=0.95),
    "int8": Tolerance(raw=float("inf"), iou=0.6, mask_iou=0.6, score=1.0, matched=0.7),
}


def check_export(
    network: ExportedNetwork, model: Yolact, detection: DetectionConfig, images: Sequence[np.ndarray]
) -> tuple[dict[str, Any], list[str]]:
    """Compare an exported file, run in its runtime in float32, with the model it was made from.

    Args:
        network: the file.
        model: the model.
        detection: the settings of the exported graph.
        images: uint8 BGR [H, W, 3].

    Returns:
        The measured differences, and a message for each that exceeds the tolerance.
    """
    tolerance = TOLERANCES[network.precision]
    predictor = Predictor(model, device="cpu", precision="fp32", size=network.size, **vars(detection))
    report: dict[str, Any] = {"precision": network.precision, "size": network.size, "images": len(images)}
    problems = []
    report["raw_difference"] = differences = _raw_differences(network, predictor, images)
    for name, value in differences.items():
        if not value <= tolerance.raw:  # also catches NaN
            problems.append(f"{name} differs by {value:.1e} of its largest value, more than {tolerance.raw:.0e}")
    if network.raw:
        return report, problems
    pairs = _Pairs(tolerance.iou)
    graph = network.runtime.start((), (), "fp32")
    for image in _at_sizes(images):
        found, wrong = _run_graph(graph, image)
        pairs.add(predictor(image), found)
        if wrong > MAX_CROPPED:
            problems.append(f"{wrong:.1%} of the pixels of masks_cropped differ from masks")
    report |= pairs.summary()
    for side in ("pytorch", "exported"):
        matched, total = report[f"{side}_matched"], report[f"{side}_detections"]
        if matched < tolerance.matched * total:
            problems.append(f"only {matched} of the {total} detections of the {side} model match one of the other")
    if report["largest_score_difference"] > tolerance.score:
        problems.append(
            f"scores differ by up to {report['largest_score_difference']:.2f}, more than {tolerance.score:g}"
        )
    if report["mean_mask_iou"] < tolerance.mask_iou:
        problems.append(f"the mean mask IoU is {report['mean_mask_iou']:.2f}, less than {tolerance.mask_iou:g}")
    return report, problems


def _at_sizes(images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for image in images:
        for fx, fy in SCALES:
            yield cv2.resize(image, None, fx=fx, fy=fy, interpolation=cv2.INTER_AREA)


def _raw_differences(network: ExportedNetwork, predictor: Predictor, images: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the largest difference of each raw output, relative to PyTorch's largest absolute value."""
    run, worst = Part(network, (NORMALISED,), RAW, "fp32"), dict.fromkeys(RAW, 0.0)
    for image in images:
        batch = predictor.preprocess(image)[None]
        with torch.inference_mode():
            expected, found = predictor.predict(batch), run(batch)
        for name, a, b in zip(RAW, expected, found, strict=False):
            assert isinstance(a, Tensor)
            assert isinstance(b, Tensor)
            difference = float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
            worst[name] = difference if difference != difference else max(worst[name], difference)
    return worst


def _run_graph(graph: Any, image: np.ndarray) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], float]:
    """Run the whole graph on one image.

    Returns the used slots of boxes, scores, labels and masks, and the share of pixels in boxes that masks_cropped has
    otherwise, 0 without that output.
    """
    outputs = graph(np.ascontiguousarray(image[None, :, :, ::-1].transpose(0, 3, 1, 2)))
    used = int(outputs[4][0])
    boxes, scores, labels, masks = (torch.from_numpy(values[0, :used]) for values in outputs[:4])
    corners = np.ceil(boxes.numpy()).astype(int)
    cropped = outputs[-1][0] if outputs[-1].ndim == 4 else ()
    wrong = total = 0
    for (x1, y1, x2, y2), mask, part in zip(corners, masks.numpy(), cropped, strict=False):
        wrong += int((part[: y2 - y1, : x2 - x1] != mask[y1:y2, x1:x2]).sum())
        total += (y2 - y1) * (x2 - x1)
    return (boxes, scores, labels, masks), wrong / max(total, 1)


class _Pairs:
    """Match the detections of two models by class and IoU, and collect their differences."""

    def __init__(self, min_iou: float):
        self.min_iou = min_iou
        self.counts = dict.fromkeys(
            (f"{side}_{what}" for side in ("pytorch", "exported") for what in ("detections", "matched")), 0
        )
        self.scores: list[float] = []
        self.boxes: list[float] = []
        self.masks: list[float] = []

    def add(self, expected: Detections, found: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        boxes, scores, labels, masks = found
        overlaps = box_iou(expected.boxes, boxes.clone())
        overlaps = overlaps.masked_fill(expected.labels[:, None] != labels, 0.0)
        # Both models' detections are counted, so that extra ones are noticed as well as missing ones.
        self._count("pytorch", overlaps, expected.scores)
        self._count("exported", overlaps.T, scores)
        for i, score in enumerate(expected.scores.tolist()):
            if score < MIN_SCORE or not len(boxes) or overlaps[i].max() < self.min_iou:
                continue
            j = int(overlaps[i].argmax())
            self.scores.append(abs(score - float(scores[j])))
            self.boxes.append(float(overlaps[i, j]))
            a, b = expected.masks[i], masks[j]
            self.masks.append(float((a & b).sum() / (a | b).sum().clamp(min=1)) if (a | b).any() else 1.0)

    def _count(self, side: str, overlaps: Tensor, scores: Tensor) -> None:
        strong = scores >= MIN_SCORE
        self.counts[f"{side}_detections"] += int(strong.sum())
        if overlaps.shape[1]:
            self.counts[f"{side}_matched"] += int((overlaps[strong].amax(dim=1) >= self.min_iou).sum())

    def summary(self) -> dict[str, Any]:
        return {
            **self.counts,
            "largest_score_difference": max(self.scores, default=0.0),
            "lowest_box_iou": min(self.boxes, default=1.0),
            "lowest_mask_iou": min(self.masks, default=1.0),
            "mean_mask_iou": sum(self.masks) / len(self.masks) if self.masks else 1.0,
        }
