"""What programs that share an image's pixels leave to each other: moments, or sums, of each chunk.

A table [N, entries, 3, C] of float32 in a fixed order, so that nothing is added atomically. Whoever reads it merges up
to `MOST` entries at once, side by side; of more, a kernel in between makes fewer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 32
LANES = 64


@triton.jit
def merged_moments(table, n, first, entries, c, inside, channels, pixels, each, ENTRIES: tl.constexpr):
    """Of entries first ... first + ENTRIES - 1, each of `each` pixels but the last: pivot, mean less it, squares.

    Chan et al. 1979, around the first entry's pivot.
    """
    i = tl.arange(0, ENTRIES)
    count = tl.minimum(tl.maximum(pixels - (first + i) * each, 0), each).to(tl.float32)[:, None]
    at = table + ((n * entries + first + i) * 3)[:, None] * channels + c[None, :]
    mask = (first + i < entries)[:, None] & inside[None, :]
    pivots = tl.load(at, mask=mask, other=0.0)
    pivot = tl.sum(tl.where(i[:, None] == 0, pivots, 0.0), 0)
    apart = tl.where(mask, (pivots - pivot[None, :]) + tl.load(at + channels, mask=mask, other=0.0), 0.0)
    mean = tl.sum(apart * count, 0) / tl.sum(count, 0)
    d = tl.where(mask, apart - mean[None, :], 0.0)
    return pivot, mean, tl.sum(tl.load(at + 2 * channels, mask=mask, other=0.0) + d * d * count, 0)


@triton.jit
def added_sums(table, n, first, entries, c, inside, channels, ENTRIES: tl.constexpr):
    """The three sums over entries first ... first + ENTRIES - 1."""
    i = tl.arange(0, ENTRIES)
    at = table + ((n * entries + first + i) * 3)[:, None] * channels + c[None, :]
    mask = (first + i < entries)[:, None] & inside[None, :]
    a = tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    b = tl.sum(tl.load(at + channels, mask=mask, other=0.0), 0)
    return a, b, tl.sum(tl.load(at + 2 * channels, mask=mask, other=0.0), 0)


@triton.jit
def norm_merge_kernel(
    out, table, entries, fewer, channels, pixels, each,
    MOMENTS: tl.constexpr, ENTRIES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ENTRIES entries become one, of `fewer` an image."""
    slabs = tl.cdiv(channels, LANES)
    n = (tl.program_id(0) // (slabs * fewer)).to(tl.int64)
    entry = tl.program_id(0) // slabs % fewer
    c = tl.program_id(0) % slabs * LANES + tl.arange(0, LANES)
    inside = c < channels
    if MOMENTS:
        v, w, u = merged_moments(table, n, entry * ENTRIES, entries, c, inside, channels, pixels, each, ENTRIES)
    else:
        v, w, u = added_sums(table, n, entry * ENTRIES, entries, c, inside, channels, ENTRIES)
    to = out + (n * fewer + entry) * 3 * channels + c
    tl.store(to, v, mask=inside)
    tl.store(to + channels, w, mask=inside)
    tl.store(to + 2 * channels, u, mask=inside)


def few(table: Tensor, pixels: int, each: int, moments: bool) -> tuple[Tensor, int]:
    """The table with at most MOST entries an image, and the pixels of each."""
    images, entries, _, channels = table.shape
    while entries > MOST:
        fewer = triton.cdiv(entries, MOST)
        out = torch.empty((images, fewer, 3, channels), dtype=torch.float32, device=table.device)
        grid = (images * fewer * triton.cdiv(channels, LANES),)
        norm_merge_kernel[grid](
            out, table, entries, fewer, channels, pixels, each, MOMENTS=moments, ENTRIES=MOST, LANES=LANES
        )
        table, entries, each = out, fewer, each * MOST
    return table, each
