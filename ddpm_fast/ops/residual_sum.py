"""The sum at the end of a residual block, with the bias of the convolution before it.

For GPUs, where a convolution takes a pass of its own for its bias. Not native: on CPUs it adds the bias as it writes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import residual_sum as reference
from . import _checks, _triton
from ._dispatch import Impl, Op
from ._library import composition

_NODE = composition("residual_sum(Tensor x, Tensor? residual, Tensor? bias=None) -> Tensor", reference.residual_sum)


def _rejects(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> str | None:
    if residual is not None and residual.dtype is not x.dtype:
        return f"takes images of one dtype, got {x.dtype} and {residual.dtype}"
    tensors = x, residual, bias
    return _triton.unfit(*tensors) or _triton.unfit_arrays(*tensors, grads=True)


class _Sum(torch.autograd.Function):
    """Keeps no tensor: both images have the gradient of the result."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Tensor], *tensors: Any) -> Tensor:
        bias = tensors[2]
        ctx.dtype = None if bias is None else bias.dtype
        return kernel(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        summed = dy.sum((0, 2, 3), dtype=torch.float32).to(ctx.dtype) if ctx.needs_input_grad[3] else None
        return None, dy, dy if ctx.needs_input_grad[2] else None, summed


def _load_triton() -> Callable[..., Tensor]:
    kernel = _triton.load("residual_sum").residual_sum

    def run(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> Tensor:
        wanted = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, residual, bias))
        with _triton.on(x):
            y: Tensor = _Sum.apply(kernel, x, residual, bias) if wanted else kernel(x, residual, bias)
        return y

    return run


def _check(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    _checks.tensor("x", x, ndim=4)
    if residual is None and bias is None:
        raise TypeError("residual must be a tensor, or bias: there is nothing to add to x")
    if residual is not None:
        _checks.tensor("residual", residual, shape=x.shape, device=x.device)
    if bias is not None:
        _checks.tensor("bias", bias, shape=x.shape[1:2], device=x.device)
    return x, residual, bias


OP = Op(
    "residual_sum",
    Impl("triton", _load_triton, _rejects),
    Impl("reference", lambda: reference.residual_sum),
    check=_check,
    traced=_NODE,
)


def residual_sum(x: Tensor, residual: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """x + residual + bias.

    Args:
        x: [N, C, H, W], what a convolution without its bias returned.
        residual: like `x`, or None where there is a bias.
        bias: [C], that of the convolution; float32 also beside images of lower precision.

    Returns:
        [N, C, H, W], of the dtype of x + residual.

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, dtype or device.
    """
    return OP(x, residual, bias)
