"""Norms inside of the convolutions around them, in chains on CPUs: our own convolutions tell the moments of what they
write, and the next one in tiles normalises and activates what it reads. So such a norm makes no pass over the image.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _native
from ..ops._conv3x3 import CODES, KINDS
from .norms import Activation, groups_of, name_of, norm_act
from .sums import Sum
from .weights import Own, Prepared, convolve3x3, own_kernel, takes


def normed_conv3x3(
    x: Sum,
    norm: nn.Module,
    activation: Activation,
    conv: nn.Conv2d,
    with_bias: bool = True,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Sum | None = None,
) -> Sum:
    """conv(activation(norm(x + add))) + residual, where sums are not made later; with a skip as if concatenated, where
    both are `alike` and the norm reads sums."""
    x2 = None if skip is None else skip.x
    moments = x.moments if skip is None else x.moments_with(skip)
    own = None if moments is None else own_kernel(conv, x.x, residual, x2)
    if own is not None and moments is not None:
        rows = _rows(x.x, moments, norm, activation, add)
        if rows:
            return _told(own, x.x, conv.bias if with_bias else None, residual, norm=rows, x2=x2)
    h = norm_act(norm, activation, x.x, add=add, x2=x2)
    return told_conv3x3(h, conv, with_bias, residual)


def told_conv3x3(x: Tensor, conv: nn.Conv2d, with_bias: bool = True, residual: Tensor | None = None) -> Sum:
    """conv(x) + residual, with its moments where our own kernel tells them."""
    own = own_kernel(conv, x, residual)
    if own is None:
        return Sum(convolve3x3(x, conv, with_bias, residual), own=True)
    return _told(own, x, conv.bias if with_bias else None, residual)


def told_onto(x: Tensor, fast: Prepared, onto: Sum) -> Sum:
    """The same of a convolution that was prepared, plus a sum that is not made later."""
    own = fast.own(x) if takes(x) and fast.adds(onto.x, x) else None
    if own is None:
        return Sum(fast(x), own=True).plus(onto)
    return _told(own, x, fast.bias, onto.x)


def alike(x: Tensor, x2: Tensor) -> bool:
    """Whether both can be read as one image tensor without being concatenated."""
    return x.dtype is x2.dtype and takes(x) and takes(x2)


def _told(own: Own, x: Tensor, bias: Tensor | None, residual: Tensor | None, **more: Any) -> Sum:
    moments = _room(x, own.out_channels)
    return Sum(own(x, bias, residual, moments=moments, **more), own=True, moments=moments)


def _room(x: Tensor, channels: int) -> Tensor:
    """For two numbers of each image and channel."""
    return torch.empty((2, x.shape[0], channels), dtype=torch.float32, device="cpu")


def _rows(x: Tensor, moments: Tensor, norm: Any, activation: Activation, add: Tensor | None) -> Any:
    """The norm as a convolution takes it, of an image tensor like x with these moments; () where it doesn't."""
    groups, name = groups_of(norm), name_of(activation)
    if not groups or name is None:
        return ()
    parameters = (norm.weight, norm.bias, add)
    if _native.unfit(*parameters) or not all(p is None or p.dtype in KINDS and p.is_contiguous() for p in parameters):
        return ()
    height, width = x.shape[2:]
    rows = torch.empty_like(moments)
    kernel = _native.kernel("norm_of_moments")
    kernel(rows, moments, parameters, groups, float(height * width), norm.eps, _native.threads())
    return rows, CODES[name]
