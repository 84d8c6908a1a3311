"""Nearest-neighbour upsampling and the 3x3 convolution after it as one convolution of the small image, 2x2 with four
times the channels: 16 products a pixel of the result's four instead of 36.

In one dimension, with weights w of three taps, the doubled row is x_0 x_0 x_1 x_1 ..., so that

    y[2 r]     = w_0 x[r - 1] + (w_1 + w_2) x[r]          y[2 r + 1] = (w_0 + w_1) x[r] + w_2 x[r + 1]

are two convolutions of two taps, over x padded by one pixel on each side; in two dimensions four.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._dispatch import forced
from .fusing import is_conv3x3

# What was made of weights that stay as they are for the time of a chain, by convolution and dtype.
_MADE: ContextVar[dict[tuple[int, torch.dtype], Tensor] | None] = ContextVar("ddpm_fast_made_of_weights", default=None)

# Where it is faster (docs/performance.md): channels, pixels of an image, and of the batch.
CHANNELS, PIXELS, ALL_PIXELS = 128, 64, 256


@contextmanager
def fixed_weights() -> Iterator[None]:
    """In here no weight changes: what follows from weights alone is made once."""
    token = _MADE.set({})
    try:
        yield
    finally:
        _MADE.reset(token)


def phase_weights(weight: Tensor) -> Tensor:
    """[4 O, I, 2, 2] of a 3x3 convolution's [O, I, 3, 3]: for the result's pixels in rows and columns that are (even,
    even), (even, odd), (odd, even), (odd, odd)."""

    def pair(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, middle, last = w.unbind(dim)
        return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

    return torch.cat([phase for rows in pair(weight, 2) for phase in pair(rows, 3)])


def phases_pay(x: Tensor, conv: nn.Module) -> bool:
    """Whether `in_phases` takes x [N, C, H, W] and is faster: on CPUs, without gradients, in `fixed_weights`."""
    if torch.compiler.is_compiling() or _MADE.get() is None:  # in this order: compilers know no ContextVar
        return False
    n, c, h, w = x.shape
    if not x.is_cpu or c < CHANNELS or h * w < PIXELS or n * h * w < ALL_PIXELS:
        return False
    return (
        not torch.is_grad_enabled()
        and forced() in (None, "native")
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and is_conv3x3(conv)
    )


def in_phases(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(upsampled x): [N, C, H, W] -> [N, O, 2 H, 2 W] in channels_last."""
    made, kind = _MADE.get(), conv.weight.dtype
    if torch.is_autocast_enabled("cpu"):
        kind = torch.get_autocast_dtype("cpu")
    key = id(conv), kind
    weight = None if made is None else made.get(key)
    if weight is None:
        weight = phase_weights(conv.weight.float()).to(kind).contiguous(memory_format=torch.channels_last)
        if made is not None:
            made[key] = weight
    n, _, h, w = x.shape
    out = F.conv2d(x, weight, None if conv.bias is None else conv.bias.repeat(4), padding=1)
    channels = conv.out_channels
    y = torch.empty((n, channels, 2 * h, 2 * w), dtype=out.dtype, device=x.device, memory_format=torch.channels_last)
    for phase, part in enumerate(out.split(channels, dim=1)):
        row, column = divmod(phase, 2)
        y[:, :, row::2, column::2] = part[:, :, row : row + h, column : column + w]
    return y
