"""Images in, and where their results go."""

from __future__ import annotations

import os
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from conftest import random_image

from config import get_config
from data.image import normalise, read_image, write_image
from tools.images import find_images, split_output
from utils.errors import UserError


def test_every_kind_of_image_is_read(tmp_path):
    from PIL import Image

    color = random_image(40, 60)
    rgb = Image.fromarray(color[..., ::-1])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    kinds = {
        "grey.png": lambda p: Image.fromarray(color[..., 0]).save(p),
        "alpha.png": lambda p: rgb.convert("RGBA").save(p),
        "deep.png": lambda p: cv2.imwrite(str(p), color.astype(np.uint16) * 257),
        "palette.png": lambda p: rgb.convert("P").save(p),
        "cmyk.jpg": lambda p: rgb.convert("CMYK").save(p),
        "one.png": lambda p: rgb.resize((1, 1)).save(p),
        "name with ü.webp": lambda p: rgb.save(p, lossless=True),
    }
    for name, save in kinds.items():
        save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image is not None, name
        assert image.dtype == np.uint8, name
        assert image.shape[2] == 3, name
        if name in ("alpha.png", "deep.png", "name with ü.webp"):
            assert np.array_equal(image, color), name
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (60, 40, 3)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, words in (
        ("bad.jpg", "cannot be read as an image"),
        ("empty.jpg", "is empty"),
        ("none.jpg", "no such image"),
        ("pipe.jpg", "not a regular file"),
    ):
        with pytest.raises(UserError, match=words):
            read_image(tmp_path / name)


def with_significant_bits(path, bits):
    """Add the chunk that states the bit depth to a PNG."""
    data = path.read_bytes()
    chunk = b"sBIT" + bytes([bits] * 3)
    path.write_bytes(data[:33] + struct.pack(">I", 3) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:])


def test_deep_images_are_scaled_by_their_type_and_not_by_their_brightness(tmp_path):
    """Two frames of one camera get the same factor; a 12-bit image states its depth."""
    color = random_image(40, 60)
    bright, dark = tmp_path / "bright.png", tmp_path / "dark.png"
    cv2.imwrite(str(bright), color.astype(np.uint16) * 257)
    cv2.imwrite(str(dark), color.astype(np.uint16) * 257 // 17)
    assert np.array_equal(read_image(bright), color)
    assert np.abs(read_image(dark).astype(int) - color / 17).max() <= 1
    twelve = tmp_path / "twelve.png"
    cv2.imwrite(str(twelve), (color * (4095 / 255)).round().astype(np.uint16))
    assert read_image(twelve).max() <= 16
    with_significant_bits(twelve, 12)
    assert np.array_equal(read_image(twelve), color)


@pytest.mark.parametrize("odd", [1.02, np.nan, np.inf, -np.inf])
def test_floating_point_images_are_from_0_to_1(tmp_path, odd):
    """A single odd pixel changes nothing else."""
    color = random_image(40, 60)
    values = color.astype(np.float32) / 255
    values[0, 0] = odd
    cv2.imwrite(str(tmp_path / "float.tiff"), values, [cv2.IMWRITE_TIFF_COMPRESSION, 1])  # not logarithmic
    image = read_image(tmp_path / "float.tiff")
    assert np.array_equal(image[1:], color[1:])
    cv2.imwrite(str(tmp_path / "bytes.tiff"), color.astype(np.float32) + 2)
    with pytest.raises(UserError, match="values of 0 to 1"):
        read_image(tmp_path / "bytes.tiff")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_truncated_images_are_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    cv2.imwrite(str(path), random_image(200, 300))
    data = path.read_bytes()
    read_image(path)
    for share in (0.3, 0.45, 0.7, 0.95, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError):
            read_image(path)


def test_a_jpeg_with_a_preview_is_not_taken_for_complete(tmp_path):
    """The preview inside has an end mark of its own."""
    preview = cv2.imencode(".jpg", random_image(20, 30))[1].tobytes()
    data = cv2.imencode(".jpg", random_image(200, 300))[1].tobytes()
    segment = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview
    whole = data[:2] + segment + data[2:]
    (tmp_path / "a.jpg").write_bytes(whole)
    assert read_image(tmp_path / "a.jpg").shape == (200, 300, 3)
    appended = b"a video \xff\xda"  # phones append one, which may contain the start of a scan
    (tmp_path / "a.jpg").write_bytes(whole + appended)
    assert read_image(tmp_path / "a.jpg").shape == (200, 300, 3)
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(UserError, match="end of the file is missing"):
        read_image(tmp_path / "a.jpg")


def test_normalised_values():
    image, config = random_image(40, 60), get_config("yolact_resnet50").model
    mean, std = np.array(config.mean)[:, None, None], np.array(config.std)[:, None, None]
    planes = normalise(torch.from_numpy(image).permute(2, 0, 1)[None], config)[0].numpy()
    assert np.abs(planes - (image[..., ::-1].transpose(2, 0, 1) - mean) / std).max() < 1e-6


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.jpg:b.jpg", ("a.jpg", "b.jpg")),
        ("a.jpg", ("a.jpg", None)),
        ("C:\\a.jpg", ("C:\\a.jpg", None)),
        ("C:\\a.jpg:D:\\b.jpg", ("C:\\a.jpg", "D:\\b.jpg")),
        ("C:/in:out", ("C:/in", "out")),
        ("0", ("0", None)),
    ],
)
def test_in_and_out(text, wanted):
    assert split_output(text) == wanted


