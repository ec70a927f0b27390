"""Segment images and videos, compute AP, measure speed.

python eval.py --image photo.jpg                                  # -> results/photo.jpg and results/photo.json
python eval.py --images photos --output results --save overlay,json,masks,polygons
python eval.py --video in.mp4 --output segmented                  # or a camera by its number: --video 0
python eval.py --weights runs/mine --annotations val.json --image_dir images
torchrun --nproc_per_node 8 eval.py --weights yolact_r50 --annotations val.json --image_dir images   # on 8 GPUs
python eval.py --weights yolact_r50 --benchmark

Without --weights, the bundled ones are used, which know people.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.stages import benchmark, format_report
from config import PUBLISHED_THRESHOLD, DetectionConfig, get_config, parse_overrides
from data.audit import quick_audit
from data.coco import CocoDataset
from data.image import MAX_PIXELS, read_image
from evaluation import evaluate
from evaluation.evaluator import per_class_table, predict_dataset
from inference import Predictor
from inference.images import find_images, split_output
from inference.outputs import parse_kinds, write_results
from inference.runtime import ExportedNetwork, is_exported
from inference.video import frame_files, process_video
from layers.nms import NMS
from utils.device import PRECISIONS, configure_process
from utils.distributed import Ranks, join
from utils.errors import ArgumentParser, UserError, fraction, integer, nearest, parse_size, run_main
from utils.files import write_json
from weights import load_model
from weights.released import BUNDLED
from yolact import Yolact

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".gif"}
DETECTION_KEYS = tuple(vars(DetectionConfig()))
DISPLAY_THRESHOLD = 0.3  # for images and videos


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Segment images and videos with YOLACT, compute AP, measure speed.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--weights",
        "--trained_model",
        help="a file, a run's folder, a released name (see weights/README.md), or an exported model",
    )
    add("--config", help="a name of config.py or a .py file; by default the configuration in the weights")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", default="auto", choices=["auto", *PRECISIONS])
    add("--threads", type=integer(1), help="processor threads; by default one for each core")
    add("--compile", action="store_true", help="torch.compile the network, which takes time at the start")
    add("--no_optimize", action="store_true", help="run the model as it is written, in float32")
    task = parser.add_argument_group("task").add_argument
    several: Any = {"nargs": "+", "action": "extend", "default": []}
    task("--image", **several, help="images, globs, in:out pairs, or - for a list on stdin")
    task("--images", **several, help="folders of images, with their subfolders")
    task("--video", help="a video file or a camera's number, or in:out")
    task("--annotations", type=Path, help="COCO JSON to compute AP on")
    task("--image_dir", type=Path, help="the folder of its images")
    task("--follow_links", action="store_true", help="accept links that lead out of the folder")
    task("--benchmark", action="store_true", help="time every stage")
    out = parser.add_argument_group("output").add_argument
    out("--output", type=Path, help="a folder, an image file for a single image, or a JSON file for AP and benchmark")
    out("--save", default="overlay,json", help="any of overlay,json,masks,polygons,prototypes")
    out("--per_class", action="store_true", help="AP, precision and recall of each class")
    how = parser.add_argument_group("detection").add_argument
    how("--score_threshold", type=fraction, help=f"{DISPLAY_THRESHOLD} for images and videos, 0.05 for AP")
    how("--top_k", type=integer(1), help="detections per image: 100, or what the configuration says")
    how("--nms", choices=list(NMS), help="fast, or what the configuration says")
    how("--size", help="the network's input as HxW or one number, from 32 on")
    how("--no_crop", action="store_true", help="do not crop masks to their boxes")
    how(
        "--crop_after_resize",
        action="store_true",
        help="crop masks at the image's resolution: no pixel outside the box; the default for images and videos",
    )
    how("--maskness", action="store_true", help="rank masks by how confident their pixels are, too")
    how("--set", **several, metavar="key=value", help="any field of DetectionConfig in config.py")
    how("--batch_size", type=integer(1), default=1, help="for --benchmark")
    how("--max_pixels", type=integer(1), default=MAX_PIXELS, help="refuse larger images (%(default)s pixels)")
    how("--max_images", type=integer(1), help="stop after this many images or frames")
    return parser


def build_model(args: argparse.Namespace) -> Yolact | ExportedNetwork:
    """Return the model that --weights and --config mean."""
    if args.weights is not None and is_exported(args.weights):
        if args.config:
            raise UserError(f"--config: {args.weights} is exported and has its own configuration")
        return ExportedNetwork(args.weights)
    config = get_config(args.config) if args.config else None
    if args.weights is not None:
        return load_model(args.weights, config)
    if args.benchmark and config is not None:
        print(f"no --weights: {config.name} with random ones, detections are provided for the later stages")
        return Yolact(config)
    if not BUNDLED.is_file():
        raise UserError("give --weights: a file, or a released name such as yolact_r50 (this copy has no bundled ones)")
    print(
        f"no --weights: using the bundled {BUNDLED.name}, which knows people; "
        "--weights yolact_r50 knows COCO's 80 classes"
    )
    return load_model(BUNDLED, config)


def build_predictor(args: argparse.Namespace, device: str | torch.device, display: bool = False) -> Predictor:
    """Return the predictor that the arguments describe.

    For `display` the score threshold is higher and masks are cropped at full resolution, unless the arguments or the
    configuration say otherwise. For AP the configuration's own values reproduce published numbers.
    """
    model = build_model(args)
    detection: dict[str, Any] = dict(parse_overrides(args.set, "nms_threshold=0.6"))
    unknown = [key for key in detection if key not in vars(model.config.detection)]
    if unknown:
        raise UserError(f"--set {unknown[0]}: not a field of DetectionConfig{nearest(unknown[0], DETECTION_KEYS)}")
    if display:
        detection.setdefault("crop_after_resize", True)
        if model.config.detection.score_threshold == PUBLISHED_THRESHOLD:
            detection.setdefault("score_threshold", DISPLAY_THRESHOLD)
    flags = {
        "score_threshold": args.score_threshold,
        "top_k": args.top_k,
        "nms": args.nms,
        "crop": False if args.no_crop else None,
        "crop_after_resize": args.crop_after_resize or None,
        "maskness": args.maskness or None,
    }
    detection |= {key: value for key, value in flags.items() if value is not None}
    if args.compile and isinstance(model, Yolact):
        print("compiling the network, which takes a while", file=sys.stderr)
    return Predictor(
        model,
        device=device,
        precision=args.precision,
        size=parse_size(args.size),
        compile=args.compile,
        optimize=not args.no_optimize,
        **detection,
    )


def segment_images(args: argparse.Namespace) -> int:
    """Segment all images of --image and --images; return 1 if some could not be read."""
    kinds = parse_kinds(args.save)
    sources, problems = find_images(args.image, args.images, args.output)
    sources = sources[: args.max_images]
    predictor = build_predictor(args, args.device, display=True)
    for problem in problems:
        print(f"{problem}, skipped", file=sys.stderr)
    unreadable = 0
    for number, source in enumerate(tqdm(sources, desc="segmenting", disable=None if len(sources) > 1 else True), 1):
        try:
            image = read_image(source.path, max_pixels=args.max_pixels)
        except UserError as error:
            hint = " (--max_pixels raises it)" if "the limit of" in str(error) else ""
            tqdm.write(f"{error}{hint}, skipped", file=sys.stderr)
            unreadable += 1
            continue
        detections = predictor(image)
        origin = {"image_id": number, "file_name": str(source.path)}
        written = write_results(image, detections, source.output, kinds, origin, source.suffix)
        tqdm.write(f"{source.path}: {len(detections)} found -> {', '.join(map(str, written))}")
    if unreadable:
        print(f"{unreadable} of {len(sources)} images could not be read", file=sys.stderr)
    return 1 if unreadable or problems else 0


def video_name(path: str) -> str:
    """Return the name of a video without its suffix, keeping other dots."""
    return Path(path).stem if Path(path).suffix.lower() in VIDEO_SUFFIXES else Path(path).name


def segment_video(args: argparse.Namespace) -> int:
    """Segment --video; return 130 if it was interrupted, and 1 if its end could not be read."""
    kinds = parse_kinds(args.save)
    source, target = split_output(args.video)
    output = Path(args.output or target or "results")
    if output.suffix.lower() in VIDEO_SUFFIXES - {".mp4"} and not output.is_dir():
        raise UserError(f"{output}: videos are written as .mp4; name it {output.with_suffix('.mp4').name}")
    # A folder holds the results of many videos, unless it is the one that an earlier run made for this video's frames.
    if (output.is_dir() and not frame_files(output)) or (args.output or target) is None:
        output = output / f"{'camera' * source.isdecimal()}{video_name(source)}"
        if output.with_name(output.name + ".mp4").resolve() == Path(source).resolve():
            output = output.with_name(output.name + ".yolact")
    output = output.with_name(video_name(str(output)))
    predictor = build_predictor(args, args.device, display=True)
    report = process_video(predictor, source, output, kinds, args.max_images)
    print(f"{source} -> {output}{'.mp4' * ('overlay' in kinds)}: {report}")
    if report.missing:
        expected = report.frames + report.missing
        print(f"{source}: {report.frames} of {expected} frames could be read, the file may be damaged", file=sys.stderr)
    # Matroska does not store the number of frames, so OpenCV's is an estimate.
    damaged = report.missing and Path(source).suffix.lower() not in (".mkv", ".webm")
    return 130 if report.interrupted else 1 if damaged else 0


def measure_ap(args: argparse.Namespace, ranks: Ranks) -> int:
    """Compute COCO metrics; for a file without annotations, such as test-dev's, write only the results."""
    if args.image_dir is None:
        raise UserError("--annotations needs --image_dir, the folder of the images")
    dataset = CocoDataset(args.annotations, args.image_dir, args.follow_links)
    dataset.check_folder()
    predictor = build_predictor(args, ranks.device)
    if not dataset.has_annotations:
        output = args.output or Path("results.json")
        prediction = predict_dataset(predictor, dataset, args.max_images, ranks=ranks)
        if ranks.main:
            write_json(output, prediction.results)
        print(f"{args.annotations} has no annotations to compare with; results -> {output}")
        return report_problems(prediction.problems)
    if ranks.main:
        quick_audit(dataset, predictor.config)
    metrics = evaluate(predictor, dataset, args.max_images, args.per_class, ranks=ranks)
    if metrics is None:  # only the main process has them
        return 0
    print(metrics["table"])
    if args.per_class:
        print(per_class_table(metrics))
    for note in metrics["notes"]:
        print(note)
    if args.output is not None:
        results = metrics.pop("results")
        write_json(args.output, {k: v for k, v in metrics.items() if k != "table"})
        write_json(args.output.with_suffix(".results.json"), results)
        print(f"metrics -> {args.output}, detections -> {args.output.with_suffix('.results.json')}")
    return report_problems(metrics["problems"])


