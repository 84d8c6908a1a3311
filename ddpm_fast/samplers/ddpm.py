"""Ancestral sampling (Ho et al. 2020, algorithm 2), also on fewer timesteps (Nichol & Dhariwal 2021, section 4)."""

from collections.abc import Sequence

import numpy as np

from ..ops import _checks as checks
from ..schedules import Array
from .plan import Plan, plan_of
from .steps import steps_of

# Where between the posterior's (0) and beta (1), in the logarithm; what is learned starts in the middle.
VARIANCES = {"beta": 1.0, "posterior": 0.0, "learned": 0.5}


def ddpm(
    alphas_cumprod: Array,
    prediction: str = "eps",
    num_steps: int | None = None,
    *,
    variance: str | float = "beta",
    spacing: str | Sequence[int] = "linspace",
    final: str = "clean",
    clip: bool = False,
) -> Plan:
    """Ancestral sampling: the posterior mean (Ho et al. 2020, equation 7) plus noise.

    Args:
        alphas_cumprod: [T].
        prediction: what the network predicts: "eps", "x0" or "v".
        num_steps: how many of the T timesteps to take, all by default; the betas between them follow from
            `alphas_cumprod`.
        variance: "beta" (as the original DDPM code), "posterior", sigma^2 = beta (1 - abar') / (1 - abar), or a number
            in [0, 1] between them, in the logarithm: 1 is "beta", 0 "posterior"; or "learned", where the network says
            for each element where between them (Nichol & Dhariwal 2021, equation 15: (v + 1) / 2).
        spacing, final: see `steps.steps_of`.
        clip: bound x0_hat to [-1, 1] in each step.

    Raises:
        ValueError, TypeError: an option has an unknown value, or num_steps is no integer in [1, T].
    """
    if isinstance(variance, str):
        checks.choice("variance", variance, tuple(VARIANCES))
        share = VARIANCES[variance]
    else:
        share = checks.number("variance", variance, 0, 1)
    t, abar, abar_next = steps_of(alphas_cumprod, num_steps, spacing, final)
    alpha = abar / abar_next
    beta = 1 - alpha
    posterior = beta * (1 - abar_next) / (1 - abar)
    noise = beta**share * posterior ** (1 - share)
    between = np.log(np.divide(beta, posterior, out=np.ones_like(beta), where=posterior > 0))
    return plan_of(
        t,
        abar,
        prediction,
        c_x=np.sqrt(alpha) * (1 - abar_next) / (1 - abar),
        c_0=np.sqrt(abar_next) * beta / (1 - abar),
        c_z=np.where(abar_next < 1, np.sqrt(noise), 0.0),
        c_v=between / 4 if variance == "learned" else None,
        clip=clip,
    )
