"""Names and URLs of released weights, and their download."""

from __future__ import annotations

import hashlib
import http.client
import re
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from config import ALIASES, canonical_name
from utils.errors import UserError, suggestion
from utils.files import atomic_write
from weights.checkpoint import read_checkpoint
from weights.convert import is_yolact

WEIGHTS_DIR = Path(__file__).resolve().parent
BUNDLED = WEIGHTS_DIR / "yolact_lite_person.pth"

MIN_RATE = 1000  # bytes per second; a slower download is aborted

_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/yolact/yolact_"


class Released(NamedTuple):
    """A file of weights published by the authors or by MMDetection."""

    url: str  # MMDetection's file names end with the first eight digits of the SHA-256
    mask_ap: str  # as published, on COCO


def _authors(name: str, mask_ap: str) -> Released:
    folder = f"https://huggingface.co/dbolya/{name.replace('_', '-')}/resolve/main"
    return Released(f"{folder}/{name}_54_800000.pth", f"{mask_ap} (test-dev)")


RELEASED = {
    "yolact_r50": Released(_MMDET + "r50_1x8_coco/yolact_r50_1x8_coco_20200908-f38d58df.pth", "29.0 (val2017)"),
    "yolact_r50_8xb8": Released(_MMDET + "r50_8x8_coco/yolact_r50_8x8_coco_20200908-ca34f5db.pth", "28.4 (val2017)"),
    "yolact_r101": Released(_MMDET + "r101_1x8_coco/yolact_r101_1x8_coco_20200908-4cbe9101.pth", "30.4 (val2017)"),
    "yolact_resnet50": _authors("yolact_resnet50", "28.2"),
    "yolact_darknet53": _authors("yolact_darknet53", "28.7"),
    "yolact_base": _authors("yolact_base", "29.8"),
    "yolact_im700": _authors("yolact_im700", "31.2"),
    "yolact_plus_resnet50": _authors("yolact_plus_resnet50", "34.1"),
    "yolact_plus_base": _authors("yolact_plus_base", "34.6"),
}


def find_weights(path_or_name: str | Path, folder: Path = WEIGHTS_DIR) -> Path:
    """Find the weights file for a path, the folder of a run, or the name of released weights.

    A run's folder gives its `best.pth`, or `last.pth` if there is none. The name of released weights gives their file
    in `folder`, which is downloaded if it does not exist.

    Raises UserError if there is no such file or name, or the download fails.
    """
    if "://" in str(path_or_name):
        # A file that anybody could have put there is not loaded unseen.
        name = str(path_or_name).partition("?")[0].rstrip("/").rpartition("/")[2] or "weights.pth"
        raise UserError(
            f"{path_or_name}: weights are not loaded from an address; download and check them by hand: "
            f"curl -L -o {name} '{path_or_name}' && sha256sum {name}; then use --weights {name}"
        )
    path = Path(path_or_name)
    if path.is_dir():
        return checkpoint_in(path)
    if path.exists():
        return path
    given = str(path_or_name)
    name = canonical_name(given)
    if path.parent == Path("."):
        local = sorted(folder.glob("*.pth"))
        for file in local:
            if given in (file.name, file.stem):
                return file
        for file in local:  # files of this configuration that were saved by hand
            if not path.suffix and canonical_name(file.name) == name:
                return file
        # Names of other projects are accepted, but not files of other steps or dates, which may be somebody's own.
        known = [name, f"{name}_config", *(alias for alias, key in ALIASES.items() if key == name)]
        if name in RELEASED and given.removesuffix(".pth") in (*known, Path(RELEASED[name].url).stem):
            return download(RELEASED[name].url, folder)
    if path.suffix or path.parent != Path("."):
        raise UserError(f"{path}: no such weights file")
    hint = suggestion(name, [*RELEASED, BUNDLED.stem])
    raise UserError(f"{path_or_name!r} is neither a file nor the name of released weights{hint}")


def checkpoint_in(folder: Path, names: tuple[str, ...] = ("best.pth", "last.pth")) -> Path:
    """Return the first of the checkpoints `names` that exists in a run's folder. Raises UserError if none does."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: the folder contains no {' or '.join(names)}")


def download(url: str, folder: Path = WEIGHTS_DIR, timeout: float = 30.0, patience: float = 60.0) -> Path:
    """Return the file of `url` in `folder`. If it does not exist, download and verify it.

    Args:
        timeout: maximum time without data, in seconds.
        patience: time in seconds after which the average speed must be at least MIN_RATE.

    Raises UserError if that fails. No file is left behind, and the message explains how to download it by hand.
    """
    target = folder / url.rpartition("/")[2]
    digits = re.search(r"-([0-9a-f]{8})\.pth$", url)
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as out:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                size, started = int(response.headers.get("Content-Length") or 0), time.monotonic()
                with tqdm(total=size or None, unit="B", unit_scale=True, desc=target.name) as bar:
                    while chunk := response.read1(2**20):
                        bar.update(out.write(chunk))
                        seconds = time.monotonic() - started
                        if seconds > patience and out.tell() < MIN_RATE * seconds:
                            raise UserError(f"the server is too slow: {out.tell()} bytes in {seconds:.0f} seconds")
            out.flush()
            found = hashlib.sha256(Path(out.name).read_bytes()).hexdigest()
            if digits is not None and not found.startswith(digits[1]):
                raise UserError(f"SHA-256 starts with {found[:8]}, not {digits[1]}")
            if size and out.tell() < size:
                raise UserError(f"the server stopped after {out.tell()} of {size} bytes")
            # Not every file has a checksum, and a login page also has status 200, so the content is checked, too.
            if not is_yolact(read_checkpoint(out.name)):
                raise UserError("these are not weights of YOLACT")
    except (UserError, OSError, ValueError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)).partition("\n")[0].rpartition(".part: ")[2]
        text = f"{target.name}: cannot be downloaded ({reason}); to do it by hand, save {url} as {target}"
        raise UserError(text) from None
    return target
