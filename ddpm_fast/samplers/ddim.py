"""DDIM (Song et al. 2021): fewer steps, with as much noise as is asked for."""

from collections.abc import Sequence

import numpy as np

from ..ops import _checks as checks
from ..schedules import Array
from .plan import Plan, plan_of
from .steps import steps_of


def ddim(
    alphas_cumprod: Array,
    prediction: str = "eps",
    num_steps: int | None = None,
    *,
    eta: float = 0.0,
    spacing: str | Sequence[int] = "linspace",
    final: str = "clean",
    clip: bool = False,
) -> Plan:
    """DDIM (Song et al. 2021), first order, with as much noise as eta says; 20 to 100 steps.

    Rows of equation 12: x' = a' x0_hat + sqrt(s'^2 - sigma^2) eps + sigma z, where eps follows from x and x0_hat.

    Args:
        alphas_cumprod: [T].
        prediction: what the network predicts: "eps", "x0" or "v".
        num_steps: how many of the T timesteps to take, all by default.
        eta: sigma as a share of the deviation of the posterior; 0 draws no noise, 1 is `ddpm` with that variance.
        spacing, final: see `steps.steps_of`.
        clip: bound x0_hat to [-1, 1] in each step.

    Raises:
        ValueError, TypeError: an option is out of range.
    """
    eta = checks.number("eta", eta, 0, 1)
    t, abar, abar_next = steps_of(alphas_cumprod, num_steps, spacing, final)
    sigma = eta * np.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
    c_x = np.sqrt(1 - abar_next - sigma**2) / np.sqrt(1 - abar)
    return plan_of(t, abar, prediction, c_x=c_x, c_0=np.sqrt(abar_next) - c_x * np.sqrt(abar), c_z=sigma, clip=clip)
