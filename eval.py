"""Segment pictures and videos, measure AP, measure speed.

python eval.py --image photo.jpg                                  # -> results/photo.jpg and results/photo.json
python eval.py --images photos --output results --save overlay,json,masks,polygons
python eval.py --video film.mp4 --output film_segmented           # or a camera's number: --video 0
python eval.py --weights runs/mine/best.pth --annotations val.json --image_dir photos
torchrun --nproc_per_node 8 eval.py --weights yolact_r50 --annotations val.json --image_dir photos   # 8 GPUs share it
python eval.py --weights yolact_r50 --benchmark

Without --weights, those bundled in weights/ are used, where this copy has them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from data.coco import CocoDataset
from data.config import Config, get_config
from data.errors import UserError, positive, run_main
from engine.checkpoint import model_from_weights
from engine.devices import PRECISIONS, keep_memory
from engine.distributed import Ranks, join
from engine.evaluator import evaluate, per_class_table, predict_dataset
from engine.media import collect, read_image, split_output
from engine.outputs import parse_kinds, write_json, write_results
from engine.predictor import Predictor
from engine.released import WEIGHTS_DIR
from engine.video import frame_files, process_video
from layers.nms import NMS
from yolact import Yolact

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".gif"}
BUNDLED = WEIGHTS_DIR / "yolact_lite_person.pth"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Segment pictures and videos with YOLACT, measure AP and speed.", allow_abbrev=False
    )
    parser.add_argument("--weights", "--trained_model", help="a file or a released name (see weights/README.md)")
    parser.add_argument("--config", help="a name of data/config.py or a .py file; by default what the weights say")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS])
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: takes time to start")
    what = parser.add_argument_group("what to do")
    what.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        help="pictures, globs, in:out pairs, or - for a list on stdin",
    )
    what.add_argument(
        "--images", nargs="+", action="extend", default=[], help="folders of pictures, searched to the bottom"
    )
    what.add_argument("--video", help="a video file or a camera's number, or in:out")
    what.add_argument("--annotations", type=Path, help="COCO JSON to measure AP on")
    what.add_argument("--image_dir", type=Path, help="the folder of its photos")
    what.add_argument("--benchmark", action="store_true", help="time every stage")
    out = parser.add_argument_group("what comes out")
    out.add_argument(
        "--output", type=Path, help="a folder, a picture for a single one, or a JSON file for measurements"
    )
    out.add_argument("--save", default="overlay,json", help="any of overlay,json,masks,polygons,prototypes")
    out.add_argument("--per_class", action="store_true", help="AP, precision and recall of each class")
    how = parser.add_argument_group("how to detect")
    how.add_argument("--score_threshold", type=float, help="0.3 for pictures, 0.05 for AP")
    how.add_argument("--top_k", type=int, help="detections a picture: 100, or what the configuration says")
    how.add_argument("--nms", default="fast", choices=list(NMS))
    how.add_argument("--size", help="the network's input as HxW, any from 32x32 on")
    how.add_argument("--no_crop", action="store_true", help="do not crop masks to their boxes")
    how.add_argument("--crop_after_resize", action="store_true", help="crop enlarged masks too: no pixel past a box")
    how.add_argument("--maskness", action="store_true", help="rank masks by how sure they are of their pixels too")
    how.add_argument("--batch_size", type=positive, default=1, help="for --benchmark")
    how.add_argument("--max_images", type=positive, help="stop after so many pictures or frames")
    return parser.parse_args()


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "480x640" -> (480, 640)."""
    if text is None:
        return None
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise UserError(f"--size {text}: expected HxW, for instance 480x640")
    return int(height), int(width)


def load_model(args: argparse.Namespace) -> Yolact:
    """The model that --weights and --config mean."""
    config: Config | None = get_config(args.config) if args.config else None
    if args.weights is not None:
        return model_from_weights(args.weights, config)
    if args.benchmark and config is not None:
        print(f"no --weights: {config.name} with random ones, detections are provided for the later stages")
        return Yolact(config)
    if not BUNDLED.is_file():
        raise UserError("give --weights: a file, or a released name such as yolact_r50 (this copy has no bundled ones)")
    print(
        f"no --weights: using the bundled {BUNDLED.name}, which knows people; "
        "--weights yolact_r50 knows COCO's 80 classes"
    )
    return model_from_weights(BUNDLED, config)


def build_predictor(args: argparse.Namespace, model: Yolact, score_threshold: float) -> Predictor:
    if args.compile:
        print("compiling the network, which takes a while", file=sys.stderr)
    return Predictor(
        model,
        device=args.device,
        precision=args.precision,
        compile=args.compile,
        size=parse_size(args.size),
        score_threshold=score_threshold if args.score_threshold is None else args.score_threshold,
        top_k=args.top_k,
        nms=args.nms,
        crop=not args.no_crop,
        crop_after_resize=args.crop_after_resize or None,
        maskness=args.maskness or None,
    )


