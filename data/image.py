"""Read, normalise and write images. No other module does so.

Throughout this project an image is uint8 [H, W, 3] in BGR order, as OpenCV reads it, unless stated otherwise.
"""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.JpegImagePlugin
import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig
from utils.errors import UserError
from utils.files import write_bytes

ImageLike = np.ndarray | PIL.Image.Image | str | Path  # what `as_image` accepts
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".ppm", ".pgm", ".gif"}
MARK = b"made by YOLACT"  # a comment in images that are written, by which results are recognised
MAX_PIXELS = 178_956_970  # 537 MB as 8-bit colour, Pillow's limit; the header of a small file can declare any size
INPUT_STEP = 32  # pixels; the stride of C5, so that no level of the backbone is rounded up
WEIGHT_ONE = 2048  # 1 in the fixed point of OpenCV's resize
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_image(path: str | Path, ignore_orientation: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image file as uint8 BGR [H, W, 3] and apply its EXIF orientation.

    Grey, palette, CMYK and transparent images are converted to 8-bit colour. 16-bit images are scaled by the bit depth
    that the file declares, and floating-point images from 0..1. The scale never depends on the image's own range, so
    that it is the same for all frames of a camera. Images of more than `max_pixels` are refused and not decoded.

    Raises UserError if `path` is not a regular file, or the image is truncated, damaged, too large or unsupported.
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
    _check_file(data, path, max_pixels)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | (cv2.IMREAD_IGNORE_ORIENTATION if ignore_orientation else 0)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:  # OpenCV does not read one floating-point or 32-bit value per pixel
        with contextlib.suppress(Exception):  # each format's parser has its own
            decoded = PIL.Image.open(io.BytesIO(data))
            image = _repeated(decoded) if decoded.mode in ("F", "I") else None
    if image is None:
        raise UserError(f"{path}: cannot be read as an image")
    return _to_uint8(image, data, str(path))


def _repeated(image: PIL.Image.Image) -> np.ndarray:
    """Return a grey PIL image of any depth as an array [H, W, 3]."""
    return np.repeat(np.asarray(PIL.ImageOps.exif_transpose(image))[..., None], 3, axis=2)


def _check_file(data: bytes, path: Path, max_pixels: int) -> None:
    """Raise UserError for an image that is too large, and for one whose end is missing, which OpenCV fills with grey.

    Pillow reads the header only. Formats that it does not know are left to OpenCV.
    """
    truncated = UserError(f"{path}: the end of the file is missing; copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = PIL.Image.open(io.BytesIO(data))
        width, height = image.size
        if image.format == "PNG":
            image.verify()  # the length and the checksum of every chunk
    except PIL.Image.DecompressionBombError:
        raise UserError(f"{path}: more than the limit of {MAX_PIXELS:,} pixels") from None
    except PIL.UnidentifiedImageError:
        return
    except Exception:  # each format's parser has its own
        raise truncated from None
    if height * width > max_pixels:
        raise UserError(f"{path}: {width}x{height} is more than the limit of {max_pixels:,} pixels")
    # A JPEG ends with the marker FFD9. Thumbnails, which have one of their own, lie before the image's first scan,
    # where Pillow stops reading; phones append other data, which may contain any bytes.
    if data.startswith(b"\xff\xd8"):
        stream = io.BytesIO(data)
        PIL.JpegImagePlugin.JpegImageFile(stream)
        if data.find(b"\xff\xd9", stream.tell()) < 0:
            raise truncated
    if image.format == "WEBP" and len(data) < int.from_bytes(data[4:8], "little") + 8:
        raise truncated


def as_image(image: ImageLike, channels: str = "bgr") -> np.ndarray:
    """Return uint8 [H, W, 3], a PIL image, or the file of a path as uint8 BGR [H, W, 3].

    The EXIF orientation of the last two is applied. `channels` is the order of an array's channels, "bgr" or "rgb".
    Raises TypeError or ValueError for another type, shape or order, and UserError if a file cannot be read.
    """
    if channels not in ("bgr", "rgb"):
        raise ValueError(f"channels must be 'bgr' or 'rgb', not {channels!r}")
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, PIL.Image.Image):
        name = str(getattr(image, "filename", ""))
        if image.mode.startswith(("I", "F")):  # Pillow would clip these to 0..255
            # A file says more than the pixels, such as the bit depth of a camera.
            return read_image(name) if Path(name).is_file() else _to_uint8(_repeated(image), b"", "PIL image")
        pixels = np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
        return np.ascontiguousarray(pixels[..., ::-1])
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected an image as cv2.imread returns it, not {image!r:.40}: does the file exist?")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        hint = "cv2.imread without flags returns one, and cv2.cvtColor converts others"
        raise ValueError(f"expected a uint8 image [H, W, 3], not {image.dtype} {list(image.shape)}; {hint}")
    return np.ascontiguousarray(image[..., ::-1]) if channels == "rgb" else image


def _to_uint8(image: np.ndarray, data: bytes, path: str) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.uint16:
        # The bit depth in a PNG's sBIT chunk, for example 12 in a file from a 12-bit camera, or 16 without one.
        header = data[: data.find(b"IDAT")] if data.startswith(PNG_SIGNATURE) else b""
        position = header.rfind(b"sBIT") + 4
        bits = header[position] if position > 4 and 1 <= header[position] <= 16 else 16
        return (image * np.float32(255 / (2**bits - 1))).round().clip(0, 255).astype(np.uint8)
    if image.dtype.kind == "f":
        image = np.nan_to_num(image.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
        if np.median(image) > 1:
            raise UserError(f"{path}: floating-point images must have values of 0 to 1, but most values exceed 1")
        return (image * 255).round().clip(0, 255).astype(np.uint8)
    raise UserError(f"{path}: {image.dtype} pixels are not supported; save the image with 8 or 16 bits per channel")


def input_size(image_size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the (height, width) of the network's input that preserves an image's aspect ratio.

    `image_size` is the image's (height, width). The area is about `side` squared, as with `preserve_aspect_ratio` in
    the authors' code. Both sides are multiples of INPUT_STEP, so the aspect ratio is not exact.
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


def normalise(planes: Tensor, config: ModelConfig) -> Tensor:
    """Normalise BGR [B, 3, h, w] with values of about 0..255 to float32 RGB [B, 3, h, w]: (x - mean) / std."""
    # One channel after the other: tensors of means and deviations would have to be copied to the device.
    channels = zip(reversed(planes.unbind(1)), config.mean, config.std, strict=True)
    return torch.stack([plane * (1 / std) - mean / std for plane, mean, std in channels], dim=1)


def to_network(image: np.ndarray, size: tuple[int, int], config: ModelConfig, device: torch.device) -> Tensor:
    """Resize and normalise uint8 BGR [H, W, 3] to float32 RGB [3, h, w] of `size` on `device`, as `config` says.

    A GPU receives the 8-bit image and computes the rest itself, with the values of the CPU.
    """
    if device.type == "cpu":
        return normalise(torch.from_numpy(resize(image, size, config.resize_uint8)).permute(2, 0, 1)[None], config)[0]
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    if device.type == "cuda":
        pixels = pixels.pin_memory()  # so that the copy does not wait
    planes = pixels.to(device, non_blocking=True).permute(2, 0, 1)[None]
    return normalise((resize_like_opencv if config.resize_uint8 else resize_float)(planes, size), config)[0]


def resize_float(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [B, 3, H, W] bilinearly in floating point, as the authors do; return float32 [B, 3, h, w]."""
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False)


def resize_like_opencv(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [B, 3, H, W] to float32 [B, 3, h, w] with whole values, as `cv2.resize(image, INTER_LINEAR)` does.

    It runs on any device and in exported graphs. OpenCV computes 8-bit images in fixed point: weights have 11 bits, and
    bits are dropped after each of the two passes. Interpolating in floating point and rounding gives another value for
    10 % of the pixels, which is enough to change detections; this gives another value, by 1, for less than 0.5 %.
    """
    height, width = images.shape[2:]
    low, high, weight = _taps(width, size[1], images.device)
    images = images.int()
    rows = _shift(images[..., low] * (WEIGHT_ONE - weight) + images[..., high] * weight, 4)
    low, high, weight = _taps(height, size[0], images.device)
    weight = weight[:, None]
    total = _shift(rows[:, :, low] * (WEIGHT_ONE - weight), 16) + _shift(rows[:, :, high] * weight, 16)
    return _shift(total + 2, 2).float()


def _taps(length: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each of `target` output pixels, the two input pixels that it mixes, and the weight of the second.

    Output pixel i has its centre at (i + 1/2) * length / target - 1/2, computed here in whole numbers.
    """
    position = (2 * torch.arange(target, device=device) + 1) * length - target  # in units of 1 / (2 * target)
    low = torch.div(position, 2 * target, rounding_mode="floor")
    weight = torch.div(WEIGHT_ONE * (position - low * 2 * target) + target, 2 * target, rounding_mode="floor")
    outside = (low < 0) | (low >= length - 1)
    low = low.clamp(min=0).clamp(max=length - 1)
    return low, (low + 1).clamp(max=length - 1), weight.masked_fill(outside, 0).int()


def _shift(values: Tensor, bits: int) -> Tensor:
    """Shift non-negative whole numbers to the right."""
    return torch.div(values, 2**bits, rounding_mode="floor")


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
