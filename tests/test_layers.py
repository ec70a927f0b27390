from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import to_centres, to_corners
from torchvision.ops import batched_nms

from config import DetectionConfig, ModelConfig
from layers import boxes as box_ops
from layers.anchors import feature_sizes, make_anchors, prototype_size
from layers.detect import detect
from layers.masks import assemble_masks, crop_window, maskness, soft_masks
from layers.nms import NMS, cluster_nms, cross_class_nms, fast_nms, standard_nms
from layers.structures import Predictions
from layers.voting import vote

MODEL = ModelConfig(square_anchors=False)


def random_boxes(n: int, batch: int = 1) -> torch.Tensor:
    low = torch.rand(batch, n, 2) * 0.7
    return torch.cat((low, low + 0.02 + torch.rand(batch, n, 2) * 0.3), dim=-1)


def test_encode_and_decode_are_inverse():
    boxes = random_boxes(50)[0]
    anchors = to_centres(random_boxes(50)[0])
    assert torch.allclose(box_ops.decode(box_ops.encode(boxes, anchors), anchors), boxes, atol=1e-5)
    assert torch.allclose(to_corners(to_centres(boxes)), boxes, atol=1e-6)


def test_decode_stays_finite_and_in_float32():
    offsets = torch.full((1, 3, 4), 1e4, dtype=torch.bfloat16)
    out = box_ops.decode(offsets, torch.rand(3, 4) + 0.1)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_sides_are_limited():
    """To 1000 / 16 times those of the anchor, and to the inverse, as in MMDetection."""
    anchors = torch.tensor([[0.5, 0.5, 0.2, 0.1]])
    for offset, factor in ((100.0, 62.5), (-100.0, 1 / 62.5), (20.0, math.exp(4.0))):
        x1, y1, x2, y2 = box_ops.decode(torch.tensor([[0.0, 0.0, offset, offset]]), anchors)[0].tolist()
        assert (x2 - x1, y2 - y1) == (pytest.approx(0.2 * factor, rel=1e-4), pytest.approx(0.1 * factor, rel=1e-4))


@pytest.mark.parametrize(("score", "votes"), [(0.045, False), (0.055, True)])
def test_weak_boxes_do_not_vote(score, votes):
    """Two anchors with an IoU of 0.8; the second one is suppressed."""
    anchors = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.4]])
    logits = torch.tensor([[[0.0, math.log(p / (1 - p))] for p in (0.9, score)]])
    raw = Predictions(torch.zeros(1, 2, 4), logits, torch.zeros(1, 2, 1), torch.zeros(1, 1, 1, 1), None)
    found = detect(raw, anchors, DetectionConfig(box_voting=True))
    y1 = (0.25 * 0.9 + 0.3 * score) / (0.9 + score) if votes else 0.25
    assert float(found.boxes[0, 0, 1]) == pytest.approx(y1, abs=1e-5)
    assert int((found.scores > 0).sum()) == 1


def test_overlaps():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    assert torch.allclose(box_ops.box_iou(a, b), torch.tensor([[1 / 7, 0.0], [0.0, 0.0]]))
    assert torch.allclose(box_ops.box_iof(a, b)[0], torch.tensor([0.25, 0.0]))


@pytest.mark.parametrize("size", [(550, 550), (400, 700), (33, 97), (32, 32)])
def test_anchors_follow_the_size(size):
    anchors = make_anchors(*size, MODEL)
    assert len(anchors) == 3 * sum(h * w for h, w in feature_sizes(*size))
    pixels = anchors * torch.tensor([size[1], size[0], size[1], size[0]])
    assert torch.allclose(pixels[0, 2:], torch.tensor([24.0, 24.0]), atol=1e-3)
    ratio = pixels[1, 2] / pixels[1, 3]
    assert float(ratio) == pytest.approx(0.5, rel=1e-4)
    square = make_anchors(*size, replace(MODEL, square_anchors=True))
    square *= torch.tensor([size[1], size[0], size[1], size[0]])
    assert torch.allclose(square[:, 2], square[:, 3], atol=1e-3)


def test_anchors_at_multiples_of_the_stride():
    """The anchors of a larger input contain those of a smaller one. Evenly spread, they move instead."""
    for even in (False, True):
        model = replace(MODEL, even_anchors=even)
        centres = []
        for height, width in ((512, 512), (544, 736)):
            anchors = make_anchors(height, width, model)
            rows, columns = feature_sizes(height, width)[-1]
            last = anchors[-3 * rows * columns :].unflatten(0, (rows, columns, 3))[:4, :4]
            centres.append(last * torch.tensor([width, height, width, height]))
        assert torch.equal(centres[0][0, 0, 0, :2], torch.tensor([64.0, 64.0]))
        assert torch.allclose(*centres, atol=1e-3) != even
    # 550 / 5 = 110 pixels instead of a stride of 128.
    spread = make_anchors(550, 550, replace(MODEL, even_anchors=True))[-1, :2] * 550
    assert torch.allclose(spread, torch.tensor([495.0, 495.0]), atol=1e-3)


