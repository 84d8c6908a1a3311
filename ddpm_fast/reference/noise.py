"""Random numbers from Philox words: standard normals, training timesteps, dropout masks.

Normals are Box-Muller on the word pairs (w0, w1), (w2, w3), in float32 with multiplication, addition, division and
square root only, in a fixed order and without fused multiply-add: every backend gives the same bits.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import TIMESTEPS, Dropout, NoiseState, words

# log1p(f) = f + f^2 Q(f) on [-1/3, 1/3], relative error 2.6e-8; sin and cos of x quarter turns on [-1/2, 1/2],
# sin = x (SIN[0] + x^2 ...), cos = 1 + x^2 (...), 3.8e-9 and 6.4e-11. Minimax, rounded to float32, lowest power first.
LOG1P = tuple(
    map(
        float.fromhex,
        "-0x1.ffffd6p-2 0x1.5554fap-2 -0x1.001480p-2 0x1.99d428p-3 "
        "-0x1.5032eap-3 0x1.1ea258p-3 -0x1.3b2846p-3 0x1.1f427ap-3".split(),
    )
)
SIN = tuple(map(float.fromhex, "-0x1.4abbbep-1 0x1.466004p-4 -0x1.2dc84cp-8".split()))
COS = tuple(map(float.fromhex, "-0x1.3bd3ccp+0 0x1.03c1dep-2 -0x1.55c5e0p-6 0x1.d9d57ep-11".split()))
# Each constant in two parts, the first with few bits, so that small integer multiples of it are exact.
LN2 = (float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7d1cp-20"))
HALF_PI = (float.fromhex("0x1.921fb6p+0"), float.fromhex("-0x1.777a5cp-25"))
TWO_THIRDS = float.fromhex("0x1.555556p-1")  # float32
TWO_THIRDS_BITS = 0x3F2AAAAB


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result = result * x + c
    return result


def _radius(k: Tensor) -> Tensor:
    """sqrt(-2 log u) with u = (k + 1/2) / 2^32 for words k: taken from the nearer end, so that both tails are exact."""
    low = k < 2**31
    v = (2 * torch.where(low, k, 0xFFFFFFFF - k) + 1).float() * 2.0**-33  # u, or 1 - u in the high half
    bits = v.view(torch.int32)
    exponent = (bits - TWO_THIRDS_BITS) >> 23
    mantissa = (bits - (exponent << 23)).view(torch.float32)  # in [2/3, 4/3)
    near_one = 1 - v >= TWO_THIRDS
    f = torch.where(low, mantissa - 1, torch.where(near_one, -v, 1 - 2 * v))
    e = torch.where(low, exponent, near_one.int() - 1).float()
    log1p = f + f * f * _polynomial(f, LOG1P)
    log_u = e * LN2[0] + (log1p + e * LN2[1])
    # Through float64, as torch.sqrt on float32 may come from a library that does not round correctly. The root of a
    # float32 keeps 2^-50 away from every midpoint between float32 values, so rounding twice is exact.
    return torch.sqrt((-2 * log_u).double()).float()


def _cos_sin(j: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle 2 pi (j + 1/2) / 2^32 for words j: the nearest quarter turn, and what is left."""
    shifted = j + 2**29
    quarter = (shifted >> 30) & 3
    x = (2 * ((shifted & (2**30 - 1)) - 2**29) + 1).float() * 2.0**-31  # quarter turns
    y = x * x
    sin = x * (HALF_PI[0] + (HALF_PI[1] + y * _polynomial(y, SIN)))
    cos = 1 + y * _polynomial(y, COS)
    odd = (quarter & 1).bool()
    c, s = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    return torch.where(((quarter + 1) & 2).bool(), -c, c), torch.where((quarter & 2).bool(), -s, s)


def box_muller(k: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (float32) from two words; within 4 ulp of the exact transform (6 guaranteed)."""
    radius = _radius(k)
    cos, sin = _cos_sin(j)
    return radius * cos, radius * sin


def noise(shape: Sequence[int], state: NoiseState, stream: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals [N, ...]: element e of a sample, in its own order, is normal e % 4 of counter e // 4."""
    num_samples, size = shape[0], math.prod(shape[1:])
    w = words(state, stream, num_samples, -(-size // 4))
    z = torch.stack([*box_muller(w[0], w[1]), *box_muller(w[2], w[3])], dim=-1)
    return z.flatten(1)[:, :size].reshape(shape).to(dtype)


def drawn(source: Tensor | NoiseState, like: Tensor, stream: int) -> Tensor:
    """The noise itself where that is given, else drawn from its counters like `like`, at least in float32."""
    if not isinstance(source, NoiseState):
        return source
    return noise(like.shape, source, stream, dtype=torch.promote_types(like.dtype, torch.float32))


def timesteps(num_samples: int, num_timesteps: int, state: NoiseState, stream: int = TIMESTEPS) -> Tensor:
    """Uniform training timesteps, int64 [N] in [0, num_timesteps): the high half of word * T."""
    first_word = words(state, stream, num_samples, 1)[0]
    return (first_word[:, 0] * num_timesteps) >> 32


def dropout_threshold(p: float) -> tuple[int, float]:
    """Sixteen random bits below the first number drop the element; what is kept is multiplied by the second."""
    threshold = round(p * 2**16)
    return threshold, 2**16 / (2**16 - threshold) if threshold < 2**16 else 0.0


def dropout_mask(shape: Sequence[int], p: float, state: NoiseState, stream: int) -> Tensor:
    """Dropout factors [N, C, H, W], float32: 0 with probability p (to 2^-16), else 1 / (1 - p).

    Elements count in H, W, C order with 16 bits each, low half of a word first: eight channels share a counter.
    """
    num_samples, channels, height, width = shape
    size = channels * height * width
    w = torch.stack(words(state, stream, num_samples, -(-size // 8)), dim=-1)
    halves = torch.stack([w & 0xFFFF, w >> 16], dim=-1).flatten(1)[:, :size]
    threshold, scale = dropout_threshold(p)
    mask = (halves >= threshold).to(torch.float32) * scale
    return mask.reshape(num_samples, height, width, channels).permute(0, 3, 1, 2)


def apply_dropout(x: Tensor, dropout: Dropout | Tensor) -> Tensor:
    """x times its dropout factors, which are given or drawn."""
    if isinstance(dropout, Dropout) and dropout.state is None:
        if x.is_contiguous():
            return F.dropout(x, dropout.p)
        # torch draws in memory order: the mask is what a contiguous x would get.
        dropout = F.dropout(torch.ones(x.shape, dtype=x.dtype, device=x.device), dropout.p)
    if isinstance(dropout, Dropout):
        state = cast(NoiseState, dropout.state)
        dropout = dropout_mask(x.shape, dropout.p, state, dropout.stream)
    return x * dropout.to(x.dtype)
