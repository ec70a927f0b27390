"""Compare the speed with the original (github.com/dbolya/yolact) on the same weights, image and machine.

python benchmarks/compare.py --original ../yolact --output benchmarks/compare_cpu.json
python benchmarks/compare.py --original ../yolact --device cuda --training --output benchmarks/compare_cuda.json

Two things are timed: `network`, the network and NMS on a preprocessed input, and `image`, from a uint8 image of 480x640
in memory to its masks in memory. With --training, a training step is timed too, without reading and augmenting images.
The weights are random, with the background bias set so that about 40 detections remain. The script first checks that
both projects find the same detections. The original runs unmodified from the given folder in a separate process, except
that `.cuda()` is a no-op on a CPU. Both projects are measured alternately in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent

IMAGE_SIZE = (480, 640)
THRESHOLD = 0.3
Jobs = dict[str, Callable[[], Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", type=Path, required=True, help="a clone of the authors' repository")
    parser.add_argument("--configs", nargs="+", default=["yolact_resnet50", "yolact_base"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per round, after one warm-up call")
    parser.add_argument("--training", action="store_true", help="also time a training step")
    parser.add_argument("--batch_size", type=int, default=8, help="batch size of the training step")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1], help="batch sizes of inference; none for training alone"
    )
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which no further round starts")
    parser.add_argument("--no_compile", action="store_true", help="leave out the compiled variants")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=["ours", "original"], help=argparse.SUPPRESS)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        jobs = {
            ("ours", False): our_jobs,
            ("ours", True): our_training_step,
            ("original", False): original_jobs,
            ("original", True): original_training_step,
        }
        if args.only == "ours":
            sys.path.insert(0, str(ROOT))
        serve(jobs[args.only, args.step](args), args.device)
        return 0
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = " ".join(["python benchmarks/compare.py", *words])
    report = {"command": command, "torch": torch.__version__, "image": IMAGE_SIZE, "agreement": {}, "rows": []}
    for config in args.configs:
        compare(args, config, report)
    return 0


def compare(args: argparse.Namespace, config: str, report: dict[str, Any]) -> None:
    """Measure one configuration, and add the results and a description of the machine to `report`."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--configs", config, "--weights", str(Path(folder) / f"{config}_0_0.pth")]
        theirs = Worker("original", options)  # it writes the weights
        ours = Worker("ours", options)
        agreement = compare_answers(theirs.ask("answer"), ours.ask("answer"))
        print(f"{config}: {agreement}")
        report["agreement"][config], report["machine"] = agreement, ours.ask("machine")
        add_rows(args, config, report, *take_turns((theirs, ours), args))
        theirs.end(), ours.end()
        if args.training:  # in processes of their own, so that memory is that of training alone
            workers = [Worker(name, [*options, "--step"]) for name in ("original", "ours")]
            add_rows(args, config, report, *take_turns(workers, args))
            for worker in workers:
                worker.end()


