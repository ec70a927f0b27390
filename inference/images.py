"""Which images to segment: files, globs, folders and lists, each with the place where its results go."""

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

from data.image import SUFFIXES, is_result
from utils.errors import UserError

# Suffixes that an output folder does not have: whoever names one expects a file of that kind.
NOT_IMAGES = {".json", ".pdf", ".svg", ".heic", ".avif", ".txt", ".npy", ".npz", ".mp4", ".avi", ".mov", ".mkv"}


LONGEST_STEM = 190  # bytes; endings and the names of temporary files are added to it, and 255 is the limit


@dataclass(frozen=True)
class Source:
    """An image to read, the path that its results are named after, and the suffix of its overlay."""

    path: Path
    output: Path
    suffix: str


def split_output(text: str) -> tuple[str, str | None]:
    """Split `in:out` into (in, out), and anything else into (text, None): existing files, `C:\\photo.jpg`."""
    if os.path.exists(text):
        return text, None
    drive = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    source, colon, target = text[drive:].partition(":")
    if "://" in text or not (colon and source and target):
        return text, None
    return text[:drive] + source, target


def find_images(images: Iterable[str], folders: Iterable[str], output: Path | None) -> tuple[list[Source], list[str]]:
    """Return the images that `--image` (paths, globs, `-` for a list on stdin) and `--images` (folders) mean.

    Results go to `output`, which is a folder, or a file for a single image; to the path after the colon of `in:out`;
    or to `results`. In a folder they keep the names of the images and of the folders they lie in. They replace results
    of earlier runs, but neither each other nor any other image.

    Returns:
        The images, and messages about folders that have none.

    Raises:
        UserError: if there is nothing to do.
    """
    jobs: list[tuple[Path, Path, str | None]] = []  # image, its name within the output folder, the output given with it
    base = output or Path("results")
    missing: list[Path] = []
    problems: list[str] = []
    for text in _with_stdin(images):
        try:
            found, target = _expand(text)
        except UserError as error:
            problems.append(str(error))
            continue
        missing += [] if found else [Path(split_output(text)[0])]
        jobs += [(path, name, target) for path, name in found]
    for text in folders:
        folder, target = split_output(text)
        try:
            jobs += [(path, path.relative_to(folder), target) for path in _images_in(Path(folder))]
        except UserError as error:
            problems.append(str(error))
    if not jobs:
        if not problems:
            problems = [f"{missing[0]}: no such image" if missing else "no images: the list on standard input is empty"]
        raise UserError(problems[0])
    jobs += [(path, Path(path.name), None) for path in missing]  # reported when they are read
    jobs = list(dict.fromkeys(jobs))  # an image that is named twice is segmented once
    if output is not None and output.suffix.lower() in NOT_IMAGES and not output.is_dir():
        raise UserError(f"--output {output}: name a folder, or an image ({', '.join(sorted(SUFFIXES))})")
    is_file = output is not None and output.suffix.lower() in SUFFIXES
    if is_file and len(jobs) > 1:
        raise UserError(f"--output {output} is a file, but there are {len(jobs)} images; name a folder")
    taken: set[Path] = set()
    inputs = {_real(path) for path, _, _ in jobs}
    sources = []
    for path, name, target in jobs:
        wanted = Path(target) if target else base
        if wanted.suffix.lower() in SUFFIXES and (target or is_file):
            source = Source(path, wanted.with_suffix(""), wanted.suffix)
            if source.output in taken or _real(wanted) in inputs:
                what = "is one of the images" if _real(wanted) in inputs else "is the result of two images"
                raise UserError(f"{wanted}: {what}; choose another name")
        else:
            suffix = ".png" if path.suffix.lower() in (".png", ".bmp", ".tif", ".tiff") else ".jpg"
            source = Source(path, _free_name(path, wanted / name, suffix, taken), suffix)
        taken.add(source.output)
        sources.append(source)
    return sources, problems


def _free_name(path: Path, target: Path, suffix: str, taken: set[Path]) -> Path:
    """`target` without its suffix, or a longer name where that one is taken or would lie beside the image.

    An image that is already there and is not a result of an earlier run is not replaced either.
    """

    def foreign(output: Path) -> bool:
        file = output.with_name(output.name + suffix)
        return file.exists() and not is_result(file)

    if _real(target.parent) == _real(path.parent) or foreign(target.with_suffix("")):
        target = target.with_name(f"{target.stem}.yolact{target.suffix}")
    stem = _shortened(target.name.removesuffix(target.suffix))
    candidates = itertools.chain((stem, target.name.replace(".", "_")), (f"{stem}_{n}" for n in itertools.count(2)))
    outputs = (target.with_name(name) for name in candidates)
    return next(output for output in outputs if output not in taken and not foreign(output))


def _real(path: Path) -> str:
    """The path without links. Unlike `Path.resolve` it accepts a link to itself, which is reported when it is read."""
    return os.path.realpath(path)


def _shortened(stem: str) -> str:
    """A name that leaves room for endings; a checksum keeps two long names apart."""
    data = stem.encode("utf-8", "surrogateescape")
    if len(data) <= LONGEST_STEM:
        return stem
    return f"{data[: LONGEST_STEM - 9].decode('utf-8', 'ignore')}_{zlib.crc32(data):08x}"


def _with_stdin(images: Iterable[str]) -> list[str]:
    """Replace `-` by the paths on standard input, one per line."""
    texts: list[str] = []
    for text in images:
        texts += [line.strip() for line in sys.stdin if line.strip()] if text == "-" else [text]
    return texts


def _expand(text: str) -> tuple[list[tuple[Path, Path]], str | None]:
    """The images that one argument of `--image` means, with their names, and where their results go."""
    pattern, target = split_output(text)
    if os.path.isdir(pattern):
        return [(path, path.relative_to(pattern)) for path in _images_in(Path(pattern))], target
    if os.path.exists(pattern):
        return [(Path(pattern), Path(Path(pattern).name))], target
    found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    return [(path, Path(path.name)) for path in found], target


def _images_in(folder: Path) -> list[Path]:
    """The images in a folder and below it, without results of earlier runs. Dangling links are kept, to be reported."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder, use --image' if folder.exists() else 'no such folder'}")
    found = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES and (p.is_symlink() or p.is_file()) and not p.is_dir() and not is_result(p)
    )
    if not found:
        raise UserError(f"{folder}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
    return found
