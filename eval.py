"""Segment images and videos, compute AP, or measure speed.

python eval.py --image street.jpg                                 # -> results/street.jpg and results/street.json
python eval.py --images images --output results --save overlay,json,masks,polygons
python eval.py --video in.mp4 --output segmented                  # or a camera by its number: --video 0
python eval.py --weights runs/mine --annotations val.json --image_dir images
torchrun --nproc_per_node 8 eval.py --weights yolact_r50 --annotations val.json --image_dir images   # on 8 GPUs
python eval.py --weights yolact_r50 --benchmark

Without --weights, the bundled weights are used, which detect people only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
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
from evaluation.report import need_matplotlib, write_report
from inference import Predictor
from inference.images import Source, find_images, split_output
from inference.outputs import KINDS, Save, folder_results, parse_kinds, write_results
from inference.polygons import POLYGON_TOLERANCE
from inference.runtime import ExportedNetwork, is_exported
from inference.tiles import TiledPredictor
from inference.video import frame_files, process_video, video_path
from layers.nms import NMS
from utils.device import PRECISIONS, configure_process
from utils.distributed import Ranks, join
from utils.errors import (
    ArgumentParser,
    UserError,
    fraction,
    fraction_or_best,
    integer,
    nearest,
    non_negative_float,
    parse_size,
    run_main,
)
from utils.files import write_json
from weights import load_model
from weights.load import store_threshold
from weights.released import BUNDLED
from yolact import Yolact

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".gif"}
DETECTION_KEYS = tuple(vars(DetectionConfig()))
DISPLAY_THRESHOLD = 0.3  # default score threshold for images and videos


# Options that other tasks would ignore without a word.
TASKS_OF = {
    "--image_dir": ("--annotations",),
    "--follow_links": ("--annotations",),
    "--per_class": ("--annotations",),
    "--report": ("--annotations",),
    "--store_threshold": ("--annotations",),
    "--save": ("--image/--images", "--video"),
    "--polygon_tolerance": ("--image/--images", "--video"),
    "--tile": ("--image/--images", "--annotations"),
    "--overlap": ("--image/--images", "--annotations"),
    "--track": ("--video",),
    "--batch_size": ("--benchmark",),
    "--max_pixels": ("--image/--images",),
    "--max_images": ("--image/--images", "--video", "--annotations"),
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Segment images and videos with YOLACT, compute AP, or measure speed.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--weights",
        "--trained_model",
        help="a file, a run's folder, a released name (see weights/README.md), or an exported model",
    )
    add("--config", help="a configuration named in config.py, or a .py file (default: the weights' own)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 or mps")
    add("--precision", default="auto", choices=["auto", *PRECISIONS], help="precision of the network")
    add("--threads", type=integer(1), help="number of CPU threads (default: one per core)")
    add("--compile", action="store_true", help="compile the network with torch.compile, which takes time at startup")
    add(
        "--no_optimize",
        action="store_true",
        help="do not fold batch norm or use channels_last; the network then runs in float32",
    )
    task = parser.add_argument_group("task").add_argument
    several: Any = {"nargs": "+", "action": "extend", "default": []}
    task("--image", **several, help="images, globs, in:out pairs, or - to read a list from stdin")
    task("--images", **several, help="folders of images; subfolders are included")
    task("--video", help="a video file, the number of a camera, or in:out")
    task("--track", action="store_true", help="number the objects of --video across its frames, with ByteTrack")
    task("--annotations", type=Path, help="annotations in COCO format, to compute AP with")
    task("--image_dir", type=Path, help="folder of the annotated images")
    task("--follow_links", action="store_true", help="follow links to files outside the image folder")
    task("--benchmark", action="store_true", help="measure the time of each stage")
    out = parser.add_argument_group("output").add_argument
    out("--output", type=Path, help="a folder, an image file for a single image, or a JSON file for AP and benchmark")
    out(
        "--save",
        default="overlay,json",
        help=f"comma-separated outputs: {','.join(KINDS)} (default: %(default)s)",
    )
    out("--polygon_tolerance", type=non_negative_float, default=POLYGON_TOLERANCE, metavar="PIXELS",
        help="largest deviation of saved polygons from the outlines of masks (default: %(default)s)")  # fmt: skip
    out("--report", type=Path, help="folder for a page with curves, errors and the worst mistakes (for --annotations)")
    out("--store_threshold", action="store_true", help="with --report, store the best score threshold in --weights")
    out("--per_class", action="store_true", help="report AP, precision and recall of each class")
    how = parser.add_argument_group("detection").add_argument
    how(
        "--score_threshold",
        type=fraction_or_best,
        help=f"a number, or best (default: {DISPLAY_THRESHOLD} for images and videos, 0.05 for AP)",
    )
    how("--top_k", type=integer(1), help="maximum detections per image (default: the configuration's, 100)")
    how("--nms", choices=list(NMS), help="NMS method (default: the configuration's, usually fast)")
    how("--size", help="input size of the network, HxW, or one number (yolact_lite: of the same area), at least 32")
    how("--tile", type=integer(32), metavar="PIXELS", help="also predict on tiles of this size, for large images")
    how("--overlap", type=fraction, default=0.25, help="part of a tile that it shares with the next (%(default)s)")
    how("--no_crop", action="store_true", help="do not crop masks to their boxes")
    how(
        "--crop_after_resize",
        action="store_true",
        help="also crop masks at the image's resolution, so that no pixel lies outside the box (default for images "
        "and videos)",
    )
    how("--maskness", action="store_true", help="multiply each score by the mean of its soft mask above the threshold")
    how("--set", **several, metavar="key=value", help="any field of DetectionConfig in config.py")
    how("--batch_size", type=integer(1), default=1, help="batch size of --benchmark")
    how("--max_pixels", type=integer(1), default=MAX_PIXELS, help="skip larger images (default: %(default)s pixels)")
    how("--max_images", type=integer(1), help="stop after this many images or frames")
    return parser


def build_model(args: argparse.Namespace) -> Yolact | ExportedNetwork:
    """Return the model that --weights and --config specify. Raises UserError if there is none, or they do not match."""
    if args.weights is not None and is_exported(args.weights):
        if args.config:
            raise UserError(f"--config cannot be used with {args.weights}: it has its own configuration")
        return ExportedNetwork(args.weights)
    config = get_config(args.config) if args.config else None
    if args.weights is not None:
        return load_model(args.weights, config)
    if args.benchmark and config is not None:
        print(f"no --weights: {config.name} with random weights; the stages after NMS use synthetic detections")
        return Yolact(config)
    if not BUNDLED.is_file():
        raise UserError("no bundled weights; give --weights, a file or a released name such as yolact_r50")
    print(
        f"no --weights: using the bundled {BUNDLED.name}, which detects people only; "
        "--weights yolact_r50 detects COCO's 80 classes"
    )
    return load_model(BUNDLED, config)


def build_predictor(args: argparse.Namespace, device: str | torch.device, display: bool = False) -> Predictor:
    """Return the predictor that the arguments describe.

    With `display`, the score threshold is higher and masks are cropped at full resolution, unless the arguments or the
    configuration specify otherwise. Without it, the configuration's values are used, which reproduce published AP.
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
    threshold = args.score_threshold
    if threshold == "best":
        threshold = model.config.detection.best_score_threshold
        if not threshold:
            raise UserError("--score_threshold best: none is stored, see --store_threshold")
    flags = {
        "score_threshold": threshold,
        "top_k": args.top_k,
        "nms": args.nms,
        "crop": False if args.no_crop else None,
        "crop_after_resize": args.crop_after_resize or None,
        "maskness": args.maskness or None,
    }
    detection |= {key: value for key, value in flags.items() if value is not None}
    if args.compile and isinstance(model, Yolact):
        print("compiling the network; this can take minutes. Its input is square unless --size is HxW", file=sys.stderr)
    return Predictor(
        model,
        device=device,
        precision=args.precision,
        size=parse_size(args.size),
        compile=args.compile,
        optimize=not args.no_optimize,
        **detection,
    )


