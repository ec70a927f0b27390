"""Compare runtimes and precisions for the bundled model, with other small segmentation networks beside it.

python benchmarks/runtimes.py --output benchmarks/runtimes_cpu.json
python benchmarks/runtimes.py --peers yolo11n-seg yolo26n-seg --output benchmarks/runtimes_cpu.json

All variants are measured alternately in one process. `network` is the network alone, `image` is the time from an image
in memory to its masks in memory. The peers need `pip install ultralytics`; they are built from their model
descriptions with random weights, exported to ONNX, and measured as networks only. int8 is calibrated on two images,
which is enough for measuring speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch

from benchmarks.stages import compute_peak, device_name, network_flops
from data.image import read_image
from inference import Predictor
from tools.export.exporting import write_export
from utils.device import configure_process, has_fast_bf16
from utils.errors import run_main
from weights import load_model
from weights.released import BUNDLED
from yolact import Yolact

ROOT = Path(__file__).resolve().parent.parent
IMAGES = [ROOT / "data/demo" / name for name in ("astronaut.jpg", "camera.jpg")]
THRESHOLD = 0.3
Jobs = dict[tuple[str, str, str], Callable[[], Any]]  # (model, variant, what)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", default=str(BUNDLED))
    parser.add_argument("--sizes", type=int, nargs="+", default=[576])
    parser.add_argument("--peers", nargs="*", default=[], help="names of ultralytics model descriptions")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=10, help="timed calls per round, after one warm-up call")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    configure_process()
    model = load_model(args.weights)
    image = cv2.resize(read_image(IMAGES[0]), (640, 480))
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            gflop = {model.config.name: network_flops(model.config, (size, size)) / 1e9}
            jobs = our_jobs(model, size, image, Path(folder))
            for peer in args.peers:
                gflop[peer] = add_peer(peer, size, Path(folder), jobs)
            for (name, variant, what), times in measure(jobs, args.rounds, args.repeats).items():
                row = {"model": name, "size": size, "gflop": round(gflop[name], 1), "variant": variant, "what": what}
                rows.append(row | {"ms": round(statistics.median(times), 2)})
                print(rows[-1])
    peers = f" --peers {' '.join(args.peers)}" if args.peers else ""
    report = {
        "command": f"python benchmarks/runtimes.py --sizes {' '.join(map(str, args.sizes))}{peers}",
        "machine": device_name(torch.device("cpu")),
        "peak_gflops": round(compute_peak(torch.device("cpu"), torch.float32) / 1e9),
        "torch": torch.__version__,
        "image": [480, 640],
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def our_jobs(model: Yolact, size: int, image: np.ndarray, folder: Path) -> Jobs:
    """Return the jobs of the model in PyTorch, ONNX Runtime and OpenVINO."""
    files = {name: folder / f"{name}.xml" for name in ("float", "int8")} | {"onnx": folder / "model.onnx"}
    for name, path in files.items():
        calibration = map(read_image, IMAGES) if name == "int8" else None
        write_export(model, path, (size, size), model.config.detection, calibration=calibration)
    fast_bf16 = has_fast_bf16(torch.device("cpu"))
    options: dict[str, Any] = {"score_threshold": THRESHOLD}
    predictors = {
        f"PyTorch {label}": Predictor(model, "cpu", precision, size=(size, size), **options)
        for label, precision in (("float32", "fp32"), ("bfloat16", "bf16"))[: 1 + fast_bf16]
    }
    for label, name, precision in (
        ("ONNX Runtime float32", "onnx", "fp32"),
        ("OpenVINO float32", "float", "fp32"),
        ("OpenVINO bfloat16", "float", "bf16"),
        ("OpenVINO int8", "int8", "auto"),
    ):
        if precision != "bf16" or fast_bf16:
            predictors[label] = Predictor.from_weights(files[name], precision=precision, **options)
    jobs: Jobs = {}
    for label, predictor in predictors.items():
        batch = predictor.preprocess(image)[None]
        jobs[model.config.name, label, "network"] = lambda p=predictor, b=batch: p.predict(b)
        jobs[model.config.name, label, "image"] = lambda p=predictor: p(image).masks
    return jobs


def add_peer(name: str, size: int, folder: Path, jobs: Jobs) -> float:
    """Add the jobs of an ultralytics network; return its operations in GFLOP."""
    import nncf
    import onnxruntime
    import openvino
    from ultralytics import YOLO
    from ultralytics.utils.torch_utils import get_flops

    threads = torch.get_num_threads()
    peer = YOLO(f"{name}.yaml")
    operations = float(get_flops(peer.model, imgsz=size))
    exported = Path(peer.export(format="onnx", imgsz=size, opset=18))
    torch.set_num_threads(threads)  # ultralytics takes one core less than there are
    path = exported.rename(folder / f"{name}_{size}.onnx")
    images = [cv2.resize(read_image(path), (size, size)).transpose(2, 0, 1)[None] for path in IMAGES]
    batches = [np.ascontiguousarray(x, np.float32) / 255 for x in images]

    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
    jobs[name, "ONNX Runtime float32", "network"] = lambda: session.run(
        None, {session.get_inputs()[0].name: batches[0]}
    )
    core = openvino.Core()
    graph = core.read_model(path)
    int8 = nncf.quantize(graph, nncf.Dataset(batches), preset=nncf.QuantizationPreset.MIXED, subset_size=len(batches))
    for label, which, precision in (
        ("OpenVINO float32", graph, "f32"),
        ("OpenVINO bfloat16", graph, "bf16"),
        ("OpenVINO int8", int8, "bf16"),
    ):
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        request = core.compile_model(which, "CPU", hints | {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
        jobs[name, label, "network"] = lambda r=request: r.infer([batches[0]], share_inputs=True)
    return operations


@torch.inference_mode()
def measure(jobs: Jobs, rounds: int, repeats: int) -> dict[tuple[str, str, str], list[float]]:
    """Return the milliseconds of each job, measured alternately."""
    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in jobs}
    for _ in range(rounds):
        for key, job in jobs.items():
            job()
            for _ in range(repeats):
                started = time.perf_counter()
                job()
                times[key].append(1000 * (time.perf_counter() - started))
    return times


if __name__ == "__main__":
    run_main(main)
