"""Pictures in: photos, globs, folders, lists, each with the place where its results go."""

from __future__ import annotations

import glob
import itertools
import os
import re
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".ppm", ".pgm", ".gif"}

# Endings that an output folder does not have: someone expects such a file.
NOT_PICTURES = {".json", ".pdf", ".svg", ".heic", ".avif", ".txt", ".npy", ".npz", ".mp4", ".avi", ".mov", ".mkv"}
MARK = b"made by YOLACT"  # a comment in the pictures that are written, so that results are told from photos


@dataclass(frozen=True)
class Source:
    """One picture to read, the path that its results are named after, and the suffix of its overlay."""

    path: Path
    output: Path
    suffix: str


def read_image(path: str | Path) -> np.ndarray | None:
    """A picture as uint8 BGR [H, W, 3], upright by its EXIF note; None when it cannot be read.

    Greyscale, palette, CMYK, 16-bit and transparent pictures come out as 8-bit colour.
    """
    try:
        data = np.fromfile(path, np.uint8)  # cv2.imread does not take every path on Windows
    except OSError:
        return None
    if data.size == 0:
        return None
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:
        return None
    if image is None or image.dtype == np.uint8:
        return image
    # 12-bit cameras fill a part of the 16 bits; floating point pictures go to 1 or to 255.
    top = image.max(initial=0)
    scale = (1 / 257 if top > 4095 else 1 / 16) if image.dtype == np.uint16 else (255 if top <= 1 else 1)
    return (image * np.float32(scale)).round().clip(0, 255).astype(np.uint8)


def marked(data: bytes) -> bytes:
    """A JPEG or PNG file with MARK as a comment; other files as they are."""
    if data[:4] == b"\xff\xd8\xff\xe0":  # after the first segment, which has to be JFIF's
        end = 4 + int.from_bytes(data[4:6], "big")
        return data[:end] + b"\xff\xfe" + (len(MARK) + 2).to_bytes(2, "big") + MARK + data[end:]
    if data[:8] == b"\x89PNG\r\n\x1a\n":  # after the header, 25 bytes
        chunk = b"tEXtComment\0" + MARK
        length, checksum = (len(chunk) - 4).to_bytes(4, "big"), zlib.crc32(chunk).to_bytes(4, "big")
        return data[:33] + length + chunk + checksum + data[33:]
    return data


def is_result(path: Path) -> bool:
    """Whether a picture was written by an earlier run."""
    try:
        with path.open("rb") as file:
            return MARK in file.read(256)
    except OSError:  # told of when it is to be segmented
        return False


def split_output(text: str) -> tuple[str, str | None]:
    """`in:out` -> (in, out), anything else -> (text, None). `C:\\photo.jpg` and existing names stay whole."""
    if os.path.exists(text):
        return text, None
    drive = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    source, colon, target = text[drive:].partition(":")
    if "://" in text or not (colon and source and target):
        return text, None
    return text[:drive] + source, target


def collect(images: Iterable[str], folders: Iterable[str], output: Path | None) -> list[Source]:
    """The pictures that `--image` (paths, globs, `-` for a list on standard input) and `--images` (folders) mean.

    Results go to `output`, a folder, or a file for a single picture; to what stands after the colon of `in:out`; or to
    `results`. In a folder they keep the names of the pictures and of the folders they lie in; they overwrite neither
    each other nor any picture but results of earlier runs. Raises UserError when there is nothing to do.
    """
    jobs: list[tuple[Path, Path, str | None]] = []  # picture, its name under a folder, the folder or file asked for
    base = output or Path("results")
    missing: list[Path] = []
    for text in _with_stdin(images):
        found, target = _expand(text)
        missing += [] if found else [Path(split_output(text)[0])]
        jobs += [(path, name, target) for path, name in found]
    for text in folders:
        folder, target = split_output(text)
        found = _pictures_in(Path(folder))
        jobs += [(path, path.relative_to(folder), target) for path in found]
    if not jobs:
        raise UserError(
            f"{missing[0]}: no such picture" if missing else "no pictures: the list on standard input is empty"
        )
    jobs += [(path, Path(path.name), None) for path in missing]  # reported when their turn comes
    jobs = list(dict.fromkeys(jobs))  # a picture that is named twice is segmented once
    if output is not None and output.suffix.lower() in NOT_PICTURES and not output.is_dir():
        raise UserError(f"--output {output}: name a folder, or a picture ({', '.join(sorted(SUFFIXES))})")
    is_file = output is not None and output.suffix.lower() in SUFFIXES
    if is_file and len(jobs) > 1:
        raise UserError(f"--output {output} is a file, but there are {len(jobs)} pictures; name a folder")
    taken: set[Path] = set()
    inputs = {path.resolve() for path, _, _ in jobs}
    sources = []
    for path, name, target in jobs:
        wanted = Path(target) if target else base
        if wanted.suffix.lower() in SUFFIXES and (target or is_file):
            source = Source(path, wanted.with_suffix(""), wanted.suffix)
            if source.output in taken or wanted.resolve() in inputs:
                what = "is one of the pictures" if wanted.resolve() in inputs else "is the result of two pictures"
                raise UserError(f"{wanted}: {what}; choose another name")
        else:
            suffix = ".png" if path.suffix.lower() in (".png", ".bmp", ".tif", ".tiff") else ".jpg"
            source = Source(path, _free_name(path, wanted / name, suffix, taken), suffix)
        taken.add(source.output)
        sources.append(source)
    return sources


def _free_name(path: Path, target: Path, suffix: str, taken: set[Path]) -> Path:
    """`target` without its suffix, or with more to its name where that is taken or would lie beside the picture.

    A picture that lies there and is no result of an earlier run is not replaced either.
    """

    def foreign(output: Path) -> bool:
        file = output.with_name(output.name + suffix)
        return file.exists() and not is_result(file)

    if target.parent.resolve() == path.parent.resolve() or foreign(target.with_suffix("")):
        target = target.with_name(f"{target.stem}.yolact{target.suffix}")
    stem = target.name.removesuffix(target.suffix)
    candidates = itertools.chain((stem, target.name.replace(".", "_")), (f"{stem}_{n}" for n in itertools.count(2)))
    outputs = (target.with_name(name) for name in candidates)
    return next(output for output in outputs if output not in taken and not foreign(output))


def _with_stdin(images: Iterable[str]) -> list[str]:
    """`-` stands for the paths on standard input, one a line."""
    texts: list[str] = []
    for text in images:
        texts += [line.strip() for line in sys.stdin if line.strip()] if text == "-" else [text]
    return texts


def _expand(text: str) -> tuple[list[tuple[Path, Path]], str | None]:
    """The pictures that one argument of `--image` means, with their names, none if it names none; where results go."""
    pattern, target = split_output(text)
    if os.path.isdir(pattern):
        return [(path, path.relative_to(pattern)) for path in _pictures_in(Path(pattern))], target
    if os.path.exists(pattern):
        return [(Path(pattern), Path(Path(pattern).name))], target
    found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    return [(path, Path(path.name)) for path in found], target


def _pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder and in those below it, but for results of earlier runs."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder, use --image' if folder.exists() else 'no such folder'}")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not is_result(p))
    if not found:
        raise UserError(f"{folder}: no pictures in this folder ({', '.join(sorted(SUFFIXES))})")
    return found
