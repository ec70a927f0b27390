"""Read, normalise and write images. No other module does so.

Throughout this project an image is uint8 [H, W, 3] in BGR order, as OpenCV reads it, unless stated otherwise.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F

from utils.errors import UserError
from utils.files import write_bytes

ImageLike = np.ndarray | PIL.Image.Image | str | Path  # what `as_image` accepts
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".ppm", ".pgm", ".gif"}
MARK = b"made by YOLACT"  # a comment in images that are written, by which results are recognised
MAX_PIXELS = 200_000_000  # 600 MB as 8-bit colour; the header of a small file can declare any size
INPUT_STEP = 32  # pixels; the stride of C5, so that no level of the backbone is rounded up
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_image(path: str | Path, ignore_orientation: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image file as uint8 BGR [H, W, 3] and apply its EXIF orientation.

    Grey, palette, CMYK and transparent images are converted to 8-bit colour. 16-bit images are scaled by the bit depth
    that the file declares, and floating-point images from 0..1. The scale never depends on the image's own range, so
    that it is the same for all frames of a camera.

    Args:
        path: the file.
        ignore_orientation: return the pixels as they are stored, without applying the EXIF orientation.
        max_pixels: refuse larger images before they are decoded.

    Raises:
        UserError: if `path` is not a regular file, or the image is truncated, damaged, too large or unsupported.
    """
    path = Path(path)
    if not path.is_file():  # also refuses devices and pipes, which may never reach their end
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such image'}")
    try:
        data = path.read_bytes()  # cv2.imread does not take every path on Windows
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not data:
        raise UserError(f"{path}: the file is empty")
    if is_truncated(data):
        raise UserError(f"{path}: the end of the file is missing; copy it again")
    height, width = declared_size(data)
    if height * width > max_pixels:
        raise UserError(f"{path}: {width}x{height} is more than the limit of {max_pixels:,} pixels")
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | (cv2.IMREAD_IGNORE_ORIENTATION if ignore_orientation else 0)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"{path}: cannot be read as an image")
    return _to_uint8(image, data, path)


def as_image(image: ImageLike, channels: str = "bgr") -> np.ndarray:
    """Return an image in any of the accepted forms as uint8 BGR [H, W, 3].

    Args:
        image: uint8 [H, W, 3], a PIL image, or the path of a file. The EXIF orientation of the last two is applied.
        channels: the order of an array's channels, "bgr" (as OpenCV reads them) or "rgb".

    Raises:
        TypeError or ValueError: for another type, shape or channel order.
        UserError: if a file cannot be read.
    """
    if channels not in ("bgr", "rgb"):
        raise ValueError(f"channels must be 'bgr' or 'rgb', not {channels!r}")
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, PIL.Image.Image):
        pixels = np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
        return np.ascontiguousarray(pixels[..., ::-1])
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected an image as cv2.imread returns it, not {image!r}: does the file exist?")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"expected a uint8 image [H, W, 3], not {image.dtype} {list(image.shape)}")
    return np.ascontiguousarray(image[..., ::-1]) if channels == "rgb" else image


def _to_uint8(image: np.ndarray, data: bytes, path: Path) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.uint16:
        largest = 2 ** (_significant_bits(data) or 16) - 1
        return (image * np.float32(255 / largest)).round().clip(0, 255).astype(np.uint8)
    if image.dtype.kind == "f":
        image = np.nan_to_num(image.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
        if np.median(image) > 1:
            raise UserError(f"{path}: floating-point images must have values of 0 to 1, but most values exceed 1")
        return (image * 255).round().clip(0, 255).astype(np.uint8)
    raise UserError(f"{path}: {image.dtype} pixels are not supported; save the image with 8 or 16 bits per channel")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, data offset and data length of a PNG's chunks, up to the first that exceeds the file."""
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if position + 12 + length > len(data):
            return
        yield kind, position + 8, length
        position += 12 + length


def _significant_bits(data: bytes) -> int | None:
    """Return the bit depth in a PNG's sBIT chunk, for example 12 in a 16-bit file from a 12-bit camera."""
    if data.startswith(PNG_SIGNATURE):
        for kind, position, length in _png_chunks(data):
            if kind == b"sBIT" and length and 1 <= data[position] <= 16:
                return data[position]
    return None


def declared_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) from the header of a JPEG, PNG, BMP, GIF, TIFF or WebP file, or (0, 0) for other formats.

    OpenCV itself refuses images of more than 2^30 pixels, in any format.
    """
    if data.startswith(PNG_SIGNATURE) and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
    elif data.startswith(b"\xff\xd8"):
        height, width = _jpeg_size(data)
    elif data.startswith(b"BM") and len(data) >= 26:
        width, height = (abs(v) for v in struct.unpack("<ii", data[18:26]))
    elif data.startswith((b"GIF87a", b"GIF89a")) and len(data) >= 10:
        width, height = struct.unpack("<HH", data[6:10])
    elif data.startswith((b"II*\0", b"MM\0*")):
        height, width = _tiff_size(data)
    elif data[8:15] == b"WEBPVP8" and len(data) >= 30:
        height, width = _webp_size(data)
    else:
        return 0, 0
    return height, width


def _tiff_size(data: bytes) -> tuple[int, int]:
    """Height and width in the first directory of a TIFF: entries of 12 bytes, sorted by tag."""
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
    start = int.from_bytes(data[4:8], order)
    sides = {}
    for i in range(int.from_bytes(data[start : start + 2], order)):
        entry = data[start + 2 + 12 * i : start + 14 + 12 * i]
        if len(entry) < 12:
            break
        length = 2 if int.from_bytes(entry[2:4], order) == 3 else 4  # SHORT or LONG
        sides[int.from_bytes(entry[:2], order)] = int.from_bytes(entry[8 : 8 + length], order)
    return sides.get(257, 0), sides.get(256, 0)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Height and width of the three kinds of WebP: extended, lossless and lossy."""
    if data[15:16] == b"X":
        return 1 + int.from_bytes(data[27:30], "little"), 1 + int.from_bytes(data[24:27], "little")
    if data[15:16] == b"L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + ((bits >> 14) & 0x3FFF), 1 + (bits & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return height & 0x3FFF, width & 0x3FFF


