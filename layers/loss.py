"""The training loss: matching, hard negative mining and one method per term (paper, section 3; SSD)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import LossConfig
from layers.boxes import area, box_iof, box_iou, encode, to_corners
from layers.masks import crop_window, mask_logits
from layers.structures import Predictions, Target

# The weights of the authors' released code: box 1.5, mask 6.125 (paper, section 3), mask IoU 25 (YOLACT++).
WEIGHTS = {"box": 1.5, "class": 1.0, "mask": 6.125, "semantic": 1.0, "mask_iou": 25.0}
TERMS = tuple(WEIGHTS)
# An anchor is positive from the first IoU on and negative below the second (released code; SSD has 0.5 for both).
POSITIVE_IOU, NEGATIVE_IOU = 0.5, 0.4
NEGATIVES_PER_POSITIVE = 3  # SSD, section 2.2
# An image without objects mines as many negatives as one with this many positive anchors: enough to unlearn its false
# positives, too few to outweigh other images. Mining per image keeps accumulated micro-batches equal to one batch.
EMPTY_POSITIVES = 10
# The mask IoU network learns from masks of more pixels than this, thresholded at a half (released code).
MASK_IOU_MIN_AREA, MASK_IOU_THRESHOLD = 25, 0.5


class Matches(NamedTuple):
    """What each anchor of each image should predict."""

    objects: Tensor  # [B, A] index of the ground truth
    classes: Tensor  # [B, A] label + 1, 0 for background, -1 for ignored anchors
    boxes: Tensor  # [B, A, 4] the matched ground truth boxes

    @property
    def positive(self) -> Tensor:
        return self.classes > 0


class MultiBoxLoss:
    """Compute {"box", "class", "mask", "semantic", "mask_iou"}, weighted scalars to be summed.

    The keys are the same whatever is in the images. Everything is computed in float32. The box, class, mask and mask
    IoU terms are sums over the positive anchors divided by their number in the batch; the semantic term is a mean
    over the images.
    """

    def __init__(self, config: LossConfig):
        self.config = config

    def __call__(
        self,
        predictions: Predictions,
        anchors: Tensor,
        targets: list[Target],
        mask_iou_net: Callable[[Tensor], Tensor] | None = None,
        num_positives: Tensor | float | None = None,
        num_images: float | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            predictions: raw outputs of B images, in training mode.
            anchors: [A, 4] in centre form, relative.
            targets: B dictionaries, see `Target`.
            mask_iou_net: the model's `mask_iou`, for YOLACT++.
            num_positives: the number of positive anchors to divide by, where the batch is shared by processes or
                accumulated in micro-batches. By default this batch's own.
            num_images: likewise the number of images.
        """
        offsets, logits = predictions.boxes.float(), predictions.logits.float()
        matches = self.match(anchors, targets)
        if num_positives is None:
            num_positives = matches.positive.sum().clamp(min=1)
        divisor = torch.as_tensor(num_positives, device=offsets.device)
        mask, mask_iou = self.mask_terms(predictions, matches, targets, mask_iou_net)
        losses = {
            "box": self.box_term(offsets, anchors, matches) / divisor,
            "class": self.class_term(logits, matches) / divisor,
            "mask": mask / divisor,
            "semantic": self.semantic_term(predictions.semantic, targets) / (num_images or len(targets)),
            "mask_iou": mask_iou / divisor,
        }
        return {term: WEIGHTS[term] * value for term, value in losses.items()}

    @torch.no_grad()
    def match(self, anchors: Tensor, targets: list[Target]) -> Matches:
        """Match every anchor [A, 4] of every image with an object, the background, or nothing."""
        corners = to_corners(anchors)
        matched = [self._match_one(corners, target) for target in targets]
        return Matches(*(torch.stack(x) for x in zip(*matched, strict=True)))

    def _match_one(self, corners: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        boxes, labels = target["boxes"], target["labels"]
        if len(boxes):
            overlaps = box_iou(boxes, corners)  # [n, A]
            best, objects = overlaps.max(dim=0)
            # Every object gets at least one anchor, however small or oddly shaped it is.
            _force_matches(overlaps, best, objects)
            classes = labels[objects] + 1
            # Anchors between the two thresholds are neither positive nor negative.
            classes = classes.masked_fill(best < POSITIVE_IOU, -1).masked_fill(best < NEGATIVE_IOU, 0)
            matched = boxes[objects]
        else:
            objects = torch.zeros(len(corners), dtype=torch.long, device=corners.device)
            classes, matched = objects.clone(), corners.new_ones(len(corners), 4)
        if len(target["crowds"]) and self.config.crowd_iou < 1:
            # An anchor inside a crowd may show an object that nobody annotated, so it is no negative.
            inside = box_iof(corners, target["crowds"]).amax(dim=1)
            classes = classes.masked_fill((classes <= 0) & (inside > self.config.crowd_iou), -1)
        return objects, classes, matched

    def box_term(self, offsets: Tensor, anchors: Tensor, matches: Matches) -> Tensor:
        """Smooth L1 between offsets [B, A, 4] and the encoded boxes, summed over the positives."""
        positive = matches.positive
        # Anchors without an object get their own box: its encoding is finite, and it is masked out below.
        boxes = torch.where(positive[..., None], matches.boxes, to_corners(anchors))
        loss = F.smooth_l1_loss(offsets, encode(boxes, anchors), reduction="none").sum(dim=-1)
        return (loss * positive).sum()

    def class_term(self, logits: Tensor, matches: Matches) -> Tensor:
        """Cross-entropy of logits [B, A, C + 1], summed over the positives and the hardest negatives (OHEM).

        Thousands of background anchors would outweigh a few positives. So only NEGATIVES_PER_POSITIVE background
        anchors per positive of an image count: those with the largest cross-entropy, which are the ones least
        confident of being background.
        """
        classes, positive = matches.classes, matches.positive
        cross_entropy = logits.logsumexp(dim=-1) - logits.gather(2, classes.clamp(min=0)[..., None])[..., 0]
        hardest = cross_entropy.masked_fill(classes != 0, 0).sort(dim=1, descending=True).values
        count = positive.sum(dim=1)
        count = torch.where(count == 0, EMPTY_POSITIVES, count) * NEGATIVES_PER_POSITIVE
        mined = torch.arange(classes.shape[1], device=classes.device) < count[:, None]
        return (cross_entropy * positive).sum() + (hardest * mined).sum()

    def mask_terms(
        self,
        predictions: Predictions,
        matches: Matches,
        targets: list[Target],
        mask_iou_net: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """The mask and mask IoU terms, summed over the positives.

        The mask term is the binary cross-entropy inside the ground truth box, divided by the box's area, so that
        small objects count as much as large ones. It is computed from logits and inside the box only: a mask that
        extends past its box, as shifted annotations have it, cannot make it explode.
        """
        size = predictions.prototypes.shape[1:3]
        # Without any object the loss is 0 and still depends on both outputs: DDP expects a gradient for everything.
        mask_loss = predictions.prototypes[:0].float().sum() + predictions.coefficients[:0].float().sum()
        soft_masks, true_masks, mask_labels = [], [], []
        for b, target in enumerate(targets):
            chosen = self._sample(matches.positive[b], target)
            if not len(chosen):
                continue
            objects, boxes = matches.objects[b, chosen], matches.boxes[b, chosen]
            logits = mask_logits(predictions.prototypes[b], predictions.coefficients[b, chosen])
            loss = mask_cross_entropy(logits, target["masks"], objects, boxes, self.config.mask_supersample)
            # A sample stands for all positives of its image.
            mask_loss = mask_loss + loss.sum() * (matches.positive[b].sum() / len(chosen))
            if mask_iou_net is not None:
                soft_masks.append(logits.sigmoid() * crop_window(boxes, *size))
                true_masks.append(resize_truth(target["masks"], size)[objects])
                mask_labels.append(target["labels"][objects])
        if mask_iou_net is None:
            return mask_loss, torch.zeros_like(mask_loss)
        return mask_loss, _mask_iou_term(mask_iou_net, size, soft_masks, true_masks, mask_labels)

    def _sample(self, positive: Tensor, target: Target) -> Tensor:
        """Indices of at most `masks_to_train` positive anchors of one image [A]."""
        chosen = positive.nonzero()[:, 0]
        if len(chosen) <= self.config.masks_to_train:
            return chosen
        generator = torch.Generator().manual_seed(int(target["seed"])) if "seed" in target else None
        some = torch.randperm(len(chosen), generator=generator)[: self.config.masks_to_train]
        return chosen[some.to(chosen.device)]

    def semantic_term(self, semantic: Tensor | None, targets: list[Target]) -> Tensor:
        """Binary cross-entropy of class maps [B, C, h, w], mean over pixels, summed over classes and images."""
        if semantic is None:
            raise ValueError("no semantic maps: the model must be in training mode")
        truth = torch.zeros_like(semantic, dtype=torch.float32)
        for b, target in enumerate(targets):
            if len(target["labels"]):
                truth[b].index_add_(0, target["labels"], resize_truth(target["masks"], semantic.shape[2:]))
        loss = F.binary_cross_entropy_with_logits(semantic.float(), truth.clamp(max=1), reduction="sum")
        return loss / (semantic.shape[2] * semantic.shape[3])


def _mask_iou_term(
    net: Callable[[Tensor], Tensor],
    size: tuple[int, ...],
    soft_masks: list[Tensor],
    true_masks: list[Tensor],
    labels: list[Tensor],
) -> Tensor:
    """Smooth L1 between the IoU that `net` predicts for each mask and its true IoU (YOLACT++, section 6.1)."""
    soft = torch.cat(soft_masks) if soft_masks else torch.zeros(0, *size)
    truth = torch.cat(true_masks) if true_masks else torch.zeros(0, *size)
    large = truth.sum(dim=(1, 2)) > MASK_IOU_MIN_AREA
    if not large.any():
        # Use the weights all the same: every process of a distributed run must have a gradient for them.
        device = next(net.parameters()).device if isinstance(net, torch.nn.Module) else None
        return net(torch.zeros(1, *size, device=device)).sum() * 0
    soft, truth, label = soft[large], truth[large], torch.cat(labels)[large]
    hard = (soft > MASK_IOU_THRESHOLD).float()
    shared = (hard * truth).sum(dim=(1, 2))
    iou = shared / (hard.sum(dim=(1, 2)) + truth.sum(dim=(1, 2)) - shared)
    predicted = net(soft).float().gather(1, label[:, None])[:, 0]
    return F.smooth_l1_loss(predicted, iou.detach(), reduction="sum")


def mask_cross_entropy(logits: Tensor, masks: Tensor, objects: Tensor, boxes: Tensor, supersample: int = 1) -> Tensor:
    """Return [N]: the cross-entropy of each mask inside its box, divided by the box's area (paper, section 3.1).

    Args:
        logits: [N, h, w].
        masks: [n, H, W] of the image's objects.
        objects: [N], which of them each belongs to.
        boxes: [N, 4] of those objects, in corner form, relative.
        supersample: compare at this multiple of h and w. The soft masks are upsampled as in inference, so an object
            that is a pixel wide keeps its outline, where one thresholded at the prototypes' size would vanish.
    """
    size = (logits.shape[1] * supersample, logits.shape[2] * supersample)
    truth = resize_truth(masks, size)[objects]
    if supersample == 1:
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    else:
        soft = F.interpolate(logits.sigmoid()[None], size, mode="bilinear", align_corners=False)[0]
        loss = F.binary_cross_entropy(soft, truth, reduction="none")
    window = crop_window(boxes, *size, padding=supersample)
    return (loss * window).sum(dim=(1, 2)) / (area(boxes) * size[0] * size[1])


def resize_truth(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    """Masks [n, H, W] of any type -> float 0 or 1 at `size`, bilinear and thresholded at a half (released code)."""
    if tuple(masks.shape[1:]) == tuple(size):
        return masks.float()
    return (F.interpolate(masks[None].float(), tuple(size), mode="bilinear", align_corners=False)[0] > 0.5).float()


def _force_matches(overlaps: Tensor, best: Tensor, objects: Tensor) -> None:
    """Give each object one anchor of its own, the best one still free, best pair first.

    Takes overlaps [n, A] and writes 2, above any threshold, into `best` [A] and the object's index into `objects` [A].
    An object loses at most n - 1 anchors to the others, so its n best suffice. Nothing synchronises with the device.

    Equal overlaps are common, as all anchors of one size inside an object have the same, and the first of them must be
    taken. The bits of a float that is not negative sort like the float, so bits and index form one unique key.
    """
    count, num_anchors = min(overlaps.shape), overlaps.shape[1]
    order = torch.arange(num_anchors, 0, -1, device=overlaps.device)
    anchors = (overlaps.view(torch.int32).long() * 2**32 + order).topk(count, dim=1).indices
    values = overlaps.gather(1, anchors)
    for _ in range(count):
        pair = values.argmax().reshape(1)
        row, anchor = torch.div(pair, count, rounding_mode="floor"), anchors.flatten()[pair]
        best.index_fill_(0, anchor, 2.0)
        objects.index_copy_(0, anchor, row)
        values.masked_fill_(anchors == anchor, -1.0)
        values.index_fill_(0, row, -1.0)