def test_fast_nms_against_its_definition():
    """Drop a box if any better one of its class, dropped or not, overlaps it."""
    boxes, scores = random_boxes(60), torch.rand(1, 3, 60)
    scores[0, :, 50:] = -1
    kept = fast_nms(boxes, scores, 0.5, top_k=40, max_detections=100)
    wanted = []
    for label in range(3):
        order = scores[0, label].argsort(descending=True)[:40]
        for rank, i in enumerate(order):
            better = box_ops.box_iou(boxes[0, i][None], boxes[0, order[:rank]])
            if scores[0, label, i] > 0 and not (better > 0.5).any():
                wanted.append((float(scores[0, label, i]), label, int(i)))
    wanted = sorted(wanted, reverse=True)[:100]
    used = kept.scores[0] > 0
    found = list(
        zip(kept.scores[0][used].tolist(), kept.labels[0][used].tolist(), kept.indices[0][used].tolist(), strict=True)
    )
    assert found == wanted
    assert kept.scores.shape == (1, 100)


@pytest.mark.parametrize("hot", [0, 3, 150, 2000])
@pytest.mark.parametrize("nms", NMS)
def test_dropping_weak_anchors_changes_nothing(nms, hot):
    """Few objects, none, crowds, all anchors: the shortcut for the CPU gives the same detections."""
    size = 200
    anchors = make_anchors(size, size, MODEL)
    rows = 2 * -(-size // 8)
    offsets, coefficients = torch.randn(2, len(anchors), 4), torch.randn(2, len(anchors), 8)
    logits = torch.randn(2, len(anchors), 21)
    logits[..., 0] += 9
    for b in range(2):
        some = torch.randperm(len(anchors))[:hot]
        logits[b, some, 0] -= 9
        logits[b, some, torch.randint(1, 6, (len(some),))] += 6 * torch.rand(len(some))
    raw = Predictions(offsets, logits, coefficients, torch.zeros(2, rows, rows, 8), None)
    for options in ({}, {"score_threshold": 0.3}, {"pre_nms_top_k": 100}, {"score_threshold": 0.3, "box_voting": True}):
        config = DetectionConfig(nms=nms, **options)
        fixed, dropped = (detect(raw, anchors, config, drop_weak_anchors=drop) for drop in (False, True))
        for b in range(2):
            used = int((fixed.scores[b] > 0).sum())
            assert int((dropped.scores[b] > 0).sum()) == used
            for wanted, found in zip(fixed, dropped, strict=True):
                assert torch.equal(wanted[b, :used], found[b, :used])


def kept_set(kept):
    used = kept.scores[0] > 0
    return set(zip(kept.labels[0][used].tolist(), kept.indices[0][used].tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_nms_variants_against_torchvision(seed):
    """Cluster-NMS keeps what sequential NMS keeps, Fast NMS a part of it."""
    torch.manual_seed(seed)
    boxes, scores = random_boxes(80), torch.rand(1, 2, 80)
    labels = torch.arange(2).repeat_interleave(80)
    stay = batched_nms(boxes[0].repeat(2, 1), scores[0].flatten(), labels, 0.3)
    wanted = {(int(i) // 80, int(i) % 80) for i in stay}
    sizes = {"iou_threshold": 0.3, "top_k": 80, "max_detections": 160}
    assert kept_set(standard_nms(boxes, scores, **sizes)) == wanted
    assert kept_set(cluster_nms(boxes, scores, **sizes)) == wanted
    fast = kept_set(fast_nms(boxes, scores, **sizes))
    assert fast < wanted


def test_score_penalty_lowers_what_overlaps():
    boxes = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [0.12, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]]])
    scores = torch.tensor([[[0.9, 0.8, 0.7]]])
    kept = NMS["cluster_penalty"](boxes, scores)
    assert kept.indices[0].tolist() == [0, 2, 1]
    assert kept.scores[0, :2].tolist() == pytest.approx([0.9, 0.7])
    assert kept.scores[0, 2] < 0.05


def test_cross_class_nms_keeps_one_class_a_place():
    boxes = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.51], [0.6, 0.6, 0.9, 0.9]]])
    scores = torch.tensor([[[0.9, 0.2, 0.1], [0.3, 0.8, 0.6]]])
    kept = cross_class_nms(boxes, scores)
    used = kept.scores[0] > 0
    assert kept.indices[0][used].tolist() == [0, 2]
    assert kept.labels[0][used].tolist() == [0, 1]
    assert (fast_nms(boxes, scores).scores[0] > 0).sum() == 4