def add_rows(
    args: argparse.Namespace,
    config: str,
    report: dict[str, Any],
    times: dict[str, list[float]],
    memory: dict[str, int | None],
) -> None:
    """Add the medians to `report`, with their ratio to the original's in float32, and write it."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = " float32" if args.device == "cuda" else ""
    for name, ms in medians.items():
        what = name.split()[1]
        row = {"configuration": config, "what": what, "variant": name.replace(f" {what}", ""), "ms": round(ms, 2)}
        batch = name[name.index(" batch") :] if " batch" in name else ""
        row["times_the_original"] = round(medians[f"original {what}{reference}{batch}"] / ms, 2)
        if what == "training":
            row["gpu_memory_mib"] = memory[name]
        report["rows"].append(row)
        print(row, flush=True)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


def take_turns(
    workers: Sequence[Worker], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """Measure the jobs of all workers alternately; return milliseconds and GPU MiB."""
    times: dict[str, list[float]] = {}
    memory: dict[str, int | None] = {}
    started = time.monotonic()
    for number in range(args.rounds):
        if number and time.monotonic() - started > args.limit:
            break
        for worker in workers:
            for name in worker.jobs:
                got = worker.ask(name, (2 if " batch" in name else args.repeats) + 1)
                times.setdefault(f"{worker.name} {name}", []).extend(got["ms"][1:])
                memory[f"{worker.name} {name}"] = got["mib"]
    return times, memory


class Worker:
    """A subprocess that runs measurements on request, so that two projects with equal module names can alternate."""

    def __init__(self, name: str, options: list[str]):
        self.name = name
        command = [sys.executable, __file__, *sys.argv[1:], *options, "--only", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.jobs = self._read()

    def ask(self, job: str, repeats: int = 1) -> Any:
        self.process.stdin.write(json.dumps([job, repeats]) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        for line in self.process.stdout:
            if line.startswith("\x1e"):  # the original prints, too
                return json.loads(line[1:])
        raise SystemExit(f"the measurement of {self.name} ended early")

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(jobs: Jobs, device: str) -> None:
    """Run the jobs that are requested on standard input; reply with their times, or for some with their result."""

    def answer(value: Any) -> None:
        print("\x1e" + json.dumps(value), flush=True)

    answered = ("answer", "machine")
    answer([name for name in jobs if name not in answered])
    for line in sys.stdin:
        name, repeats = json.loads(line)
        if name in answered:
            answer(jobs[name]())
            continue
        times, mib = [], None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats):
            started = time.perf_counter()
            jobs[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - started))
        if device == "cuda":
            mib = torch.cuda.max_memory_allocated() // 2**20
        answer({"ms": times, "mib": mib})


def test_image() -> np.ndarray:
    """Return a smooth colour image, uint8 BGR, which is the same in both processes."""
    small = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return cv2.resize(small, IMAGE_SIZE[::-1], interpolation=cv2.INTER_CUBIC)


def compare_answers(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Return a description of how well the detections agree. Raises SystemExit if they do not."""
    count = len(theirs["scores"])
    if not count or theirs["labels"] != ours["labels"]:
        raise SystemExit(f"the detections differ: labels {theirs['labels']} and {ours['labels']}")
    score = max(abs(a - b) for a, b in zip(theirs["scores"], ours["scores"], strict=True))
    area = max(abs(a - b) / max(a, 1) for a, b in zip(theirs["areas"], ours["areas"], strict=True))
    if score > 0.01 or area > 0.02:
        raise SystemExit(f"detections differ: scores by {score:.4f}, mask areas by {100 * area:.2f} %")
    return f"the same {count} detections (scores within {score:.1e}, mask areas within {100 * area:.2f} %)"


def our_jobs(args: argparse.Namespace) -> Jobs:
    """Return the jobs of this project: every precision that the device supports, uncompiled and compiled."""
    from benchmarks.stages import device_name
    from inference import Predictor
    from utils.device import choose_precision
    from weights import load_model

    device, image = torch.device(args.device), test_image()
    model = load_model(args.weights)
    best = choose_precision("auto", device)
    variants: dict[str, dict[str, Any]] = {"float32": {"precision": "fp32"}}
    if device.type == "cpu":
        variants = {"float32 as written": {"optimize": False}, **variants}
        variants["float32 compiled"] = {"precision": "fp32", "compile": True}
    else:
        variants["tf32"] = {"precision": "tf32"}
    if best != torch.float32:
        name = str(best).removeprefix("torch.")
        variants |= {name: {"precision": "auto"}, f"{name} compiled": {"precision": "auto", "compile": True}}
    if not args.batches:
        variants = {}
    if args.no_compile:
        variants = {name: options for name, options in variants.items() if "compile" not in options}
    jobs: Jobs = {}
    size = (model.config.model.max_size,) * 2
    for name, options in variants.items():
        predictor = Predictor(
            model, args.device, size=size, score_threshold=THRESHOLD, crop_after_resize=False, **options
        )
        for count in args.batches:
            images = [image] * count
            batch = torch.stack([predictor.preprocess(image) for image in images])
            jobs[f"network {label(name, count)}"] = network_job(predictor, batch)
            jobs[f"image {label(name, count)}"] = lambda predictor=predictor, images=images: [
                list(found.iter_masks()) for found in predictor(images)
            ]
    for job in jobs.values():  # warm-up
        for _ in range(3):
            job()
    exact = Predictor(model, args.device, "fp32", size=size, score_threshold=THRESHOLD, crop_after_resize=False)(image)
    found = {"labels": exact.labels.tolist(), "scores": exact.scores.tolist()}
    jobs["answer"] = lambda: found | {"areas": exact.masks.sum(dim=(1, 2)).tolist()}
    jobs["machine"] = lambda: device_name(device)
    return jobs


