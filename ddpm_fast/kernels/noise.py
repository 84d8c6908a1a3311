"""Random numbers in Triton: the words, normals and dropout factors of reference/noise.py, bit for bit.

Least work: 4 bytes written a normal, and per four normals ten Philox rounds and two Box-Muller transforms, about 200
operations; a GPU that does 15 32-bit operations for each byte it writes is bound by memory, barely.

`normals` is what other kernels draw with. Launch whatever draws with `EXACT`: no multiplication and addition are fused.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import noise as formula
from ..reference.philox import NoiseState
from . import configs

EXACT = {"enable_fp_fusion": False}
BLOCK = 256  # counters of a program, of four normals each: two for each thread of four warps


class Cut(NamedTuple):
    """Counters of a program, and its warps."""

    counters: int
    warps: int


# What a search may pick from, the rule's first.
CUTS = {f"{counters}w{warps}": Cut(counters, warps) for counters, warps in ((BLOCK, 4), (128, 4), (512, 4), (512, 8))}

LOG1P_0, LOG1P_1, LOG1P_2, LOG1P_3, LOG1P_4, LOG1P_5, LOG1P_6, LOG1P_7 = map(tl.constexpr, formula.LOG1P)
SIN_0, SIN_1, SIN_2 = map(tl.constexpr, formula.SIN)
COS_0, COS_1, COS_2, COS_3 = map(tl.constexpr, formula.COS)
LN2_0, LN2_1 = map(tl.constexpr, formula.LN2)
HALF_PI_0, HALF_PI_1 = map(tl.constexpr, formula.HALF_PI)
TWO_THIRDS, TWO_THIRDS_BITS = tl.constexpr(formula.TWO_THIRDS), tl.constexpr(formula.TWO_THIRDS_BITS)


@triton.jit
def words(block, seed, draw, sample, stream):
    """Four words (uint32) for each counter (block, draw, sample, stream | high bits of sample << 8)."""
    like = block.to(tl.uint32) * 0
    second = like + draw.to(tl.uint32)
    third = like + sample.to(tl.uint32)
    last = like + (stream | ((sample >> 32) & 0xFFFFFF) << 8).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), second, third, last)


@triton.jit
def _radius(k):
    """sqrt(-2 log u) with u = (k + 1/2) / 2^32, from the nearer end."""
    low = (k >> 31) == 0
    v = (tl.where(low, k, 0xFFFFFFFF - k) * 2 + 1).to(tl.float32) * 1.1641532182693481e-10  # 2^-33
    bits = v.to(tl.int32, bitcast=True)
    exponent = (bits - TWO_THIRDS_BITS) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    near_one = 1.0 - v >= TWO_THIRDS
    f = tl.where(low, mantissa - 1.0, tl.where(near_one, 0.0 - v, 1.0 - 2.0 * v))
    e = tl.where(low, exponent, near_one.to(tl.int32) - 1).to(tl.float32)
    q = LOG1P_7 * f + LOG1P_6
    q = q * f + LOG1P_5
    q = q * f + LOG1P_4
    q = q * f + LOG1P_3
    q = q * f + LOG1P_2
    q = q * f + LOG1P_1
    q = q * f + LOG1P_0
    log1p = f + f * f * q
    return tl.sqrt_rn(-2.0 * (e * LN2_0 + (log1p + e * LN2_1)))


@triton.jit
def turned(quarter, x):
    """Cosine and sine of quarter + x quarter turns, x in [-1/2, 1/2]."""
    y = x * x
    sin = x * (HALF_PI_0 + (HALF_PI_1 + y * ((SIN_2 * y + SIN_1) * y + SIN_0)))
    cos = 1.0 + y * (((COS_3 * y + COS_2) * y + COS_1) * y + COS_0)
    odd = (quarter & 1) != 0
    c, s = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((quarter + 1) & 2) != 0, 0.0 - c, c), tl.where((quarter & 2) != 0, 0.0 - s, s)


@triton.jit
def _cos_sin(j):
    """Cosine and sine of 2 pi (j + 1/2) / 2^32: the nearest quarter turn, and what is left."""
    shifted = j + 0x20000000
    x = (((shifted & 0x3FFFFFFF).to(tl.int32) - 0x20000000) * 2 + 1).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    return turned((shifted >> 30).to(tl.int32), x)


@triton.jit
def normals(first, seed, draw, sample, stream, COUNTERS: tl.constexpr):
    """Normals of the elements 4 first ... 4 (first + COUNTERS) - 1 of a sample, float32 [4 COUNTERS]."""
    w0, w1, w2, w3 = words(first + tl.arange(0, COUNTERS), seed, draw, sample, stream)
    r0, r1 = _radius(w0), _radius(w2)
    c0, s0 = _cos_sin(w1)
    c1, s1 = _cos_sin(w3)
    # A thread's four numbers lie side by side: joining them moves nothing.
    return tl.reshape(tl.join(tl.join(r0 * c0, r1 * c1), tl.join(r0 * s0, r1 * s1)), [4 * COUNTERS])


@triton.jit
def dropout_factors(block, seed, draw, sample, stream, threshold, scale):
    """Factors of eight elements, in H, W, C order, for each counter of `block` [B]: float32 [8 B]."""
    w0, w1, w2, w3 = words(block, seed, draw, sample, stream)
    # Element 4 a + 2 b + c is half c of word 2 a + b; reshaping takes the first join as the slowest.
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    halves = tl.reshape(tl.join(low, high), [8 * block.shape[0]]).to(tl.int32)
    return tl.where(halves >= threshold, scale, 0.0)


@triton.jit(do_not_specialize=["first_sample", "stream"])
def noise_kernel(out, seed, draw, first_sample, stream, size, blocks, COUNTERS: tl.constexpr):
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * COUNTERS
    z = normals(first, tl.load(seed), tl.load(draw), first_sample + n, stream, COUNTERS)
    e = first * 4 + tl.arange(0, 4 * COUNTERS)
    tl.store(out + n * size + e, z, mask=e < size)


@triton.jit(do_not_specialize=["first_sample", "stream"])
def dropout_mask_kernel(out, seed, draw, first_sample, stream, threshold, scale, size, blocks, COUNTERS: tl.constexpr):
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * COUNTERS
    block = first + tl.arange(0, COUNTERS)
    factors = dropout_factors(block, tl.load(seed), tl.load(draw), first_sample + n, stream, threshold, scale)
    e = first * 8 + tl.arange(0, 8 * COUNTERS)
    tl.store(out + n * size + e, factors, mask=e < size)


@triton.jit(do_not_specialize=["first_sample", "stream", "num_timesteps"])
def timesteps_kernel(out, seed, draw, first_sample, stream, num_samples, num_timesteps, COUNTERS: tl.constexpr):
    n = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)
    sample = first_sample + n.to(tl.int64)
    zero = n.to(tl.uint32) * 0
    last = (stream | ((sample >> 32) & 0xFFFFFF) << 8).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seed), zero, zero + tl.load(draw).to(tl.uint32), sample.to(tl.uint32), last)
    tl.store(out + n, (word.to(tl.int64) * num_timesteps) >> 32, mask=n < num_samples)


def key(images: int, size: int) -> str:
    """Under which a table has the name of a cut."""
    return f"{triton.next_power_of_2(images)}x{size}"


def blocks_of(op: str, images: int, size: int, of_a_counter: int, device: torch.device) -> tuple[int, dict[str, int]]:
    """Programs for a sample's elements, and how each is launched."""
    most, warps = configs.chosen(op, key(images, size), CUTS, device)
    counters = min(most, triton.next_power_of_2(-(-max(size, 1) // of_a_counter)))
    return -(-size // (of_a_counter * counters)), {"COUNTERS": counters, "num_warps": warps}


def noise(shape: Sequence[int], state: NoiseState, stream: int, dtype: torch.dtype) -> Tensor:
    """Standard normals; arguments as in ops.noise."""
    out = torch.empty(tuple(shape), dtype=dtype, device=state.seed.device)
    size = math.prod(shape[1:])
    blocks, cut = blocks_of("noise", shape[0], size, 4, out.device)
    if out.numel():
        noise_kernel[(shape[0] * blocks,)](out, *state, stream, size, blocks, **cut, **EXACT)
    return out


def timesteps(num_samples: int, num_timesteps: int, state: NoiseState, stream: int) -> Tensor:
    """Training timesteps; arguments as in ops.timesteps."""
    out = torch.empty(num_samples, dtype=torch.int64, device=state.seed.device)
    if num_samples:
        grid = (triton.cdiv(num_samples, BLOCK),)
        timesteps_kernel[grid](out, *state, stream, num_samples, num_timesteps, COUNTERS=BLOCK)
    return out


def dropout_mask(shape: Sequence[int], p: float, state: NoiseState, stream: int) -> Tensor:
    """Dropout factors; arguments as in ops.dropout_mask."""
    n, channels, height, width = shape
    out = torch.empty((n, height, width, channels), dtype=torch.float32, device=state.seed.device)
    size = channels * height * width
    blocks, cut = blocks_of("dropout_mask", n, size, 8, out.device)
    threshold, scale = formula.dropout_threshold(p)
    if out.numel():
        grid = (n * blocks,)
        dropout_mask_kernel[grid](out, *state, stream, threshold, scale, size, blocks, **cut)
    return out.permute(0, 3, 1, 2)
