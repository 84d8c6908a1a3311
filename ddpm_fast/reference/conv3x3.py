"""3x3 convolution, stride 1, padding 1, with what precedes and follows it in a residual block."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .group_norm_silu import ACTIVATIONS


class Norm(NamedTuple):
    """A normalisation reduced to one scale and shift per image and channel, and the activation after it."""

    scale: Tensor  # [N, C]
    shift: Tensor  # [N, C]
    activation: str = "silu"


def conv3x3(
    x: Tensor,  # [N, C1, H, W]
    weight: Tensor,  # [K, C, 3, 3], C = C1 + C2
    bias: Tensor | None = None,  # [K]
    *,
    x2: Tensor | None = None,  # [N, C2, H, W]
    norm: Norm | None = None,
    residual: Tensor | None = None,  # [N, K, H, W]
    stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """conv(activation(cat(x, x2) scale + shift)) + bias + residual.

    With `stats` also the output's mean and sum of squared deviations over H, W: [N, K] each, at least float32.
    """
    h = x if x2 is None else torch.cat([x, x2], dim=1)
    if norm is not None:
        h = h * norm.scale.to(h.dtype)[..., None, None] + norm.shift.to(h.dtype)[..., None, None]
        h = ACTIVATIONS[norm.activation](h)
    y = F.conv2d(h, weight, bias, padding=1)
    if residual is not None:
        y = y + residual
    if not stats:
        return y
    z = y.to(torch.promote_types(y.dtype, torch.float32))
    mean = z.mean(dim=(2, 3))
    return y, mean, (z - mean[..., None, None]).square().sum(dim=(2, 3))