def report_problems(problems: list[str]) -> int:
    """Print what was wrong with images; return 1 if there was any, since AP is then too low."""
    for problem in problems:
        print(f"{problem}; it counts as an image without detections", file=sys.stderr)
    return 1 if problems else 0


def measure_speed(args: argparse.Namespace) -> int:
    """Time every stage."""
    provide = 10 if args.weights is None and args.config is not None else 0  # random weights find nothing
    report = benchmark(build_predictor(args, args.device), args.batch_size, provide)
    print(format_report(report))
    if args.output is not None:
        write_json(args.output, report)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    configure_process(args.threads)
    tasks = {
        "--image/--images": bool(args.image or args.images),
        "--video": args.video is not None,
        "--annotations": args.annotations is not None,
        "--benchmark": args.benchmark,
    }
    if args.no_crop and args.crop_after_resize:
        raise UserError("--no_crop and --crop_after_resize exclude each other")
    chosen = [name for name, on in tasks.items() if on]
    if len(chosen) != 1:
        problem = "nothing to do" if not chosen else f"{' and '.join(chosen)} at once"
        raise UserError(f"{problem}: give one of {', '.join(tasks)}")
    if args.image or args.images:
        return segment_images(args)
    if args.video is not None:
        return segment_video(args)
    if args.benchmark:
        return measure_speed(args)
    with join(args.device) as ranks:
        return measure_ap(args, ranks)


if __name__ == "__main__":
    run_main(main)
