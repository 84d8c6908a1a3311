"""Norms inside of the convolutions around them, in chains on CPUs: a convolution in tiles takes the moments of what it
writes, and the next one normalises and activates what it reads. So such a norm makes no pass over the image.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _native
from ..ops._conv3x3 import CODES, KINDS
from .norms import Activation, groups_of, name_of, norm_act
from .sums import Sum
from .weights import convolve3x3, in_tiles


def normed_conv3x3(
    x: Sum,
    norm: nn.Module,
    activation: Activation,
    conv: nn.Conv2d,
    with_bias: bool = True,
    add: Tensor | None = None,
    residual: Tensor | None = None,
) -> Sum:
    """conv(activation(norm(x + add))) + residual, where sums are not made later."""
    bias = conv.bias if with_bias else None
    if x.moments is not None:
        tiled = in_tiles(conv, x.x, residual)
        rows = () if tiled is None else _rows(x.x, x.moments, norm, activation, add)
        if tiled is not None and rows:
            moments = _room(x.x, conv.out_channels)
            return Sum(tiled(x.x, bias, residual, rows, moments), own=True, moments=moments)
    h = norm_act(norm, activation, x.x, add=add)
    tiled = in_tiles(conv, h, residual)
    if tiled is None:
        return Sum(convolve3x3(h, conv, with_bias, residual), own=True)
    moments = _room(h, conv.out_channels)
    return Sum(tiled(h, bias, residual, (), moments), own=True, moments=moments)


def _room(x: Tensor, channels: int) -> Tensor:
    """For two numbers of each image and channel."""
    return torch.empty((2, x.shape[0], channels), dtype=torch.float32, device="cpu")


def _rows(x: Tensor, moments: Tensor, norm: Any, activation: Activation, add: Tensor | None) -> Any:
    """The norm as a convolution takes it; () where it doesn't."""
    groups, name = groups_of(norm), name_of(activation)
    if not groups or name is None:
        return ()
    parameters = (norm.weight, norm.bias, add)
    if _native.unfit(*parameters) or not all(p is None or p.dtype in KINDS and p.is_contiguous() for p in parameters):
        return ()
    n, channels, height, width = x.shape
    rows = _room(x, channels)
    kernel = _native.kernel("norm_of_moments")
    kernel(rows, moments, parameters, groups, float(height * width), norm.eps, _native.threads())
    return rows, CODES[name]
