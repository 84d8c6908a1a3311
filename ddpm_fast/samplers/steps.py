"""Which noise levels a sampler visits: a spacing of the timesteps of training, and where its last step ends.

A level is abar in [0, 1], of x = sqrt(abar) x_0 + sqrt(1 - abar) noise; its sigma, sqrt((1 - abar) / abar), is the
noise beside an unscaled image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..ops import _checks as checks
from ..schedules import Array

SPACINGS = ("linspace", "leading", "trailing", "quadratic", "logsnr", "karras")
FINALS = ("clean", "first")
RHO = 7.0  # Karras et al. 2022, table 1


class Steps(NamedTuple):
    """Steps from one level to the next, the noisiest first."""

    t: Array  # [S] what the model is told
    abar: Array  # [S] where each step starts
    abar_next: Array  # [S] where it ends


def sigma_of(abar: Array) -> Array:
    """Noise beside an unscaled image; infinite for abar = 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.sqrt((1 - abar) / abar))


def time_at(alphas_cumprod: Array, sigma: Array) -> Array:
    """The timestep of a noise level, a real number: between those of training, log sigma is linear."""
    known = sigma_of(alphas_cumprod)
    finite = np.isfinite(known)
    with np.errstate(divide="ignore"):
        return np.interp(np.log(sigma), np.log(known[finite]), np.flatnonzero(finite).astype(np.float64))


def steps_of(
    alphas_cumprod: Array, num_steps: int | None, spacing: str | Sequence[int] = "linspace", final: str = "clean"
) -> Steps:
    """The levels of `num_steps` steps.

    Args:
        alphas_cumprod: [T] of training.
        num_steps: all T if None.
        spacing: of the T timesteps
            "linspace": even, both ends included;
            "leading": every floor(T / num_steps)-th, from 0 up, so that the first may lie far below T - 1;
            "trailing": every (T / num_steps)-th, from T - 1 down;
            "quadratic": the squares of an even spacing from 0 to sqrt(0.8 T) (Song et al. 2021, appendix D.2), fewer
            where two would be the same;
            "logsnr": even in log sigma, at real timesteps (Lu et al. 2022, section 3.3);
            "karras": even in sigma^(1/7), likewise (Karras et al. 2022, equation 5);
            or how many of each of several equal parts, the least noisy one first (Nichol & Dhariwal 2021, appendix A).
        final: where the last step ends: "clean", without noise, or "first", at the level of timestep 0.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """
    total = len(alphas_cumprod)
    checks.choice("final", final, FINALS)
    if not isinstance(spacing, str):
        if not hasattr(spacing, "__len__"):
            listed = ", ".join(SPACINGS)
            raise TypeError(f"spacing must be one of {listed}, or numbers of steps such as [10, 15, 20]; got {spacing}")
        parts = checks.integers("spacing", spacing, 1)
        if num_steps not in (None, sum(parts)):
            raise ValueError(f"spacing {parts} takes {sum(parts)} steps, num_steps is {num_steps}")
        t = _sections(total, parts)
    else:
        checks.choice("spacing", spacing, SPACINGS)
        num_steps = total if num_steps is None else checks.integer("num_steps", num_steps, 1, total)
        t = _times(alphas_cumprod, num_steps, spacing)
    known = np.log(sigma_of(alphas_cumprod))
    between = 1 / (1 + np.exp(2 * np.interp(t, np.arange(total), known)))
    abar = np.where(t == t.round(), alphas_cumprod[t.astype(np.int64)], between)
    end = 1.0 if final == "clean" else alphas_cumprod[0]
    return Steps(t, abar, np.append(abar[1:], end))


def _times(alphas_cumprod: Array, n: int, spacing: str) -> Array:
    """Descending; fewer than n where two would be the same."""
    total = len(alphas_cumprod)
    if n == 1:  # it starts where x_T is
        return np.array([total - 1.0])
    if spacing in ("logsnr", "karras"):
        sigma = sigma_of(alphas_cumprod)
        low, high = sigma[0], sigma[np.isfinite(sigma)][-1]
        pure = [total - 1.0] if np.isinf(sigma[-1]) else []  # noise alone, which no finite sigma is
        n -= len(pure)
        if spacing == "karras":
            t = time_at(alphas_cumprod, np.linspace(high ** (1 / RHO), low ** (1 / RHO), n) ** RHO)
        else:
            t = time_at(alphas_cumprod, np.exp(np.linspace(np.log(high), np.log(low), n)))
        t[[0, -1]] = t[[0, -1]].round()
        return np.append(pure, t)
    t = {
        "linspace": np.linspace(0, total - 1, n).round(),
        "leading": np.arange(n) * float(total // n),
        "trailing": (total - np.arange(n) * (total / n)).round() - 1,
        "quadratic": np.floor(np.linspace(0, np.sqrt(0.8 * total), n) ** 2),
    }[spacing]
    return np.unique(t)[::-1]


def _sections(total: int, parts: Sequence[int]) -> Array:
    taken: list[float] = []
    size, more = divmod(total, len(parts))
    start = 0
    for i, count in enumerate(parts):
        length = size + (i < more)
        if count > length:
            raise ValueError(f"spacing: a part of {length} timesteps can't give {count}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        taken += [start + round(k * stride) for k in range(count)]
        start += length
    return np.array(taken[::-1], dtype=np.float64)
