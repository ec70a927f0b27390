"""Random damage to annotations, checkpoints, images and runs, executed in a process that may crash or hang.

python tests/fuzz/cases.py KIND FOLDER FIRST COUNT

Each case is drawn from its number alone. Before a case its number is printed, after it the outcome: "right" if the
result is right, "refused" after a UserError. Anything else, a hang included, ends the process, so the last number
printed is the case that did it. `python tests/fuzz/cases.py KIND FOLDER NUMBER 1` repeats it.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import io
import json
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/fixtures")]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import make_dataset, random_image, train_args  # noqa: E402

import eval as eval_script  # noqa: E402
import train as train_script  # noqa: E402
from config import get_config  # noqa: E402
from data.coco import CocoDataset  # noqa: E402
from data.image import read_image  # noqa: E402
from evaluation.evaluator import coco_metrics  # noqa: E402
from tools.audit import audit  # noqa: E402
from utils.errors import UserError  # noqa: E402
from weights import load_model  # noqa: E402
from weights.checkpoint import save_checkpoint  # noqa: E402
from yolact import Yolact  # noqa: E402

SECONDS = 60  # for one case
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3.9, 2**31, 2**63, 10**400, -(10**20), 1e8, 1e308, float("nan"), float("inf"), "",
    "0", "7", "no", "\0", "a\0b", "\ud800", "x" * 300, "../a.png", "/etc/passwd", [], [[]], {}, [None], [1, 2],
    [[1, 2, 3, 4, 5, 6]], [[1e9, 1e9, 2e9, 1e9, 2e9, 2e9]], [[float("nan")] * 6], [[["a"]]], {"size": [96, 128]},
    {"size": ["96", "128"], "counts": "PPPP"}, {"size": [96, 128], "counts": [0.5, 12287.5]},
    {"size": [96, 128], "counts": [[12288]]}, {"size": [2**40, 2**40], "counts": "0"}, {"a": 1},
]  # fmt: skip
SMALL = get_config(
    "yolact_lite",
    max_size=96,
    anchor_sizes=((8,), (16,), (32,), (64,), (96,)),
    class_names=("disc", "tile"),
    category_ids=(7, 3),
)


def annotations(folder: Path, rng: random.Random) -> None:
    """Damage an annotation file; then read, audit and evaluate it."""
    source = folder / "data/annotations.json"
    if not source.exists():
        make_dataset(folder / "data", 4)
    content = json.loads(source.read_text())
    for _ in range(rng.choice((1, 1, 2, 5))):
        section = rng.choice(("annotations", "annotations", "annotations", "images", "categories"))
        entry = rng.choice(content[section])
        key = rng.choice([*entry, "area", "iscrowd"])
        segmentation = entry.get("segmentation")
        if key == "segmentation" and isinstance(segmentation, dict) and rng.random() < 0.7:
            counts = str(segmentation.get("counts"))
            position = rng.randrange(max(1, len(counts)))
            change = rng.choice((counts[:position], counts[:-1], counts[position:], counts * 2,
                                 counts[:position] + chr(rng.randrange(32, 127)) + counts[position + 1 :]))  # fmt: skip
            entry["segmentation"] = {**segmentation, "counts": change}
        elif rng.random() < 0.15:
            entry.pop(key, None)
        elif isinstance(entry.get(key), list) and entry[key] and rng.random() < 0.4:
            values = copy.deepcopy(entry[key])
            inner = values[0] if isinstance(values[0], list) and values[0] else values
            inner[rng.randrange(len(inner))] = rng.choice(ODD)
            entry[key] = values
        else:
            entry[key] = copy.deepcopy(rng.choice(ODD))
    path = folder / "damaged.json"
    text = json.dumps(content)
    if rng.random() < 0.1:
        text = text[: rng.randrange(len(text))]
    path.write_text(text)
    data = CocoDataset(path, folder / "data/images")
    results = []
    for index in range(len(data)):
        with contextlib.suppress(UserError):  # an image that is missing does not end a run
            sample = data[index]
            assert len(sample.boxes) == len(sample.labels) == len(sample.segmentations)
            assert np.isfinite(sample.boxes).all()
            if len(sample.boxes):
                x1, y1, x2, y2 = sample.boxes[0].tolist()
                results.append({"image_id": data.image_ids[index], "category_id": data.category_ids[0], "score": 0.5,
                                "bbox": [x1, y1, x2 - x1, y2 - y1],
                                "segmentation": {"size": list(sample.image.shape[:2]), "counts": "0"}})  # fmt: skip
    str(audit(data, SMALL))
    metrics = coco_metrics(data, [{**r, "segmentation": _box_rle(r)} for r in results])
    json.dumps({k: v for k, v in metrics.items() if k != "table"}, allow_nan=False)


def _box_rle(result: dict[str, Any]) -> dict[str, Any]:
    from pycocotools import mask as rle

    mask = np.zeros(result["segmentation"]["size"], np.uint8, order="F")
    mask[2:9, 2:9] = 1
    return rle.encode(mask)


def checkpoints(folder: Path, rng: random.Random) -> None:
    """Damage a checkpoint; what loads must have the weights that were saved."""
    whole = folder / "whole.pth"
    if not whole.exists():
        torch.manual_seed(0)
        save_checkpoint(whole, Yolact(SMALL), half=True)
    path = folder / "damaged.pth"
    data = bytearray(whole.read_bytes())
    kind = rng.choice(("bit", "bit", "zeros", "cut", "content", "content"))
    if kind == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        start = rng.randrange(len(data))
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    elif kind == "cut":
        data = data[: rng.randrange(len(data))]
    path.write_bytes(data)
    if kind == "content":
        content = torch.load(whole, weights_only=True)
        place = rng.choice(("config", "config", "model", "top"))
        target = content if place == "top" else content[place]
        key = rng.choice(list(target))
        tensors = [torch.zeros(1).expand(10**6, 10**6), torch.full((3,), float("nan")), torch.zeros(2).long()]
        odd = [value for value in ODD if not isinstance(value, int) or abs(value) < 2**60]
        value = rng.choice([*odd, *tensors])
        if rng.random() < 0.2:
            del target[key]
        else:
            target[key] = value
        torch.save(content, path)
    state = load_model(path).state_dict()
    wanted = torch.load(whole, weights_only=True)["model"]
    assert all(torch.equal(value.float(), wanted[name].float()) for name, value in state.items())


def images(folder: Path, rng: random.Random) -> None:
    """Damage an image file; what is read is 8-bit colour of a sensible size."""
    suffix = rng.choice((".jpg", ".png", ".webp", ".bmp", ".tiff", ".gif"))
    image = random_image(rng.randrange(1, 90), rng.randrange(1, 90), rng.randrange(9))
    if suffix == ".gif":
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(image[..., ::-1]).save(stream, "gif")
        data = bytearray(stream.getvalue())
    else:
        if suffix in (".png", ".tiff") and rng.random() < 0.4:
            image = image.astype(np.uint16) * 257
        data = bytearray(cv2.imencode(suffix, image)[1].tobytes())
    for _ in range(rng.choice((0, 1, 1, 3, 20))):
        position = rng.randrange(min(len(data), rng.choice((40, 200, 10**9))))
        data[position] = rng.randrange(256)
    if rng.random() < 0.4:
        data = data[: rng.randrange(len(data) + 1)]
    path = folder / f"damaged{suffix}"
    path.write_bytes(data)
    read = read_image(path, max_pixels=10**7)
    assert read.dtype == np.uint8
    assert read.ndim == 3
    assert read.shape[2] == 3


def resume(folder: Path, rng: random.Random) -> None:
    """Damage a run's folder; resuming ends at its last step or refuses."""
    run = folder / "run"
    if not run.exists():
        path = make_dataset(folder / "data", 4)
        args = train_args(path, "--batch_size", "2", "--max_iter", "1", "--output_dir", run)
        assert train_script.main([str(a) for a in args[1:]]) == 0
    other = folder / "damaged"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(run, other)
    if rng.random() < 0.3:
        log = other / "log.jsonl"
        lines = log.read_bytes()
        cut = rng.randrange(len(lines))
        log.write_bytes(rng.choice((lines[:cut], lines[:cut] + b"\0\xff\n" + lines[cut:], b"\n\n" + lines, b"")))
    else:
        content = torch.load(other / "last.pth", weights_only=True)
        key = rng.choice(list(content["training"]))
        if rng.random() < 0.5:
            del content["training"][key]
        else:
            odd = ({}, None, "x", -1, torch.zeros(3), {"state": {}, "param_groups": []})
            content["training"][key] = rng.choice(odd)
        torch.save(content, other / "last.pth")
    code = train_script.main(["--resume", str(other), "--max_iter", "2"])
    assert code == 0
    steps = [json.loads(line) for line in (other / "log.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "total" in s][-1] == 2


def inputs(folder: Path, rng: random.Random) -> None:
    """Strange files among the images of one command: the others are segmented."""
    images = folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    cv2.imwrite(str(images / "good.png"), random_image())
    if not (folder / "weights.pth").exists():
        save_checkpoint(folder / "weights.pth", Yolact(SMALL))
    kind = rng.choice(("long", "empty folder", "folder", "pipe", "link", "bomb", "bytes", "loop"))
    more: list[str] = []
    if kind == "long":
        cv2.imwrite(str(images / ("x" * 251 + ".png")), random_image())
    elif kind == "empty folder":
        (folder / "nothing").mkdir(exist_ok=True)
        more = ["--images", str(folder / "nothing")]
    elif kind == "folder":
        (images / "odd.jpg").mkdir()
    elif kind == "pipe":
        import os

        os.mkfifo(images / "pipe.jpg")
        more = ["--image", str(images / "pipe.jpg")]
    elif kind == "link":
        (images / "link.jpg").symlink_to(folder / "gone.jpg")
    elif kind == "loop":
        (images / "loop.jpg").symlink_to(images / "loop.jpg")
    elif kind == "bomb":
        (images / "bomb.png").write_bytes(_bomb(rng.choice((30_000, 2**31 - 1))))
    else:
        (images / "bytes.jpg").write_bytes(bytes(rng.randrange(256) for _ in range(rng.randrange(300))))
    words = ["--weights", str(folder / "weights.pth"), "--images", str(images), *more, "--output", str(folder / "out")]
    shutil.rmtree(folder / "out", ignore_errors=True)
    code = eval_script.main([*words, "--device", "cpu", "--save", "json"])
    assert code == (0 if kind in ("long", "folder") else 1), (kind, code)
    assert (folder / "out/good.json").is_file()
    if kind == "long":
        assert len(list((folder / "out").glob("x*.json"))) == 1


def _bomb(side: int) -> bytes:
    """A PNG whose header claims `side` x `side` pixels."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "annotations": annotations,
    "checkpoints": checkpoints,
    "images": images,
    "resume": resume,
    "inputs": inputs,
}


def main() -> None:
    kind, folder, first, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    faulthandler.enable()
    torch.set_num_threads(1)
    for number in range(first, first + count):
        print(f"{kind} {number}", end=" ", flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        signal.alarm(2 * SECONDS)
        quiet = io.StringIO()
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                KINDS[kind](folder, random.Random(f"{kind} {number}"))
        except UserError as error:
            message = str(error)
        else:
            message = ""
        if "\n" in message.strip() or len(message) > 1500:
            raise SystemExit(f"not one clear line: {message}")
        print("refused" if message else "right", flush=True)
        faulthandler.cancel_dump_traceback_later()
    print(f"memory {_peak_mib():.0f}", flush=True)


def _peak_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
