"""Sinusoidal embedding of the timestep (Vaswani et al. 2017, section 3.5, in the layout of the original DDPM code)."""

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """[N] timesteps -> [N, dim]: sines, then cosines, of scale * t * 10000^(-i / half), i < half = dim / 2."""
    half = dim // 2
    dtype = t.dtype if t.dtype == torch.float64 else torch.float32
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=dtype) * (-math.log(10000) / half))
    angles = torch.outer(t.to(dtype) * float(scale), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
