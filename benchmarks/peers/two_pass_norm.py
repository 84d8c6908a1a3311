"""GroupNorm + time bias + SiLU of channels_last images in two passes, in the manner of apex's `group_norm`, in Triton.

The first kernel leaves the sums and the sums of squares of each chunk of pixels; the second adds the few of them up and
normalises, in vectors of 16 bytes. Least bytes: x read, y written, where the second kernel finds x in the L2. After the
way of NVIDIA apex's two-pass NHWC kernels (contrib/group_norm), not their code; no atomics here.
"""

# What Triton compiles has no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS = 2 * 132  # two for each multiprocessor of an H100
TILE = 8192  # numbers that a program holds at once, at most: 32 a thread


@triton.jit
def _tile(
    x, add, n, pixel, slab, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SLAB: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """x + add at ROWS pixels and a slab's channels, float32, 0 beyond the mask; where; the mask; channels; theirs."""
    lane = tl.arange(0, WIDTH)
    c = slab + lane
    inside = (lane < SLAB) & (c < CHANNELS)
    p = pixel + tl.arange(0, ROWS)
    mask = (p < PIXELS)[:, None] & inside[None, :]
    at = n * (PIXELS * CHANNELS) + p[:, None] * CHANNELS + c[None, :]
    more = tl.load(add + n * CHANNELS + c, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, v + more[None, :], 0.0), at, mask, c, inside


@triton.jit
def two_pass_norm_sums_kernel(
    x, add, sums, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PER_GROUP: tl.constexpr, SLAB: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A chunk's sums and sums of squares of each group of a slab; sums is float32 [N, 2, CHUNKS, groups]."""
    chunk, slab, n = tl.program_id(0), tl.program_id(1) * SLAB, tl.program_id(2).to(tl.int64)
    s = tl.zeros([ROWS, WIDTH], tl.float32)
    q = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(TILES):
        v, _, _, _, _ = _tile(x, add, n, (chunk * TILES + i) * ROWS, slab, PIXELS, CHANNELS, SLAB, WIDTH, ROWS)
        s += v
        q += v * v
    group = tl.arange(0, LANES)
    member = group[:, None] == (tl.arange(0, WIDTH) // PER_GROUP)[None, :]
    groups: tl.constexpr = CHANNELS // PER_GROUP
    g = slab // PER_GROUP + group
    inside = (group < SLAB // PER_GROUP) & (g < groups)
    to = sums + (n * 2 * CHUNKS + chunk) * groups + g
    tl.store(to, tl.sum(tl.where(member, tl.sum(s, 0)[None, :], 0.0), 1), mask=inside)
    tl.store(to + CHUNKS * groups, tl.sum(tl.where(member, tl.sum(q, 0)[None, :], 0.0), 1), mask=inside)


@triton.jit
def two_pass_norm_apply_kernel(
    x, weight, bias, add, sums, y, eps, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PER_GROUP: tl.constexpr,
    SLAB: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A tile of y, from the sums of all chunks of its image."""
    slab, n = tl.program_id(1) * SLAB, tl.program_id(2).to(tl.int64)
    v, at, mask, c, inside = _tile(x, add, n, tl.program_id(0) * ROWS, slab, PIXELS, CHANNELS, SLAB, WIDTH, ROWS)
    groups: tl.constexpr = CHANNELS // PER_GROUP
    s = tl.zeros([WIDTH], tl.float32)
    q = tl.zeros([WIDTH], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        of = sums + (n * 2 * CHUNKS + chunk) * groups + c // PER_GROUP
        s += tl.load(of, mask=inside, other=0.0)
        q += tl.load(of + CHUNKS * groups, mask=inside, other=0.0)
    mean = s / (PIXELS * PER_GROUP)
    rstd = tl.rsqrt(tl.maximum(q / (PIXELS * PER_GROUP) - mean * mean, 0.0) + eps)
    gain = rstd * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32) - mean * gain
    z = v * gain[None, :] + offset[None, :]
    tl.store(y + at, (z / (1.0 + tl.exp2(z * -LOG2_E))).to(y.dtype.element_ty), mask=mask)


class Cut(NamedTuple):
    """How a call is shared out among programs."""

    slab: int  # channels of a program, whole groups
    width: int  # lanes for them, a power of two
    rows: int  # pixels of a tile, a power of two
    tiles: int  # of a chunk of the first pass; the second has a program for each


def cut(images: int, channels: int, pixels: int, groups: int) -> Cut:
    """Slabs of 64 channels or a group, and the largest chunks that leave programs enough."""
    per_group = channels // groups
    width = max(64, triton.next_power_of_2(per_group))
    aligned = math.lcm(per_group, 8)  # 16 bytes of 16-bit numbers
    slab = width // aligned * aligned or width // per_group * per_group
    least = max(1, 1024 // width)  # 16 bytes for each of 128 threads
    chunks = max(1, triton.cdiv(PROGRAMS, images * triton.cdiv(channels, slab)))
    chunk = max(least, triton.next_power_of_2(pixels) // triton.next_power_of_2(chunks))
    rows = min(chunk, max(least, TILE // width))
    return Cut(slab, width, rows, chunk // rows)


def two_pass_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, add: Tensor, groups: int, eps: float = 1e-5
) -> Tensor:
    """Return silu(group_norm(x + add)), without gradients.

    Args:
        x: images [N, C, H, W] in channels_last; float32, float16 or bfloat16.
        weight: of the norm, [C].
        bias: of the norm, [C].
        add: bias of each image's channels, before the norm: [N, C].
        groups: of channels.
        eps: added to the variance.

    Raises:
        ValueError: x is not in channels_last.
    """
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x: expected a channels_last image, got shape {tuple(x.shape)} and strides {x.stride()}")
    n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    slab, width, rows, tiles = cut(n, channels, pixels, groups)
    chunks, slabs = triton.cdiv(pixels, rows * tiles), triton.cdiv(channels, slab)
    shape = {"PIXELS": pixels, "CHANNELS": channels, "PER_GROUP": channels // groups, "SLAB": slab, "WIDTH": width}
    shape |= {"ROWS": rows, "CHUNKS": chunks, "num_warps": 8 if rows * width > TILE // 2 else 4}
    y = torch.empty_like(x)
    sums = torch.empty((n, 2, chunks, groups), dtype=torch.float32, device=x.device)
    lanes = triton.next_power_of_2(slab * groups // channels)
    weight, bias, add = weight.contiguous(), bias.contiguous(), add.contiguous()
    two_pass_norm_sums_kernel[chunks, slabs, n](x, add, sums, TILES=tiles, LANES=lanes, **shape)
    two_pass_norm_apply_kernel[triton.cdiv(pixels, rows), slabs, n](x, weight, bias, add, sums, y, eps, **shape)
    return y
