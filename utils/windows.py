"""Masks as the pixels around their objects: on a large photo, most of a whole mask is background."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle


class MaskWindow(NamedTuple):
    """A part of a mask that contains all of its pixels."""

    x: int  # of its left column in the image
    y: int  # of its top row
    pixels: np.ndarray  # bool [h, w]

    @classmethod
    def around(cls, mask: np.ndarray, x: int = 0, y: int = 0) -> MaskWindow:
        """Return the smallest window of a bool mask whose corner is at (x, y); one of no pixels for an empty mask."""
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return cls(x, y, mask[:0, :0])
        left, top = int(columns[0]), int(rows[0])
        return cls(x + left, y + top, mask[top : rows[-1] + 1, left : columns[-1] + 1])

    def tight(self) -> MaskWindow:
        """Return the smallest window of the same mask."""
        return self.around(self.pixels, self.x, self.y)

    @property
    def place(self) -> tuple[slice, slice]:
        """The window as an index of the image."""
        height, width = self.pixels.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)

    def encode(self, size: tuple[int, int]) -> dict[str, Any]:
        """Return the mask as a COCO run-length encoding, the one that pycocotools makes of the whole mask."""
        height, width = size
        # Runs go down the columns. In each column, 1 marks where a run begins and -1 the pixel after its end.
        padded = np.pad(self.pixels.T.view(np.int8), ((0, 0), (1, 1)))
        column, row = np.nonzero(np.diff(padded, axis=1))
        places = (self.x + column) * height + self.y + row
        begins, ends = places[0::2], places[1::2]
        # A run that reaches the bottom of the image goes on at the top of the next column.
        separate = begins[1:] != ends[:-1]
        begins, ends = np.append(begins[:1], begins[1:][separate]), np.append(ends[:-1][separate], ends[-1:])
        counts = np.diff(np.stack((begins, ends), axis=1).ravel(), prepend=0).tolist()
        rest = height * width - int(ends[-1]) if len(ends) else height * width
        return rle.frPyObjects({"size": [height, width], "counts": counts + [rest] * (rest > 0)}, height, width)
