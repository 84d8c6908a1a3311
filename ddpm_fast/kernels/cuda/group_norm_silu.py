"""Launches csrc/cuda/group_norm_silu*.cu, on images in channels_last.

Least bytes: x read, y written; in the backward x and dy read, dx written. That is what one pass moves, by a block or a
cluster that holds an image's slab of channels in shared memory; where none can, or elements don't lie in vectors of 16
bytes, two launches share the image's pixels out in chunks and read twice.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference.group_norm_silu import ACTIVATIONS
from ...reference.philox import NoiseState
from ..norm_operands import Operands
from ._module import TYPES, address, draws, limits, module, place

__all__ = ["Operands", "backward", "forward"]

THREADS = 256  # of a block, at most
_ROW_BYTES = 128  # of a pixel in a slab, at least: whole lines of the cache
_CLUSTERS = (1, 2, 4, 8)  # blocks that a cluster may have on every GPU with clusters
_RESIDENT = {"forward": 3, "backward": 2}  # blocks of a processor that its registers hold: one loads, another computes
_RESERVED = 1024  # bytes of shared memory that a block takes beyond its own
_CHUNKS = 64  # that a block merges, at most
_BLOCKS = 4  # of a processor, where chunks may be as many as are wanted
_WARP = 32
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # as csrc/cuda/group_norm_silu.h numbers them


class Cut(NamedTuple):
    """How a call is cut; as csrc/cuda/group_norm_silu.h has it."""

    slab: int  # channels of a block, whole groups
    pixels: int  # of a block
    chunks: int  # blocks that share a slab's pixels
    threads: int
    vectors: bool  # of 16 bytes, else elements
    one_pass: bool  # the chunks of a slab are a cluster


def shared_bytes(cut: Cut, size: int, images: int, sums: int) -> int:
    """What a block holds: of `images` images, sums, numbers of its channels; as csrc/cuda/group_norm.h counts."""
    vectors = cut.slab // (16 // size if cut.vectors else 1)
    folds = vectors < _WARP and vectors & (vectors - 1) == 0
    rows = cut.threads // (_WARP if folds else vectors)
    return (cut.pixels * cut.slab * size * images if cut.one_pass else 0) + 4 * cut.slab * (sums * rows + 12)


def _slab(channels: int, least: int, wanted: int) -> int:
    """Channels of a block: as many as are wanted, in equal parts if that can be."""
    some = -(-wanted // least) * least
    equal = [width for width in range(some, 4 * some + 1, least) if channels % width == 0]
    return min([*equal[:1], channels]) if equal else min(some, channels)


def rule(direction: str, of: Operands, vectors: bool, device: int) -> Cut:
    """By metadata: one pass by the smallest cluster of those that leave the most room for other blocks."""
    images, pixels, channels, groups = of.sizes
    size, (major, processors, shared) = of.x.dtype.itemsize, limits(device)
    vector = 16 // size if vectors else 1
    slab = _slab(channels, math.lcm(channels // groups, vector), _ROW_BYTES // size)
    held, sums = {"forward": (1, 2), "backward": (2, 3)}[direction]
    slabs, lanes = images * -(-channels // slab), slab // vector

    def cut(pixels_each: int, one_pass: bool) -> Cut:
        threads = min(THREADS, -(-lanes * pixels_each // _WARP) * _WARP)
        return Cut(slab, pixels_each, -(-pixels // pixels_each), threads, vectors, one_pass)

    clusters = _CLUSTERS[: len(_CLUSTERS) if major >= 9 else 1] if vectors else ()
    whole = [cut(-(-pixels // cluster), True) for cluster in clusters]
    for resident in range(_RESIDENT[direction], 0, -1):
        for i, found in enumerate(whole):
            if (shared_bytes(found, size, held, sums) + _RESERVED) * resident <= shared + _RESERVED:
                more = [c for c in whole[i + 1 :] if slabs * c.chunks <= processors and c.pixels * lanes >= THREADS]
                return more[-1] if more else found  # few images: as many blocks as there are processors
    rows = THREADS // lanes
    chunks = max(1, min(_CHUNKS, _BLOCKS * processors // slabs))
    return cut(min(pixels, max(4 * rows, -(-pixels // chunks))), False)


def _in_vectors(of: Operands, *images: Tensor | None) -> bool:
    count = 16 // of.x.dtype.itemsize
    if of.channels % count or of.x.shape[1] % count:
        return False
    for x in (of.x, of.x2, *images):
        if x is not None and (x.data_ptr() % 16 or x.stride(0) % count or _pixel(x) % count):
            return False
    return True


def _pixel(x: Tensor) -> int:
    """Elements from pixel to pixel; rows are as far apart as their pixels."""
    return x.stride(2) if x.shape[3] == 1 else x.stride(3)


def _image(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), _pixel(x))


def _row(v: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if v is None else (v.data_ptr(), TYPES[v.dtype], 0 if v.ndim == 1 else v.shape[1])


def _given(of: Operands, statistics: Tensor, eps: float, cut: Cut) -> tuple[dict[str, Any], Tensor | None]:
    """What forward and backward are told, and memory that must live until they are launched."""
    n, channels, height, width = of.x.shape
    entries = (n, cut.chunks, 3, of.channels)
    table = None if cut.one_pass else torch.empty(entries, dtype=torch.float32, device=of.x.device)
    seed, draw, first, stream, threshold, factor = of.dropout or (None, None, 0, 0, 0, 1.0)
    state = None if seed is None or draw is None else NoiseState(seed, draw, first)
    given = {
        "sizes": (n, height * width, of.channels, channels, of.groups),
        "eps": eps,
        "activation": _CODES[of.activation],
        "dtype": TYPES[of.x.dtype],
        "x": _image(of.x),
        "x2": _image(of.x2),
        "parameters": tuple(map(_row, (of.weight, of.bias, of.add, of.scale, of.shift))),
        "statistics": address(statistics),
        "table": address(table),
        "draws": draws(state, stream),
        "threshold": threshold,
        "factor": factor,
        "cut": tuple(cut),
    }
    return given, table


def forward(of: Operands, residual: Tensor | None, y: Tensor, h: Tensor | None, statistics: Tensor, eps: float) -> None:
    """Writes y, h and the groups' statistics (float64 [N, groups, 2]: mean, 1 / deviation)."""
    device, stream = place(of.x)
    cut = rule("forward", of, _in_vectors(of, residual, y, h), device)
    given, _table = _given(of, statistics, eps, cut)
    module.group_norm_silu(given, _image(residual), _image(h), _image(y), device, stream)


def backward(of: Operands, dy: Tensor, dh: Tensor | None, dx: Tensor, dx2: Tensor | None, statistics: Tensor) -> Tensor:
    """Writes dx and dx2; returns each image's gradients of weight, bias, add, scale and shift: float32 [5, N, C]."""
    device, stream = place(of.x)
    cut = rule("backward", of, _in_vectors(of, dy, dh, dx, dx2), device)
    rows = torch.empty((5, of.x.shape[0], of.channels), dtype=torch.float32, device=of.x.device)
    given, _table = _given(of, statistics, 0.0, cut)
    images = (_image(v) for v in (dy, dh, dx, dx2))
    module.group_norm_silu_backward(given, *images, rows.data_ptr(), device, stream)
    return rows