def tiled(predictor: Predictor, args: argparse.Namespace) -> Predictor | TiledPredictor:
    """Return the predictor, or one for tiles if --tile is given."""
    return predictor if args.tile is None else TiledPredictor(predictor, args.tile, args.overlap)


def segment_images(args: argparse.Namespace) -> int:
    """Segment all images of --image and --images; return 1 if some could not be read."""
    save = Save(parse_kinds(args.save), args.polygon_tolerance)
    sources, problems = find_images(args.image, args.images, args.output)
    sources = sources[: args.max_images]
    predictor = tiled(build_predictor(args, args.device, display=True), args)
    if args.tile and "prototypes" in save:
        raise UserError("--save prototypes: each tile has its own; leave out --tile")
    for problem in problems:
        print(f"{problem}, skipped", file=sys.stderr)
    unreadable = 0
    config = predictor.config
    with contextlib.ExitStack() as stack:
        together = None
        if "json" in save and args.images and len(sources) > 1:
            path = unused_json(sources)
            image_root = os.path.commonpath([os.path.dirname(os.path.realpath(source.path)) for source in sources])
            together = stack.enter_context(folder_results(path, config.class_names, config.category_ids))
        for number, source in enumerate(
            tqdm(sources, desc="segmenting", disable=None if len(sources) > 1 else True), 1
        ):
            try:
                image = read_image(source.path, max_pixels=args.max_pixels)
            except UserError as error:
                hint = "; increase it with --max_pixels" if "the limit of" in str(error) else ""
                tqdm.write(f"{error}{hint}, skipped", file=sys.stderr)
                unreadable += 1
                continue
            detections = predictor(image)
            origin = {"image_id": number, "file_name": str(source.path)}
            written = write_results(image, detections, source.output, save, origin, source.suffix)
            if together is not None:
                together.add(os.path.relpath(os.path.realpath(source.path), image_root), detections)
            tqdm.write(f"{source.path}: {len(detections)} detections -> {', '.join(map(str, written))}")
        if together is not None:
            print(f"{together.count} detections of {len(together.images)} images -> {path}")
    if unreadable:
        print(f"{unreadable} of {len(sources)} images could not be read", file=sys.stderr)
    return 1 if unreadable or problems else 0


