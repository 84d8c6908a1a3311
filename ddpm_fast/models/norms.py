"""The norms of the network: made by name, and run as one op with what stands around them."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Dropout, apply_dropout
from ..ops import _checks as checks
from ..ops.group_norm_silu import OP as GROUP_NORM_SILU
from .fusing import is_plain

Activation = Callable[[Tensor], Tensor]

_FUSED: tuple[tuple[Activation, str], ...] = (
    (F.silu, "silu"),
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.mish, "mish"),
)


def get_norm(norm: str | None, num_channels: int, num_groups: int) -> nn.Module:
    """The normalisation "gn" (group), "in" (instance, affine), "bn" (batch) or None.

    Raises:
        ValueError: another name, or a number of groups that does not divide the channels.
    """
    if norm is not None and not (isinstance(norm, str) and norm in ("gn", "in", "bn")):
        raise ValueError(f"norm must be 'gn', 'in', 'bn' or None, got {checks.text(norm)}")
    num_channels = checks.integer("num_channels", num_channels, 1)
    if norm == "gn":
        if num_channels % checks.integer("num_groups", num_groups, 1):
            raise ValueError(f"num_groups must divide the number of channels, {num_channels}; got {num_groups}")
        return nn.GroupNorm(num_groups, num_channels)
    if norm == "in":
        return nn.InstanceNorm2d(num_channels, affine=True)
    if norm == "bn":
        return nn.BatchNorm2d(num_channels)
    return nn.Identity()


def checked_activation(activation: Activation) -> Activation:
    """The activation; raise TypeError unless it is a function of tensors."""
    if isinstance(activation, type) or not callable(activation):
        raise TypeError(f"activation must be a function such as F.silu, got {checks.text(activation)}")
    return activation


def reads_sums(norm: nn.Module) -> bool:
    """Whether `norm_act` takes more than x for this norm: it is one over groups."""
    return groups_of(norm) > 0


def is_known(activation: Activation) -> bool:
    """Whether it runs inside the norm, and so is the same whenever it runs again."""
    return name_of(activation) is not None


def name_of(activation: Activation) -> str | None:
    """What ops call it, where it is known."""
    return next((name for f, name in _FUSED if f is activation), None)  # by identity: it need not be hashable


def groups_of(norm: nn.Module) -> int:
    """How many groups an op would take in this norm's place; 0 where none can."""
    if type(norm) is nn.InstanceNorm2d and not norm.track_running_stats:
        groups = norm.num_features  # a group a channel
    else:
        groups = norm.num_groups if type(norm) is nn.GroupNorm else 0
    return groups if groups and is_plain(norm) else 0


def norm_act(
    norm: nn.Module,
    activation: Activation | None,
    x: Tensor,
    *,
    add: Tensor | None = None,
    dropout: Dropout | None = None,
    x2: Tensor | None = None,
    residual: Tensor | None = None,
) -> Any:
    """dropout(activation(norm(cat(x + residual, x2) + add))), and with a residual x + residual.

    One op where the norm is over groups and the activation a known one; `x2` and `residual` only if `reads_sums`.
    """
    fused = "none" if activation is None else name_of(activation)
    groups, h = groups_of(norm), None
    if groups:
        inside = (fused, dropout) if fused else ("none", None)
        norm = cast(nn.GroupNorm, norm)
        # Unchecked: the module's own arguments are right.
        y = GROUP_NORM_SILU.unchecked(
            x, norm.weight, norm.bias, groups, norm.eps, x2, add, residual, None, None, *inside
        )
        if fused:
            return y
        y, h = y if residual is not None else (y, None)
    else:
        y = norm(x if add is None else x + add.to(x.dtype)[..., None, None])
    y = y if activation is None else activation(y)
    y = y if dropout is None else apply_dropout(y, dropout)
    return y if h is None else (y, h)
