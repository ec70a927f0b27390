"""Find the images to segment (files, globs, folders and lists) and the paths of their results."""

from __future__ import annotations

import glob
import itertools
import os
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.image import MARK, SUFFIXES
from utils.errors import UserError, count

# An --output with one of these suffixes is refused, unless it is an existing folder: here only a folder or an image
# file can be named.
NOT_IMAGES = {".json", ".pdf", ".svg", ".heic", ".avif", ".txt", ".npy", ".npz", ".mp4", ".avi", ".mov", ".mkv"}


UNSUPPORTED = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"}
NO_OBJECT = b'{"annotations": [\n],\n'  # the beginning of a result for several images without any detection
LONGEST_STEM = 190  # bytes; suffixes of results and temporary files are added, and file systems allow 255


@dataclass(frozen=True)
class Source:
    """An image to read, the path that its results are named after, and the suffix of its overlay."""

    path: Path
    output: Path
    suffix: str


def is_result(path: Path) -> bool:
    """Return whether an image file carries MARK, or a JSON file has detections, so was written by an earlier run."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".json":
                start = file.read(8192)
                return (
                    b'"mask_score": ' in start
                    or start.split() in ([b"[]"], [b"[", b"]"])
                    or start.startswith(NO_OBJECT)
                )
            return MARK in file.read(256)
    except OSError:  # reported when it is segmented
        return False


def split_output(text: str) -> tuple[str, str | None]:
    """Split `in:out` into (in, out), and anything else into (text, None): existing files, `C:\\photo.jpg`."""
    if os.path.exists(text):
        return text, None
    drive = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    source, colon, target = text[drive:].partition(":")
    if "://" in text or not (colon and source and target):
        return text, None
    return text[:drive] + source, target


def find_images(
    images: Iterable[str], folders: Iterable[str], output: Path | None, endings: Sequence[str] = ()
) -> tuple[list[Source], list[str]]:
    """Resolve `--image` (paths, globs, `-` for a list on stdin) and `--images` (folders) to images and output paths.

    Results are written to the path after the colon of `in:out`, otherwise to `output` (a folder, or a file for a
    single image), otherwise to the folder `results`. In a folder they keep the images' names and subfolders. They
    replace results of earlier runs, but never each other or an input image. An overlay in a folder, and results
    with one of `endings` such as ".json", never replace a file that is not such a result.

    Returns:
        The images, and messages about folders without images.

    Raises:
        UserError: if there are no images, or `output` is unusable or would replace an input image.
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
            problems += _unsupported_in(Path(folder))
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
            foreign = [file for file in map(wanted.with_suffix, endings) if is_foreign(file)]
            if source.output in taken or _real(wanted) in inputs or foreign:
                what = "is one of the images" if _real(wanted) in inputs else "is the result of two images"
                what = f"{foreign[0].name} beside it is not a result of an earlier run" if foreign else what
                raise UserError(f"{wanted}: {what}; choose another name")
        else:
            suffix = ".png" if path.suffix.lower() in (".png", ".bmp", ".tif", ".tiff") else ".jpg"
            source = Source(path, _free_name(path, wanted / name, (suffix, *endings), taken), suffix)
        taken.add(source.output)
        sources.append(source)
    return sources, problems


def _free_name(path: Path, target: Path, endings: Sequence[str], taken: set[Path]) -> Path:
    """Return `target` without its suffix, or a longer name if that one is taken or is in the folder of the image.

    An existing file with one of `endings` that is not a result of an earlier run is not replaced either.
    """

    def foreign(output: Path) -> bool:
        return any(is_foreign(output.with_name(output.name + ending)) for ending in endings)

    if _real(target.parent) == _real(path.parent) or foreign(target.with_suffix("")):
        target = target.with_name(f"{target.stem}.yolact{target.suffix}")
    stem = _shortened(target.name.removesuffix(target.suffix))
    # For a.png: a, then a_png (a.jpg may have taken a), then a_2, a_3, ...
    candidates = itertools.chain((stem, target.name.replace(".", "_")), (f"{stem}_{n}" for n in itertools.count(2)))
    outputs = (target.with_name(name) for name in candidates)
    return next(output for output in outputs if output not in taken and not foreign(output))


def is_foreign(path: Path) -> bool:
    """Return whether a file exists that is not the result of an earlier run."""
    return path.exists() and not is_result(path)


def _real(path: Path) -> str:
    """Resolve symbolic links. Unlike `Path.resolve` this accepts a link to itself, which is reported on reading."""
    return os.path.realpath(path)


def _shortened(stem: str) -> str:
    """Shorten a name to LONGEST_STEM bytes; a checksum keeps shortened names distinct."""
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
    """Return the images of one `--image` argument as (path, relative name), and the target of `in:out` or None."""
    pattern, target = split_output(text)
    if os.path.isdir(pattern):
        return [(path, path.relative_to(pattern)) for path in _images_in(Path(pattern))], target
    if os.path.exists(pattern):
        return [(Path(pattern), Path(Path(pattern).name))], target
    found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    return [(path, Path(path.name)) for path in found], target


def _unsupported_in(folder: Path) -> list[str]:
    """Return a message about images in formats that OpenCV cannot read, if there are any."""
    names = sorted(p.name for p in folder.rglob("*") if p.suffix.lower() in UNSUPPORTED)
    if not names:
        return []
    number = count(len(names), "image")
    return [f"{folder}: {number} in an unsupported format such as {names[0]}; convert to JPEG or PNG"]


def _images_in(folder: Path) -> list[Path]:
    """List the images in a folder and its subfolders, except hidden ones and results of earlier runs.

    Broken links are included, so that they are reported on reading. Raises UserError if there are no images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder, use --image' if folder.exists() else 'no such folder'}")
    found = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        and (p.is_symlink() or p.is_file())
        and not p.is_dir()
        and not is_result(p)
    )
    if not found:
        raise UserError(f"{folder}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
    return found
