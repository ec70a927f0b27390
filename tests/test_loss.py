from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import to_corners

from config import get_config
from layers.anchors import make_anchors
from layers.boxes import box_iou
from layers.loss import TERMS, MultiBoxLoss, Part, _mask_iou_term, count_anchors, mask_cross_entropy, resize_truth
from layers.masks import crop_window
from layers.matching import Matches
from yolact import MaskIoUNet, Predictions

CONFIG = get_config("yolact_resnet50", class_names=("a", "b", "c"), category_ids=(1, 2, 3))
ANCHORS = make_anchors(128, 128, replace(CONFIG.model, square_anchors=False))


def predictions(batch: int, classes: int = 3) -> Predictions:
    shapes = ((len(ANCHORS), 4), (len(ANCHORS), classes + 1), (len(ANCHORS), 32), (32, 32, 32), (classes, 16, 16))
    out = Predictions(*(0.5 * torch.randn(batch, *shape) for shape in shapes))
    for value in out:
        value.requires_grad_()
    return out


def target(n: int = 2, crowds: int = 0) -> dict[str, torch.Tensor]:
    low = torch.rand(n + crowds, 2) * 0.5
    boxes = torch.cat((low, low + 0.2 + 0.2 * torch.rand(n + crowds, 2)), dim=1)
    masks = torch.zeros(n, 64, 64, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, (boxes[:n] * 64).long(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes[:n], "labels": torch.randint(3, (n,)), "masks": masks, "crowds": boxes[n:]}


EMPTY = target(0)


@pytest.mark.parametrize("targets", [[target(), EMPTY], [EMPTY, EMPTY], [target(0, crowds=2)], [target(3, crowds=1)]])
def test_keys_never_change_and_all_is_finite(targets):
    raw = predictions(len(targets))
    losses = MultiBoxLoss(CONFIG.loss)(raw, ANCHORS, targets)
    assert tuple(losses) == TERMS
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    assert raw.logits.grad.isfinite().all()


def test_a_picture_without_objects_unlearns_its_strongest_mistakes():
    raw = predictions(1)
    losses = MultiBoxLoss(CONFIG.loss)(raw, ANCHORS, [EMPTY])
    assert losses["class"] > 0
    assert losses["box"] == losses["mask"] == 0
    losses["class"].backward()
    touched = raw.logits.grad[0].abs().sum(dim=1) > 0
    assert touched.sum() == 3 * 10
    foreground = raw.logits[0].softmax(dim=1)[:, 1:].sum(dim=1)
    assert foreground[touched].min() >= foreground[~touched].max()


def test_where_negatives_run_short_nothing_takes_their_place():
    """Three are mined for a positive anchor, and two exist. All anchors are nearly right, so each costs little."""
    classes = torch.tensor([[1, 0, 0, -1]])
    logits = torch.tensor([[[0.0, 5, 0, 0], [5, 0, 0, 0], [4, 0, 0, 0], [0, 5, 0, 0]]])
    matches = Matches(torch.zeros(1, 4, dtype=torch.long), classes, torch.zeros(1, 4, 4))
    wanted = torch.nn.functional.cross_entropy(logits[0, :3], classes[0, :3], reduction="sum")
    assert MultiBoxLoss(CONFIG.loss).class_term(logits, matches) == pytest.approx(float(wanted), rel=1e-5)


def test_every_object_gets_an_anchor_of_its_own():
    """Even if all want the same one, and though none overlaps by half."""
    boxes = torch.tensor([[0.5, 0.5, 0.52, 0.52]] * 3 + [[0.1, 0.1, 0.9, 0.2]])
    some = {
        "boxes": boxes,
        "labels": torch.tensor([0, 1, 2, 0]),
        "masks": torch.zeros(4, 8, 8),
        "crowds": torch.zeros(0, 4),
    }
    matches = MultiBoxLoss(CONFIG.loss).match(ANCHORS, [some])
    owners = matches.objects[0][matches.positive[0]]
    assert set(owners.tolist()) == {0, 1, 2, 3}
    assert torch.equal(matches.classes[0][matches.positive[0]], some["labels"][owners] + 1)


def atss(boxes, sizes=(64, 16)):
    """Match boxes, in pixels of an input of 64 x 64, to two levels of square anchors of 8 and 16 pixels."""
    y, x = torch.meshgrid(torch.arange(8) * 8.0 + 4, torch.arange(8) * 8.0 + 4, indexing="ij")
    small = torch.stack((x, y, torch.full_like(x, 8), torch.full_like(x, 8)), dim=-1).reshape(-1, 4)
    y, x = torch.meshgrid(torch.arange(4) * 16.0 + 8, torch.arange(4) * 16.0 + 8, indexing="ij")
    large = torch.stack((x, y, torch.full_like(x, 16), torch.full_like(x, 16)), dim=-1).reshape(-1, 4)
    anchors = torch.cat((small, large)) / 64
    boxes = torch.tensor(boxes) / 64
    some = {"boxes": boxes, "labels": torch.arange(len(boxes)) % 3, "crowds": torch.zeros(0, 4)}
    config = get_config("yolact_resnet50", assigner="atss").loss
    return MultiBoxLoss(config).match(anchors, [some], list(sizes)), anchors


@pytest.mark.parametrize(("box", "count"), [([17.0, 17.0, 33.0, 33.0], 1), ([28.0, 32.0, 41.0, 48.0], 3)])
def test_atss_follows_the_paper(box, count):
    """Computed by hand: the 9 nearest anchors of each level, their IoUs, mean + standard deviation, centre inside."""
    matches, anchors = atss([box])
    corners = to_corners(anchors) * 64
    overlaps = box_iou(torch.tensor([box]), corners)[0]
    x1, y1, x2, y2 = box
    distances = (anchors[:, :2] * 64 - torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2])).norm(dim=1)
    nearest = torch.cat((distances[:64].argsort(stable=True)[:9], 64 + distances[64:].argsort(stable=True)[:9]))
    # Anchors at the same distance may be chosen in any order; here they have the same IoU.
    threshold = overlaps[nearest].mean() + overlaps[nearest].std()
    low, high = torch.tensor(box).split(2)
    inside = ((anchors[:, :2] * 64 > low) & (anchors[:, :2] * 64 < high)).all(dim=1)
    expected = {int(i) for i in nearest if overlaps[i] >= threshold and inside[i]}
    assert set(matches.positive[0].nonzero()[:, 0].tolist()) == expected
    assert len(expected) == count  # one is the anchor that every object gets
    assert (matches.classes >= 0).all()  # none is ignored


