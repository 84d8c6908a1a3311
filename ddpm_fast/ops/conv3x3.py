"""3x3 convolution with its neighbours folded in."""

from typing import Any, cast

import torch
from torch import Tensor

from ..reference import conv3x3 as reference
from ..reference.conv3x3 import Norm
from ..reference.group_norm_silu import ACTIVATIONS
from . import _checks, _conv3x3, _native
from ._dispatch import Impl, Op
from ._library import composition


def _composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
    stats: bool = False,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = None if scale is None or shift is None else Norm(scale, shift, activation)
    out = reference.conv3x3(x, weight, bias, norm=norm, stats=stats, **rest)
    return out if isinstance(out, tuple) else (out, out.new_empty(0), out.new_empty(0))


_NODE = composition(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? x2=None, Tensor? scale=None, Tensor? shift=None, "
    "str activation='silu', Tensor? residual=None, bool stats=False) -> (Tensor, Tensor, Tensor)",
    _composed,
)


def _traced(x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None, norm: Norm | None, *rest: Any) -> Any:
    residual, stats = rest
    named = {} if norm is None else norm._asdict()
    out = _NODE(x, weight, bias, x2=x2, residual=residual, stats=stats, **named)
    return out if stats else out[0]


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x2: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    stats: bool,
) -> Any:
    if residual is None or stats or torch.is_grad_enabled() or _native.in_the_way():
        return reference.conv3x3(x, weight, bias, x2=x2, norm=norm, residual=residual, stats=stats)
    y = cast(Tensor, reference.conv3x3(x, weight, bias, x2=x2, norm=norm))
    return y.add_(residual) if y.dtype == residual.dtype else y + residual  # nobody else has y yet


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None, norm: Norm | None, *rest: Any
) -> tuple[Any, ...]:
    residual, stats = rest
    n, channels, height, width = _checks.concatenated(x, x2)
    _checks.tensor("weight", weight, ndim=4, device=x.device)
    for name, value in (("weight", weight), ("bias", bias)):
        given = isinstance(value, Tensor) and value.dtype != x.dtype
        if given and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}; got {_checks.text(value)}")
    out_channels = weight.shape[0]
    _checks.tensor("weight", weight, shape=(out_channels, channels, 3, 3))
    if 0 in (channels, out_channels, height, width):
        raise ValueError(f"x and weight must have channels and pixels, got {_checks.text(x)}, {_checks.text(weight)}")
    if bias is not None:
        _checks.tensor("bias", bias, shape=(out_channels,), device=x.device)
    if residual is not None:
        _checks.tensor("residual", residual, shape=(n, out_channels, height, width), device=x.device)
    if norm is not None:
        if not isinstance(norm, Norm):
            raise TypeError(f"norm must be a Norm, got {_checks.text(norm)}")
        _checks.tensor("norm.scale", norm.scale, shape=(n, channels), device=x.device)
        _checks.tensor("norm.shift", norm.shift, shape=(n, channels), device=x.device)
        _checks.choice("norm.activation", norm.activation, tuple(ACTIVATIONS))
    _checks.flag("stats", stats)
    return x, weight, bias, x2, norm, residual, stats


def _load_native() -> Any:
    _native.load()
    return _conv3x3.run


OP = Op(
    "conv3x3",
    Impl("native", _load_native, _conv3x3.rejects),
    Impl("reference", lambda: _reference),
    check=_check,
    traced=_traced,
)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    stats: bool = False,
) -> Any:
    """conv(activation(cat(x, x2) scale + shift)) + bias + residual; 3x3, stride 1, padding 1.

    Args:
        x: [N, C1, H, W].
        weight: [K, C, 3, 3] with C = C1 + C2.
        bias: [K].
        x2: [N, C2, H, W], as if concatenated to x.
        norm: a normalisation of the input reduced to scale and shift [N, C], and its activation.
        residual: [N, K, H, W], added to the result.
        stats: return also the result's mean and sum of squared deviations over H, W, [N, K] each.

    Returns:
        y [N, K, H, W], or (y, mean, m2) with `stats`.

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, device or value.
    """
    return OP(x, weight, bias, x2, norm, residual, stats)