def label(variant: str, batch_size: int) -> str:
    """Return the name of a variant, with the batch size if there are several images."""
    return variant if batch_size == 1 else f"{variant} batch {batch_size}".strip()


def with_tf32(allow: bool, job: Callable[[], Any]) -> Callable[[], Any]:
    """Return the job with cuDNN's TF32 allowed or not. PyTorch allows it by default."""

    def run() -> Any:
        torch.backends.cudnn.allow_tf32 = allow
        return job()

    return run


def network_job(predictor: Any, batch: torch.Tensor) -> Callable[[], Any]:
    """Return a job that runs the network and NMS on an input that is already on the device."""

    @torch.inference_mode()
    def job() -> Any:
        return predictor.run(batch)

    return job


def training_targets(size: int, batch_size: int, count: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return random targets per image: relative boxes with labels [n, 5], and filled boxes as masks [n, size, size]."""
    rng = np.random.default_rng(0)
    targets = []
    for _ in range(batch_size):
        low = rng.uniform(0, 0.6, (count, 2))
        boxes = np.concatenate((low, low + rng.uniform(0.05, 0.4, (count, 2))), axis=1)
        masks = np.zeros((count, size, size), np.float32)
        for mask, (x1, y1, x2, y2) in zip(masks, (boxes * size).astype(int), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append((np.concatenate((boxes, rng.integers(0, 80, (count, 1))), axis=1).astype(np.float32), masks))
    return targets


def our_training_step(args: argparse.Namespace) -> Jobs:
    """Return jobs for a training step in float32 and in the precision that "auto" selects."""

    from config import get_config
    from data.augment import Distortion
    from data.loader import Batch
    from training.trainer import Trainer
    from utils.device import choose_precision
    from utils.distributed import Ranks
    from yolact import Yolact

    config = get_config(args.configs[0])
    size = config.train_size
    rows = 2 * -(-size // 8)
    targets = [
        {
            "boxes": torch.from_numpy(boxes[:, :4]),
            "labels": torch.from_numpy(boxes[:, 4]).long(),
            "masks": torch.nn.functional.interpolate(torch.from_numpy(masks)[None], (rows, rows))[0],
            "crowds": torch.zeros(0, 4),
        }
        for boxes, masks in training_targets(size, args.batch_size)
    ]
    images = torch.randint(256, (args.batch_size, size, size, 3), dtype=torch.uint8)
    distortions = torch.tensor([Distortion.draw(np.random.default_rng(i)) for i in range(args.batch_size)])
    jobs: Jobs = {}
    device = torch.device(args.device)
    best = str(choose_precision("auto", device)).removeprefix("torch.")
    for name, precision in {"float32": "fp32", best: "auto"}.items():
        run = Trainer(Yolact(config), Path(tempfile.mkdtemp()), Ranks(device), precision)
        batch = Batch(images, distortions, targets, list(range(args.batch_size)), []).to(device)
        jobs[f"training {name}"] = lambda run=run, batch=batch: run.step(batch, 1e-4)
    return jobs


def original_jobs(args: argparse.Namespace) -> Jobs:
    """Return the jobs of the original: its transform, network, NMS and masks, called as in its evaluation."""
    from original import load

    detect = load(args.original, args.configs[0], args.device, args.weights, test_image(), THRESHOLD)
    jobs: Jobs = {}
    for variant in ("float32", "tf32") if args.device == "cuda" else ("",):
        for count in args.batches if variant != "tf32" else args.batches[:1]:
            tf32, name = variant == "tf32", label(variant, count)
            jobs[f"network {name}".strip()] = with_tf32(tf32, lambda count=count: detect.network(count))
            jobs[f"image {name}".strip()] = with_tf32(tf32, lambda count=count: detect.image_to_masks(count))
    for job in jobs.values():
        for _ in range(3):
            job()
    jobs["answer"] = detect.answer
    return jobs


def original_training_step(args: argparse.Namespace) -> Jobs:
    """Return a job for the original's training step."""
    from original import training_step

    targets = training_targets(550, args.batch_size)
    name = "training float32" if args.device == "cuda" else "training"
    return {name: with_tf32(False, training_step(args.original, args.configs[0], args.device, targets))}


if __name__ == "__main__":
    sys.exit(main())
