"""Draw twelve images that are hard to draw on, as one sheet to be looked at after a change of utils/draw.py.

python -m examples.gallery gallery.jpg
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from data.image import read_image, write_image
from inference import Predictor
from utils.draw import draw_objects

ROOT = Path(__file__).parents[1]
SIDE = 480  # pixels of a cell
SCRIPTS = ("person", "\u4eba", "\u0447\u0435\u043b\u043e\u0432\u0435\u043a", "\u00e9l\u00e8ve", "traffic light")


def photos() -> Iterator[tuple[str, np.ndarray]]:
    """Yield images on which the bundled weights find people."""
    astronaut, camera = (read_image(ROOT / "data/demo" / name) for name in ("astronaut.jpg", "camera.jpg"))
    wide = np.hstack([cv2.resize(image, (300, 300)) for image in (astronaut, camera) * 4])
    yield "photo", astronaut
    yield "120x120", cv2.resize(astronaut, (120, 120), interpolation=cv2.INTER_AREA)
    yield "panorama, 2400x300", wide
    yield "12 megapixels", cv2.resize(astronaut, (3464, 3464), interpolation=cv2.INTER_CUBIC)
    yield "crowd", np.tile(cv2.resize(astronaut, (200, 200), interpolation=cv2.INTER_AREA), (3, 3, 1))
    yield "dark", (0.2 * astronaut).astype(np.uint8)
    yield "bright", (255 - 0.3 * (255 - astronaut.astype(np.float32))).astype(np.uint8)
    yield "grey", cv2.cvtColor(cv2.cvtColor(camera, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)


def synthetic(kind: str) -> np.ndarray:
    """Return an image with objects that no network has found."""
    rng = np.random.default_rng(0)
    image = np.full((480, 640, 3), (60, 120, 230) if kind == "orange" else 128, np.uint8)
    number = 60 if kind == "sixty objects" else 8
    masks, boxes = [], []
    for _ in range(number):
        centre = int(rng.integers(60, 580)), int(rng.integers(60, 420))
        axes = (120, 3) if kind == "thin" else (int(300 / number**0.5), int(200 / number**0.5))
        mask = np.zeros(image.shape[:2], np.uint8)
        cv2.ellipse(mask, centre, axes, int(rng.integers(180)), 0, 360, 1, -1)
        masks.append(mask > 0)
        boxes.append(cv2.boundingRect(mask))
    corners = np.array(boxes, float)
    corners[:, 2:] += corners[:, :2]
    texts = [f"{SCRIPTS[i % len(SCRIPTS)]} 0.{99 - i}" for i in range(number)]
    return draw_objects(image, masks, corners, texts, range(number))


def cell(title: str, image: np.ndarray) -> np.ndarray:
    """Return an image inside a square with its title."""
    scale = SIDE / max(image.shape[:2])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    out = np.full((SIDE + 30, SIDE + 8, 3), 255, np.uint8)
    out[30 : 30 + small.shape[0], : small.shape[1]] = small
    return cv2.putText(out, title, (4, 22), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m examples.gallery gallery.jpg")
    predictor = Predictor.from_weights(ROOT / "weights/yolact_lite_person.pth")
    cells = [cell(title, predictor(image).draw()) for title, image in photos()]
    cells += [cell(kind, synthetic(kind)) for kind in ("eight objects", "sixty objects", "thin", "orange")]
    rows = [np.hstack(cells[start : start + 4]) for start in range(0, len(cells), 4)]
    write_image(Path(sys.argv[1]), np.vstack(rows))


if __name__ == "__main__":
    main()
