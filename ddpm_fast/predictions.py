"""What the network predicts - eps, x0 or v - as coefficients. Let x_t = a x_start + s noise with a^2 + s^2 = 1.

    prediction   x0_hat = p_x x_t + p_m model_out      target = noise_coef noise + x_coef x_start
    eps          p_x = 1/a,  p_m = -s/a                noise                (Ho et al. 2020, section 3.2)
    x0           p_x = 0,    p_m = 1                   x_start
    v            p_x = a,    p_m = -s                  a noise - s x_start  (Salimans & Ho 2022, appendix D)

The functions take a and s as arrays or tensors alike.
"""

from typing import TypeVar

from torch import Tensor

from .schedules import Array

PREDICTIONS = ("eps", "x0", "v")
TIME_INPUTS = ("timestep", "noise_level")  # what the network is told of the noise: t, or a
Numbers = TypeVar("Numbers", Array, Tensor)


def x0_coefficients(prediction: str, a: Numbers, s: Numbers) -> tuple[Numbers, Numbers]:
    """(p_x, p_m), shaped like a and s."""
    if prediction == "eps":
        return 1 / a, -s / a
    return (0 * a, 0 * a + 1) if prediction == "x0" else (a, -s)


def target_coefficients(prediction: str, a: Numbers, s: Numbers) -> tuple[Numbers, Numbers]:
    """(noise_coef, x_coef), shaped like a and s."""
    if prediction == "eps":
        return 0 * a + 1, 0 * a
    return (0 * a, 0 * a + 1) if prediction == "x0" else (a, -s)
