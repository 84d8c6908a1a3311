"""DPM-Solver-12: the probability flow with steps as long as an error estimate allows, which no table can hold.

Lu et al. 2022, section 3.4 and appendix C, with both steps written in x0_hat as in DPM-Solver++ (Lu et al. 2022b), so
that it may be clipped. Let lambda = log(a / s), primes the level after a step and h = lambda' - lambda. Then

    u     = s_m / s x - a_m (e^(-h/2) - 1) x0_hat(x, lambda)         at the middle, lambda + h/2
    low   = s' / s x - a' (e^-h - 1) x0_hat(x, lambda)               first order
    high  = s' / s x - a' (e^-h - 1) x0_hat(u, lambda + h/2)         second order

An image goes to `high` where error = rms((high - low) / max(atol, rtol max(|low|, |low before|))) is at most 1, and in
any case goes on with h = min(safety h / sqrt(error), what is left).
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .ops import _checks as checks
from .predictions import PREDICTIONS, TIME_INPUTS, x0_coefficients
from .samplers.steps import FINALS, sigma_of, time_at
from .schedules import Array

Places = NDArray[np.int64]  # images by their place in the batch
# (x [M, ...], t [M], places [M]) -> model_out [M, ...]
PlacedNetwork = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def adaptive(
    network: PlacedNetwork,
    x: Tensor,
    alphas_cumprod: Array,
    prediction: str = "eps",
    *,
    time_input: str = "timestep",
    rtol: float = 0.05,
    atol: float = 0.0078,
    first_step: float = 0.05,
    safety: float = 0.9,
    clip: bool = False,
    final: str = "clean",
    max_calls: int = 1000,
    on_step: Callable[[float, Tensor], None] | None = None,
) -> Tensor:
    """DPM-Solver-12, second order, two calls a step, as many steps as each image's own error asks for.

    Takes x from the level of timestep T - 1 to that of timestep 0.
    An image depends on itself alone, whatever the batch. The host decides on each step and waits for the device; no
    step is recorded. A step costs two calls of the network, tried again one.
    From pure noise (alphas_cumprod ends with 0), where lambda is infinite, one step of first order leads to the last
    timestep that has an image left.

    Args:
        network: told x [M, ...], t [M] in float32, and the places in the batch [M] int64 of the images
            that it is called for; returns [M, ...]. Images that have arrived are left out.
        x: [N, ...], x_T.
        alphas_cumprod: [T] float64, falling.
        prediction: what the network predicts: "eps", "x0" or "v".
        time_input: what t is: "timestep", a real number, or "noise_level", a.
        rtol, atol: error allowed in a step, relative to the image and absolute. The paper's atol is one step of 256
            in [-1, 1].
        first_step: length of the first step to try, in lambda.
        safety: the share of the longest step that the estimate allows to be tried next.
        clip: bound x0_hat to [-1, 1].
        final: where to end: "clean", with one more call for x0_hat, or "first", at the level of timestep 0.
        max_calls: of the network for any one image.
        on_step: called with (share done in [0, 1], x) after each step; x is to be read and not kept.

    Returns:
        [N, ...], like x.

    Raises:
        ValueError, TypeError: an option is out of range, or "eps" would start from pure noise.
        RuntimeError: an image needs more than max_calls calls, or has values that are not finite.
    """
    _check(x, rtol, atol, first_step, safety, clip, final, max_calls)
    abar = np.asarray(alphas_cumprod, dtype=np.float64)
    flow = _Flow(network, abar, prediction, time_input, clip, max_calls, len(x))
    walk = _Walk(flow, flow.leave_pure_noise(x) if abar[-1] == 0 else x.clone(), first_step)
    while (walk.level < flow.end).any():
        walk.advance(rtol, atol, safety)
        if on_step is not None:
            on_step(walk.share, walk.x)
    if final == "clean":
        walk.x = flow.x0_hat(walk.x, walk.level, np.arange(len(x)))
        if on_step is not None:
            on_step(1.0, walk.x)
    return walk.x


class _Flow:
    """The probability flow of a network. Levels are lambda, in float64 on the host, one an image."""

    def __init__(
        self,
        network: PlacedNetwork,
        abar: Array,
        prediction: str,
        time_input: str,
        clip: bool,
        max_calls: int,
        batch_size: int,
    ):
        checks.choice("time_input", time_input, TIME_INPUTS)
        checks.choice("prediction", prediction, PREDICTIONS)
        if prediction == "eps" and abar[-1] == 0:
            raise ValueError("prediction 'eps' says nothing of pure noise, where abar is 0: train 'x0' or 'v'")
        if abar[0] == 0:
            raise ValueError("alphas_cumprod must have a timestep with an image left, got 0 alone")
        self.network, self.abar, self.prediction, self.clip = network, abar, prediction, clip
        self.time_input = time_input
        levels = -np.log(sigma_of(abar[abar > 0]))
        self.start, self.end = float(levels[-1]), float(levels[0])
        self.max_calls, self.calls = max_calls, np.zeros(batch_size, dtype=np.int64)

    def time(self, level: Array) -> Array:
        """The real timestep."""
        return np.where(np.isneginf(level), len(self.abar) - 1, time_at(self.abar, np.exp(-level)))

    def x0_hat(self, x: Tensor, level: Array, places: Places) -> Tensor:
        """What the network makes of x [M, ...], the images at `places`.

        Raises:
            RuntimeError: it was called too often.
        """
        time = self.time(level)
        self.calls[places] += 1
        if (over := self.calls[places] > self.max_calls).any():
            raise RuntimeError(
                f"image {places[over][0]} takes more than max_calls = {self.max_calls} calls of the network, and has "
                f"come to timestep {time[over][0]:.1f}: allow more calls, or larger errors by rtol and atol"
            )
        p_x, p_m = _columns(x, *x0_coefficients(self.prediction, *_scales(level)))
        told = torch.from_numpy(time if self.time_input == "timestep" else _scales(level)[0])
        model_out = self.network(x, told.to(x.device, torch.float32), _index(x, places))
        x0_hat = p_x * x + p_m * model_out.to(x.dtype)
        return x0_hat.clamp(-1, 1) if self.clip else x0_hat

    def leave_pure_noise(self, x: Tensor) -> Tensor:
        """x at the last timestep that has an image left."""
        pure, places = np.full(len(x), -np.inf), np.arange(len(x))
        return _step(x, self.x0_hat(x, pure, places), pure, np.full(len(x), self.start))


class _Walk:
    """A batch under way: x [N, ...] and the level and next step of each image."""

    def __init__(self, flow: _Flow, x: Tensor, first_step: float):
        self.flow, self.x = flow, x
        self.level, self.h = np.full(len(x), flow.start), np.full(len(x), float(first_step))
        self.low = x.clone()  # of the step before
        self.x0_hat, self.known = torch.empty_like(x), np.zeros(len(x), dtype=bool)

    @property
    def share(self) -> float:
        """How much of the way is done."""
        return float(np.mean((self.level - self.flow.start) / (self.flow.end - self.flow.start)))

    def advance(self, rtol: float, atol: float, safety: float) -> None:
        """Try one step of each image that hasn't arrived."""
        x, flow, places = self.x, self.flow, np.flatnonzero(self.level < self.flow.end)
        unknown = places[~self.known[places]]  # an image whose step was refused stands where it stood
        if unknown.size:
            index = _index(x, unknown)
            self.x0_hat[index] = flow.x0_hat(x[index], self.level[unknown], unknown)
        index, here = _index(x, places), self.level[places]
        there = np.minimum(here + self.h[places], flow.end)
        middle = (here + there) / 2
        now, x0_hat, low_before = x[index], self.x0_hat[index], self.low[index]
        low = _step(now, x0_hat, here, there)
        high = _step(now, flow.x0_hat(_step(now, x0_hat, here, middle), middle, places), here, there)
        allowed = (rtol * torch.maximum(low.abs(), low_before.abs())).clamp_min(atol)
        # Added in float64: the order of a sum may depend on how many images there are.
        errors = ((high - low) / allowed).square().flatten(1).mean(1, dtype=torch.float64).sqrt()
        error = errors.cpu().numpy()  # the host waits here
        if not np.isfinite(error).all():
            k = int(np.flatnonzero(~np.isfinite(error))[0])
            raise RuntimeError(f"image {places[k]} is no longer finite at timestep {flow.time(there)[k]:.1f}")
        taken = (errors <= 1).view(-1, *[1] * (x.ndim - 1))
        x[index], self.low[index] = torch.where(taken, high, now), torch.where(taken, low, low_before)
        self.level[places], self.known[places] = np.where(error <= 1, there, here), error > 1
        with np.errstate(divide="ignore"):
            self.h[places] = safety * (there - here) / np.sqrt(error)


