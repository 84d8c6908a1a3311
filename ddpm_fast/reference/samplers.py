"""Textbook sampler loops, each as its paper writes it: what the plans are held against."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def ddpm_loop(
    network: Callable[[Tensor, int], Tensor],  # (x_t, t) -> what it predicts
    x: Tensor,  # x_T
    alphas_cumprod: Sequence[float],  # of the timesteps taken, ascending
    timesteps: Sequence[int],  # ascending
    noise: Sequence[Tensor],  # z of each step, in the order of use
    *,
    prediction: str = "eps",
    variance: str = "beta",
    clip: bool = False,
) -> Tensor:
    """Ancestral sampling: Ho et al. 2020, algorithm 2; with clip, through x0 and equation 7."""
    for step, i in enumerate(reversed(range(len(timesteps)))):
        abar = alphas_cumprod[i]
        abar_prev = alphas_cumprod[i - 1] if i > 0 else 1.0
        alpha = abar / abar_prev
        beta = 1 - alpha
        out = network(x, timesteps[i])
        if prediction == "eps":
            x0 = (x - math.sqrt(1 - abar) * out) / math.sqrt(abar)
        elif prediction == "v":
            x0 = math.sqrt(abar) * x - math.sqrt(1 - abar) * out
        else:
            x0 = out
        if prediction == "eps" and not clip:
            mean = (x - beta / math.sqrt(1 - abar) * out) / math.sqrt(alpha)
        else:
            x0 = torch.clamp(x0, -1, 1) if clip else x0
            mean = math.sqrt(abar_prev) * beta * x0 + math.sqrt(alpha) * (1 - abar_prev) * x
            mean = mean / (1 - abar)
        sigma = math.sqrt(beta) if variance == "beta" else math.sqrt(beta * (1 - abar_prev) / (1 - abar))
        x = mean + sigma * noise[step] if i > 0 else mean
    return x