def unused_json(sources: list[Source]) -> Path:
    """Return the path of one COCO file for all images, in their common output folder; no image has that name."""
    folder = Path(os.path.relpath(os.path.commonpath([os.path.realpath(source.output.parent) for source in sources])))
    taken = {Path(os.path.relpath(source.output)) for source in sources}
    names = (f"coco{number or ''}" for number in itertools.count())
    return next(folder / f"{name}.json" for name in names if folder / name not in taken)


def video_name(path: str) -> str:
    """Return the name of a video without its suffix, keeping other dots."""
    return Path(path).stem if Path(path).suffix.lower() in VIDEO_SUFFIXES else Path(path).name


def segment_video(args: argparse.Namespace) -> int:
    """Segment --video; return 130 if interrupted, 1 if it ended before the expected number of frames, else 0."""
    save = Save(parse_kinds(args.save), args.polygon_tolerance)
    source, target = split_output(args.video)
    output = Path(args.output or target or "results")
    if output.suffix.lower() in VIDEO_SUFFIXES - {".mp4"} and not output.is_dir():
        raise UserError(f"{output}: videos are written as .mp4; name it {output.with_suffix('.mp4').name}")
    # If `output` is an existing folder, the results go into it, named after the video. If that folder holds the frames
    # of an earlier run, it was created by that run, and `output` is again used as the name of the results.
    if (output.is_dir() and not frame_files(output)) or (args.output or target) is None:
        output = output / f"{'camera' * source.isdecimal()}{video_name(source)}"
        if video_path(output, "overlay").resolve() == Path(source).resolve():
            output = output.with_name(output.name + ".yolact")
    output = output.with_name(video_name(str(output)))
    predictor = build_predictor(args, args.device, display=True)
    report = process_video(predictor, source, output, save, args.max_images, args.track)
    print(f"{source} -> {output}{'.mp4' * ('overlay' in save)}: {report}")
    if report.missing:
        expected = report.frames + report.missing
        print(f"{source}: {report.frames} of {expected} frames could be read; the file may be damaged", file=sys.stderr)
    # Matroska does not store the number of frames, so the count that OpenCV reports is an estimate.
    damaged = report.missing and Path(source).suffix.lower() not in (".mkv", ".webm")
    return 130 if report.interrupted else 1 if damaged else 0


