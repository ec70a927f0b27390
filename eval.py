"""Segment images and videos, compute AP, or measure speed.

python eval.py --image street.jpg                                 # -> results/street.jpg and results/street.json
python eval.py --images images --output results --save overlay,json,masks,polygons
python eval.py --video in.mp4 --output segmented                  # or a camera by its number: --video 0
python eval.py --weights runs/mine --annotations val.json --image_dir images
torchrun --nproc_per_node 8 eval.py --weights yolact_r50 --annotations val.json --image_dir images   # on 8 GPUs
python eval.py --weights yolact_r50 --benchmark

Without --weights, the bundled weights are used, which detect people only; --benchmark --config NAME uses random ones.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# See train.py. Beside another process, an image at 320 px takes 0.15 s with it and 1.76 s without.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

try:
    import cv2  # noqa: F401
except ImportError as error:  # libGL, for instance, in a container
    print(f"error: OpenCV: {error}; without a display, install opencv-python-headless instead", file=sys.stderr)
    sys.exit(2)

from tqdm import tqdm

from config import get_config, parse_overrides, with_detection
from data.image import MAX_PIXELS, read_image
from evaluation import evaluate
from evaluation.evaluator import Segmenter, check_classes, per_class_table, predict_dataset, write_coco_results
from inference import Predictor
from inference.runtime import ExportedNetwork, is_exported
from layers.nms import NMS
from utils.device import PRECISIONS, configure_process
from utils.distributed import Ranks, process_group
from utils.errors import ArgumentParser, UserError, count, fraction_or_best, integer, join_names, parse_size, run_main
from utils.files import write_json
from weights import load_model
from weights.released import BUNDLED
from yolact import Yolact

TASKS = ("--image/--images", "--video", "--annotations", "--benchmark")
# Options that other tasks would ignore without a word.
TASKS_OF = {
    "--image_dir": TASKS[2:3],
    "--per_class": TASKS[2:3],
    "--report": TASKS[2:3],
    "--store_threshold": TASKS[2:3],
    "--save": TASKS[:2],
    "--tile": TASKS[::2],
    "--track": TASKS[1:2],
    "--batch_size": TASKS[3:],
    "--max_pixels": TASKS[:1],
    "--max_images": TASKS[:3],
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Segment images and videos with YOLACT, compute AP, or measure speed.", allow_abbrev=False
    )
    several: Any = {"nargs": "+", "action": "extend", "default": []}
    add = parser.add_argument
    add("--weights", "--trained_model", help="a file, a run's folder, a released name, or an exported model")
    add("--config", help="a configuration named in config.py, or a .py file (default: the weights' own)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 or mps")
    add("--precision", default="auto", choices=["auto", *PRECISIONS], help="precision of the network")
    add("--threads", type=integer(1), help="number of CPU threads (default: one per core)")
    add("--compile", action="store_true", help="compile the network with torch.compile, which takes time at startup")
    task = parser.add_argument_group("task").add_argument
    task("--image", **several, help="images, globs, in:out pairs, or - to read a list from stdin")
    task("--images", **several, help="folders of images; subfolders are included")
    task("--video", help="a video file, the number of a camera, or in:out")
    task("--annotations", type=Path, help="annotations in COCO format, to compute AP with")
    task("--image_dir", type=Path, help="folder of the annotated images")
    task("--benchmark", action="store_true", help="measure the time of each stage")
    out = parser.add_argument_group("output").add_argument
    out("--output", type=Path, help="a folder (default: results), an image file, or a JSON file for AP and benchmark")
    out("--save", default="overlay,json", help="of overlay,json,masks,polygons,prototypes,cutout,blur (%(default)s)")
    out("--track", action="store_true", help="number the objects of --video across its frames, with ByteTrack")
    out("--report", type=Path, help="folder for a page with curves, errors and the worst mistakes (for --annotations)")
    out("--store_threshold", action="store_true", help="with --report, store the best score threshold in --weights")
    out("--per_class", action="store_true", help="report AP, precision and recall of each class")
    how = parser.add_argument_group("detection").add_argument
    how("--score_threshold", type=fraction_or_best, help="a number, or best (default: 0.3, and 0.05 for AP)")
    how("--top_k", type=integer(1), help="maximum detections per image (default: the configuration's, 100)")
    how("--nms", choices=list(NMS), help="NMS method (default: the configuration's, usually fast)")
    how("--size", help="the network's input: HxW, or a number for a square (yolact_lite: for an input of its area)")
    how("--tile", type=integer(32), metavar="PIXELS", help="also predict on tiles of this size, for large images")
    how("--set", **several, metavar="key=value", help="any field of DetectionConfig in config.py, such as crop=false")
    how("--batch_size", type=integer(1), default=1, help="batch size of --benchmark")
    how("--max_pixels", type=integer(1), default=MAX_PIXELS, help="skip larger images (default: %(default)s pixels)")
    how("--max_images", type=integer(1), help="stop after this many images or frames")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    configure_process(args.threads)
    task = chosen_task(args)
    if task == "--image/--images":
        return segment_images(args)
    if task == "--video":
        from tools.outputs import parse_kinds
        from tools.video import segment_video

        predictor = build_predictor(args)
        return segment_video(predictor, args.video, args.output, parse_kinds(args.save), args.max_images, args.track)
    if task == "--benchmark":
        from benchmarks.stages import benchmark, format_report

        provide = 10 if args.weights is None and args.config is not None else 0  # random weights give no detections
        report = benchmark(build_predictor(args), args.batch_size, provide)
        print(format_report(report))
        if args.output is not None:
            write_json(args.output, report)
        return 0
    with process_group(args.device) as ranks:
        return measure_ap(args, ranks)


def segment_images(args: argparse.Namespace) -> int:
    """Segment all images of --image and --images; return 1 if some image or folder could not be used."""
    from tools.images import find_images
    from tools.outputs import merged_coco, parse_kinds, write_results

    kinds = parse_kinds(args.save)
    if args.tile and "prototypes" in kinds:
        raise UserError("--save prototypes: each tile has its own; leave out --tile")
    sources, problems = find_images(args.image, args.images, args.output, [".json"] * ("json" in kinds))
    sources = sources[: args.max_images]
    predictor = tiled(build_predictor(args), args.tile)
    for problem in problems:
        print(f"{problem}, skipped", file=sys.stderr)
    unreadable = 0
    images, outputs = [source.path for source in sources], [source.output for source in sources]
    base = args.output or Path("results")
    with merged_coco(images if "json" in kinds else [], outputs, base, predictor.config) as merged:
        for number, source in enumerate(tqdm(sources, desc="segmenting", disable=None if len(sources) > 1 else True)):
            try:
                image = read_image(source.path, max_pixels=args.max_pixels)
            except UserError as error:
                tqdm.write(f"{error}, skipped", file=sys.stderr)
                unreadable += 1
                continue
            started = time.perf_counter()
            detections = predictor(image)
            elapsed = 1000 * (time.perf_counter() - started)
            origin = {"image_id": number + 1, "file_name": str(source.path)}
            written = write_results(image, detections, source.output, kinds, origin, source.suffix)
            if merged is not None:
                merged.add(number + 1, source.path, detections)
            files = join_names([*map(str, written)])
            if len(written) > 3:
                files = f"{source.output.parent} ({count(len(written), 'file')})"
            tqdm.write(f"{source.path}: {detections.summary()}, {elapsed:.0f} ms -> {files}")
    if merged is not None:
        images_text = count(len(merged.images), "image")
        print(f"{count(merged.count, 'detection')} of {images_text} -> {merged.path}")
    if unreadable:
        print(f"{unreadable} of {len(sources)} images could not be read", file=sys.stderr)
    return 1 if unreadable or problems else 0


def measure_ap(args: argparse.Namespace, ranks: Ranks) -> int:
    """Compute COCO metrics. If the file has no annotations, as for test-dev, only write the detections.

    Returns 1 if an image could not be used, and 0 otherwise.
    """
    from tools.audit import quick_audit
    from tools.formats.readers import open_coco

    dataset = open_coco(args.annotations, args.image_dir)
    dataset.check_folder()
    with ranks.main_first():
        predictor = tiled(build_predictor(args, ranks), args.tile)
    note = check_classes(dataset, predictor.config)
    if note:
        print(note)
    if not dataset.has_annotations:
        found = predict_dataset(predictor, dataset, args.max_images, ranks=ranks)
        if ranks.is_main:
            paths = write_coco_results(args.output or Path("results.json"), found.results)
            print(f"{args.annotations} has no annotations, so AP cannot be computed; detections -> {', '.join(paths)}")
        return report_problems(found.problems)
    if ranks.is_main:
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
    if args.output is not None:
        write_json(args.output, {k: v for k, v in metrics.items() if k != "table"})
        paths = write_coco_results(args.output, results)
        print(f"metrics -> {args.output}, detections -> {', '.join(paths)}")
    if args.report is not None:
        from tools.advice import better_size
        from tools.report import store_threshold, write_report

        title = f"{predictor.config.name} on {args.annotations.name}"
        report = write_report(args.report, dataset, metrics, results, sizes, title)
        print(f"best score threshold {report['best_threshold']:.2f} (F1 {report['f1']:.2f} of masks at IoU 0.5)")
        print(f"report -> {args.report / 'index.html'}")
        hint = better_size(predictor, dataset) if isinstance(predictor, Predictor) and ranks.size == 1 else ""
        if hint:
            print(hint)
        if args.store_threshold:
            print(f"stored for --score_threshold best in {store_threshold(args.weights, report['best_threshold'])}")
    return report_problems(metrics["problems"])


def report_problems(problems: list[str]) -> int:
    """Print the problems with images. Return 1 if there are any, because AP is then too low, and 0 otherwise."""
    for problem in problems:
        print(f"{problem}; it counts as an image without detections", file=sys.stderr)
    return 1 if problems else 0


def build_predictor(args: argparse.Namespace, ranks: Ranks | None = None) -> Predictor:
    """Return the predictor that the arguments describe."""
    model = build_model(args)
    detection: dict[str, Any] = dict(parse_overrides(args.set, "nms_threshold=0.6"))
    flags = {key: getattr(args, key) for key in ("score_threshold", "top_k", "nms")}
    detection |= {key: value for key, value in flags.items() if value is not None}
    with_detection(model.config, detection)  # raises for a key that is not a field, such as `size`
    if args.compile and isinstance(model, Yolact):
        print("compiling the network; this can take minutes. Its input is square unless --size is HxW", file=sys.stderr)
    device = args.device if ranks is None else ranks.device
    return Predictor(model, device, args.precision, parse_size(args.size), args.compile, **detection)


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
    try:
        return load_model(BUNDLED, config)
    except UserError:
        if config is None:
            raise
        raise UserError(f"--config {args.config} needs weights that were trained with it; give --weights") from None


def tiled(predictor: Predictor, side: int | None) -> Segmenter:
    """Return the predictor, or one for tiles if --tile is given."""
    if side is None:
        return predictor
    from tools.tiles import TiledPredictor

    return TiledPredictor(predictor, side)


def chosen_task(args: argparse.Namespace) -> str:
    """Return the option that names the task. Raises UserError for none, several, or an option of another task."""
    given = (bool(args.image or args.images), args.video is not None, args.annotations is not None, args.benchmark)
    chosen = [task for task, on in zip(TASKS, given, strict=True) if on]
    if len(chosen) != 1:
        problem = f"{' and '.join(chosen)} at once" if chosen else "nothing to do"
        raise UserError(f"{problem}; give exactly one of {', '.join(TASKS)}")
    parser = build_parser()
    for option, allowed in TASKS_OF.items():
        name = option.removeprefix("--")
        if getattr(args, name) != parser.get_default(name) and chosen[0] not in allowed:
            raise UserError(f"{option} has no effect with {chosen[0]}; it is for {' and '.join(allowed)}")
    if args.annotations is not None and args.image_dir is None:
        raise UserError("--annotations needs --image_dir, the folder of the images")
    if args.store_threshold and (args.report is None or args.weights is None or args.max_images is not None):
        raise UserError("--store_threshold needs --report DIR and --weights, and all images (no --max_images)")
    if args.report is not None:
        from tools.report import need_matplotlib, storable

        need_matplotlib()
        if args.store_threshold:
            storable(args.weights)
    return chosen[0]


if __name__ == "__main__":
    run_main(main)
