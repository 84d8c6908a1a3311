"""Heun's method for the probability flow, with churn (Karras et al. 2022, algorithm 2): two rows a step.

In x / a, a step from sigma to sigma', r = sigma' / sigma, first goes to x' = r x + (1 - r) D, D = x0_hat(x), and is
then corrected with D' = x0_hat(x'). The mean of both slopes gives x' + (1 - r) / (2 r) (D' - D), without the old x.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from ..ops import _checks as checks
from ..schedules import Array
from .plan import Plan, plan_of
from .steps import sigma_of, steps_of, time_at

FAR = 0.03  # of sigma, left after a step


def heun(
    alphas_cumprod: Array,
    prediction: str = "eps",
    num_steps: int | None = None,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
    spacing: str | Sequence[int] = "logsnr",
    final: str = "clean",
    clip: bool = False,
) -> Plan:
    """Heun's method, second order, two calls of the network a step, with churn (Karras et al. 2022); 10 to 40 steps.

    Rows of a step and of its correction; a step to a clean image has none, nor one from pure noise. Where sigma falls
    far in a step, as with few steps or an even spacing of the cosine schedule's timesteps, corrections go astray.

    Args:
        alphas_cumprod: [T].
        prediction: what the network predicts: "eps", "x0" or "v".
        num_steps: steps to take, T by default; each calls the network twice.
        s_churn, s_tmin, s_tmax, s_noise: noise added before a step from a sigma in [s_tmin, s_tmax], which grows by
            min(s_churn / num_steps, sqrt(2) - 1) of itself; None is no limit. Before the first step x_T already is that
            noise.
        spacing, final: see `steps.steps_of`.
        clip: bound x0_hat to [-1, 1] in each row.

    Raises:
        ValueError, TypeError: an option is out of range.
    """
    s_churn, s_noise = checks.number("s_churn", s_churn, 0), checks.number("s_noise", s_noise, 0)
    s_tmin = checks.number("s_tmin", s_tmin, 0)
    s_tmax = np.inf if s_tmax is None else checks.number("s_tmax", s_tmax, s_tmin)
    steps = steps_of(alphas_cumprod, num_steps, spacing, final)
    t, abar, abar_next = steps
    sigma, after = sigma_of(abar), sigma_of(abar_next)
    churned = (sigma >= s_tmin) & (sigma <= s_tmax) & np.isfinite(sigma)
    grown = np.where(churned, sigma * (1 + min(s_churn / len(t), np.sqrt(2) - 1)), sigma)
    t = np.where(grown > sigma, time_at(alphas_cumprod, grown), t)
    a_grown, a_next = 1 / np.sqrt(1 + grown**2), np.sqrt(abar_next)
    s_grown, s_next = np.sqrt(1 - a_grown**2), np.sqrt(1 - abar_next)
    # After a step x stands at the level at which the next one starts, grown.
    a_start = np.append(a_grown[1:], a_next[-1])
    added = np.append(s_noise * np.sqrt(grown[1:] ** 2 - sigma[1:] ** 2), 0.0)
    r = after / grown
    corrected = r > 0
    if (least := r[corrected].min(initial=1.0)) < FAR:
        warnings.warn(
            f"heun: sigma falls to {least:.2g} of itself in a step, where corrections go astray: take more steps or "
            "spacing 'logsnr'",
            stacklevel=4,
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(corrected, a_start * (1 - r) / (2 * r), 0.0)
    first = np.stack([t, a_grown**2, s_next / s_grown, (1 - r) * a_next, 0 * r, 0 * r])
    second = np.stack([np.append(steps.t[1:], 0.0), abar_next, a_start / a_next, weight, -weight, a_start * added])
    taken = np.repeat(corrected, 2) | np.tile([True, False], len(r))
    times, levels, c_x, c_0, c_h, c_z = np.stack([first, second], axis=2).reshape(6, -1)[:, taken]
    return plan_of(times, levels, prediction, c_x=c_x, c_0=c_0, c_h=c_h, c_z=c_z, clip=clip)
