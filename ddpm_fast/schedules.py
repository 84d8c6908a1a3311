"""Noise schedules, and the tables that follow from them. All arithmetic in float64."""

import warnings
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .ops import _checks as checks

Array = NDArray[np.float64]


def generate_linear_schedule(T: int, low: float, high: float) -> Array:
    """T betas evenly spaced from `low` to `high` (Ho et al. 2020, section 4).

    The paper's 1e-4 and 0.02 are for T = 1000; scale both by 1000 / T for another T. Warns where a beta reaches 1, as
    with ends scaled for few timesteps.

    Raises:
        ValueError, TypeError: T is not a positive integer, or an end is not a finite number.
    """
    steps = checks.integer("T", T, 1)
    low, high = checks.number("low", low), checks.number("high", high)
    if not np.isfinite(high - low):
        raise ValueError(f"low and high must be closer together, got {low} and {high}")
    if max(low, high) >= 1:
        warnings.warn(
            f"{steps} linear betas reach {max(low, high):.3g}, and nothing is left of an image at 1: use more "
            "timesteps (more than 20 for ends scaled by 1000 / T), lower ends or the cosine schedule",
            stacklevel=2,
        )
    return np.linspace(low, high, steps)


def generate_cosine_schedule(T: int, s: float = 0.008) -> Array:
    """T betas of the cosine schedule, clipped at 0.999 (Nichol & Dhariwal 2021, equation 17).

    Raises:
        ValueError, TypeError: T is not a positive integer, or s is not a number of at least 0.
    """
    steps, s = checks.integer("T", T, 1), checks.number("s", s, 0)
    f = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def generate_quadratic_schedule(T: int, low: float, high: float) -> Array:
    """T betas whose square roots are evenly spaced: diffusers' "scaled_linear", Ho et al.'s "quad".

    Raises:
        ValueError, TypeError: T is not a positive integer, or an end is not a number of at least 0.
    """
    steps, low, high = checks.integer("T", T, 1), checks.number("low", low, 0), checks.number("high", high, 0)
    return np.linspace(np.sqrt(low), np.sqrt(high), steps) ** 2


def generate_sigmoid_schedule(T: int, low: float, high: float, width: float = 6.0) -> Array:
    """T betas that go from about `low` to about `high` as a sigmoid from -width to width (Xu et al. 2022, GeoDiff).

    Raises:
        ValueError, TypeError: T is not a positive integer, or a number is not finite.
    """
    steps, low, high = checks.integer("T", T, 1), checks.number("low", low), checks.number("high", high)
    width = checks.number("width", width)
    return low + (high - low) / (1 + np.exp(-np.linspace(-width, width, steps)))


def generate_warmup_schedule(T: int, low: float, high: float, share: float = 0.1) -> Array:
    """T betas that rise linearly over the first `share` of them and then stay at `high`: Ho et al.'s "warmup10".

    Raises:
        ValueError, TypeError: T is not a positive integer, an end is not finite, or share is not in [0, 1].
    """
    steps, low, high = checks.integer("T", T, 1), checks.number("low", low), checks.number("high", high)
    rising = int(steps * checks.number("share", share, 0, 1))
    return np.append(np.linspace(low, high, rising), np.full(steps - rising, high))


def generate_constant_schedule(T: int, beta: float) -> Array:
    """T equal betas.

    Raises:
        ValueError, TypeError: T is not a positive integer, or beta is not a finite number.
    """
    return np.full(checks.integer("T", T, 1), checks.number("beta", beta))


def generate_jsd_schedule(T: int) -> Array:
    """The betas 1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015, section 2.4.1): each step removes as much of the
    image, and the last one all that is left; for "x0" and "v" alone.

    Raises:
        ValueError, TypeError: T is not a positive integer.
    """
    return 1 / np.arange(checks.integer("T", T, 1), 0, -1, dtype=np.float64)


def zero_terminal_snr(betas: Array) -> Array:
    """The schedule moved and stretched so that nothing of the image is left at the end, where beta becomes 1 (Lin et
    al. 2023, algorithm 1); for "x0" and "v" alone.

    Raises:
        ValueError, TypeError: `betas` are no schedule of at least two timesteps.
    """
    betas = check_betas(betas, "v")
    if len(betas) < 2:
        raise ValueError("betas must have at least two timesteps to be stretched, got one")
    signal = np.sqrt(np.cumprod(1 - betas))
    stretched = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    abar = stretched**2
    return 1 - np.append(abar[:1], abar[1:] / abar[:-1])


def check_betas(betas: object, prediction: str = "eps") -> Array:
    """`betas` as a float64 vector.

    Raises:
        TypeError: not an array, tensor or sequence of numbers.
        ValueError: not a non-empty vector inside (0, 1). Exactly 1 is allowed at the last index, where nothing of the
            image is left, with prediction "x0" or "v", which can still be inverted there.
    """
    try:
        if isinstance(betas, Tensor):
            betas = betas.detach().cpu().double().numpy() if not betas.is_complex() else None
        if betas is None or np.iscomplexobj(cast(Any, betas)):
            raise TypeError
        array = np.array(betas, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"betas must be a vector of numbers, got {type(betas).__name__}") from error
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"betas must have shape [T] with T >= 1, got {list(array.shape)}")
    inside = (array > 0) & (array < 1)
    if prediction != "eps" and array[-1] == 1:
        inside[-1] = True
    if not inside.all():
        i = int(np.argmin(inside))
        hint = ""
        if array[i] == 1 and i == len(array) - 1:
            hint = ": 1 at the last index needs prediction='x0' or 'v' (--prediction v)"
        elif array[i] >= 1:
            hint = " (with few timesteps ends that are scaled by 1000 / T pass 1): use more timesteps, lower ends or "
            hint += "the cosine schedule"
        raise ValueError(f"betas must lie inside (0, 1): betas[{i}] is {array[i]}{hint}")
    if 1 - array[0] == 1:
        raise ValueError(f"betas must add noise from the first on: betas[0] is {array[0]}, too small to count")
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
