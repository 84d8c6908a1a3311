"""Euler's method for the probability flow, and its ancestral form (Karras et al. 2022; k-diffusion).

With x / a in place of x the flow is dx = (x - x0_hat) / sigma dsigma, so a step to sigma' gives x + (sigma' - sigma)
(x - x0_hat) / sigma. Written back, these are DDIM's rows; what differs is which levels are usual.
"""

from collections.abc import Sequence

import numpy as np

from ..ops import _checks as checks
from ..schedules import Array
from .plan import Plan, plan_of
from .steps import steps_of


def euler(
    alphas_cumprod: Array,
    prediction: str = "eps",
    num_steps: int | None = None,
    *,
    spacing: str | Sequence[int] = "linspace",
    final: str = "clean",
    clip: bool = False,
) -> Plan:
    """Euler's method in sigma, first order, without noise.

    Args:
        alphas_cumprod: [T].
        prediction: what the network predicts: "eps", "x0" or "v".
        num_steps: steps to take, T by default.
        spacing, final: see `steps.steps_of`.
        clip: bound x0_hat to [-1, 1] in each step.

    Raises:
        ValueError, TypeError: an option is out of range.
    """
    return ancestral_euler(alphas_cumprod, prediction, num_steps, eta=0.0, spacing=spacing, final=final, clip=clip)


def ancestral_euler(
    alphas_cumprod: Array,
    prediction: str = "eps",
    num_steps: int | None = None,
    *,
    eta: float = 1.0,
    spacing: str | Sequence[int] = "linspace",
    final: str = "clean",
    clip: bool = False,
) -> Plan:
    """Euler's method to a lower sigma than the next one, up to which fresh noise is added ("euler_ancestral").

    Arguments as of `euler`.

    Args:
        eta: the fresh noise as a share of what keeps the distribution; 0 for none.
    """
    eta = checks.number("eta", eta, 0, 1)
    t, abar, abar_next = steps_of(alphas_cumprod, num_steps, spacing, final)
    s, s_next, a_next = np.sqrt(1 - abar), np.sqrt(1 - abar_next), np.sqrt(abar_next)
    ratio = s_next * np.sqrt(abar) / (s * a_next)  # sigma' / sigma
    kept = np.sqrt(1 - eta**2 * (1 - ratio**2))  # of sigma', by the step itself
    return plan_of(
        t,
        abar,
        prediction,
        c_x=s_next / s * kept,
        c_0=a_next * (1 - ratio * kept),
        c_z=eta * s_next * np.sqrt(1 - ratio**2),
        clip=clip,
    )
