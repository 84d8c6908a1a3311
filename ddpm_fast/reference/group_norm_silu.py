"""Group normalisation (Wu & He 2018) with all that stands around it in a residual block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import apply_dropout
from .philox import Dropout

ACTIVATIONS = {"none": lambda x: x, "silu": F.silu, "relu": F.relu, "mish": F.mish}


def _group_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """torch.group_norm that takes float32 parameters beside half-precision data on every device."""
    if weight is None or bias is None:
        return torch.group_norm(h, groups, weight, bias, eps)
    if h.device.type == "cpu" and torch.is_grad_enabled() and not h.requires_grad and weight.requires_grad:
        h = h.contiguous()  # torch 2.13 crashes in that backward in channels_last
    dtypes = {weight.dtype, bias.dtype}
    half = h.dtype in (torch.float16, torch.bfloat16)
    if dtypes == {h.dtype} or (h.device.type == "cpu" and half and dtypes == {torch.float32}):
        return torch.group_norm(h, groups, weight, bias, eps)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, bias.dtype), h.dtype)
    return torch.group_norm(h.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps).to(h.dtype)


def group_norm_silu(
    x: Tensor,  # [N, C1, H, W]
    weight: Tensor | None,  # [C], C = C1 + C2
    bias: Tensor | None,  # [C]
    groups: int,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,  # [N, C2, H, W]
    add: Tensor | None = None,  # [C] or [N, C]
    residual: Tensor | None = None,  # [N, C1, H, W]
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    activation: str = "silu",
    dropout: Dropout | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout(activation(norm(cat(h, x2) + add) (1 + scale) + shift)) of h = x + residual; with a residual, also h."""
    h = x if residual is None else x + residual.to(x.dtype)
    y = h if x2 is None else torch.cat([h, x2], dim=1)
    if add is not None:
        y = y + add.to(y.dtype)[..., None, None]
    y = _group_norm(y, weight, bias, groups, eps)
    if scale is not None:
        y = y * (1 + scale.to(y.dtype)[..., None, None])
    if shift is not None:
        y = y + shift.to(y.dtype)[..., None, None]
    y = ACTIVATIONS[activation](y)
    if dropout is not None:
        y = apply_dropout(y, dropout)
    return y if residual is None else (y, h)
