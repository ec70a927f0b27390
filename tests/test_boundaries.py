"""Values exactly at a threshold, ties and defaults, as the definitions have them.

Faults that were seeded one at a time into layers/, data/ and training/ showed what the other tests did not notice.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from config import DetectionConfig, LossConfig
from layers.boxes import box_iou, to_centres
from layers.loss import MultiBoxLoss
from layers.matching import IGNORED
from layers.nms import NMS, cluster_nms, standard_nms

METHODS = sorted(set(NMS) - {"cluster_penalty"})  # which removes no box


@pytest.mark.parametrize("name", METHODS)
def test_only_an_iou_above_the_threshold_suppresses(name):
    """The paper, section 5: a box is removed if its IoU with a better one is greater than t. Here it is 1/2 exactly."""
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.25]]])
    assert float(box_iou(boxes, boxes)[0, 0, 1]) == 0.5
    scores = torch.tensor([[[0.9, 0.8]]])
    assert NMS[name](boxes, scores, 0.5).scores.tolist() == scores[0].tolist()
    below = NMS[name](boxes, scores, 0.4999).scores[0]
    assert below.tolist() == [scores[0, 0, 0], -1]  # a slot that is not used is marked by -1


@pytest.mark.parametrize("name", sorted(NMS))
def test_defaults_are_those_of_the_configuration(name):
    defaults = {key: value.default for key, value in inspect.signature(NMS[name]).parameters.items()}
    wanted = DetectionConfig()
    assert defaults["iou_threshold"] == wanted.nms_threshold
    assert defaults["top_k"] == wanted.nms_top_k
    assert defaults["max_detections"] == wanted.top_k


def test_long_chains_are_resolved_on_the_cpu():
    """Each box suppresses the next only, so sequential NMS keeps every second one."""
    left = torch.arange(60) * 0.01
    boxes = torch.stack((left, torch.zeros(60), left + 0.03, torch.ones(60)), dim=1)[None]
    scores = torch.linspace(0.9, 0.3, 60)[None, None]
    ours, wanted = (method(boxes, scores, 0.4, 60, 60) for method in (cluster_nms, standard_nms))
    assert ours.indices[ours.scores > 0].tolist() == wanted.indices[wanted.scores > 0].tolist() == list(range(0, 60, 2))


def matched(boxes, anchors, assigner="max_iou", positions=None):
    """The classes of the anchors, given in corner form, for one image with objects of class 0."""
    target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.long), "crowds": torch.zeros(0, 4)}
    loss = MultiBoxLoss(LossConfig(assigner=assigner))
    return loss.match(to_centres(anchors), [target], positions).classes[0].tolist()


def test_anchors_exactly_at_the_thresholds_of_the_iou():
    """The released code: positive from 0.5 on, background below 0.4."""
    box = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    whole, half, four_tenths, less = (torch.tensor([0.0, 0.0, 0.5, side]) for side in (0.5, 0.25, 0.2, 0.19))
    anchors = torch.stack((whole, half, four_tenths, less))
    assert box_iou(box, anchors)[0].tolist()[:3] == pytest.approx([1, 0.5, 0.4])
    assert matched(box, anchors) == [1, 1, IGNORED, 0]


def test_atss_takes_candidates_at_its_threshold():
    """Algorithm 1 of the ATSS paper: IoU >= mean + deviation. Here all are equal, so each is at the threshold."""
    size = 0.25
    centres = [(0.5 + dx * 0.125, 0.5 + dy * 0.125) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    anchors = torch.tensor([[x - size / 2, y - size / 2, x + size / 2, y + size / 2] for x, y in centres])
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    assert set(box_iou(box, anchors)[0].tolist()) == {0.25}
    assert matched(box, anchors, "atss", [9]) == [1] * 9


@pytest.mark.parametrize(
    "box", [(0.3, 0.1, 0.5, 0.9), (0.1, 0.3, 0.9, 0.5), (0.5, 0.1, 0.7, 0.9), (0.1, 0.5, 0.9, 0.7)]
)
def test_atss_takes_anchors_with_their_centres_inside(box):
    """Strictly inside, on all four sides; the box is moved so that one side passes through centres of anchors."""
    centres = torch.cartesian_prod(torch.arange(1, 8), torch.arange(1, 8)).flip(1) / 8
    anchors = torch.cat((centres - 0.125, centres + 0.125), dim=1)
    exact = torch.tensor([box])
    inside = ((centres > exact[:, :2]) & (centres < exact[:, 2:])).all(dim=1)
    on_a_side = ((centres >= exact[:, :2]) & (centres <= exact[:, 2:])).all(dim=1) & ~inside
    assert on_a_side.any()
    classes = torch.tensor(matched(exact, anchors, "atss", [49]))
    assert (classes > 0).any()
    assert not (classes[~inside] > 0).any()
