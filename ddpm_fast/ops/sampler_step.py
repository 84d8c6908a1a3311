"""One step of any sampler: the reverse step that a row of a plan describes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..reference import sampler_step as reference
from ..reference.philox import REVERSE, NoiseState
from . import _checks, _cuda, _native, _triton
from ._dispatch import Impl, Op
from ._library import composition
from .noise import check_source, drawn

NUM_COLUMNS = (8, 9)  # without and with c_v


def _delivering(step: Callable[..., Any]) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """`step`, which returns x' and x0_hat, with the noise drawn and the results where the caller asked for them."""

    def run(x: Tensor, model_out: Tensor, rows: Tensor, k: Tensor, *rest: Any) -> Tensor | tuple[Tensor, Tensor]:
        noise, hist, variance, clip, return_x0, out, x0_out = rest
        z = None if noise is None else drawn(noise, x, REVERSE)
        x_next, x0_hat = step(x, model_out, rows, k, noise=z, hist=hist, variance=variance, clip=clip)
        x_next = x_next if out is None else out.copy_(x_next)
        if not return_x0:
            return x_next
        return x_next, x0_hat if x0_out is None else x0_out.copy_(x0_hat)

    return run


_plain = partial(reference.sampler_step, return_x0=True)
_NODE = composition(
    "sampler_step(Tensor x, Tensor model_out, Tensor rows, Tensor k, *, Tensor? noise=None, Tensor? hist=None, "
    "Tensor? variance=None, float? clip=None) -> (Tensor, Tensor)",
    _plain,
)


def _rejects(fit: Any, x: Tensor, model_out: Tensor, rows: Tensor, k: Tensor, *rest: Any) -> str | None:
    noise, hist, variance, _, _, out, x0_out = rest
    state, z = (noise[:2], None) if isinstance(noise, NoiseState) else ((), noise)
    if rows.dtype not in (torch.float64, torch.float32, torch.bfloat16):
        return f"takes no rows of {rows.dtype}"
    if rows.requires_grad and torch.is_grad_enabled():
        return "has no gradient for rows"
    arrays = (x, model_out, z, hist, variance, out, x0_out)
    reason: str | None = fit.unfit(*arrays, rows, k, *state) or fit.unfit_arrays(*arrays)
    return reason


def _ready(*arguments: Any) -> bool:
    fits: bool = _native.load().sampler_step_ready(*arguments, torch.is_grad_enabled())
    return fits and _native.in_the_way() is None


def _load() -> Callable[..., Any]:
    native = _native.load().sampler_step

    def run(x: Tensor, model_out: Tensor, rows: Tensor, k: Tensor, *rest: Any) -> Tensor | tuple[Tensor, Tensor]:
        noise, hist, variance, clip, return_x0, out, x0_out = rest
        x_next = torch.empty_like(x) if out is None else out
        x0_hat = None if not return_x0 else torch.empty_like(x) if x0_out is None else x0_out
        bound = math.inf if clip is None else clip
        done = native(x_next, x0_hat, x, model_out, hist, noise, variance, rows, k, bound, _native.threads())
        if not done:  # a result would overwrite what is still to be read
            return aside(x, model_out, rows, k, *rest)
        if out is not None:
            increment_version(out)
        if x0_hat is None:
            return x_next
        if x0_out is not None:
            increment_version(x0_out)
        return x_next, x0_hat

    def step(*arguments: Any, noise: Any, hist: Any, variance: Any, clip: Any) -> Any:
        return run(*arguments, noise, hist, variance, clip, True, None, None)

    aside = _delivering(step)
    return run


def _load_gpu(load: Callable[[str], Any]) -> Callable[..., Any]:
    kernels = load("sampler_step")

    def run(x: Tensor, model_out: Tensor, rows: Tensor, k: Tensor, *rest: Any) -> Tensor | tuple[Tensor, Tensor]:
        noise, hist, variance, clip, return_x0, out, x0_out = rest
        read = [v for v in (x, model_out, hist, noise, variance) if isinstance(v, Tensor)]
        to = kernels.room(x, out, read)
        x0_to = kernels.room(x, x0_out, read if out is None else [*read, out]) if return_x0 else None
        with _triton.on(x):
            kernels.sampler_step(to, x0_to, x, model_out, rows, k, noise, hist, variance, clip)
        x_next = _delivered(to.data, out)
        return x_next if x0_to is None else (x_next, _delivered(x0_to.data, x0_out))

    return run


