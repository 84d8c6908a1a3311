"""The simplified training objective (Ho et al. 2020, equation 14), for any target linear in noise and x_start."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import drawn
from .philox import PERTURB, NoiseState


def diffusion_loss(
    model_out: Tensor,  # [N, ...]
    noise: Tensor | NoiseState,
    *,
    loss_type: str = "l2",
    noise_coef: Tensor | None = None,  # [N]
    x_coef: Tensor | None = None,  # [N]
    x_start: Tensor | None = None,  # [N, ...]
) -> Tensor:  # []
    """Mean over all elements of |d| (l1) or d^2 (l2), d = model_out - (noise_coef noise + x_coef x_start)."""
    loss = F.l1_loss if loss_type == "l1" else F.mse_loss
    return loss(*_sides(model_out, noise, noise_coef, x_coef, x_start))


def losses_per_image(
    model_out: Tensor, noise: Tensor | NoiseState, *, loss_type: str = "l2", **target: Tensor | None
) -> Tensor:  # [N]
    """`diffusion_loss`, but the mean of each image."""
    loss = F.l1_loss if loss_type == "l1" else F.mse_loss
    sides = _sides(model_out, noise, target.get("noise_coef"), target.get("x_coef"), target.get("x_start"))
    return loss(*sides, reduction="none").flatten(1).mean(1)


def _sides(
    model_out: Tensor,
    noise: Tensor | NoiseState,
    noise_coef: Tensor | None,
    x_coef: Tensor | None,
    x_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What came and what should have come, in at least float32."""
    dtype = torch.promote_types(model_out.dtype, torch.float32)
    column = (-1, *[1] * (model_out.ndim - 1))
    target = drawn(noise, model_out, PERTURB).to(dtype)
    if noise_coef is not None:
        target = target * noise_coef.to(dtype).view(column)
    if x_coef is not None and x_start is not None:
        target = target + x_start.to(dtype) * x_coef.to(dtype).view(column)
    return model_out.to(dtype), target