def test_names_never_collide(tmp_path):
    for name in ("a.jpg", "a.png", "a_png.bmp", "b/a.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "in" / name), random_image(8, 8))
    sources, _ = find_images([], [str(tmp_path / "in")], tmp_path / "out")
    outputs = [s.output.relative_to(tmp_path / "out").as_posix() for s in sources]
    assert len(set(outputs)) == 4
    assert "b/a" in outputs
    for explicit in (["a.jpg:o.jpg", "a.png:o.jpg"], ["a.jpg:a.jpg"]):
        with pytest.raises(UserError, match="choose another name"):
            find_images(
                [f"{tmp_path}/in/{e.split(':')[0]}:{tmp_path}/in/{e.split(':')[1]}" for e in explicit], [], None
            )
    beside, _ = find_images([], [str(tmp_path / "in")], tmp_path / "in")
    assert {s.output.name for s in beside} == {"a.yolact", "a_yolact_png", "a_png.yolact"}
    twice, _ = find_images([str(tmp_path / "in/a.jpg"), str(tmp_path / "in/b/a.jpg")], [], tmp_path / "out")
    assert len({s.output for s in twice}) == 2
    assert len(find_images([str(tmp_path / "in/a.jpg")] * 2, [], None)[0]) == 1
    nested, _ = find_images([str(tmp_path / "in")], [], tmp_path / "out")
    assert (tmp_path / "out/b/a") in {s.output for s in nested}
    with pytest.raises(UserError, match="name a folder, or an image"):
        find_images([str(tmp_path / "in/a.jpg")], [], tmp_path / "out.json")
    with pytest.raises(UserError, match="is one of the images"):
        find_images([f"{tmp_path}/in/a.jpg:{tmp_path}/in/a.png", f"{tmp_path}/in/a.png:{tmp_path}/x.png"], [], None)
    assert len(find_images([], [str(tmp_path / "in")], tmp_path)[0]) == 4  # a folder above the images


def test_photos_are_never_replaced_and_results_are(tmp_path):
    for name in ("in/a.jpg", "out/a.jpg", "in/b.png", "out/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), random_image(8, 8))
    for _ in range(2):
        sources, _ = find_images([], [str(tmp_path / "in")], tmp_path / "out")
        assert [s.output.name for s in sources] == ["a.yolact", "b.yolact"]
        for source in sources:
            write_image(source.output.with_name(source.output.name + source.suffix), random_image(9, 9))
    assert cv2.imread(str(tmp_path / "out/a.jpg")).shape == (8, 8, 3)
    assert len(find_images([], [str(tmp_path / "out")], None)[0]) == 2  # results are not segmented
    assert np.array_equal(cv2.imread(str(tmp_path / "out/b.yolact.png")), random_image(9, 9))


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_small_file_cannot_claim_billions_of_pixels(tmp_path):
    """A PNG of 109 KB took 5.4 GiB."""
    (tmp_path / "bomb.png").write_bytes(png_header(30_000, 30_000))
    with pytest.raises(UserError, match=r"bomb\.png: more than the limit of 178,956,970 pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tiff"])
def test_the_limit_of_pixels_is_exact(tmp_path, suffix):
    for height, width in ((1, 1), (33, 70), (300, 7)):
        path = tmp_path / f"a{suffix}"
        cv2.imwrite(str(path), random_image(height, width))
        with pytest.raises(UserError, match="more than the limit"):
            read_image(path, max_pixels=height * width - 1)
        assert read_image(path, max_pixels=height * width).shape[:2] == (height, width)


def test_long_names_and_empty_folders_do_not_end_the_batch(tmp_path):
    """A name of 255 bytes leaves no room for an ending; two of them that differ at the end stay apart."""
    folder, empty = tmp_path / "in", tmp_path / "empty"
    folder.mkdir()
    empty.mkdir()
    for letter in "ab":
        cv2.imwrite(str(folder / ("x" * 250 + letter + ".png")), random_image(8, 8))
    sources, problems = find_images([str(empty)], [str(folder), str(empty), str(tmp_path / "none")], tmp_path / "out")
    assert [len(s.output.name) <= 190 for s in sources] == [True, True]
    assert len({s.output for s in sources}) == 2
    assert len(problems) == 3
    for source in sources:
        write_image(source.output.with_name(source.output.name + ".prototypes.png"), random_image(8, 8))