def _delivered(result: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return result
    if result is not out:
        return out.copy_(result)
    increment_version(out)
    return out


def _check(x: Tensor, model_out: Tensor, rows: Tensor, k: Tensor, *rest: Any) -> tuple[Any, ...]:
    noise, hist, variance, clip, return_x0, out, x0_out = rest
    _checks.tensor("x", x)
    if x.ndim < 1:
        raise ValueError("x must have a batch dimension, got a scalar")
    _checks.tensor("model_out", model_out, shape=x.shape, device=x.device)
    _checks.tensor("rows", rows, ndim=2, device=x.device)
    without, learned = NUM_COLUMNS
    if rows.shape[1] not in NUM_COLUMNS:
        raise ValueError(f"rows must have {without} or {learned} columns, got {_checks.text(rows)}")
    if variance is not None and rows.shape[1] != learned:
        raise ValueError(f"rows must have {learned} columns for variance, c_v the last; got {_checks.text(rows)}")
    _checks.tensor("k", k, shape=(), dtype=torch.int64, device=x.device)
    _checks.indices("k", k, rows.shape[0])
    for name, value in (("hist", hist), ("variance", variance)):
        if value is not None:
            _checks.tensor(name, value, shape=x.shape, device=x.device)
    for name, value in (("out", out), ("x0_out", x0_out)):
        if value is not None:
            _checks.tensor(name, value, shape=x.shape, dtype=x.dtype, device=x.device)
            _checks.own_memory(name, value)
    if noise is not None:
        check_source(noise, x)
    clip = None if clip is None else _checks.number("clip", clip)
    if clip is not None and clip <= 0:
        raise ValueError(f"clip must be positive, got {clip}: None is for no clipping")
    if x0_out is not None and x0_out is out:
        raise ValueError("x0_out must be another tensor than out: each receives a result of its own")
    _checks.flag("return_x0", return_x0)
    if x0_out is not None and not return_x0:
        raise ValueError("x0_out needs return_x0=True")
    return x, model_out, rows, k, noise, hist, variance, clip, return_x0, out, x0_out


OP = Op(
    "sampler_step",
    Impl("native", _load, partial(_rejects, _native), _ready),
    Impl("triton", partial(_load_gpu, _triton.load), partial(_rejects, _triton)),
    Impl("cuda", partial(_load_gpu, _cuda.load), partial(_rejects, _cuda)),
    Impl("reference", lambda: _delivering(_plain)),
    check=_check,
    traced=_delivering(_NODE),
)


def sampler_step(
    x: Tensor,
    model_out: Tensor,
    rows: Tensor,
    k: Tensor,
    *,
    noise: Tensor | NoiseState | None = None,
    hist: Tensor | None = None,
    variance: Tensor | None = None,
    clip: float | None = None,
    return_x0: bool = False,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x' = c_x x + c_0 x0_hat + c_h hist + c_z exp(c_v v) z with x0_hat = clip(p_x x + p_m model_out).

    docs/sampling.md has the coefficients of each sampler.

    Args:
        x: [N, ...], the state; computed in its dtype.
        model_out: like `x`, any floating dtype.
        rows: [S, 8 or 9], columns t, c_in, p_x, p_m, c_x, c_0, c_h, c_z and, needed for `variance` alone, c_v.
        k: int64 scalar on the device of `x`: the row to take.
        noise: z like `x`, or the NoiseState to draw it from (stream REVERSE); None for no noise.
        hist: like `x`, x0_hat of the row before.
        variance: v like `x`, any floating dtype: what a network with a learned variance predicts beside `model_out`,
            -1 and 1 for the bounds of the deviation (Nichol & Dhariwal 2021, equation 15, whose v is (v + 1) / 2). c_z
            is the geometric mean of these, c_v half the logarithm of their ratio. None for a factor of 1; without
            noise there is no effect. It may share memory with `model_out`.
        clip: bound of |x0_hat|; None for no clipping.
        return_x0: return (x', x0_hat) and not x' alone.
        out, x0_out: like `x`, receive x' and x0_hat; they may be `x` and `hist`. Without them nothing is overwritten
            and the step is differentiable.

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, dtype, device or range.
    """
    return OP(x, model_out, rows, k, noise, hist, variance, clip, return_x0, out, x0_out)