def test_box_voting_by_hand():
    """Two boxes agree on an object, one box stands alone, and a slot is unused."""
    voters = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.54], [0.6, 0.6, 0.9, 0.9], [0.1, 0.1, 0.5, 0.9]]])
    voter_scores = torch.tensor([[[0.8, 0.4, 0.9, 0.7]]])
    boxes, scores = voters[:, [2, 0, 1]], torch.tensor([[0.9, 0.8, -1.0]])
    found, rescored, order = vote(boxes, scores, torch.zeros(1, 3, dtype=torch.long), voters, voter_scores)
    assert order.tolist() == [[1, 0, 2]]  # two weaker boxes outweigh one stronger box
    assert rescored[0].tolist() == pytest.approx([0.8 * (1.2 / 30) ** 0.5, 0.9 * (0.9 / 30) ** 0.5, -1])
    assert found[0, 0].tolist() == pytest.approx([0.1, 0.1, 0.5, (0.8 * 0.5 + 0.4 * 0.54) / 1.2])
    assert torch.equal(found[0, 1], voters[0, 2])


def test_votes_count_for_their_class_only_and_full_support_changes_nothing():
    voters = torch.tensor([[0.1, 0.1, 0.5, 0.5]]).expand(1, 60, 4)
    voter_scores = torch.stack((torch.full((60,), 0.6), torch.zeros(60)))[None]
    scores, labels = torch.tensor([[0.6, 0.5]]), torch.tensor([[0, 1]])
    found, rescored, _ = vote(voters[:, :2], scores, labels, voters, voter_scores)
    assert rescored[0].tolist() == pytest.approx([0.6, 0.5 * (0.5 / 30) ** 0.5])  # the second votes for itself
    assert torch.allclose(found, voters[:, :2])


def test_voting_does_not_depend_on_the_score_threshold():
    anchors = to_centres(random_boxes(200)[0])
    raw = raw_predictions(anchors=200)
    low, high = (
        detect(raw, anchors, DetectionConfig(score_threshold=t, strict_threshold=t > 0.05, box_voting=True))
        for t in (0.05, 0.1)
    )
    count = int((high.scores > 0).sum(dim=1).min())
    assert count > 3
    assert (high.scores[high.scores > 0] >= 0.1).all()
    for a, b in zip(low, high, strict=True):
        assert torch.equal(a[:, :count], b[:, :count])


def raw_predictions(batch: int = 2, anchors: int = 15, classes: int = 4):
    """For an input of 8x8: one position in each of five levels, with as many anchors each."""
    return Predictions(
        0.3 * torch.randn(batch, anchors, 4),
        2 * torch.randn(batch, anchors, classes + 1),
        torch.rand(batch, anchors, 8),
        torch.rand(batch, 2, 2, 8),
        None,
    )


def test_detect_gives_the_same_alone_and_in_a_batch():
    anchors = to_centres(random_boxes(200)[0])
    raw = raw_predictions(anchors=200)
    together = detect(raw, anchors, DetectionConfig())
    for b in range(2):
        alone = detect(Predictions(*(x[b : b + 1] for x in raw[:4]), None), anchors, DetectionConfig())
        for one, both in zip(alone, together, strict=True):
            assert torch.equal(one[0], both[b])


def test_detect_has_fixed_shapes_without_detections():
    anchors = to_centres(random_boxes(200)[0])
    raw = raw_predictions(anchors=200)
    raw.logits[..., 0] = 50
    found = detect(raw, anchors, DetectionConfig(top_k=30))
    assert found.boxes.shape == (2, 30, 4)
    assert (found.scores == -1).all()


def test_levels_follow_from_the_prototypes():
    from layers.anchors import positions_per_level

    for size in ((550, 550), (97, 333)):
        anchors = make_anchors(*size, MODEL)
        rows, columns = prototype_size(*size)
        raw = raw_predictions(1, len(anchors))._replace(prototypes=torch.zeros(1, rows, columns, 8))
        assert positions_per_level(raw) == [h * w for h, w in feature_sizes(*size)]
    few = detect(raw_predictions(), random_boxes(15)[0], DetectionConfig(pre_nms_top_k=2, top_k=400))
    assert few.boxes.shape[1] == 4 * 5 * 2  # classes, levels, anchors of each


