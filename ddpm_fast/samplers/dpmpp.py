"""DPM-Solver++(2M) and its SDE form (Lu et al. 2022b, algorithm 2 and appendix D): second order from one call a step.

With lambda = log(a / s) and h = lambda' - lambda, both use D = x0_hat + (x0_hat - x0_hat before) h / (2 h before).
"""

from collections.abc import Sequence

import numpy as np

from ..ops import _checks as checks
from ..schedules import Array
from .plan import Plan, plan_of
from .steps import Steps, sigma_of, steps_of


def _slopes(steps: Steps) -> tuple[Array, Array]:
    """h, and the weight of x0_hat - x0_hat before; 0 in the first step, and in a last one that ends without noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(sigma_of(steps.abar)) - np.log(sigma_of(steps.abar_next))
        weight = np.append(0.0, h[1:] / (2 * h[:-1]))
    return h, np.where(np.isfinite(weight), weight, 0.0)


def dpmpp_2m(
    alphas_cumprod: Array,
    prediction: str = "eps",
    num_steps: int | None = None,
    *,
    spacing: str | Sequence[int] = "karras",
    final: str = "clean",
    clip: bool = False,
) -> Plan:
    """DPM-Solver++(2M), second order, one call of the network a step, without noise; 10 to 30 steps.

    Rows of x' = s'/s x - a' (e^-h - 1) D.

    Args:
        alphas_cumprod: [T].
        prediction: what the network predicts: "eps", "x0" or "v".
        num_steps: steps to take, T by default.
        spacing, final: see `steps.steps_of`.
        clip: bound x0_hat to [-1, 1] in each step.

    Raises:
        ValueError, TypeError: an option is out of range.
    """
    return dpmpp_2m_sde(alphas_cumprod, prediction, num_steps, eta=0.0, spacing=spacing, final=final, clip=clip)


def dpmpp_2m_sde(
    alphas_cumprod: Array,
    prediction: str = "eps",
    num_steps: int | None = None,
    *,
    eta: float = 1.0,
    spacing: str | Sequence[int] = "karras",
    final: str = "clean",
    clip: bool = False,
) -> Plan:
    """SDE-DPM-Solver++(2M): the same with fresh noise; 20 to 50 steps.

    Rows of x' = s'/s e^-(eta h) x + a' (1 - e^-(1 + eta) h) D + s' sqrt(1 - e^-2 eta h) z. Arguments as of `dpmpp_2m`.

    Args:
        eta: how much of the noise is drawn anew; 1 is the paper's, 0 gives `dpmpp_2m`.
    """
    eta = checks.number("eta", eta, 0)
    steps = steps_of(alphas_cumprod, num_steps, spacing, final)
    h, weight = _slopes(steps)
    a_next, s_next = np.sqrt(steps.abar_next), np.sqrt(1 - steps.abar_next)
    fresh = np.exp(-2 * eta * h) if eta else np.ones_like(h)  # h may be infinite
    push = a_next * -np.expm1(-(1 + eta) * h)
    return plan_of(
        *(steps.t, steps.abar, prediction),
        c_x=s_next / np.sqrt(1 - steps.abar) * np.sqrt(fresh),
        c_0=push * (1 + weight),
        c_h=-push * weight,
        c_z=s_next * np.sqrt(1 - fresh),
        clip=clip,
    )
