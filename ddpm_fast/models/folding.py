"""Norms inside of the convolutions around them, in chains on CPUs: a convolution in tiles takes the moments of what it
writes, and the next one normalises and activates what it reads. So such a norm makes no pass over the image.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _native
from ..ops._conv3x3 import CODES
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
    tiled = in_tiles(conv, x.x, residual)
    rows: Any = () if tiled is None or x.moments is None else _rows(x.x, x.moments, norm, activation, add)
    h = x.x if rows else norm_act(norm, activation, x.x, add=add)
    if tiled is None:
        return Sum(convolve3x3(h, conv, with_bias, residual), own=True)
    moments = torch.empty((2, h.shape[0], conv.out_channels), device="cpu")
    return Sum(tiled(h, conv.bias if with_bias else None, residual, rows, moments), own=True, moments=moments)


def _rows(x: Tensor, moments: Tensor, norm: Any, activation: Activation, add: Tensor | None) -> Any:
    """The norm as a convolution takes it; () where it doesn't."""
    groups, name = groups_of(norm), name_of(activation)
    if not groups or name is None:
        return ()
    n, channels, height, width = x.shape
    rows = torch.empty((2, n, channels), device="cpu")
    parameters = (norm.weight, norm.bias, add)
    kernel = _native.kernel("norm_of_moments")
    kernel(rows, moments, parameters, groups, float(height * width), norm.eps, _native.threads())
    return rows, CODES[name]
