"""Textbook sampler loops, each as its paper writes it: what the plans are held against.

All take `network(x, t)`, x where it starts, the S timesteps in the order of use, the S + 1 levels abar from there to
the end, and the noise z of each step. x is a x_0 + s noise with a = sqrt(abar), s = sqrt(1 - abar). What is written in
sigma runs on x / a, with sigma = s / a.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Network = Callable[[Tensor, float], Tensor]  # (x_t, t) -> what it predicts


def x0_of(prediction: str, x: Tensor, out: Tensor, abar: float, clip: bool) -> Tensor:
    """The image that a prediction stands for."""
    a, s = math.sqrt(abar), math.sqrt(1 - abar)
    x0 = {"eps": lambda: (x - s * out) / a, "x0": lambda: out, "v": lambda: a * x - s * out}[prediction]()
    return torch.clamp(x0, -1, 1) if clip else x0


def _sigma(abar: float) -> float:
    return math.sqrt((1 - abar) / abar) if abar > 0 else math.inf


def ddpm_loop(
    network: Network, x: Tensor, t: Sequence[float], abar: Sequence[float], noise: Sequence[Tensor], *,
    prediction: str = "eps", variance: str | float = "beta", clip: bool = False,
) -> Tensor:  # fmt: skip
    """Ancestral sampling: Ho et al. 2020, algorithm 2; with clip, through x0 and equation 7."""
    for i, time in enumerate(t):
        now, after = abar[i], abar[i + 1]
        alpha = now / after
        beta = 1 - alpha
        out = network(x, time)
        if variance == "learned":
            out, v = out.chunk(2, dim=1)
        if prediction == "eps" and not clip:
            mean = (x - beta / math.sqrt(1 - now) * out) / math.sqrt(alpha)
        else:
            x0 = x0_of(prediction, x, out, now, clip)
            mean = math.sqrt(after) * beta * x0 + math.sqrt(alpha) * (1 - after) * x
            mean = mean / (1 - now)
        x = mean
        if after < 1 and beta > 0:
            posterior = beta * (1 - after) / (1 - now)
            logs = math.log(beta), math.log(posterior)
            sigma: Tensor | float
            if variance == "learned":  # Nichol & Dhariwal 2021, equation 15
                share = (v.clamp(-1, 1) + 1) / 2
                sigma = torch.exp((share * logs[0] + (1 - share) * logs[1]) / 2)
            elif isinstance(variance, str):
                sigma = math.sqrt(beta if variance == "beta" else posterior)
            else:
                sigma = math.exp((variance * logs[0] + (1 - variance) * logs[1]) / 2)
            x = mean + sigma * noise[i]
    return x


def ddim_loop(
    network: Network, x: Tensor, t: Sequence[float], abar: Sequence[float], noise: Sequence[Tensor], *,
    prediction: str = "eps", eta: float = 0.0, clip: bool = False,
) -> Tensor:  # fmt: skip
    """Song et al. 2021, equations 12 and 16; eps follows from a clipped x0."""
    for i, time in enumerate(t):
        now, after = abar[i], abar[i + 1]
        x0 = x0_of(prediction, x, network(x, time), now, clip)
        eps = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        sigma = eta * math.sqrt((1 - after) / (1 - now)) * math.sqrt(1 - now / after)
        x = math.sqrt(after) * x0 + math.sqrt(1 - after - sigma**2) * eps + sigma * noise[i]
    return x


def euler_loop(
    network: Network, x: Tensor, t: Sequence[float], abar: Sequence[float], noise: Sequence[Tensor], *,
    prediction: str = "eps", eta: float = 0.0, clip: bool = False,
) -> Tensor:  # fmt: skip
    """Euler's method in sigma, ancestral with eta = 1 (k-diffusion's sample_euler and sample_euler_ancestral)."""
    y = x / math.sqrt(abar[0])
    for i, time in enumerate(t):
        a, sigma, after = math.sqrt(abar[i]), _sigma(abar[i]), _sigma(abar[i + 1])
        x0 = x0_of(prediction, y * a, network(y * a, time), abar[i], clip)
        up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
        down = math.sqrt(after**2 - up**2)
        y = y + (y - x0) / sigma * (down - sigma) + noise[i] * up
    return y * math.sqrt(abar[-1])


def heun_loop(
    network: Network, x: Tensor, t: Sequence[float], abar: Sequence[float], noise: Sequence[Tensor], *,
    time_at: Callable[[float], float], prediction: str = "eps", s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = math.inf, s_noise: float = 1.0, clip: bool = False,
) -> Tensor:  # fmt: skip
    """Karras et al. 2022, algorithm 2; `time_at(sigma)` is what the network is told of a grown sigma.

    x already has the noise that is added before the first step: it stands at that step's grown sigma.
    """

    def slope(y: Tensor, sigma: float, time: float) -> Tensor:
        level = 1 / (1 + sigma**2)
        a = math.sqrt(level)
        return (y - x0_of(prediction, y * a, network(y * a, time), level, clip)) / sigma

    y = x
    for i, time in enumerate(t):
        sigma, after = _sigma(abar[i]), _sigma(abar[i + 1])
        gamma = min(s_churn / len(t), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        grown = sigma * (1 + gamma)
        if i == 0:
            y = x * math.sqrt(1 + grown**2)
        else:
            y = y + math.sqrt(grown**2 - sigma**2) * s_noise * noise[i]
        d = slope(y, grown, time_at(grown) if gamma else time)
        following = y + (after - grown) * d
        if after > 0:
            corrected = slope(following, after, t[i + 1] if i + 1 < len(t) else 0.0)
            following = y + (after - grown) * (d + corrected) / 2
        y = following
    return y * math.sqrt(abar[-1])


def dpmpp_2m_loop(
    network: Network, x: Tensor, t: Sequence[float], abar: Sequence[float], noise: Sequence[Tensor], *,
    prediction: str = "eps", clip: bool = False,
) -> Tensor:  # fmt: skip
    """Lu et al. 2022b, algorithm 2; a last step without noise is of first order."""
    before, h_before = None, 0.0
    for i, time in enumerate(t):
        a, s = math.sqrt(abar[i + 1]), math.sqrt(1 - abar[i + 1])
        h = math.log(_sigma(abar[i])) - math.log(_sigma(abar[i + 1])) if s > 0 else math.inf
        x0 = x0_of(prediction, x, network(x, time), abar[i], clip)
        d = x0
        if before is not None and 0 < h < math.inf:
            r = h_before / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = s / math.sqrt(1 - abar[i]) * x - a * (math.exp(-h) - 1) * d
        before, h_before = x0, h
    return x


def dpmpp_2m_sde_loop(
    network: Network, x: Tensor, t: Sequence[float], abar: Sequence[float], noise: Sequence[Tensor], *,
    prediction: str = "eps", eta: float = 1.0, clip: bool = False,
) -> Tensor:  # fmt: skip
    """Lu et al. 2022b, appendix D.3 (k-diffusion's sample_dpmpp_2m_sde, midpoint)."""
    y, before, h_before = x / math.sqrt(abar[0]), None, 0.0
    for i, time in enumerate(t):
        a, sigma, after = math.sqrt(abar[i]), _sigma(abar[i]), _sigma(abar[i + 1])
        x0 = x0_of(prediction, y * a, network(y * a, time), abar[i], clip)
        if after == 0:
            y = x0
            continue
        h = math.log(sigma / after)
        share = 1 - math.exp(-h - eta * h)
        y = after / sigma * math.exp(-eta * h) * y + share * x0
        if before is not None:
            y = y + 0.5 * share * h / h_before * (x0 - before)
        y = y + noise[i] * after * math.sqrt(1 - math.exp(-2 * eta * h))
        before, h_before = x0, h
    return y * math.sqrt(abar[-1])


def dpm_adaptive_loop(
    network: Network, x: Tensor, abar: Sequence[float], *, time_at: Callable[[float], float], prediction: str = "eps",
    rtol: float = 0.05, atol: float = 0.0078, first_step: float = 0.05, safety: float = 0.9, clip: bool = False,
) -> Tensor:  # fmt: skip
    """DPM-Solver-12 with adaptive steps for one image (Lu et al. 2022, appendix C), its two solvers those of
    DPM-Solver++ (Lu et al. 2022b, algorithm 1 with r = 1/2).

    `abar` are the levels where it starts and ends, and 1 for a last step without noise; the network is told
    `time_at(sigma)`.
    """

    def scales(lam: float) -> tuple[float, float]:
        return 1 / math.sqrt(1 + math.exp(-2 * lam)), 1 / math.sqrt(1 + math.exp(2 * lam))

    def denoised(x: Tensor, lam: float) -> Tensor:
        a, _ = scales(lam)
        return x0_of(prediction, x, network(x, time_at(math.exp(-lam))), a**2, clip)

    lam, end = (-math.log(_sigma(level)) for level in abar[:2])
    h, before = first_step, x
    while lam < end:
        after = end if lam + h >= end else lam + h
        h = after - lam
        (_, s), (a_mid, s_mid), (a_after, s_after) = scales(lam), scales(lam + h / 2), scales(after)
        x0 = denoised(x, lam)
        u = s_mid / s * x - a_mid * (math.exp(-h / 2) - 1) * x0
        low = s_after / s * x - a_after * (math.exp(-h) - 1) * x0
        high = s_after / s * x - a_after * (math.exp(-h) - 1) * denoised(u, lam + h / 2)
        delta = torch.clamp(rtol * torch.maximum(low.abs(), before.abs()), min=atol)
        error = float(((high - low) / delta).square().mean().sqrt())
        if error <= 1:
            x, lam, before = high, after, low
        h = safety * h / math.sqrt(error) if error else math.inf
    return denoised(x, lam) if abar[-1] == 1 else x
