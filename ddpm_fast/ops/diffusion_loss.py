"""The training loss: distance of the network's output from the noise (or x_start, or v) it should have predicted."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference import diffusion_loss as reference
from ..reference.diffusion_loss import LOSSES
from ..reference.philox import PERTURB, NoiseState
from . import _checks, _native, _triton
from ._dispatch import Impl, Op
from ._library import composition
from .noise import check_source, drawn

REDUCTIONS = ("mean", "none")

_OPTIONS = "loss_type", "noise_coef", "x_coef", "x_start", "reduction"
_CODES = {name: code for code, name in enumerate(LOSSES)}  # as csrc/cpu/kernels.h numbers them


def _reference(model_out: Tensor, noise: Tensor | NoiseState, *rest: Any) -> Tensor:
    named = dict(zip(_OPTIONS, rest, strict=True))
    return reference.diffusion_loss(model_out, drawn(noise, model_out, PERTURB), **named)


_NODE = composition(
    "diffusion_loss(Tensor model_out, Tensor noise, *, str loss_type='l2', Tensor? noise_coef=None, "
    "Tensor? x_coef=None, Tensor? x_start=None, str reduction='mean') -> Tensor",
    reference.diffusion_loss,
)


def _traced(model_out: Tensor, noise: Tensor | NoiseState, *rest: Any) -> Tensor:
    return _NODE(model_out, drawn(noise, model_out, PERTURB), **dict(zip(_OPTIONS, rest, strict=True)))


def _rejects(fit: Any, model_out: Tensor, noise: Tensor | NoiseState, loss_type: str, *rest: Any) -> str | None:
    noise_coef, x_coef, x_start, _ = rest
    for coef in (noise_coef, x_coef):
        if coef is not None and coef.dtype is not torch.float32:
            return f"takes float32 coefficients, got {coef.dtype}"
    state, z = (noise[:2], None) if isinstance(noise, NoiseState) else ((), noise)
    others = (z, noise_coef, x_coef, x_start)
    reason: str | None = (
        fit.unfit(model_out, *others, *state) or fit.unfit_arrays(model_out, grads=True) or fit.unfit_arrays(*others)
    )
    return reason


def _forward(shape: Sequence[int], *arguments: Any) -> Tensor:
    loss = torch.empty(shape, dtype=torch.float32, device="cpu")
    _native.load().diffusion_loss(loss, *arguments, _native.threads())
    return loss


class _Loss(torch.autograd.Function):
    """The gradient for model_out alone; noise is drawn again from its counter."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], model_out: Tensor, noise: Any, *rest: Any) -> Tensor:
        # The noise is a tensor or the values of a state: its tensors may be advanced before the backward.
        *target, ctx.code = rest
        ctx.values = noise if isinstance(noise, tuple) else None
        ctx.save_for_backward(model_out, None if ctx.values else noise, *target)
        return _forward(shape, model_out, noise, *rest)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        _native.check_backward("diffusion_loss", grad_loss)
        model_out, noise, *target = ctx.saved_tensors
        grad = torch.empty_like(model_out)
        arguments = model_out, ctx.values or noise, *target, ctx.code
        _native.load().diffusion_loss_backward(grad, grad_loss, *arguments, _native.threads())
        return None, grad, None, None, None, None, None


def _shape(model_out: Tensor, reduction: str) -> Sequence[int]:
    return () if reduction == "mean" else model_out.shape[:1]


def _contiguous(coef: Tensor | None) -> Tensor | None:
    return None if coef is None else coef.contiguous()


def _load() -> Callable[..., Tensor]:
    _native.load()

    def run(model_out: Tensor, noise: Tensor | NoiseState, loss_type: str, *others: Any) -> Tensor:
        noise_coef, x_coef, x_start, reduction = others
        rest = _contiguous(noise_coef), _contiguous(x_coef), x_start, _CODES[loss_type]
        if model_out.requires_grad and torch.is_grad_enabled():
            values = (noise[0].item(), noise[1].item(), noise[2]) if isinstance(noise, NoiseState) else noise
            loss: Tensor = _Loss.apply(_shape(model_out, reduction), model_out, values, *rest)
            return loss
        return _forward(_shape(model_out, reduction), model_out, noise, *rest)

    return run


