"""Export a model for ONNX Runtime, OpenVINO and other runtimes, and compare it with the PyTorch model.

python -m tools.export --weights yolact_r50 --output model.onnx
python -m tools.export --weights runs/mine --output model.xml --size 480x640        # one input size of the network
python -m tools.export --weights runs/mine --output model.xml --int8 --calibration images
python -m tools.export --weights runs/mine --output raw.onnx --raw        # the network alone, for TensorRT and NPUs

Requires: pip install -r requirements-export.txt

The exported graph has one input and five outputs, for a batch of B images and C classes:

    image   uint8 [B, 3, H, W], RGB, any size; the graph resizes it to the input size of the network
    boxes   float32 [B, N, 4], x1, y1, x2, y2 in pixels of the image
    scores  float32 [B, N], 0..1; -1 for padding
    labels  int64 [B, N], 0..C-1
    masks   bool [B, N, H, W]
    count   int64 [B], the number of valid detections of each image

Detections are sorted by descending score and padded to N, the largest number of detections in an image of the batch
after NMS (at least 1). Models that score their masks (YOLACT++, or `maskness` in the configuration) have a sixth output
`mask_scores` [B, N]; with `strict_threshold`, detections are sorted and filtered by it. All N masks are
computed at once, so limit N with --top_k for large images. With --masks_cropped, the last output is `masks_cropped`
[B, N, h, w]: of each mask only the pixels inside its box, where h and w are the sides of the largest box. Mask [b, n]
begins at the pixel (ceil(x1), ceil(y1)) of the image. With --raw, the input is `normalised`, float32 [B, 3, h, w],
and the outputs are `raw_boxes` [B, A, 4], `raw_logits` [B, A, C + 1], `raw_coefficients` [B, A, K] and `prototypes` [B,
h', w', K], see `layers.structures.Predictions`. The metadata of the file contain the class names, the category ids, the
preprocessing and the configuration.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config import DetectionConfig, parse_overrides, with_detection
from data.image import read_image
from inference.runtime import EXTRA, ExportedNetwork
from tools.export.exporting import write_export
from tools.export.onnx_export import EXPORTABLE_NMS
from tools.export.parity import check_export
from tools.images import find_images
from utils.device import configure_process
from utils.errors import ArgumentParser, UserError, count, fraction_or_best, integer, parse_size, require, run_main
from utils.files import write_error, write_json
from weights import load_model
from weights.released import BUNDLED
from yolact import Yolact

CHECK_IMAGES = [Path(__file__).parents[2] / "data/demo" / name for name in ("astronaut.jpg", "camera.jpg")]
MAX_CALIBRATION = 300  # more images make calibration slower


def build_parser() -> ArgumentParser:
    text = "Export a model to ONNX or OpenVINO, and check the file."
    parser = ArgumentParser("python -m tools.export", description=text, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--weights",
        default=str(BUNDLED),
        help="a file, a run's folder, or a released name (default: the bundled weights)",
    )
    add("--output", type=Path, required=True, help="model.onnx, or model.xml for OpenVINO")
    add(
        "--size",
        help="input size of the network: HxW, or a number for a square, with yolact_lite for an input of its area and "
        "each image's aspect ratio (default: the configuration's)",
    )
    add("--raw", action="store_true", help="export only the network, from normalised images to raw outputs")
    add("--masks_cropped", action="store_true", help="add an output with the pixels of each mask inside its box only")
    add("--int8", action="store_true", help="quantise the network to int8 (OpenVINO)")
    add("--calibration", nargs="+", default=[], help="images or folders for --int8; a hundred are enough")
    add("--check", nargs="+", default=[], help="images on which the export is checked (default: two bundled images)")
    add(
        "--score_threshold",
        type=fraction_or_best,
        help="minimum score (default: the configuration's, which is meant for AP; about 0.3 for applications)",
    )
    add("--top_k", type=integer(1), help="maximum detections per image (default: the configuration's, 100)")
    add(
        "--nms",
        choices=EXPORTABLE_NMS,
        help="NMS method (default: the configuration's, usually fast); standard cannot be exported",
    )
    add("--set", nargs="+", action="extend", default=[], metavar="key=value", help="any field of DetectionConfig")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    configure_process()
    to_ir = args.output.suffix == ".xml"
    if args.output.suffix not in (".onnx", ".xml"):
        raise UserError(f"--output {args.output}: the suffix must be .onnx, or .xml for OpenVINO")
    if args.int8 and not (to_ir and args.calibration):
        raise UserError("--int8 needs --output MODEL.xml and --calibration IMAGES")
    if args.calibration and not args.int8:
        raise UserError("--calibration can only be used with --int8")
    size = parse_size(args.size)
    if size is not None and min(np.ravel(size)) < 32:
        raise UserError(f"--size {args.size}: the network needs at least 32 pixels a side")
    if args.raw and args.masks_cropped:
        raise UserError("--raw has no masks; leave out --masks_cropped")
    with require("onnx", "onnxscript", "openvino" if to_ir else "onnxruntime", *["nncf"] * args.int8, install=EXTRA):
        pass  # a missing package is reported now, and not after the export
    model = load_model(args.weights)
    size = size or model.config.model.max_size
    if isinstance(size, int) and (args.raw or not model.config.model.preserve_aspect_ratio):
        size = (size, size)
    detection = choose_detection(model, args)
    images = [read_image(path) for path in list_images(args.check) or CHECK_IMAGES]

    paths = list_images(args.calibration)[:MAX_CALIBRATION]
    with scratch_folder(args.output) as folder:
        draft = Path(folder) / args.output.name
        calibration = read_images(paths) if args.int8 else None
        used = write_export(model, draft, size, detection, args.raw, calibration, args.masks_cropped)
        if args.int8:
            print(f"calibrated on {count(used, 'image')}")
        report, problems = check_export(ExportedNetwork(draft), model, detection, images)
        if problems:
            raise UserError(
                f"{args.output}: not written, because its results differ from the model's: {'; '.join(problems)}"
            )
        for path in sorted(Path(folder).iterdir()):  # .bin before .xml
            os.replace(path, args.output.with_name(path.name))
    write_json(args.output.with_name(f"{args.output.name}.parity.json"), report)
    print(summary(args.output, report))
    return 0


def choose_detection(model: Yolact, args: Any) -> DetectionConfig:
    """Return the detection settings of the exported graph."""
    values: dict[str, Any] = dict(parse_overrides(args.set, "nms_threshold=0.6"))
    flags = {"score_threshold": args.score_threshold, "top_k": args.top_k, "nms": args.nms}
    values |= {key: value for key, value in flags.items() if value is not None}
    return with_detection(model.config, values).detection


def list_images(paths: Sequence[str]) -> list[Path]:
    """Expand paths, folders and globs to a list of image paths."""
    if not paths:
        return []
    folders = [path for path in paths if Path(path).is_dir()]
    sources, problems = find_images([path for path in paths if path not in folders], folders, None)
    if problems:
        raise UserError(problems[0])
    return [source.path for source in sources]


def read_images(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Yield the images that can be read. Others are reported and skipped."""
    for path in paths:
        try:
            yield read_image(path)
        except UserError as error:
            print(f"{error}, skipped", file=sys.stderr)


def scratch_folder(output: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder beside `output`, for the exported files until they pass the check."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{output.stem}.", dir=output.parent)
    except OSError as error:
        raise write_error(output, error) from None


def summary(output: Path, report: dict[str, Any]) -> str:
    """Return a one-line summary of the export and its check."""
    worst = max(report["raw_difference"].values())
    size = report["size"]
    side = f"input of the area of {size}x{size}" if isinstance(size, int) else f"{size[0]}x{size[1]} input"
    text = f"{output}: {report['precision']}, {side}; raw outputs differ by up to {worst:.1e} of their largest value"
    if "pytorch_detections" in report:
        text += (
            f"; {report['pytorch_matched']} of PyTorch's {report['pytorch_detections']} detections match, of "
            f"{report['exported_detections']} of the export, on {report['images']} images at three sizes, lowest mask "
            f"IoU {report['lowest_mask_iou']:.3f}"
        )
        if not report["pytorch_detections"]:
            text += " (no objects were detected; use --check with images that contain your classes)"
    return text


if __name__ == "__main__":
    run_main(main)
