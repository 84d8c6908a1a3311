"""The perturb step of training: x_start and noise to x_t."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference import q_sample as reference
from ..reference.philox import PERTURB, NoiseState
from . import _checks, _native, _triton
from ._dispatch import Impl, Op
from ._library import composition
from .noise import check_source, drawn


def _reference(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Tensor | NoiseState) -> Tensor:
    return reference.q_sample(x_start, t, signal, sigma, drawn(noise, x_start, PERTURB))


_NODE = composition(
    "q_sample(Tensor x_start, Tensor t, Tensor signal, Tensor sigma, Tensor noise) -> Tensor", reference.q_sample
)


def _traced(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Tensor | NoiseState) -> Tensor:
    return _NODE(x_start, t, signal, sigma, drawn(noise, x_start, PERTURB))


def _rejects(
    fit: Any, x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Tensor | NoiseState
) -> str | None:
    tables = (signal, sigma)
    for table in tables:
        if table.dtype is not torch.float32:
            return f"takes float32 tables, got {table.dtype}"
    state, z = (noise[:2], None) if isinstance(noise, NoiseState) else ((), noise)
    reason: str | None = fit.unfit(x_start, t, *tables, z, *state) or fit.unfit_arrays(x_start, *tables, z)
    return reason


def _load_triton() -> Callable[..., Tensor]:
    kernel = _triton.load("q_sample").q_sample

    def run(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Tensor | NoiseState) -> Tensor:
        with _triton.on(x_start):
            out: Tensor = kernel(x_start, t.contiguous(), signal.contiguous(), sigma.contiguous(), noise)
        return out

    return run


def _load() -> Callable[..., Tensor]:
    native = _native.load().q_sample

    def run(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Tensor | NoiseState) -> Tensor:
        x_t = torch.empty_like(x_start)
        t, signal, sigma = t.contiguous(), signal.contiguous(), sigma.contiguous()
        native(x_t, x_start, t, signal, sigma, noise, _native.threads())
        return x_t

    return run


def _ready(*arguments: Any) -> bool:
    fits: bool = _native.load().q_sample_ready(*arguments, torch.is_grad_enabled())
    return fits and _native.in_the_way() is None


def _check(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Tensor | NoiseState) -> tuple[Any, ...]:
    _checks.tensor("x_start", x_start)
    if x_start.ndim < 1:
        raise ValueError("x_start must have a batch dimension, got a scalar")
    _checks.tensor("t", t, shape=x_start.shape[:1], dtype=torch.int64, device=x_start.device)
    _checks.tensor("sqrt_alphas_cumprod", signal, ndim=1, device=x_start.device)
    _checks.tensor("sqrt_one_minus_alphas_cumprod", sigma, shape=signal.shape, device=x_start.device)
    _checks.indices("t", t, signal.shape[0])
    check_source(noise, x_start)
    return x_start, t, signal, sigma, noise


OP = Op(
    "q_sample",
    Impl("native", _load, partial(_rejects, _native), _ready),
    Impl("triton", _load_triton, partial(_rejects, _triton)),
    Impl("reference", lambda: _reference),
    check=_check,
    traced=_traced,
)


def extract(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """a[t], shaped to broadcast against a batch.

    Args:
        a: [T], a table.
        t: [N], int64 in [0, T).
        x_shape: [N, ...], the shape of the batch.

    Returns:
        [N, 1, ...], as many dimensions as `x_shape`.

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, device or range.
    """
    _checks.tensor("a", a, ndim=1)
    x_shape = _checks.integers("x_shape", x_shape, 0)
    if not x_shape:
        raise ValueError("x_shape must begin with the batch size, got an empty shape")
    _checks.tensor("t", t, shape=x_shape[:1], dtype=torch.int64, device=a.device)
    _checks.indices("t", t, a.shape[0])
    return reference.extract(a, t, x_shape)


def q_sample(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    noise: Tensor | NoiseState,
) -> Tensor:
    """x_t = sqrt(alphas_cumprod[t]) x_start + sqrt(1 - alphas_cumprod[t]) noise (Ho et al. 2020, equation 4).

    Args:
        x_start: [N, ...], floating point.
        t: [N], int64 in [0, T).
        sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod: [T].
        noise: like `x_start`, or the NoiseState to draw it from (stream PERTURB).

    Returns:
        x_t, like `x_start`.

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, dtype, device or range.
    """
    return OP(x_start, t, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, noise)