def segment_pictures(args: argparse.Namespace) -> int:
    """All pictures of --image and --images; 1 when some could not be read."""
    kinds = parse_kinds(args.save)
    sources = collect(args.image, args.images, args.output)[: args.max_images]
    predictor = build_predictor(args, load_model(args), 0.3)
    unreadable = 0
    several = len(sources) > 1
    for number, source in enumerate(tqdm(sources, desc="segmenting", disable=None if several else True), start=1):
        image = read_image(source.path)
        if image is None:
            problem = "cannot be read as a picture" if source.path.is_file() else "no such picture"
            tqdm.write(f"{source.path}: {problem}, skipped", file=sys.stderr)
            unreadable += 1
            continue
        detections = predictor(image)
        origin = {"image_id": number, "file_name": str(source.path)}
        written = write_results(image, detections, source.output, kinds, origin, source.suffix)
        tqdm.write(f"{source.path}: {len(detections)} found -> {', '.join(map(str, written))}")
    if unreadable:
        print(f"{unreadable} of {len(sources)} pictures could not be read", file=sys.stderr)
    return 1 if unreadable else 0


def video_name(path: str) -> str:
    """The name of a video without its suffix, whatever other dots are in it."""
    path = Path(path)
    return path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name


def segment_video(args: argparse.Namespace) -> int:
    kinds = parse_kinds(args.save)
    source, target = split_output(args.video)
    output = Path(args.output or target or "results")
    if output.suffix.lower() in VIDEO_SUFFIXES - {".mp4"} and not output.is_dir():
        raise UserError(f"{output}: films are written as .mp4; name it {output.with_suffix('.mp4').name}")
    # A folder with frames of the same command's earlier run is not one to write into, but to write again.
    if (output.is_dir() and not frame_files(output)) or (args.output or target) is None:
        output = output / f"{'camera' * source.isdigit()}{video_name(source)}"
        if output.with_name(output.name + ".mp4").resolve() == Path(source).resolve():
            output = output.with_name(output.name + ".yolact")
    output = output.with_name(video_name(str(output)))
    predictor = build_predictor(args, load_model(args), 0.3)
    report = process_video(predictor, source, output, kinds, args.max_images)
    print(f"{source} -> {output}{'.mp4' * ('overlay' in kinds)}: {report}")
    return 130 if report.interrupted else 0


def measure_ap(args: argparse.Namespace, ranks: Ranks) -> int:
    """COCO metrics; for a file without annotations, such as test-dev's, the results alone."""
    if args.image_dir is None:
        raise UserError("--annotations needs --image_dir, the folder of the photos")
    dataset = CocoDataset(args.annotations, args.image_dir)
    args.device = str(ranks.device)
    predictor = build_predictor(args, load_model(args), 0.05)
    if not dataset.has_annotations:
        output = args.output or Path("results.json")
        results = predict_dataset(predictor, dataset, args.max_images, ranks=ranks)
        if ranks.main:
            write_json(output, results)
        print(f"{args.annotations} has no annotations to compare with; results -> {output}")
        return 0
    metrics = evaluate(predictor, dataset, args.max_images, args.per_class, ranks=ranks)
    if metrics is None:  # the main process has them
        return 0
    print(metrics["table"])
    if args.per_class:
        print(per_class_table(metrics))
    if args.output is not None:
        results = metrics.pop("results")
        write_json(args.output, {k: v for k, v in metrics.items() if k != "table"})
        write_json(args.output.with_suffix(".results.json"), results)
        print(f"metrics -> {args.output}, detections -> {args.output.with_suffix('.results.json')}")
    return 0


def measure_speed(args: argparse.Namespace) -> int:
    from engine.benchmark import benchmark, format_report

    model = load_model(args)
    provide = 10 if args.weights is None else 0  # random weights find nothing
    report = benchmark(build_predictor(args, model, 0.05), args.batch_size, provide)
    print(format_report(report))
    if args.output is not None:
        write_json(args.output, report)
    return 0


def main() -> int:
    args = parse_args()
    keep_memory()
    modes = {
        "--image/--images": bool(args.image or args.images),
        "--video": args.video is not None,
        "--annotations": args.annotations is not None,
        "--benchmark": args.benchmark,
    }
    if args.no_crop and args.crop_after_resize:
        raise UserError("--no_crop and --crop_after_resize exclude each other")
    chosen = [name for name, on in modes.items() if on]
    if len(chosen) != 1:
        problem = "nothing to do" if not chosen else f"{' and '.join(chosen)} at once"
        raise UserError(f"{problem}: give one of {', '.join(modes)}")
    if args.image or args.images:
        return segment_pictures(args)
    if args.video is not None:
        return segment_video(args)
    if args.benchmark:
        return measure_speed(args)
    with join(args.device) as ranks:
        return measure_ap(args, ranks)


if __name__ == "__main__":
    run_main(main)
