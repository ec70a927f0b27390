"""Pictures in: photos, globs, folders, lists, each with the place where its results go."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".ppm", ".pgm", ".gif"}


@dataclass(frozen=True)
class Source:
    """One picture to read, and the path that its results are named after, without a suffix."""

    path: Path
    output: Path


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
        return cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error:
        return None


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
    `results`. In a folder they keep the names of the pictures and of the folders they lie in, and never overwrite each
    other. Raises UserError when there is nothing to do.
    """
    pairs: list[tuple[Path, Path]] = []  # picture, its name under the output folder
    fixed: dict[Path, Path] = {}  # picture -> the file that was asked for
    outputs: dict[Path, Path] = {}  # picture -> its output folder
    base = output or Path("results")
    for text in _with_stdin(images):
        found, target = _expand(text)
        for path in found:
            pairs.append((path, Path(path.name)))
            outputs[path] = Path(target) if target else base
        if target and Path(target).suffix.lower() in SUFFIXES and len(found) == 1:
            fixed[found[0]] = Path(target)
    for text in folders:
        folder, target = split_output(text)
        for path in _pictures_in(Path(folder)):
            pairs.append((path, path.relative_to(folder)))
            outputs[path] = Path(target) if target else base
    if output is not None and output.suffix.lower() in SUFFIXES:
        if len(pairs) > 1:
            raise UserError(f"--output {output} is a file, but there are {len(pairs)} pictures; name a folder")
        fixed = {path: output for path, _ in pairs}
    return _named(pairs, fixed, outputs)


def _named(pairs: list[tuple[Path, Path]], fixed: dict[Path, Path], outputs: dict[Path, Path]) -> list[Source]:
    """Give each picture a name of its own: its stem, with its suffix or a number where stems are the same."""
    taken: set[Path] = set()
    sources = []
    for path, name in pairs:
        if path in fixed:
            sources.append(Source(path, fixed[path].with_suffix("")))
            continue
        candidate = outputs[path] / name.with_suffix("")
        if candidate in taken:
            candidate = outputs[path] / name.with_name(name.name.replace(".", "_"))
        number = 2
        while candidate in taken:
            candidate = outputs[path] / name.with_name(f"{name.stem}_{number}")
            number += 1
        taken.add(candidate)
        sources.append(Source(path, candidate))
    return sources


def _with_stdin(images: Iterable[str]) -> list[str]:
    """`-` stands for the paths on standard input, one a line."""
    texts: list[str] = []
    for text in images:
        texts += [line.strip() for line in sys.stdin if line.strip()] if text == "-" else [text]
    return texts


def _expand(text: str) -> tuple[list[Path], str | None]:
    """The pictures that one argument of `--image` means, and where their results go if it says so."""
    pattern, target = split_output(text)
    if os.path.isdir(pattern):
        return _pictures_in(Path(pattern)), target
    if os.path.exists(pattern):
        return [Path(pattern)], target
    found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if not found:
        raise UserError(f"{pattern}: no such picture")
    return found, target


def _pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder and in those below it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"{folder}: no pictures in this folder ({', '.join(sorted(SUFFIXES))})")
    return found
