"""Nearest-neighbour upsampling and the 3x3 convolution after it as one convolution of the small image, 2x2 with four
times the channels: 16 products a pixel of the result's four instead of 36.

In one dimension, with weights w of three taps, the doubled row is x_0 x_0 x_1 x_1 ..., so that

    y[2 r]     = w_0 x[r - 1] + (w_1 + w_2) x[r]          y[2 r + 1] = (w_0 + w_1) x[r] + w_2 x[r + 1]

are two convolutions of two taps, over x padded by one pixel on each side; in two dimensions four.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _checks as checks
from ..ops._conv3x3 import CHANGING, FIXED, choose, is_exact
from ..ops._dispatch import forced
from ..ops._native import wanted
from .folding import told_conv3x3
from .fusing import is_conv3x3, is_untouched
from .inputs import check_input
from .made import are_fixed, are_trained, made
from .sums import Sum
from .weights import Prepared, computed_in, convolve, convolve3x3

# Where it is faster on CPUs (docs/performance.md): channels, pixels of an image, and of the batch, in chains and in
# training, where the weights are made in every step.
CHANNELS, PIXELS, ALL_PIXELS, ALL_IN_TRAINING = 128, 64, 256, 4096


def phase_weights(weight: Tensor) -> Tensor:
    """[4 O, I, 2, 2] of a 3x3 convolution's [O, I, 3, 3]: for the result's pixels in rows and columns that are (even,
    even), (even, odd), (odd, even), (odd, odd)."""

    def pair(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, middle, last = w.unbind(dim)
        return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

    return torch.cat([phase for rows in pair(weight, 2) for phase in pair(rows, 3)])


def phases_pay(x: Tensor, conv: nn.Module, later: bool = False) -> bool:
    """Whether `in_phases` takes x [N, C, H, W] and is faster: where sums are made later, on GPUs, and on CPUs for large
    images in chains and in training, unless Winograd's filtering takes the upsampled image: it has fewer products."""
    if torch.compiler.is_compiling() or not (later or _pay_on_cpus(x)):
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and is_conv3x3(conv)


def _pay_on_cpus(x: Tensor) -> bool:
    n, c, h, w = x.shape
    if not x.is_cpu or c < CHANNELS or h * w < PIXELS or n * h * w < ALL_PIXELS:
        return False
    fixed = are_fixed()
    if not fixed and not (are_trained() and n * h * w >= ALL_IN_TRAINING):
        return False
    if forced() not in (None, "native") or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return not (wanted() and choose(computed_in(x), (n, c, 2 * h, 2 * w), c, FIXED if fixed else CHANGING).tile)


def in_phases(x: Tensor, conv: nn.Conv2d, with_bias: bool = True) -> Tensor:
    """conv(upsampled x): [N, C, H, W] -> [N, O, 2 H, 2 W] in channels_last."""
    kind = computed_in(conv.weight)

    def prepare() -> Prepared:
        weight = phase_weights(conv.weight.to(torch.promote_types(kind, torch.float32)))
        return Prepared(weight, None if conv.bias is None else conv.bias.repeat(4), kind, padding=(1, 1))

    if are_fixed():
        out = made(("phases", kind, is_exact()), (conv.weight, conv.bias), prepare)(x, with_bias)
    else:
        bias = conv.bias.repeat(4) if with_bias and conv.bias is not None else None
        out = F.conv2d(x, phase_weights(conv.weight), bias, padding=1)
    return cast(Tensor, _Interleave.apply(out))


class _Interleave(torch.autograd.Function):
    """The phases [N, 4 O, H + 1, W + 1], each but for a border of its own, to the image [N, O, 2 H, 2 W]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        n, channels, h, w = out.shape[0], out.shape[1] // 4, out.shape[2] - 1, out.shape[3] - 1
        y = _room(out, n, channels, 2 * h, 2 * w)
        for phase, part in enumerate(out.split(channels, dim=1)):
            row, column = divmod(phase, 2)
            y[:, :, row::2, column::2] = part[:, :, row : row + h, column : column + w]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return cast(Tensor, _Separate.apply(dy))


class _Separate(torch.autograd.Function):
    """The gradient of `_Interleave`, whose own that is."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor) -> Tensor:
        n, channels, h, w = dy.shape[0], dy.shape[1], dy.shape[2] // 2, dy.shape[3] // 2
        dout = _room(dy, n, 4 * channels, h + 1, w + 1).zero_()
        for phase, part in enumerate(dout.split(channels, dim=1)):
            row, column = divmod(phase, 2)
            part[:, :, row : row + h, column : column + w] = dy[:, :, row::2, column::2]
        return dout

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return cast(Tensor, _Interleave.apply(d))


def _room(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


class NearestUpsample(nn.Module):
    """Doubles height and width by repetition: [N, C, H, W] -> [N, C, 2H, 2W]."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        # The inductor of torch 2.13 loses the gradients of interpolate on CPUs, in silence.
        n, c, h, w = x.shape
        return x[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_channels = in_channels = checks.integer("in_channels", in_channels, 1)
        self.upsample = nn.Sequential(NearestUpsample(), nn.Conv2d(in_channels, in_channels, 3, padding=1))

    def forward(self, x: Tensor, time_emb: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        check_input(x, self.in_channels, self.upsample[-1])
        return self.summed(Sum(x)).tensor()

    def summed(self, x: Sum) -> Sum:
        """As forward, of and to a sum that need not be made yet."""
        if not self._is_plain():
            return Sum(self.upsample(x.tensor()), later=x.later)
        nearest, conv = self.upsample
        small = x.tensor()
        if phases_pay(small, conv, x.later):
            return x.convolved(small, conv, in_phases)
        large = nearest(small)
        if is_conv3x3(conv) and are_fixed() and not x.later:
            return told_conv3x3(large, cast(nn.Conv2d, conv))
        return x.convolved(large, conv, convolve3x3 if is_conv3x3(conv) else convolve)

    def _is_plain(self) -> bool:
        """Whether nothing was put into or around the two steps."""
        layers = [type(m) for m in self.upsample]
        return layers == [NearestUpsample, nn.Conv2d] and is_untouched(self.upsample, self.upsample[0])
