"""3x3 convolutions with a quarter of the multiplications (Lavin and Gray 2016, F(4x4, 3x3)), in float32 on a CPU.

What direct convolution computes for 16 pixels by 144 products a channel, this does by 36: patches of 6x6 pixels and the
weights are brought to another basis, multiplied there element by element, and brought back. The sums come out to about
1e-5 of the largest output, where direct convolution has 2e-6.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUT, PATCH = 4, 6  # pixels a side, of what a patch gives and of the patch
# Interpolation at 0, 1, -1, 2, -2 and infinity: patches, weights, outputs (Lavin and Gray, section 4.3).
PATCHES = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
WEIGHTS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUTS = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
ONES = PATCH + 1  # interpolation at 1 and 1: of the 36 products, the one that all 16 outputs take once
STRIP = 2**22  # elements of patches that are transformed at a time: they should stay in the processor's cache
# Changing the basis costs by the sum of the channels in and out, multiplying by their product: their ratio is what
# there is to gain. As measured on two cores, it pays from this ratio, and this ratio times the number of pixels, on.
FROM_RATIO, FROM_WORK = 48, 24_000


def ratio(conv: nn.Conv2d) -> float:
    """Product of the channels in and out, over their sum."""
    return conv.in_channels * conv.out_channels / (conv.in_channels + conv.out_channels)


class WinogradConv2d(nn.Module):
    """Does what the `conv` it is made from does: 3x3, stride 1, padding 1, one group. For inference alone."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        if not self.fits(conv):
            raise ValueError(f"Winograd's scheme is for 3x3 convolutions of stride and padding 1, not {conv}")
        self.direct = conv
        self.fewest_pixels = math.ceil(FROM_WORK / ratio(conv))
        basis = torch.tensor(WEIGHTS, dtype=torch.float64)
        weights = torch.einsum("ia,ocab,jb->ijco", basis, conv.weight.detach().cpu().double(), basis)
        self.register_buffer("weights", weights.flatten(0, 1).float().contiguous(), persistent=False)
        for name, rows in (("to_basis", PATCHES), ("from_basis", OUTPUTS)):
            self.register_buffer(name, torch.tensor(rows, dtype=torch.float32), persistent=False)

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether `conv` is of the kind that this replaces."""
        if type(conv) is not nn.Conv2d or conv.groups != 1 or conv.kernel_size != (3, 3):
            return False
        return conv.stride == conv.padding == conv.dilation == (1, 1)

    @classmethod
    def pays(cls, conv: nn.Module) -> bool:
        """Whether it is faster than `conv`, on pictures that are not tiny."""
        return cls.fits(conv) and ratio(conv) >= FROM_RATIO

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W], channels last."""
        if x.shape[0] * x.shape[2] * x.shape[3] < self.fewest_pixels:
            return self.direct(x)
        with torch.autocast(x.device.type, enabled=False):  # the other basis needs float32
            return winograd(x.float(), self.weights, self.direct.bias, self.to_basis, self.from_basis)


# One step for the compiler, which would make it slower.
@torch.library.custom_op("yolact::winograd", mutates_args=())
def winograd(x: Tensor, weights: Tensor, bias: Tensor | None, to_basis: Tensor, from_basis: Tensor) -> Tensor:
    """x [B, C, H, W], weights [36, C, C'] in the other basis, bias [C'] -> [B, C', H, W], channels last."""
    batch, channels, height, width = x.shape
    rows, columns = -(-height // OUT), -(-width // OUT)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, OUT * columns + 1 - width, 1, OUT * rows + 1 - height))
    out = x.new_empty(batch, rows, OUT, columns, OUT, weights.shape[2])
    step = max(1, STRIP // (PATCH**2 * batch * columns * channels))
    for row in range(0, rows, step):
        strip = out[:, row : row + step]
        part = padded[:, OUT * row : OUT * (row + strip.shape[1]) + PATCH - OUT]
        patches = part.unfold(1, PATCH, OUT).unfold(2, PATCH, OUT).permute(4, 5, 0, 1, 2, 3)  # [6, 6, B, rows, w, C]
        values = to_basis @ (to_basis @ patches.reshape(PATCH, -1)).view(PATCH, PATCH, -1)  # rows, then columns
        values = torch.bmm(values.view(PATCH**2, -1, channels), weights)
        if bias is not None:
            values[ONES] += bias
        values = from_basis @ (from_basis @ values.view(PATCH, -1)).view(OUT, PATCH, -1)
        strip.copy_(values.view(OUT, OUT, batch, strip.shape[1], columns, -1).permute(2, 3, 0, 4, 1, 5))
    image = out.view(batch, OUT * rows, OUT * columns, -1)[:, :height, :width]
    return image.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


@winograd.register_fake
def _(x: Tensor, weights: Tensor, _bias: Tensor | None, _to_basis: Tensor, _from_basis: Tensor) -> Tensor:
    shape = (x.shape[0], weights.shape[2], *x.shape[2:])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)