def test_atss_gives_every_object_an_anchor():
    """A box between four anchor centres has no centre inside; two boxes never share an anchor."""
    boxes = [[6.0, 6.0, 10.0, 10.0], [0.0, 0.0, 32.0, 32.0], [1.0, 1.0, 31.0, 31.0], [40.0, 40.0, 63.0, 63.0]]
    matches, _ = atss(boxes)
    owners = matches.objects[0][matches.positive[0]]
    assert set(owners.tolist()) == {0, 1, 2, 3}
    positive = matches.positive[0]
    assert torch.equal(matches.boxes[0][positive], torch.tensor(boxes)[owners] / 64)
    assert torch.equal(matches.classes[0][positive], owners % 3 + 1)


def test_thresholds_and_crowds():
    some = target(2)
    matches = MultiBoxLoss(CONFIG.loss).match(ANCHORS, [some])
    best = box_iou(some["boxes"], to_corners(ANCHORS)).amax(dim=0)
    classes = matches.classes[0]
    assert (classes[best >= 0.5] > 0).all()
    assert (classes[(best >= 0.4) & (best < 0.5)] != 0).all()
    some["crowds"] = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    crowded = MultiBoxLoss(CONFIG.loss).match(ANCHORS, [some]).classes[0]
    inside = (to_corners(ANCHORS) >= 0).all(dim=1) & (to_corners(ANCHORS) <= 1).all(dim=1)
    assert (crowded[inside] != 0).all()
    assert torch.equal(crowded > 0, classes > 0)


def test_mask_outside_of_its_box_cannot_explode():
    """As shifted annotations have it; the original's loss takes 100 for each such pixel."""
    some = target(1)
    some["masks"][:] = 1
    losses = MultiBoxLoss(CONFIG.loss)(predictions(1), ANCHORS, [some])
    assert losses["mask"] < 30


