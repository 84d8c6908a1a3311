"""Sinusoidal embedding of the timestep."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference import timestep_embedding as reference
from . import _checks, _native, _triton
from ._dispatch import Impl, Op
from ._library import composition

_NODE = composition("timestep_embedding(Tensor t, int dim, float scale=1.0) -> Tensor", reference.timestep_embedding)


def _rejects(fit: Any, t: Tensor, dim: int, scale: float) -> str | None:
    if t.dtype not in (torch.int64, torch.int32, torch.float32):
        return f"takes int64, int32 and float32, got {t.dtype}"
    if t.layout is not torch.strided or t.is_neg():
        return "needs plain memory"
    if t.requires_grad and torch.is_grad_enabled():
        return "has no gradient for t"
    reason: str | None = fit.unfit(t)
    return reason


def _load() -> Callable[..., Tensor]:
    _native.load()

    def run(t: Tensor, dim: int, scale: float) -> Tensor:
        out = torch.empty(t.shape[0], dim, dtype=torch.float32, device="cpu")
        half = dim // 2
        ratio = math.exp(-math.log(10000) / half)
        _native.kernel("timestep_embedding")(out, t, half, scale, ratio, _native.threads())
        return out

    return run


def _load_triton() -> Callable[..., Tensor]:
    kernel = _triton.load("timestep_embedding").timestep_embedding

    def run(t: Tensor, dim: int, scale: float) -> Tensor:
        with _triton.on(t):
            out: Tensor = kernel(t, dim, scale)
        return out

    return run


def _check(t: Tensor, dim: int, scale: float) -> tuple[Any, ...]:
    if not isinstance(t, Tensor) or t.is_complex():
        raise TypeError(f"t must be a tensor of numbers, got {_checks.text(t)}")
    if t.ndim != 1:
        raise ValueError(f"t must have shape [N], got {_checks.text(t)}: one timestep per image")
    dim, scale = _checks.integer("dim", dim, 2), _checks.number("scale", scale)
    if dim % 2:
        raise ValueError(f"dim must be a positive even number, got {dim}: {dim + 1} would work")
    return t, dim, scale


OP = Op(
    "timestep_embedding",
    Impl("native", _load, partial(_rejects, _native)),
    Impl("triton", _load_triton, partial(_rejects, _triton)),
    Impl("reference", lambda: reference.timestep_embedding),
    check=_check,
    traced=_NODE,
)


def timestep_embedding(t: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """Sines, then cosines, of scale * t * 10000^(-i / half) for i < half = dim / 2 (Vaswani et al. 2017, section 3.5).

    Args:
        t: [N], integer or floating point.
        dim: size of the embedding, even.
        scale: factor on t.

    Returns:
        [N, dim], float32 (float64 for float64 t).

    Raises:
        ValueError, TypeError: `t` is no vector, or `dim` is not a positive even number.
    """
    return OP(t, dim, scale)