def is_truncated(data: bytes) -> bool:
    """Return whether the end of a JPEG, PNG or WebP file is missing. OpenCV silently fills the rest with grey."""
    if data.startswith(b"\xff\xd8"):
        return data.find(b"\xff\xd9", _first_scan(data)) < 0
    if data.startswith(PNG_SIGNATURE):
        # All chunks are checked, because OpenCV allocates the length that a damaged chunk declares.
        return all(kind != b"IEND" for kind, _, _ in _png_chunks(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return False


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and position of a JPEG's segments up to its first scan.

    Searching for the markers is not enough: a segment may embed a thumbnail with its own size and end marker.
    """
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        yield marker, position
        if marker == 0xDA:  # start of scan
            return
        # Fill bytes (0xFF) and stand-alone markers have no length field.
        alone = marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8
        step = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        position += (1 if marker == 0xFF else 2) if alone else step


def _first_scan(data: bytes) -> int:
    """Return the offset of a JPEG's first scan."""
    return max((position for _, position in _jpeg_segments(data)), default=2)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) from a JPEG's frame header, or (0, 0) if there is none."""
    for marker, position in _jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and position + 9 <= len(data):
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return height, width
    return 0, 0


def input_size(image_size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the (height, width) of the network's input that preserves an image's aspect ratio.

    Its area is about `side` squared, as with `preserve_aspect_ratio` in the authors' code. Both sides are multiples of
    INPUT_STEP, so the aspect ratio is not exact.

    Args:
        image_size: (height, width) of the image in pixels.
        side: the side in pixels of the input for a square image.
    """
    thinnest = side / INPUT_STEP  # more extreme images are distorted, so that the area is limited
    root = min(max((image_size[1] / image_size[0]) ** 0.5, 1 / thinnest), thinnest)
    height, width = (max(1, round(length / INPUT_STEP)) * INPUT_STEP for length in (side / root, side * root))
    return height, width


def resize(image: np.ndarray, size: tuple[int, int], uint8: bool) -> np.ndarray:
    """Resize a uint8 image to `size` (H, W), bilinear with half-pixel centres and without antialiasing.

    By default the image is interpolated as float32, as in the authors' code, and returned as float32 [H, W, 3]. With
    `uint8` the 8-bit image is interpolated and rounded, as in MMDetection, and returned as uint8.
    """
    if uint8:
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    # OpenCV resizes floats too, but rounds the coordinates: its values are off by up to a thousandth of a grey level.
    planes = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32, order="C"))
    return F.interpolate(planes[None], size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()


def normalise(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Convert a BGR image [H, W, 3] with values 0..255 to RGB float32 [3, H, W] and normalise it: (x - mean) / std.

    `mean` and `std` are in RGB order.
    """
    out = np.empty((3, *image.shape[:2]), np.float32)
    for channel in range(3):
        np.multiply(image[..., 2 - channel], np.float32(1 / std[channel]), out=out[channel])
        out[channel] -= np.float32(mean[channel] / std[channel])
    return out


def denormalise(planes: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Undo `normalise` for display: RGB float [3, H, W] -> uint8 BGR [H, W, 3]."""
    pixels = planes * np.array(std, np.float32)[:, None, None] + np.array(mean, np.float32)[:, None, None]
    return np.ascontiguousarray(pixels.round().clip(0, 255).astype(np.uint8)[::-1].transpose(1, 2, 0))


def write_image(path: Path, image: np.ndarray, mark: bool = True) -> None:
    """Write a BGR image in the format of the path's suffix; with `mark`, JPEG and PNG files get the comment MARK.

    Raises UserError if the format is unknown or the file cannot be written.
    """
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if path.suffix.lower() in (".jpg", ".jpeg") else []
    try:
        done, data = cv2.imencode(path.suffix, image, options)
    except cv2.error:
        done = False
    if not done:
        raise UserError(f"{path}: OpenCV cannot write this image format")
    write_bytes(path, _marked(data.tobytes()) if mark else data.tobytes())


def _marked(data: bytes) -> bytes:
    """A JPEG or PNG file with MARK as a comment; other files unchanged."""
    if data[:4] == b"\xff\xd8\xff\xe0":  # after the first segment, which has to be JFIF's
        end = 4 + int.from_bytes(data[4:6], "big")
        return data[:end] + b"\xff\xfe" + (len(MARK) + 2).to_bytes(2, "big") + MARK + data[end:]
    if data.startswith(PNG_SIGNATURE):  # after the header chunk, 25 bytes
        chunk = b"tEXtComment\0" + MARK
        length, checksum = (len(chunk) - 4).to_bytes(4, "big"), zlib.crc32(chunk).to_bytes(4, "big")
        return data[:33] + length + chunk + checksum + data[33:]
    return data


def is_result(path: Path) -> bool:
    """Return whether an image file carries MARK, so was written by an earlier run."""
    try:
        with path.open("rb") as file:
            return MARK in file.read(256)
    except OSError:  # reported when it is segmented
        return False