def measure_ap(args: argparse.Namespace, ranks: Ranks) -> int:
    """Compute COCO metrics. If the file has no annotations, as for test-dev, only write the detections.
    Returns 1 if an image could not be used, and 0 otherwise.
    """
    if args.image_dir is None:
        raise UserError("--annotations needs --image_dir, the folder of the images")
    dataset = CocoDataset(args.annotations, args.image_dir, args.follow_links)
    dataset.check_folder()
    predictor = tiled(build_predictor(args, ranks.device), args)
    if not dataset.has_annotations:
        output = args.output or Path("results.json")
        prediction = predict_dataset(predictor, dataset, args.max_images, ranks=ranks)
        if ranks.main:
            write_json(output, prediction.results)
        print(f"{args.annotations} has no annotations, so AP cannot be computed; detections -> {output}")
        return report_problems(prediction.problems)
    if ranks.main:
        quick_audit(dataset, predictor.config)
    per_class = args.per_class or args.report is not None
    metrics = evaluate(predictor, dataset, args.max_images, per_class, ranks=ranks)
    if metrics is None:  # only the main process has them
        return 0
    print(metrics["table"])
    if args.per_class:
        print(per_class_table(metrics))
    if args.max_images is not None and args.max_images < len(dataset):
        print(f"only the first {args.max_images} of {len(dataset)} images were evaluated (--max_images)")
    for note in metrics["notes"]:
        print(note)
    results, sizes = metrics.pop("results"), metrics.pop("sizes")
    if args.report is not None:
        title = f"{predictor.config.name} on {args.annotations.name}"
        report = write_report(args.report, dataset, metrics, results, sizes, title)
        print(f"best score threshold {report['best_threshold']:.2f} (F1 {report['f1']:.2f} of masks at IoU 0.5)")
        print(f"report -> {args.report / 'index.html'}")
        if args.store_threshold:
            print(f"stored for --score_threshold best in {store_threshold(args.weights, report['best_threshold'])}")
    if args.output is not None:
        write_json(args.output, {k: v for k, v in metrics.items() if k != "table"})
        write_json(args.output.with_suffix(".results.json"), results)
        print(f"metrics -> {args.output}, detections -> {args.output.with_suffix('.results.json')}")
    return report_problems(metrics["problems"])


def report_problems(problems: list[str]) -> int:
    """Print the problems with images. Return 1 if there are any, because AP is then too low, and 0 otherwise."""
    for problem in problems:
        print(f"{problem}; it counts as an image without detections", file=sys.stderr)
    return 1 if problems else 0


def measure_speed(args: argparse.Namespace) -> int:
    """Measure and print the time of each stage; return the exit code."""
    provide = 10 if args.weights is None and args.config is not None else 0  # random weights give no detections
    report = benchmark(build_predictor(args, args.device), args.batch_size, provide)
    print(format_report(report))
    if args.output is not None:
        write_json(args.output, report)
    return 0


def chosen_task(args: argparse.Namespace) -> str:
    """Return the option that names the task. Raises UserError for none, several, or an option of another task."""
    tasks = {
        "--image/--images": bool(args.image or args.images),
        "--video": args.video is not None,
        "--annotations": args.annotations is not None,
        "--benchmark": args.benchmark,
    }
    chosen = [name for name, on in tasks.items() if on]
    if len(chosen) != 1:
        problem = "nothing to do" if not chosen else f"{' and '.join(chosen)} at once"
        raise UserError(f"{problem}; give exactly one of {', '.join(tasks)}")
    parser = build_parser()
    for option, allowed in TASKS_OF.items():
        name = option.removeprefix("--")
        if getattr(args, name) != parser.get_default(name) and chosen[0] not in allowed:
            raise UserError(f"{option} has no effect with {chosen[0]}; it is for {' and '.join(allowed)}")
    if args.no_crop and args.crop_after_resize:
        raise UserError("--no_crop and --crop_after_resize cannot be combined")
    if args.store_threshold and args.report is None:
        raise UserError("--store_threshold needs --report DIR, which finds the threshold")
    if args.report is not None:
        need_matplotlib()
    return chosen[0]


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    configure_process(args.threads)
    task = chosen_task(args)
    if task == "--image/--images":
        return segment_images(args)
    if task == "--video":
        return segment_video(args)
    if task == "--benchmark":
        return measure_speed(args)
    with join(args.device) as ranks:
        return measure_ap(args, ranks)


if __name__ == "__main__":
    run_main(main)
