"""Pictures in, and where their results go."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import photo

from data.errors import UserError
from engine.media import collect, read_image, split_output
from engine.outputs import write_image


def test_every_kind_of_picture_is_read(tmp_path):
    from PIL import Image

    color = photo(40, 60)
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
    cv2.imwrite(str(tmp_path / "twelve.png"), color.astype(np.uint16) * 16)
    assert np.array_equal(read_image(tmp_path / "twelve.png"), color)
    cv2.imwrite(str(tmp_path / "float.tiff"), color.astype(np.float32) / 255)
    assert np.array_equal(read_image(tmp_path / "float.tiff"), color)
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "empty.jpg").touch()
    for name in ("bad.jpg", "empty.jpg", "none.jpg"):
        assert read_image(tmp_path / name) is None


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
        cv2.imwrite(str(tmp_path / "in" / name), photo(8, 8))
    sources = collect([], [str(tmp_path / "in")], tmp_path / "out")
    outputs = [s.output.relative_to(tmp_path / "out").as_posix() for s in sources]
    assert len(set(outputs)) == 4
    assert "b/a" in outputs
    for explicit in (["a.jpg:o.jpg", "a.png:o.jpg"], ["a.jpg:a.jpg"]):
        with pytest.raises(UserError, match="choose another name"):
            collect([f"{tmp_path}/in/{e.split(':')[0]}:{tmp_path}/in/{e.split(':')[1]}" for e in explicit], [], None)
    beside = collect([], [str(tmp_path / "in")], tmp_path / "in")
    assert {s.output.name for s in beside} == {"a.yolact", "a_yolact_png", "a_png.yolact"}
    twice = collect([str(tmp_path / "in/a.jpg"), str(tmp_path / "in/b/a.jpg")], [], tmp_path / "out")
    assert len({s.output for s in twice}) == 2
    assert len(collect([str(tmp_path / "in/a.jpg")] * 2, [], None)) == 1
    nested = collect([str(tmp_path / "in")], [], tmp_path / "out")
    assert (tmp_path / "out/b/a") in {s.output for s in nested}
    with pytest.raises(UserError, match="name a folder, or a picture"):
        collect([str(tmp_path / "in/a.jpg")], [], tmp_path / "out.json")
    with pytest.raises(UserError, match="is one of the pictures"):
        collect([f"{tmp_path}/in/a.jpg:{tmp_path}/in/a.png", f"{tmp_path}/in/a.png:{tmp_path}/x.png"], [], None)
    assert len(collect([], [str(tmp_path / "in")], tmp_path)) == 4  # a folder above the pictures


def test_photos_are_never_replaced_and_results_are(tmp_path):
    for name in ("in/a.jpg", "out/a.jpg", "in/b.png", "out/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), photo(8, 8))
    for _ in range(2):
        sources = collect([], [str(tmp_path / "in")], tmp_path / "out")
        assert [s.output.name for s in sources] == ["a.yolact", "b.yolact"]
        for source in sources:
            write_image(source.output.with_name(source.output.name + source.suffix), photo(9, 9))
    assert cv2.imread(str(tmp_path / "out/a.jpg")).shape == (8, 8, 3)
    assert len(collect([], [str(tmp_path / "out")], None)) == 2  # results are no pictures to segment
    assert np.array_equal(cv2.imread(str(tmp_path / "out/b.yolact.png")), photo(9, 9))