def test_upsampled_masks_keep_what_is_thinner_than_a_prototype_pixel():
    """Thresholded at the prototypes' size such an object vanishes; upsampled as in inference it keeps its outline."""
    masks = torch.zeros(1, 64, 64)
    masks[:, 10:50, 21:23] = 1  # half of each of two prototype pixels
    boxes, first = torch.tensor([[21 / 64, 10 / 64, 23 / 64, 50 / 64]]), torch.tensor([0])
    gradients = []
    for supersample in (1, 2):
        logits = torch.full((1, 32, 32), -1.0, requires_grad=True)
        mask_cross_entropy(logits, masks, first, boxes, supersample).sum().backward()
        gradients.append(logits.grad[0, 15, 10])
    assert gradients[0] > 0 > gradients[1]

    logits = torch.full((1, 32, 32), 0.0, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(100):
        loss = mask_cross_entropy(logits, masks, first, boxes, 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    soft = logits.detach().sigmoid() * crop_window(boxes, 32, 32)
    found = torch.nn.functional.interpolate(soft[None], (64, 64), mode="bilinear", align_corners=False)[0] > 0.5
    both, either = (found & (masks > 0)).sum(), (found | (masks > 0)).sum()
    assert both / either > 0.45


@pytest.mark.parametrize("supersample", [2, 3])
def test_upsampling_around_the_box_is_exact(supersample):
    """Boxes at the borders, in the middle and over the whole image; the reference upsamples whole masks."""
    torch.manual_seed(0)
    height, width = 12, 16
    size = (height * supersample, width * supersample)
    boxes = torch.tensor([[0, 0, 0.2, 0.3], [0.41, 0.33, 0.47, 0.52], [0.7, 0.6, 1, 1], [0, 0, 1, 1]])
    masks = (torch.rand(4, *size) > 0.5).float()
    objects = torch.tensor([1, 0, 3, 1, 2, 2])
    logits = torch.randn(6, height, width, requires_grad=True)
    found = mask_cross_entropy(logits, masks, objects, boxes[objects], supersample)
    found_gradient = torch.autograd.grad(found.square().sum(), logits)[0]

    soft = torch.nn.functional.interpolate(logits.sigmoid()[None], size, mode="bilinear", align_corners=False)[0]
    loss = torch.nn.functional.binary_cross_entropy(soft, masks[objects], reduction="none")
    window = crop_window(boxes[objects], *size, padding=supersample)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)[objects] * size[0] * size[1]
    expected = (loss * window).sum(dim=(1, 2)) / areas
    gradient = torch.autograd.grad(expected.square().sum(), logits)[0]
    assert torch.allclose(found, expected, rtol=1e-5)
    assert torch.allclose(found_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_upsampled_masks_cost_what_others_do():
    """Where nothing is lost by the size; and logits that are sure and wrong stay finite."""
    masks = torch.zeros(1, 64, 64)
    masks[:, 16:48, 16:48] = 1
    boxes, first = torch.tensor([[0.25, 0.25, 0.75, 0.75]]), torch.tensor([0])
    for level in (-3.0, 0.0, 2.0):
        logits = torch.full((1, 32, 32), level)
        one, two = (mask_cross_entropy(logits, masks, first, boxes, n) for n in (1, 2))
        assert torch.allclose(one, two, rtol=1e-4)
    logits = torch.full((1, 32, 32), -200.0, requires_grad=True)
    loss = mask_cross_entropy(logits, masks, first, boxes, 2).sum()
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_positives_given_from_outside():
    raw, some = predictions(1), [target(2)]
    loss = MultiBoxLoss(CONFIG.loss)
    matches = loss.match(ANCHORS, some)
    torch.manual_seed(0)
    own = loss(raw, ANCHORS, some)
    torch.manual_seed(0)
    double = loss(raw, ANCHORS, some, part=Part(matches, 2 * count_anchors(matches), 1))
    assert float(own["class"].detach()) == pytest.approx(2 * float(double["class"].detach()), rel=1e-5)
    assert float(own["mask"].detach()) == pytest.approx(2 * float(double["mask"].detach()), rel=1e-5)


def test_mask_iou_term():
    net = MaskIoUNet(3)
    loss = MultiBoxLoss(CONFIG.loss)
    some = target(2)
    some["masks"][:] = 0
    for targets in ([EMPTY], [some]):  # nothing to learn from, yet the weights are used
        loss(predictions(1), ANCHORS, targets, net)["mask_iou"].backward()
        assert all(p.grad is not None for p in net.parameters())
    raw = predictions(1)
    size = 138
    raw = raw._replace(prototypes=torch.rand(1, size, size, 32, requires_grad=True))
    losses = loss(raw, ANCHORS, [target(2)], MaskIoUNet(3).train())
    assert losses["mask_iou"] > 0


def test_the_target_of_the_mask_iou_is_that_of_the_mask_at_one_half():
    """Soft masks of 0.6 inside an object and 0.4 elsewhere are the object; the network predicts an IoU of 1."""
    truth = torch.zeros(2, 20, 20)
    truth[0, 2:12, 2:12] = 1  # 100 pixels
    truth[1, :5, :5] = 1  # 25 pixels, which is too small

    def loss(soft, predicted):
        return float(
            _mask_iou_term(lambda masks: torch.full((len(masks), 1), predicted), soft, truth, torch.zeros(2).long())
        )

    assert loss(0.4 + 0.2 * truth, 1.0) == 0
    assert loss(0.4 + 0.2 * truth, 0.0) == pytest.approx(0.5)  # smooth L1 of 1, of the large object alone
    half = truth.clone()
    half[0, 2:7] = 0
    assert loss(0.4 + 0.2 * half, 0.5) == pytest.approx(0)


def test_an_object_without_a_mask_trains_its_box_and_class_only():
    torch.manual_seed(0)
    raw, targets = predictions(2), [target(3), target(2)]
    loss = MultiBoxLoss(CONFIG.loss)
    complete = loss(raw, ANCHORS, targets)
    known = [value | {"has_mask": torch.ones(len(value["labels"]), dtype=torch.bool)} for value in targets]
    torch.testing.assert_close(loss(raw, ANCHORS, known), complete)
    known[0]["has_mask"][1] = False
    known[0]["masks"] = known[0]["masks"].clone()
    known[0]["masks"][1] = 0
    partial = loss(raw, ANCHORS, known)
    for term in ("box", "class"):
        torch.testing.assert_close(partial[term], complete[term])
    # The gradient says which outputs the mask and semantic terms read.
    (partial["mask"] + partial["semantic"]).backward()
    matches = loss.match(ANCHORS, targets)
    touched = raw.coefficients.grad.abs().sum(dim=2) > 0
    without = matches.positive & (matches.objects == 1) & torch.tensor([[True], [False]])
    assert without.any()
    assert torch.equal(touched, matches.positive & ~without)
    # The box of that object, as the semantic map sees it, without what lies in a mask of the same class.
    label, box = int(targets[0]["labels"][1]), targets[0]["boxes"][1:2]
    others = [m for m, same in zip(known[0]["masks"], targets[0]["labels"] == label, strict=True) if same]
    truth = resize_truth(torch.stack(others), (16, 16)).amax(dim=0) > 0
    silent = (crop_window(box, 16, 16)[0] > 0) & ~truth
    assert silent.any()
    assert torch.equal(raw.semantic.grad[0, label] == 0, silent)
    assert (raw.semantic.grad[0, [c for c in range(3) if c != label]] != 0).all()


def test_the_semantic_term_does_not_depend_on_the_layout_in_memory():
    """The network's output is channels_last in training; a perfect prediction costs nothing."""
    some = [target(2), target(3)]
    some[1]["has_mask"], some[0]["has_mask"] = torch.tensor([True, False, True]), torch.tensor([True, True])
    truth = torch.zeros(2, 3, 16, 16)
    for image, item in zip(truth, some, strict=True):
        for mask, label in zip(resize_truth(item["masks"], (16, 16)), item["labels"], strict=True):
            image[label] = torch.maximum(image[label], mask.float())
    semantic = (truth * 2 - 1) * 20
    loss = MultiBoxLoss(CONFIG.loss)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert loss.semantic_term(semantic.contiguous(memory_format=layout), some) < 1e-3
        assert loss.semantic_term(-semantic.contiguous(memory_format=layout), some) > 10


def test_images_without_objects_do_not_outweigh_others():
    """As many anchors count for the class term as are mined, so a batch of such images costs no more than another."""
    raw = predictions(4)
    loss = MultiBoxLoss(CONFIG.loss)
    alone, all_empty, some = (
        loss(raw, ANCHORS, targets) for targets in ([target(2)] * 4, [EMPTY] * 4, [target(2), EMPTY, EMPTY, EMPTY])
    )
    assert all_empty["class"] < 2 * alone["class"]
    assert some["class"] < 2 * alone["class"]


def test_semantic_needs_training_mode():
    with pytest.raises(ValueError, match="training mode"):
        MultiBoxLoss(CONFIG.loss)(predictions(1)._replace(semantic=None), ANCHORS, [EMPTY])


def test_loss_is_float32_under_mixed_precision():
    raw = Predictions(*(value.detach().bfloat16() for value in predictions(1)))
    assert all(value.dtype == torch.float32 for value in MultiBoxLoss(CONFIG.loss)(raw, ANCHORS, [target()]).values())


def test_resized_truth_stays_binary():
    masks = (torch.rand(2, 50, 60) > 0.5).byte()
    assert set(resize_truth(masks, (20, 20)).unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(resize_truth(masks, (50, 60)), masks.float())


def test_the_mask_loss_of_a_tiny_object_is_bounded():
    """Divided by the area of its box, 1 x 0.5 pixels of a 550 pixel input, it would be 30 times as large."""
    logits, masks = torch.zeros(1, 138, 138), torch.zeros(1, 138, 138)
    box = torch.tensor([[0.5, 0.5, 0.5 + 1 / 550, 0.5 + 0.5 / 550]])
    loss = float(mask_cross_entropy(logits, masks, torch.tensor([0]), box))
    inside = float(crop_window(box, 138, 138).sum())
    assert inside > 0
    assert loss == pytest.approx(inside * math.log(2), rel=1e-5)  # ln 2 for each pixel of the padded box