class _TritonLoss(torch.autograd.Function):
    """As _Loss, on the device: the state is copied there, as its tensors may be advanced before the backward."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, shape: Sequence[int], model_out: Tensor, noise: Any, *rest: Any) -> Tensor:
        ctx.kernels, ctx.state = kernels, isinstance(noise, NoiseState)
        *target, ctx.loss_type = rest
        if isinstance(noise, NoiseState):
            ctx.first_sample = noise.first_sample
            ctx.save_for_backward(model_out, torch.stack(noise[:2]), *target)
        else:
            ctx.save_for_backward(model_out, noise, *target)
        loss: Tensor = kernels.forward(shape, model_out, kernels.Target(noise, *rest))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        _native.check_backward("diffusion_loss", grad_loss)
        model_out, noise, *target = ctx.saved_tensors
        if ctx.state:
            noise = NoiseState(noise[0], noise[1], ctx.first_sample)
        with _triton.on(model_out):
            grad = ctx.kernels.backward(grad_loss, model_out, ctx.kernels.Target(noise, *target, ctx.loss_type))
        return None, None, grad, None, None, None, None, None


def _load_triton() -> Callable[..., Tensor]:
    kernels = _triton.load("diffusion_loss")

    def run(model_out: Tensor, noise: Tensor | NoiseState, loss_type: str, *others: Any) -> Tensor:
        noise_coef, x_coef, x_start, reduction = others
        shape, rest = _shape(model_out, reduction), (_contiguous(noise_coef), _contiguous(x_coef), x_start, loss_type)
        with _triton.on(model_out):
            loss: Tensor
            if model_out.requires_grad and torch.is_grad_enabled():
                loss = _TritonLoss.apply(kernels, shape, model_out, noise, *rest)
            else:
                loss = kernels.forward(shape, model_out, kernels.Target(noise, *rest))
        return loss

    return run


def _ready(*arguments: Any) -> bool:
    fits: bool = _native.load().diffusion_loss_ready(*arguments, torch.is_grad_enabled())
    return fits and _native.in_the_way() is None


def _check(model_out: Tensor, noise: Tensor | NoiseState, loss_type: str, *rest: Any) -> tuple[Any, ...]:
    noise_coef, x_coef, x_start, reduction = rest
    _checks.tensor("model_out", model_out)
    if model_out.ndim < 1:
        raise ValueError("model_out must have a batch dimension, got a scalar")
    check_source(noise, model_out)
    _checks.choice("loss_type", loss_type, tuple(LOSSES))
    _checks.choice("reduction", reduction, REDUCTIONS)
    for name, coef in (("noise_coef", noise_coef), ("x_coef", x_coef)):
        if coef is not None:
            _checks.tensor(name, coef, shape=model_out.shape[:1], device=model_out.device)
    if (x_coef is None) != (x_start is None):
        raise ValueError("x_coef and x_start go together: give both or neither")
    if x_start is not None:
        _checks.tensor("x_start", x_start, shape=model_out.shape, device=model_out.device)
    return model_out, noise, loss_type, *rest


OP = Op(
    "diffusion_loss",
    Impl("native", _load, partial(_rejects, _native), _ready),
    Impl("triton", _load_triton, partial(_rejects, _triton)),
    Impl("reference", lambda: _reference),
    check=_check,
    traced=_traced,
)


def diffusion_loss(
    model_out: Tensor,
    noise: Tensor | NoiseState,
    *,
    loss_type: str = "l2",
    noise_coef: Tensor | None = None,
    x_coef: Tensor | None = None,
    x_start: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean of |d|, d^2 or huber(d), d = model_out - (noise_coef noise + x_coef x_start).

    Without coefficients the target is the noise (Ho et al. 2020, equation 14). Computed in at least float32.
    A loss weighted by timesteps is `(weight * diffusion_loss(..., reduction="none")).mean()`.

    Args:
        model_out: [N, ...].
        noise: like `model_out`, or the NoiseState that `q_sample` was given: it is drawn again, not stored.
        loss_type: "l1", "l2", or "huber": d^2 / 2 where |d| < 1, else |d| - 1/2.
        noise_coef, x_coef: [N]; `x_coef` needs `x_start`.
        x_start: like `model_out`.
        reduction: "mean" over all elements, or "none": the mean of each image.

    Returns:
        A scalar, or [N] without reduction; float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, device or value.
    """
    return OP(model_out, noise, loss_type, noise_coef, x_coef, x_start, reduction)