def _step(x: Tensor, x0_hat: Tensor, here: Array, there: Array) -> Tensor:
    """x after a step in which x0_hat stays as it is."""
    (_, s), (a_next, s_next) = _scales(here), _scales(there)
    c_x, c_0 = _columns(x, s_next / s, a_next * -np.expm1(here - there))
    return c_x * x + c_0 * x0_hat


def _scales(level: Array) -> tuple[Array, Array]:
    """a and s."""
    return 1 / np.sqrt(1 + np.exp(-2 * level)), 1 / np.sqrt(1 + np.exp(2 * level))


def _columns(x: Tensor, *values: Array) -> Tensor:
    """Numbers for each image, [M] each, to broadcast against x."""
    return torch.from_numpy(np.stack(values)).to(x.device, x.dtype).view(len(values), -1, *[1] * (x.ndim - 1))


def _index(x: Tensor, places: Places) -> Tensor:
    return torch.from_numpy(places).to(x.device)


def _check(
    x: Tensor, rtol: float, atol: float, first_step: float, safety: float, clip: bool, final: str, max_calls: int
) -> None:
    checks.tensor("x", x)
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"x must have shape [N, ...] with N >= 1, got {checks.text(x)}")
    checks.number("rtol", rtol, 0)
    checks.number("safety", safety, 0, 1)
    for name, value in (("atol", atol), ("first_step", first_step), ("safety", safety)):
        if not checks.number(name, value) > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    checks.flag("clip", clip)
    checks.choice("final", final, FINALS)
    checks.integer("max_calls", max_calls, 1)
