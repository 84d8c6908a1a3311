"""How kernels that work element by element in a sample's own order reach tensors of other layouts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Array(NamedTuple):
    """[N, ...] as a kernel takes it: each sample dense, in its own order or with the channels of a pixel adjacent."""

    data: Tensor
    sample: int  # elements from one sample to the next
    last: bool  # channels_last


def array(x: Tensor) -> Array:
    """x where it lies, if a kernel can take it there, else a copy; a sample of one element is in its own order."""
    of_sample = tuple(zip(x.shape[1:], x.stride()[1:], strict=True))
    if _dense(of_sample):
        return Array(x, x.stride(0), False)
    if x.ndim == 4 and _dense((*of_sample[1:], of_sample[0])):
        return Array(x, x.stride(0), True)
    x = x.contiguous()
    return Array(x, x.stride(0), False)


def _dense(dims: tuple[tuple[int, int], ...]) -> bool:
    step = 1
    for size, stride in reversed(dims):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def like(x: Tensor) -> Array:
    """Room for a result like x, laid out as torch would if a kernel can write that."""
    out = torch.empty_like(x)
    found = array(out)
    return found if found.data is out else array(torch.empty_like(x, memory_format=torch.contiguous_format))


def pixels(x: Tensor) -> tuple[int, int]:
    """Channels and pixels, for places in channels_last; (1, elements) where a sample has neither."""
    return (x.shape[1], x.shape[2] * x.shape[3]) if x.ndim == 4 else (1, x[:1].numel())


def room(x: Tensor, out: Tensor | None, read: Sequence[Tensor]) -> Array:
    """Where a result goes: into `out`, unless a kernel can't write there, or would write over what is still read."""
    if out is None or any(_shares(out, v) for v in read):
        return like(x)
    found = array(out)
    return found if found.data is out else like(x)


def _shares(out: Tensor, v: Tensor) -> bool:
    """Whether they have memory in common, but not number for number: those are read before they are written."""
    if out.data_ptr() == v.data_ptr() and out.stride() == v.stride() and out.dtype == v.dtype:
        return False
    return out.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
