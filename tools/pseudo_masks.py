"""Give the objects of a detection data set the masks that a network predicts for their boxes.

python -m tools.pseudo_masks --weights yolact_r50 --annotations boxes.json --image_dir images --output masks.json

Annotations that have a mask, and crowd regions, stay as they are. A predicted mask is kept if its bounding box agrees
with the annotated one and the network sees an object of that class there; other objects keep their box only. The new
entries state the agreement as "pseudo_mask_iou".
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from tqdm import tqdm

from data.annotation import Annotation, as_id, is_crowd, parse_annotation
from data.coco import CocoDataset, read_coco_json
from evaluation.evaluator import check_classes
from inference import Detections, Predictor
from layers.boxes import box_iou, decode
from utils.device import configure_process
from utils.errors import ArgumentParser, UserError, fraction, run_main
from utils.files import write_json

LEAST_SCORE = 0.05  # of the class, times the IoU of the boxes: the threshold of published AP


def masks_of_boxes(predictor: Predictor, image: np.ndarray, annotations: Sequence[Annotation]) -> Detections:
    """Return, in order, the mask that the network predicts for each annotated box of `image`, uint8 BGR [H, W, 3].

    The coefficients are those of the anchor whose predicted box has the highest IoU times score of the class; the mask
    is cropped to the annotated box.
    """
    height, width = image.shape[:2]
    config = predictor.config
    boxes = torch.tensor([annotation.box for annotation in annotations])
    labels = torch.tensor([annotation.label for annotation in annotations])
    relative = (boxes / torch.tensor([width, height, width, height])).to(predictor.device)
    with torch.inference_mode():
        raw = predictor.predict(predictor.preprocess(image)[None])
        decoded = decode(raw.boxes, predictor.backend.anchors(*predictor.input_size(image)))[0]
        scores = raw.logits[0].float().softmax(dim=-1)[:, 1:]
        agreement = box_iou(relative, decoded) * scores[:, labels].T
        quality, best = agreement.max(dim=1)
    return Detections(
        boxes.to(predictor.device),
        quality,
        quality,
        labels.to(predictor.device),
        config.class_names,
        config.category_ids,
        (height, width),
        raw.coefficients[0, best],
        raw.prototypes[0],
        relative,
        config.detection,
    )


def add_masks(predictor: Predictor, dataset: CocoDataset, content: dict[str, Any], least_iou: float) -> tuple[int, int]:
    """Add masks to the annotations in `content`, the parsed file of `dataset`; return how many, and of how many boxes.

    An image that cannot be read is reported and left out.
    """
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in content.get("annotations", []):
        if not is_crowd(entry):
            by_image[as_id(entry["image_id"], "image_id")].append(entry)
    kept = total = 0
    for index, image_id in enumerate(tqdm(dataset.image_ids, "predicting", disable=None)):
        try:
            image = dataset.read_image(index)
        except UserError as error:
            tqdm.write(f"{error}, skipped", file=sys.stderr)
            continue
        height, width = image.shape[:2]
        parsed = []
        for entry in by_image[image_id]:
            label = dataset.labels[as_id(entry["category_id"], "category_id")]
            annotation = parse_annotation(entry, label, height, width)
            if annotation.segmentation is None and annotation.box is not None:
                parsed.append((entry, annotation))
        if not parsed:
            continue
        total += len(parsed)
        found = masks_of_boxes(predictor, image, [annotation for _, annotation in parsed])
        rows = zip(parsed, found.encode_masks(), found.scores.tolist(), strict=True)
        for (entry, annotation), code, score in rows:
            x1, y1, x2, y2 = annotation.box or (0.0, 0.0, 0.0, 0.0)
            iou = float(rle.iou([rle.toBbox(code)], [[x1, y1, x2 - x1, y2 - y1]], [0])[0, 0])
            if iou >= least_iou and score >= LEAST_SCORE:
                entry |= {"segmentation": code, "area": float(rle.area(code)), "pseudo_mask_iou": round(iou, 4)}
                kept += 1
    return kept, total


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Predict masks for the boxes of a detection data set.", allow_abbrev=False)
    parser.add_argument("--weights", required=True, help="a file, a run's folder, or a released name")
    parser.add_argument("--annotations", type=Path, required=True, help="annotations in COCO format")
    parser.add_argument("--image_dir", type=Path, required=True, help="the folder of the images")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--least_iou", type=fraction, default=0.75, help="IoU of the mask's box and the annotated one (default: 0.75)"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 or mps")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    configure_process()
    dataset = CocoDataset(args.annotations, args.image_dir)
    dataset.check_folder()
    predictor = Predictor.from_weights(args.weights, device=args.device)
    if note := check_classes(dataset, predictor.config):
        print(note)
    content = read_coco_json(args.annotations)
    kept, total = add_masks(predictor, dataset, content, args.least_iou)
    write_json(args.output, content)
    print(f"{kept} of {total} boxes without a mask got one -> {args.output}")
    return 0


if __name__ == "__main__":
    run_main(main)
