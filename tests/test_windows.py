"""Windows of masks give what the whole masks give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from test_predict import disc_detections
from torch.nn import functional as F

from inference.polygons import polygon_iou, rings
from layers.masks import crop_window, soft_masks
from utils.windows import MaskWindow


def encoded(mask):
    return rle.encode(np.asfortranarray(mask.view(np.uint8)))


def whole(window, size):
    mask = np.zeros(size, bool)
    mask[window.place] = window.pixels
    return mask


@pytest.mark.parametrize("seed", range(40))
def test_run_lengths_are_those_of_the_whole_mask(seed):
    """Byte for byte, also where a run goes on in the next column, at every border and without pixels."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 12)), int(rng.integers(1, 12))
    height, width = rng.integers(0, size[0] + 1), rng.integers(0, size[1] + 1)
    x, y = int(rng.integers(0, size[1] - width + 1)), int(rng.integers(0, size[0] - height + 1))
    window = MaskWindow(x, y, rng.random((height, width)) < rng.choice([0.0, 0.3, 0.8, 1.0]))
    assert window.encode(size) == encoded(whole(window, size))
    tight = window.tight()
    assert tight.encode(size) == encoded(whole(window, size))
    assert np.array_equal(whole(tight, size), whole(window, size))
    assert tight.pixels.shape == (0, tight.pixels.shape[1]) or tight.pixels[0].any()


def test_full_columns_are_one_run():
    mask = np.zeros((3, 4), bool)
    mask[:, 1:3] = True
    assert MaskWindow(1, 0, np.ones((3, 2), bool)).encode((3, 4)) == encoded(mask)


@pytest.mark.parametrize("options", [{}, {"crop_after_resize": True}, {"crop": False}])
@pytest.mark.parametrize("size", [(301, 203), (37, 911), (5, 4), (1, 1)])
def test_windows_are_the_masks(options, size):
    found = disc_detections(*size)
    found.config = replace(found.config, **options)
    found.relative_boxes = torch.tensor([[-0.2, 0.1, 0.6, 0.7], [0.9, 0.3, 0.3, 1.4]])  # beyond the image, and swapped
    found.prototypes = torch.rand_like(found.prototypes) - 0.3  # so that the masks reach every border
    windows = [whole(window, size) for window in found.windows()]
    assert len(windows) == 2
    assert all(np.array_equal(window, mask) for window, mask in zip(windows, found.masks.numpy(), strict=True))
    config, boxes = found.config, found.relative_boxes
    soft = soft_masks(found.prototypes, found.coefficients, boxes if config.crop else None)
    wanted = F.interpolate(soft[None], size, mode="bilinear", align_corners=False)[0] > config.mask_threshold
    if config.crop_after_resize:
        wanted &= crop_window(boxes, *size, padding=0)
    assert (np.array(windows) != wanted.numpy()).mean() < 1e-4  # rounding, at pixels of the threshold
    assert [code["counts"].encode() for code in found.encode_masks()] == [
        encoded(mask)["counts"] for mask in found.masks.numpy()
    ]


def test_outputs_are_placed_where_the_window_is():
    found = disc_detections(120, 160)
    masks = found.masks.numpy()
    for mask, row, shape in zip(masks, found.to_dicts(), found.to_labelme("x.jpg", 0)["shapes"], strict=True):
        ys, xs = np.nonzero(mask)
        assert row["area"] == len(xs)
        assert (row["centroid_x"], row["centroid_y"]) == pytest.approx((xs.mean() + 0.5, ys.mean() + 0.5))
        assert polygon_iou(mask, [(np.array(shape["points"]), False)]) == 1
    window = MaskWindow.around(masks[0])
    shifted = [(points + (window.x, window.y), hole) for points, hole in rings(window.pixels)]  # noqa: RUF005
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(shifted, rings(masks[0]), strict=True))
