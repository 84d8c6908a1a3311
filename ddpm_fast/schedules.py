"""Noise schedules, and the tables that follow from them. All arithmetic in float64."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def _check_timesteps(num_timesteps: int) -> None:
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int) or num_timesteps < 1:
        raise ValueError(f"T must be a positive integer, got {num_timesteps!r}")


def generate_linear_schedule(T: int, low: float, high: float) -> Array:
    """T betas evenly spaced from `low` to `high` (Ho et al. 2020, section 4).

    The paper's 1e-4 and 0.02 are for T = 1000; scale both by 1000 / T for another T.

    Raises:
        ValueError: T is not a positive integer, or an end is not finite.
    """
    _check_timesteps(T)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"low and high must be finite, got {low} and {high}")
    return np.linspace(low, high, T)


def generate_cosine_schedule(T: int, s: float = 0.008) -> Array:
    """T betas of the cosine schedule, clipped at 0.999 (Nichol & Dhariwal 2021, equation 17).

    Raises:
        ValueError: T is not a positive integer, or s is negative.
    """
    _check_timesteps(T)
    if not s >= 0:
        raise ValueError(f"s must not be negative, got {s}")
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def check_betas(betas: object, prediction: str = "eps") -> Array:
    """`betas` as a float64 vector.

    Raises:
        TypeError: not an array, tensor or sequence of numbers.
        ValueError: not a non-empty vector inside (0, 1). Exactly 1 is allowed at the last index, where nothing of the
            image is left, with prediction "x0" or "v", which can still be inverted there.
    """
    if isinstance(betas, Tensor):
        betas = betas.detach().to("cpu", torch.float64).numpy()
    try:
        array = np.array(betas, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"betas must be a vector of numbers, got {type(betas).__name__}") from error
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"betas must have shape [T] with T >= 1, got {list(array.shape)}")
    inside = (array > 0) & (array < 1)
    if prediction != "eps" and array[-1] == 1:
        inside[-1] = True
    if not inside.all():
        i = int(np.argmin(inside))
        hint = (
            " (1 at the last index needs prediction='x0' or 'v')" if array[i] == 1 and i == len(array) - 1 else
            " (a linear schedule with few steps: its ends, scaled by 1000 / T, pass 1; lower them or use more steps)"
            if array[i] >= 1 else ""
        )  # fmt: skip
        raise ValueError(f"betas must lie inside (0, 1): betas[{i}] is {array[i]}{hint}")
    return array


def tables(betas: Array) -> dict[str, Array]:
    """The eight vectors [T] of the original DDPM code, by name and in its order."""
    alphas = 1 - betas
    alphas_cumprod = np.cumprod(alphas)
    with np.errstate(divide="ignore"):  # beta = 1 at the last index, where no mean is taken from eps
        reciprocal_sqrt_alphas = np.sqrt(1 / alphas)
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "reciprocal_sqrt_alphas": reciprocal_sqrt_alphas,
        "remove_noise_coeff": betas / np.sqrt(1 - alphas_cumprod),
        "sigma": np.sqrt(betas),
    }
