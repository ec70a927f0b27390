"""The training loss: matching, hard negative mining and a method for each term (paper, section 3; SSD)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.boxes import area, box_iof, box_iou, encode, to_corners
from layers.masks import crop_window

if TYPE_CHECKING:
    from data.config import Config
    from yolact import Predictions

# One picture's ground truth: boxes [n, 4] (corner form, relative), labels [n] (0..C-1), masks [n, h, w] (0 or 1, any
# size), crowds [m, 4] (boxes of crowd regions), and where the draw of masks must be the same in any process and after
# any interruption, seed [] (int64).
Target = dict[str, Tensor]

TERMS = ("box", "class", "mask", "semantic", "mask_iou")
# A picture without objects mines as many negatives as one with this many positive anchors: enough to unlearn what it
# wrongly shows, too few to drown the others. Mining per picture keeps accumulated batches equal to large ones.
EMPTY_POSITIVES = 10


class Matches(NamedTuple):
    """What each anchor of each picture should predict."""

    objects: Tensor  # [B, A] index of the ground truth
    classes: Tensor  # [B, A] label + 1, 0 for the background, -1 for anchors that are left out
    boxes: Tensor  # [B, A, 4] the matched ground truth boxes

    @property
    def positive(self) -> Tensor:
        return self.classes > 0


class MultiBoxLoss:
    """`loss(predictions, anchors, targets)` -> {"box", "class", "mask", "semantic", "mask_iou"}, scalars to be summed.

    The keys are always the same, whatever is in the pictures. All is computed in float32. The box, class, mask and
    mask-IoU terms are sums over the positive anchors divided by their number in the batch, the semantic term is a mean
    over the pictures.
    """

    def __init__(self, config: Config):
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
        """predictions of B pictures, anchors [A, 4], B targets; see Target for theirs.

        `mask_iou_net` is the model's, for YOLACT++. `num_positives` and `num_images` override the numbers of positive
        anchors and of pictures to divide by, where a batch is spread over several processes or accumulated in parts.
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
        weights = {term: getattr(self.config, f"{term}_weight") for term in TERMS}
        return {term: weights[term] * value for term, value in losses.items()}

    @torch.no_grad()
    def match(self, anchors: Tensor, targets: list[Target]) -> Matches:
        """Match every anchor [A, 4] of every picture with an object, the background, or nothing."""
        corners = to_corners(anchors)
        matched = [self._match_one(corners, target) for target in targets]
        return Matches(*(torch.stack(x) for x in zip(*matched, strict=True)))

    def _match_one(self, corners: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        config, boxes, labels = self.config, target["boxes"], target["labels"]
        num_anchors = len(corners)
        if len(boxes):
            overlaps = box_iou(boxes, corners)  # [n, A]
            best, objects = overlaps.max(dim=0)
            _force_matches(overlaps, best, objects)
            classes = labels[objects] + 1
            classes = classes.masked_fill(best < config.positive_iou, -1).masked_fill(best < config.negative_iou, 0)
            matched = boxes[objects]
        else:
            objects = torch.zeros(num_anchors, dtype=torch.long, device=corners.device)
            classes, matched = objects.clone(), corners.new_ones(num_anchors, 4)
        if len(target["crowds"]) and config.crowd_iou < 1:
            inside = box_iof(corners, target["crowds"]).amax(dim=1)
            classes = classes.masked_fill((classes <= 0) & (inside > config.crowd_iou), -1)
        return objects, classes, matched

    def box_term(self, offsets: Tensor, anchors: Tensor, matches: Matches) -> Tensor:
        """Smooth L1 between offsets [B, A, 4] and the encoded boxes, summed over the positives."""
        positive = matches.positive
        # Anchors without an object get their own box: its encoding is finite, and it does not count.
        boxes = torch.where(positive[..., None], matches.boxes, to_corners(anchors))
        loss = F.smooth_l1_loss(offsets, encode(boxes, anchors), reduction="none").sum(dim=-1)
        return (loss * positive).sum()

    def class_term(self, logits: Tensor, matches: Matches) -> Tensor:
        """Cross-entropy of logits [B, A, C + 1], summed over the positives and the hardest negatives (OHEM).

        For each positive of a picture, `negatives_per_positive` of its background anchors count: those that are least
        sure to be background, which are also those of the largest cross-entropy.
        """
        classes, positive = matches.classes, matches.positive
        cross_entropy = logits.logsumexp(dim=-1) - logits.gather(2, classes.clamp(min=0)[..., None])[..., 0]
        hardest = cross_entropy.masked_fill(classes != 0, 0).sort(dim=1, descending=True).values
        count = positive.sum(dim=1)
        count = torch.where(count == 0, EMPTY_POSITIVES, count) * self.config.negatives_per_positive
        mined = torch.arange(classes.shape[1], device=classes.device) < count[:, None]
        return (cross_entropy * positive).sum() + (hardest * mined).sum()

    def mask_terms(
        self,
        predictions: Predictions,
        matches: Matches,
        targets: list[Target],
        mask_iou_net: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """The mask and mask-IoU terms, summed over the positives.

        Mask: binary cross-entropy inside the ground truth box, divided by the box's area, so that small objects count
        as much as large ones. It is computed from logits and inside the box alone: a mask that lies partly outside of
        its box, as shifted annotations do, cannot make it explode.
        """
        size = predictions.prototypes.shape[1:3]
        # Without any object the loss is 0 and still has gradients, zeros, for all: DDP waits for each parameter's.
        mask_loss = predictions.prototypes[:0].float().sum() + predictions.coefficients[:0].float().sum()
        soft_masks, true_masks, mask_labels = [], [], []
        for b, target in enumerate(targets):
            chosen = matches.positive[b].nonzero()[:, 0]
            total = len(chosen)
            if total == 0:
                continue
            if total > self.config.masks_to_train:
                own = torch.Generator().manual_seed(int(target["seed"])) if "seed" in target else None
                some = torch.randperm(total, generator=own)[: self.config.masks_to_train]
                chosen = chosen[some.to(chosen.device)]
            objects, boxes = matches.objects[b, chosen], matches.boxes[b, chosen]
            coefficients = predictions.coefficients[b, chosen].float()
            logits = torch.einsum("hwk,nk->nhw", predictions.prototypes[b].float(), coefficients)
            loss = mask_cross_entropy(logits, target["masks"], objects, boxes, self.config.mask_supersample)
            mask_loss = mask_loss + loss.sum() * (total / len(chosen))
            if mask_iou_net is not None:
                soft_masks.append(logits.sigmoid() * crop_window(boxes, *size))
                true_masks.append(shrink_masks(target["masks"], size)[objects])
                mask_labels.append(target["labels"][objects])
        if mask_iou_net is None:
            return mask_loss, torch.zeros_like(mask_loss)
        return mask_loss, self._mask_iou_term(mask_iou_net, size, soft_masks, true_masks, mask_labels)

    def _mask_iou_term(
        self,
        net: Callable[[Tensor], Tensor],
        size: tuple[int, int],
        soft_masks: list[Tensor],
        true_masks: list[Tensor],
        labels: list[Tensor],
    ) -> Tensor:
        """Smooth L1 between the IoU that `net` expects of each mask and the one it has (YOLACT++, section 6.1)."""
        soft, truth, label = (torch.cat(x) if x else None for x in (soft_masks, true_masks, labels))
        large = None if truth is None else truth.sum(dim=(1, 2)) > self.config.mask_iou_min_area
        if large is None or not large.any():
            # Touch the weights all the same: every process of a distributed run must see the same ones used.
            device = next(net.parameters()).device if hasattr(net, "parameters") else None
            return net(torch.zeros(1, *size, device=device)).sum() * 0
        soft, truth, label = soft[large], truth[large], label[large]
        hard = (soft > self.config.mask_threshold).float()
        shared = (hard * truth).sum(dim=(1, 2))
        iou = shared / (hard.sum(dim=(1, 2)) + truth.sum(dim=(1, 2)) - shared)
        expected = net(soft).float().gather(1, label[:, None])[:, 0]
        return F.smooth_l1_loss(expected, iou.detach(), reduction="sum")

    def semantic_term(self, semantic: Tensor | None, targets: list[Target]) -> Tensor:
        """Binary cross-entropy of the class maps [B, C, h, w], mean over pixels, summed over classes and pictures."""
        if semantic is None:
            raise ValueError("no semantic maps: the model must be in training mode")
        truth = torch.zeros_like(semantic, dtype=torch.float32)
        for b, target in enumerate(targets):
            if len(target["labels"]):
                truth[b].index_add_(0, target["labels"], shrink_masks(target["masks"], semantic.shape[2:]))
        loss = F.binary_cross_entropy_with_logits(semantic.float(), truth.clamp(max=1), reduction="sum")
        return loss / (semantic.shape[2] * semantic.shape[3])


def mask_cross_entropy(logits: Tensor, masks: Tensor, objects: Tensor, boxes: Tensor, supersample: int = 1) -> Tensor:
    """[N]: binary cross-entropy of each mask inside its box, divided by the box's area in pixels (paper, section 3.1).

    logits [N, h, w], masks [n, H, W] of the picture's objects, objects [N] (which of them), boxes [N, 4] (relative).
    `supersample` over 1 enlarges the soft masks as inference does (`layers.masks.resize_masks`) before they are
    compared: an object a pixel wide can have its true outline, where one cut at the prototypes' size vanishes.
    """
    size = (logits.shape[1] * supersample, logits.shape[2] * supersample)
    truth = shrink_masks(masks, size)[objects]
    if supersample == 1:
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    else:
        soft = F.interpolate(logits.sigmoid()[None], size, mode="bilinear", align_corners=False)[0]
        loss = F.binary_cross_entropy(soft, truth, reduction="none")
    window = crop_window(boxes, *size, padding=supersample)
    return (loss * window).sum(dim=(1, 2)) / (area(boxes) * size[0] * size[1])


def shrink_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [n, H, W] of any type -> float 0 or 1 at `size`, bilinear and cut at a half as in the released code."""
    if tuple(masks.shape[1:]) == tuple(size):
        return masks.float()
    return (F.interpolate(masks[None].float(), tuple(size), mode="bilinear", align_corners=False)[0] > 0.5).float()


def _force_matches(overlaps: Tensor, best: Tensor, objects: Tensor) -> None:
    """Give each object one anchor for itself, the best one still free, best pair first.

    overlaps [n, A]; writes 2, over any threshold, into `best` [A] and the object's index into `objects` [A]. An object
    loses at most n - 1 anchors to the others, so its n best are all that is needed. No step waits for a value.

    Equal overlaps are the rule (all anchors of a size inside an object have the same), and the first of them is taken:
    the bits of a float that is not negative sort as it does, so bits and index make one key that is never equal.
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
