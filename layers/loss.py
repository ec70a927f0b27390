"""The training loss: matching, hard negative mining and one method per term (paper, sections 3.3 and 5; SSD)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from config import LossConfig
from layers.anchors import positions_per_level
from layers.boxes import area, box_iof, encode
from layers.masks import crop_limits, crop_window, mask_logits
from layers.matching import ASSIGNERS, IGNORED, Grid, Matches
from layers.structures import Predictions, Target
from utils.device import to_device, to_host
from utils.errors import look_up

# Weights of the terms, from the released code and the paper (section 3.3); the mask IoU weight is that of YOLACT++.
WEIGHTS = {"box": 1.5, "class": 1.0, "mask": 6.125, "semantic": 1.0, "mask_iou": 25.0}
TERMS = tuple(WEIGHTS)
NEGATIVES_PER_POSITIVE = 3  # SSD, section 2.2
# An image without objects contributes as many negatives as one with this many positive anchors: enough to suppress
# false positives, and too few to outweigh other images. Negatives are mined per image, so that the loss does not depend
# on how a batch is split into micro-batches.
EMPTY_POSITIVES = 10
# The mask IoU network is trained on objects with more prototype pixels than this. The IoU is that of the soft mask,
# thresholded at 0.5 (released code).
MASK_IOU_MIN_AREA, MASK_IOU_THRESHOLD = 25, 0.5


class Part(NamedTuple):
    """The matches of a part of a batch, and what the losses of all parts are divided by, so that they add up."""

    matches: Matches
    divisors: Tensor  # [2], see `count_anchors`, of the whole batch, at least 1
    num_images: int  # in the whole batch


def count_anchors(matches: Matches) -> Tensor:
    """Return [2]: the number of positive anchors, and the same with EMPTY_POSITIVES for each image that has none.

    Losses of positive anchors are divided by the first. The class term is divided by the second: its negatives are
    mined as if images without objects had so many, and a batch of such images would otherwise give a huge gradient.
    """
    count = matches.positive.sum(dim=1)
    return torch.stack((count, torch.where(count == 0, EMPTY_POSITIVES, count))).sum(dim=1)


class MultiBoxLoss:
    """Compute the terms "box", "class", "mask", "semantic" and "mask_iou" of the training loss.

    All terms are computed in float32, and none is ever missing. The class term is a sum over positive and mined
    negative anchors, the box, mask and mask IoU terms are sums over positive anchors; all four are divided by the
    number of positive anchors in the batch, to which images without objects add for the class term, see
    `count_anchors`. The semantic term is a mean over the images. An object without a mask contributes to the box and
    class terms only.

    Raises UserError if the configuration's assigner is unknown.
    """

    def __init__(self, config: LossConfig):
        self.config = config
        self.assign = look_up("assigner", config.assigner, ASSIGNERS)

    def __call__(
        self,
        predictions: Predictions,
        anchors: Tensor,
        targets: list[Target],
        mask_iou_net: Callable[[Tensor], Tensor] | None = None,
        part: Part | None = None,
    ) -> dict[str, Tensor]:
        """Return a scalar for each of TERMS, already multiplied by its weight. Their sum is the loss.

        Args:
            predictions: raw outputs of B images. Raises ValueError if they are not those of training mode.
            anchors: [A, 4] in centre form, relative to the image.
            targets: B dictionaries, see `Target`.
            mask_iou_net: the model's `mask_iou`, for YOLACT++.
            part: given if `targets` is only one process's share of a batch, or a micro-batch.
        """
        offsets, logits = predictions.boxes.float(), predictions.logits.float()
        if part is None:
            matches = self.match(anchors, targets, positions_per_level(predictions))
            part = Part(matches, count_anchors(matches).clamp(min=1), len(targets))
        matches, (divisor, class_divisor) = part.matches, part.divisors.unbind()
        mask, mask_iou = self.mask_terms(predictions, matches, targets, mask_iou_net)
        losses = {
            "box": self.box_term(offsets, anchors, matches) / divisor,
            "class": self.class_term(logits, matches) / class_divisor,
            "mask": mask / divisor,
            "semantic": self.semantic_term(predictions.semantic, targets) / part.num_images,
            "mask_iou": mask_iou / divisor,
        }
        return {term: WEIGHTS[term] * value for term, value in losses.items()}

    @torch.no_grad()
    def match(self, anchors: Tensor, targets: list[Target], positions: list[int] | None = None) -> Matches:
        """Match every anchor to an object or the background, or mark it as ignored, for each image.

        Args:
            anchors: [A, 4] in centre form, relative to the image.
            targets: the ground truth of B images.
            positions: the number of positions of each level P3..P7, for ATSS. Default: one level, one anchor each.
        """
        grid = Grid(anchors, box_convert(anchors, "cxcywh", "xyxy"), positions or [len(anchors)])
        boxes, labels = (_padded([target[key] for target in targets]) for key in ("boxes", "labels"))
        counts = torch.tensor([len(target["boxes"]) for target in targets])
        valid = to_device(torch.arange(boxes.shape[1]) < counts[:, None], anchors.device)
        objects, used = self.assign(boxes, valid, grid)
        classes = torch.where(used > 0, labels.gather(1, objects) + 1, used)
        if self.config.crowd_iou < 1 and any(len(target["crowds"]) for target in targets):
            # An anchor inside a crowd region may contain an object that is not annotated, so it is not a negative.
            crowds = _padded([target["crowds"] for target in targets])
            inside = box_iof(grid.corners.expand(len(targets), -1, -1), crowds).amax(dim=2)
            classes = classes.masked_fill((classes <= 0) & (inside > self.config.crowd_iou), IGNORED)
        return Matches(objects, classes, boxes.gather(1, objects[..., None].expand(-1, -1, 4)))

    def box_term(self, offsets: Tensor, anchors: Tensor, matches: Matches) -> Tensor:
        """Smooth L1 loss between offsets [B, A, 4] and the encoded matched boxes, summed over the positive anchors."""
        positive = matches.positive
        # Other anchors are encoded against themselves, which is finite, and masked out below. Indexing the positives
        # instead would synchronise with the device.
        boxes = torch.where(positive[..., None], matches.boxes, box_convert(anchors, "cxcywh", "xyxy"))
        loss = F.smooth_l1_loss(offsets, encode(boxes, anchors), reduction="none").sum(dim=-1)
        return (loss * positive).sum()

    def class_term(self, logits: Tensor, matches: Matches) -> Tensor:
        """Cross-entropy of logits [B, A, C + 1], summed over the positives and the hardest negatives (OHEM).

        Background anchors far outnumber positives. The loss therefore includes only NEGATIVES_PER_POSITIVE of them for
        each positive anchor of the image, those with the largest cross-entropy (SSD, section 2.2).
        """
        classes, positive = matches.classes, matches.positive
        # The class -1 is clamped to a valid index; ignored anchors are in neither of the two sums below.
        cross_entropy = logits.logsumexp(dim=-1) - logits.gather(2, classes.clamp(min=0)[..., None])[..., 0]
        # Cross-entropy is not negative, so other anchors, set to 0, sort last and add nothing if negatives run short.
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
        """Return the mask and mask IoU terms, summed over the positive anchors of objects with a mask (section 3.3).

        The mask term is the binary cross-entropy inside the ground truth box, divided by the area of the box, so that
        small objects have the same weight as large ones. Pixels outside the box are ignored, so the term stays bounded
        if an inaccurate annotation has a mask that extends beyond its box.
        """
        prototypes = predictions.prototypes
        size = tuple(prototypes.shape[1:3])
        positive = matches.positive
        if "has_mask" in targets[0]:
            positive = positive & _padded([target["has_mask"] for target in targets]).gather(1, matches.objects)
        picked, counts = self._sample(positive, targets)
        image, anchor, first_object = picked.unbind(dim=1)
        objects, boxes = matches.objects[image, anchor] + first_object, matches.boxes[image, anchor]
        # One product per image, as the numbers of masks differ; what follows handles the masks of all images at once.
        coefficients = predictions.coefficients[image, anchor].split(counts)
        logits = torch.cat([mask_logits(*pair) for pair in zip(prototypes, coefficients, strict=True)])
        scale = self.config.mask_supersample
        masks = true_masks(targets, (size[0] * scale, size[1] * scale))
        # Scale the sum over each image's sample to all of its positive anchors.
        positives = positive.sum(dim=1)
        weight = (positives / positives.clamp(min=1, max=self.config.masks_to_train))[image]
        mask_loss = (mask_cross_entropy(logits, masks, objects, boxes, scale) * weight).sum()
        if mask_iou_net is None:
            return mask_loss, torch.zeros_like(mask_loss)
        soft = logits.sigmoid() * crop_window(boxes, *size)
        labels = torch.cat([target["labels"] for target in targets])
        return mask_loss, _mask_iou_term(mask_iou_net, soft, true_masks(targets, size)[objects], labels[objects])

    def _sample(self, positive: Tensor, targets: list[Target]) -> tuple[Tensor, list[int]]:
        """Choose at most `masks_to_train` random positive anchors per image, for a bool mask [B, A].

        This is the one place where the loss synchronises with the device.

        Returns:
            For each chosen anchor, the index of its image, its own, and the number of objects in the images before
            its own: int64 [N, 3], in the order of the images. And the number of anchors of each image.
        """
        rows, first = [], 0
        for b, (mask, target) in enumerate(zip(to_host(positive), targets, strict=True)):
            chosen = mask.nonzero()[:, 0]
            if len(chosen) > self.config.masks_to_train:
                generator = torch.Generator().manual_seed(int(target["seed"])) if "seed" in target else None
                chosen = chosen[torch.randperm(len(chosen), generator=generator)[: self.config.masks_to_train]]
            rows.append(torch.stack((torch.full_like(chosen, b), chosen, torch.full_like(chosen, first)), dim=1))
            first += len(target["labels"])
        return to_device(torch.cat(rows), positive.device), [len(some) for some in rows]

    def semantic_term(self, semantic: Tensor | None, targets: list[Target]) -> Tensor:
        """Binary cross-entropy of class maps [B, C, h, w] (paper, section 5).

        It is averaged over pixels, and summed over classes and images. In the box of an object without a mask, pixels
        that belong to no mask of its class may belong to the object, so they contribute nothing.
        """
        if semantic is None:
            raise ValueError("predictions.semantic is None; the model must be in training mode")
        classes, (height, width) = semantic.shape[1], semantic.shape[2:]
        rows = torch.cat([target["labels"] + b * classes for b, target in enumerate(targets)])
        # The union of the masks of each class: a sum, clamped to 1.
        # With the strides of `semantic`, which is channels_last, `flatten` would return a copy.
        truth = torch.zeros(semantic.shape, device=semantic.device)
        truth.flatten(0, 1).index_add_(0, rows, true_masks(targets, (height, width)))
        truth = truth.clamp(max=1)
        loss = F.binary_cross_entropy_with_logits(semantic.float(), truth, reduction="none")
        if "has_mask" in targets[0]:
            boxes, has_mask = (torch.cat([target[key] for target in targets]) for key in ("boxes", "has_mask"))
            regions = crop_window(boxes, height, width) * ~has_mask[:, None, None]
            unknown = torch.zeros(semantic.shape, device=semantic.device)
            unknown.flatten(0, 1).index_add_(0, rows, regions.to(unknown.dtype))
            loss = loss.masked_fill((unknown > 0) & (truth == 0), 0)
        return loss.sum() / (height * width)


def _padded(values: list[Tensor]) -> Tensor:
    """Stack tensors [n_i, ...] to one [B, n, ...], filled up with zeros; n is the largest n_i, and at least 1."""
    padded = pad_sequence(values, batch_first=True)
    return padded if padded.shape[1] else F.pad(padded, (0, 0) * (padded.ndim - 2) + (0, 1))


def _mask_iou_term(net: Callable[[Tensor], Tensor], soft: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
    """Smooth L1 loss between predicted and true mask IoU, summed over the masks (YOLACT++, section 6.1).

    `soft` and `truth` are [N, h, w], `labels` [N]. Masks of at most MASK_IOU_MIN_AREA pixels add nothing to the sum,
    but pass through the network: leaving them out would synchronise with the device.
    """
    hard = (soft > MASK_IOU_THRESHOLD).float()
    true_area, shared = truth.sum(dim=(1, 2)), (hard * truth).sum(dim=(1, 2))
    iou = shared / (hard.sum(dim=(1, 2)) + true_area - shared).clamp(min=1)
    predicted = net(soft).float().gather(1, labels[:, None])[:, 0]
    loss = F.smooth_l1_loss(predicted, iou.detach(), reduction="none")
    return (loss * (true_area > MASK_IOU_MIN_AREA)).sum()


def mask_cross_entropy(logits: Tensor, masks: Tensor, objects: Tensor, boxes: Tensor, supersample: int = 1) -> Tensor:
    """Return the cross-entropy [N] of each mask inside its box, divided by the box's area (paper, section 3.3).

    Args:
        logits: [N, h, w] predicted masks.
        masks: [n, H, W] ground truth masks of the image's objects.
        objects: [N] index into `masks` for each predicted mask.
        boxes: [N, 4] ground truth boxes of those objects, in corner form, relative to the image.
        supersample: compute the loss at this multiple of h and w. Soft masks are upsampled as in inference, so that
            thin objects are kept, which would vanish if their masks were thresholded at the prototypes' size.
    """
    size = (logits.shape[1] * supersample, logits.shape[2] * supersample)
    truth = resize_truth(masks, size)
    # One prototype pixel of padding, as in inference. The divisor is the area of the box without it (released code).
    window = crop_window(boxes, *size, padding=supersample)
    if supersample == 1:
        loss = F.binary_cross_entropy_with_logits(logits, truth[objects], reduction="none")
        sums = (loss * window).sum(dim=(1, 2))
    elif logits.device.type == "cpu":
        sums = _sums_around_boxes(logits, truth, objects, boxes, window)
    else:  # reading the boxes on the host would synchronise with the device
        sums = (_upsampled_cross_entropy(logits, truth[objects]) * window).sum(dim=(1, 2))
    # At least one pixel of the prototypes, so that the loss of an object without visible area is bounded.
    return sums / (area(boxes) * size[0] * size[1]).clamp(min=supersample**2)


def _upsampled_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the cross-entropy [N, H, W] of the soft masks of logits [N, h, w], upsampled to the size of `truth`."""
    # The masks are the batch, which may be empty; channels may not.
    soft = F.interpolate(logits.sigmoid()[:, None], truth.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    # `binary_cross_entropy` raises for NaN, and on a GPU it aborts the process. The caller reports a NaN instead.
    broken = soft.isnan()
    loss = F.binary_cross_entropy(soft.masked_fill(broken, 0.5), truth, reduction="none")
    return loss.masked_fill(broken, torch.nan)


def _sums_around_boxes(logits: Tensor, truth: Tensor, objects: Tensor, boxes: Tensor, window: Tensor) -> Tensor:
    """Return the upsampled cross-entropy [N], summed over `window` [N, H, W]; `truth` is [n, H, W].

    Most boxes are small, so each object's masks are upsampled only around its box, which makes a training step of
    yolact_lite 1.35 times as fast on a CPU. The result is the same, because the region is one prototype pixel wider
    than the window on each side, and bilinear interpolation reads no further.
    """
    height, width = logits.shape[1:]
    if not len(logits):
        return logits.sum(dim=(1, 2))  # [0], and part of the graph: DDP expects a gradient for each parameter
    scale = truth.shape[1] // height
    limits = crop_limits(boxes, height, width, padding=2)
    low, high = limits[:, :2].floor().clamp(min=0), limits[:, 2:].ceil()
    regions = torch.cat((low, high), dim=1).long().tolist()
    rows = [(objects == n).nonzero()[:, 0] for n in objects.unique().tolist()]
    order = torch.cat(rows)
    # Split first: the gradient of a slice has the size of what was sliced, all masks or those of one object.
    parts = logits[order].split([len(same) for same in rows])
    sums = []
    for same, part in zip(rows, parts, strict=True):
        x1, y1, x2, y2 = regions[same[0]]
        region = (..., slice(y1 * scale, y2 * scale), slice(x1 * scale, x2 * scale))
        target = truth[objects[same[0]]][region].expand(len(same), -1, -1)
        loss = _upsampled_cross_entropy(part[:, y1:y2, x1:x2], target)
        sums.append((loss * window[same[0]][region]).sum(dim=(1, 2)))
    return torch.cat(sums)[order.argsort()]


def true_masks(targets: list[Target], size: tuple[int, ...]) -> Tensor:
    """Return the masks of all images one after the other, resized to float [n, *size], see `resize_truth`."""
    return torch.cat([resize_truth(target["masks"], size) for target in targets])


def resize_truth(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize masks [n, H, W] of any dtype to float masks [n, *size] of 0 and 1.

    As in the released code, masks are resized bilinearly and thresholded at 0.5.
    """
    if tuple(masks.shape[1:]) == tuple(size):
        return masks.float()
    resized = F.interpolate(masks[:, None].float(), tuple(size), mode="bilinear", align_corners=False)
    return (resized[:, 0] > 0.5).float()
