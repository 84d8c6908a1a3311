"""Group normalisation fused with what stands around it in a residual block."""

from typing import Any

import torch
from torch import Tensor

from ..reference import group_norm_silu as reference
from ..reference.group_norm_silu import ACTIVATIONS
from ..reference.philox import Dropout
from . import _checks
from ._dispatch import Impl, Op
from .noise import drawn_dropout


def _reference(x: Tensor, *args: Any, dropout: Dropout | None = None, **rest: Any) -> Any:
    if dropout is None:
        return reference.group_norm_silu(x, *args, **rest)
    n, c, h, w = x.shape
    if rest.get("x2") is not None:
        c += rest["x2"].shape[1]
    return reference.group_norm_silu(x, *args, dropout=drawn_dropout(dropout, (n, c, h, w)), **rest)


OP = Op("group_norm_silu", Impl("reference", lambda: _reference))


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
    dropout: Dropout | None = None,
) -> Any:
    """dropout(activation(group_norm(h) (1 + scale) + shift)) of h = cat(x, x2) + add + residual (Wu & He 2018).

    Args:
        x: [N, C1, H, W].
        weight, bias: [C] with C = C1 + C2, both or neither; may be float32 beside half-precision `x`.
        groups: number of groups, divides C; groups may straddle x and x2.
        eps: added to the variance.
        x2: [N, C2, H, W], as if concatenated to x.
        add: [C] or [N, C], added before the norm: convolution, time and class biases.
        residual: [N, C, H, W], added before the norm; then h is returned too.
        scale, shift: [N, C], applied after the norm (FiLM).
        activation: "none", "silu", "relu" or "mish".
        dropout: probability and source of the mask; only for training.

    Returns:
        y, like h; or (y, h) where `residual` is given.

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, device or value.
    """
    n, channels, height, width = _checks.concatenated(x, x2)
    groups, eps = _checks.integer("groups", groups, 1), _checks.number("eps", eps, 0)
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups}")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias go together: give both or neither")
    for name, value, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("residual", residual, (n, channels, height, width)),
        ("scale", scale, (n, channels)),
        ("shift", shift, (n, channels)),
    ):
        if value is not None:
            _checks.tensor(name, value, shape=shape, device=x.device)
    if add is not None:
        _checks.tensor("add", add, device=x.device)
        if add.shape not in (torch.Size((channels,)), torch.Size((n, channels))):
            raise ValueError(f"add must have shape [{channels}] or [{n}, {channels}], got {_checks.text(add)}")
    _checks.choice("activation", activation, tuple(ACTIVATIONS))
    if dropout is not None:
        if not isinstance(dropout, Dropout):
            raise TypeError(f"dropout must be a Dropout, got {_checks.text(dropout)}")
        _checks.number("dropout.p", dropout.p, 0, 1)
    return OP(
        x,
        weight,
        bias,
        groups,
        eps=eps,
        x2=x2,
        add=add,
        residual=residual,
        scale=scale,
        shift=shift,
        activation=activation,
        dropout=dropout,
    )
