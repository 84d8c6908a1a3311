"""Ancestral sampling (Ho et al. 2020, algorithm 2), also on fewer timesteps (Nichol & Dhariwal 2021, section 4)."""

import numpy as np
import torch

from ..ops import _checks as checks
from ..predictions import x0_coefficients
from ..schedules import Array
from .plan import Plan


def spaced_timesteps(num_timesteps: int, num_steps: int) -> Array:
    """`num_steps` timesteps evenly spaced over 0..T-1, both ends included, ascending."""
    return np.unique(np.round(np.linspace(0, num_timesteps - 1, num_steps))).astype(np.int64)


def ddpm(
    alphas_cumprod: Array,
    prediction: str = "eps",
    num_steps: int | None = None,
    *,
    variance: str = "beta",
    clip: bool = False,
) -> Plan:
    """Rows of the posterior mean (Ho et al. 2020, equation 7) plus noise.

    Args:
        alphas_cumprod: [T].
        prediction: what the network predicts: "eps", "x0" or "v".
        num_steps: how many of the T timesteps to take, all by default; the betas between them follow from
            `alphas_cumprod`.
        variance: "beta" (as the original DDPM code) or "posterior", sigma^2 = beta (1 - abar') / (1 - abar).
        clip: bound x0_hat to [-1, 1] in each step.

    Raises:
        ValueError, TypeError: an option has an unknown value, or num_steps is no integer in [1, T].
    """
    total = len(alphas_cumprod)
    num_steps = total if num_steps is None else checks.integer("num_steps", num_steps, 1, total)
    checks.choice("variance", variance, ("beta", "posterior"))
    checks.flag("clip", clip)
    # One step alone starts where x_T is: at the last timestep.
    t = spaced_timesteps(total, num_steps)[::-1] if num_steps > 1 else np.array([total - 1])
    abar, abar_next = alphas_cumprod[t], np.append(alphas_cumprod[t[1:]], 1.0)
    alpha = abar / abar_next
    p_x, p_m = x0_coefficients(prediction, np.sqrt(abar), np.sqrt(1 - abar))
    posterior = (1 - alpha) * (1 - abar_next) / (1 - abar)
    c_z = np.sqrt(1 - alpha if variance == "beta" else posterior)
    c_z[-1] = 0
    rows = np.stack([
        t,
        np.ones_like(abar),
        p_x,
        p_m,
        np.sqrt(alpha) * (1 - abar_next) / (1 - abar),
        np.sqrt(abar_next) * (1 - alpha) / (1 - abar),
        np.zeros_like(abar),
        c_z,
    ], axis=1)  # fmt: skip
    return Plan(torch.from_numpy(rows), clip=1.0 if clip else None)
