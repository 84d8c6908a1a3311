"""group_norm_silu on the kernels of a GPU, Triton's or CUDA's: its arguments, and its gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.noise import dropout_threshold
from ..reference.philox import Dropout, NoiseState
from . import _native, _triton
from ._group_norm import _empty, _image, _like, _placed

_MOST = 2**31 - 1  # within an image kernels count in 32 bits


def rejects(x: Tensor, x2: Tensor | None, residual: Tensor | None, channels: int, groups: int) -> str | None:
    """What the kernels have no room for."""
    if channels * x.shape[2] * x.shape[3] > _MOST or any(_reach(v) > _MOST for v in (x, x2, residual) if v is not None):
        return "takes images that reach over less than 2^31 elements"
    if channels // groups > 1024:
        return "takes groups of at most 1024 channels"
    return None


def rejects_cuda(x: Tensor, channels: int, groups: int) -> str | None:
    """What those of csrc/cuda have no room for beyond that."""
    if x.stride(1) != 1 or x.shape[1] == 1:
        return "takes images in channels_last"
    if channels // groups > 256:
        return "takes groups of at most 256 channels"
    return None


def _reach(x: Tensor) -> int:
    """How far apart the first and the last element of an image lie."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def _near(x: Tensor, layout: torch.memory_format) -> Tensor:
    """A gradient where it lies, or a copy."""
    x = _image(x.resolve_neg(), layout)
    return x if _reach(x) <= _MOST else x.contiguous(memory_format=layout)


def _dropout(dropout: Dropout | None) -> tuple[Any, ...] | None:
    if dropout is None:
        return None
    assert dropout.state is not None  # else the op rejects it
    return *dropout.state, dropout.stream, *dropout_threshold(dropout.p)


def _vector(v: Tensor | None) -> Tensor | None:
    return v if v is None else v.contiguous()


class Differentiable(torch.autograd.Function):
    """group_norm_silu with a gradient; saves x and its groups' statistics, and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, rest: tuple[Any, ...], *tensors: Any) -> Any:
        x, x2, residual, *parameters = tensors
        groups, _, activation, dropout = rest
        y, h, statistics = forward(kernels, x, x2, residual, parameters, *rest)
        if dropout is not None:  # whose owner may advance the state before the backward
            seed, draw, first = dropout.state
            dropout = dropout._replace(state=NoiseState(seed.clone(), draw.clone(), first))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if h is None else h, x2, *parameters, statistics)
        ctx.kernels, ctx.rest = kernels, (groups, activation, dropout)
        return y if h is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Any:
        _native.check_backward("group_norm_silu", dy, dh)
        if dy is None and dh is None:
            return (None,) * 10
        saved = ctx.saved_tensors  # once: checkpointing unpacks no tensor twice
        with _triton.on(saved[0]):
            dx, dx2, *rows = _backward(ctx.kernels, dy, dh, saved, *ctx.rest)
        _, _, _, _, of_residual, *needed = ctx.needs_input_grad
        rows = [g if need else None for g, need in zip(rows, needed, strict=True)]
        return None, None, dx, dx2, dx if of_residual else None, *rows


def _backward(
    kernels: Any,
    dy: Tensor | None,
    dh: Tensor | None,
    saved: Any,
    groups: int,
    activation: str,
    dropout: Any,
) -> list[Any]:
    x, x2, *given, statistics = saved
    x, x2, layout = _placed(x, x2)
    dx, dx2 = _like(x, layout), None if x2 is None else _like(x2, layout)
    dy = _empty(x, x2, layout).zero_() if dy is None else _near(dy, layout)
    dh = None if dh is None else _near(dh, layout)
    of = kernels.Operands(x, x2, *map(_vector, given), groups, activation, _dropout(dropout))
    rows = kernels.backward(of, dy, dh, dx, dx2, statistics)
    found: list[Any] = [dx, dx2]
    for v, row in zip(given, rows, strict=True):
        found.append(None if v is None else (row.sum(0) if v.ndim == 1 else row).to(v.dtype))
    return found


def forward(
    kernels: Any,
    x: Tensor,
    x2: Tensor | None,
    residual: Tensor | None,
    parameters: Any,
    groups: int,
    eps: float,
    activation: str,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, h where there is a residual, and the groups' statistics."""
    x, x2, layout = _placed(x, x2)
    y = _empty(x, x2, layout)
    residual, h = (None, None) if residual is None else (_image(residual, layout), _like(x, layout))
    statistics = torch.empty((x.shape[0], groups, 2), dtype=torch.float64, device=x.device)
    of = kernels.Operands(x, x2, *map(_vector, parameters), groups, activation, _dropout(dropout))
    with _triton.on(x):
        kernels.forward(of, residual, y, h, statistics, eps)
    return y, h, statistics


def load(kernels_of: Callable[[str], Any]) -> Any:
    """The op on plain tensors, with a gradient where one is asked for; `kernels_of` loads an op's kernels."""
    kernels = kernels_of("group_norm_silu")

    def run(
        x: Tensor, weight: Any, bias: Any, groups: int, eps: float, x2: Any, add: Any, residual: Any, *rest: Any
    ) -> Any:
        scale, shift, activation, dropout = rest
        tensors = x, x2, residual, weight, bias, add, scale, shift
        options = groups, eps, activation, dropout
        if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
            return Differentiable.apply(kernels, options, *tensors)
        y, h, _ = forward(kernels, x, x2, residual, tensors[3:], *options)
        return y if h is None else (y, h)

    return run
