"""The sinusoidal embedding of the timestep in Triton: one launch where the formula takes seven.

Angles reach 1000 and more, so they are formed and reduced to a quarter turn in float64: [N, dim] is small.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import turned

BLOCK = 128
QUARTERS = tl.constexpr(2 / math.pi)  # in a radian


@triton.jit
def timestep_embedding_kernel(
    out, t, t_step, half, SCALE: tl.constexpr, RATE: tl.constexpr, BLOCK: tl.constexpr
):  # constants, as a number that a launch is given would be float32
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    frequency = tl.exp(i.to(tl.float64) * RATE)
    quarters = tl.load(t + n * t_step).to(tl.float64) * SCALE * QUARTERS * frequency
    rest = quarters - tl.floor(quarters * 0.25) * 4.0  # in [0, 4)
    nearest = tl.floor(rest + 0.5)
    cos, sin = turned(nearest.to(tl.int32), (rest - nearest).to(tl.float32))
    row = out + n * 2 * half + i
    tl.store(row, sin, mask=i < half)
    tl.store(row + half, cos, mask=i < half)


def timestep_embedding(t: Tensor, dim: int, scale: float) -> Tensor:
    """Arguments as in ops.timestep_embedding; float32."""
    half = dim // 2
    out = torch.empty((t.shape[0], dim), dtype=torch.float32, device=t.device)
    if t.numel():
        grid = (t.shape[0], triton.cdiv(half, BLOCK))
        rate = -math.log(10000) / half
        timestep_embedding_kernel[grid](out, t, t.stride(0), half, SCALE=scale, RATE=rate, BLOCK=BLOCK)
    return out
