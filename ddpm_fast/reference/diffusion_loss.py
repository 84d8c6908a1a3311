"""The simplified training objective (Ho et al. 2020, equation 14), for any target linear in noise and x_start."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import drawn
from .philox import PERTURB, NoiseState

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


def diffusion_loss(
    model_out: Tensor,  # [N, ...]
    noise: Tensor | NoiseState,
    *,
    loss_type: str = "l2",
    noise_coef: Tensor | None = None,  # [N]
    x_coef: Tensor | None = None,  # [N]
    x_start: Tensor | None = None,  # [N, ...]
    reduction: str = "mean",
) -> Tensor:  # [], or [N] without reduction
    """Mean of |d| (l1), d^2 (l2) or huber(d), d = model_out - (noise_coef noise + x_coef x_start).

    huber(d) is d^2 / 2 where |d| < 1, else |d| - 1/2. The mean is that of all elements, or ("none") of each image.
    """
    dtype = torch.promote_types(model_out.dtype, torch.float32)
    column = (-1, *[1] * (model_out.ndim - 1))
    target = drawn(noise, model_out, PERTURB).to(dtype)
    if noise_coef is not None:
        target = target * noise_coef.to(dtype).view(column)
    if x_coef is not None and x_start is not None:
        target = target + x_start.to(dtype) * x_coef.to(dtype).view(column)
    loss = LOSSES[loss_type](model_out.to(dtype), target, reduction=reduction)
    return loss if reduction == "mean" else loss.unsqueeze(-1).flatten(1).mean(1)