def test_the_threshold_of_the_configuration_is_monotonous():
    """A higher threshold never gives more detections. At the published one, weak classes of an anchor may remain."""
    anchors = to_centres(random_boxes(200)[0])
    raw = raw_predictions(anchors=200)
    counts = []
    for threshold in (0.0, 0.01, 0.05, 0.06, 0.3, 0.6, 0.99):
        scores = detect(
            raw, anchors, DetectionConfig(score_threshold=threshold, strict_threshold=threshold > 0.05, top_k=2000)
        ).scores
        counts.append(int((scores > 0).sum()))
        if threshold > 0.05:
            assert ((scores >= threshold) | (scores == -1)).all()
    assert counts == sorted(counts, reverse=True)
    assert counts[1] > counts[3] > counts[4] > counts[5] > 0
    assert (detect(raw, anchors, DetectionConfig(top_k=2000)).scores < 0.05).any()
    clipped = detect(raw, anchors, DetectionConfig(top_k=2000, strict_threshold=True)).scores  # as MMDetection
    assert ((clipped >= 0.05) | (clipped == -1)).all()


def masks_of(prototypes, coefficients, boxes, size, budget=2**28, **options):
    config = DetectionConfig(**options)
    return torch.cat(list(assemble_masks(prototypes, coefficients, boxes, size, config, budget)))


def test_masks_in_chunks_are_the_same():
    prototypes, coefficients = torch.rand(20, 24, 8), torch.randn(9, 8)
    boxes = random_boxes(9)[0]
    whole = masks_of(prototypes, coefficients, boxes, (61, 83))
    chunks = list(assemble_masks(prototypes, coefficients, boxes, (61, 83), DetectionConfig(), 2 * 61 * 83 * 5))
    assert max(map(len, chunks)) == 2
    assert torch.equal(torch.cat(chunks), whole)


def test_lower_thresholds_give_larger_masks():
    args = torch.rand(20, 24, 8), torch.randn(9, 8), random_boxes(9)[0], (61, 83)
    low, half, high = (masks_of(*args, mask_threshold=t) for t in (0.3, 0.5, 0.7))
    assert torch.equal(half, masks_of(*args))
    assert not (high & ~half).any()
    assert not (half & ~low).any()
    assert high.sum() < half.sum() < low.sum()


def test_crop_after_resize_leaves_no_pixel_outside_the_box():
    boxes, size = random_boxes(5)[0], (200, 300)
    args = torch.ones(16, 16, 1), torch.full((5, 1), 4.0), boxes, size
    leaky, tight = masks_of(*args), masks_of(*args, crop_after_resize=True)
    inside = crop_window(boxes, *size, padding=0)
    assert (leaky & ~inside).any()
    assert not (tight & ~inside).any()
    assert masks_of(*args, crop=False).all()


def test_crop_window_takes_corners_in_any_order():
    a = crop_window(torch.tensor([[0.2, 0.3, 0.6, 0.8]]), 40, 50)
    b = crop_window(torch.tensor([[0.6, 0.8, 0.2, 0.3]]), 40, 50)
    assert torch.equal(a, b)
    assert a.any()


def test_maskness_is_the_mean_inside():
    masks = torch.tensor([[[0.9, 0.7], [0.5, 0.1]], [[0.2, 0.1], [0.0, 0.3]], [[1.0, 1.0], [1.0, 1.0]]])
    assert maskness(masks).tolist() == pytest.approx([0.8, 0, 1])
    assert maskness(masks, 0.25).tolist() == pytest.approx([0.7, 0.3, 1])
    assert maskness(masks[:0]).shape == (0,)


def test_masks_are_float32():
    assert soft_masks(torch.rand(4, 4, 2).bfloat16(), torch.rand(3, 2).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("size", [(48, 64), (301, 203), (5, 400), (1, 1)])
def test_upsampled_windows_equal_upsampled_masks(size):
    prototypes, coefficients = torch.rand(31, 40, 6), torch.randn(30, 6)
    low = torch.rand(30, 2) * 1.4 - 0.2  # some lie partly or entirely outside
    boxes = torch.cat((low, low + torch.rand(30, 2)), dim=1)
    boxes[0] = boxes[0, [2, 3, 0, 1]]
    for threshold in (0.3, 0.5):
        soft = soft_masks(prototypes, coefficients, boxes)
        whole = torch.nn.functional.interpolate(soft[None], size, mode="bilinear", align_corners=False)[0] > threshold
        windows = masks_of(prototypes, coefficients, boxes, size, 2**17, mask_threshold=threshold)
        assert whole.any() or size == (1, 1)
        assert torch.equal(whole, windows)
