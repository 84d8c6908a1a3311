"""The variational bound on -log p(x_0), term by term (Sohl-Dickstein et al. 2015; Ho et al. 2020, equation 5).

    prior_term                  KL(q(x_T | x_0) || N(0, 1))
    reverse_term at t > 0       KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
    reverse_term at t = 0       -log p(x_0 | x_t)

Here x_t of timestep t has noise for t = 0, too, and x_0 in the formulas is `x_start`. The bound of an image is the
prior's term and the sum of the others over all T timesteps. All terms are in bits per dimension, one per image.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ops import _checks as checks
from .ops import extract
from .schedules import Array


def gaussian_kl(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor) -> Tensor:
    """KL(N(mean_1, e^log_var_1) || N(mean_2, e^log_var_2)) in nats, elementwise; the arguments broadcast."""
    gap = log_var_2 - log_var_1
    # expm1, as variances nearly alike would leave nothing of exp(-gap) - 1.
    return (gap + torch.expm1(-gap) + (mean_1 - mean_2) ** 2 * torch.exp(-log_var_2)) / 2


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor, bins: int = 256) -> Tensor:
    """Log of the probability that N(mean, std^2) has for the bin of x (Ho et al. 2020, equation 13), in nats.

    Args:
        x: values 2 k / (bins - 1) - 1 for k = 0 ... bins - 1, for bytes k / 127.5 - 1. A bin reaches half way to the
            next values, and the outer ones to infinity.
        mean, log_std: of the Gaussian; the arguments broadcast.
        bins: how many values there are.

    Returns:
        elementwise, in the dtype of `mean`, at least float32.
    """
    half = 1 / (checks.integer("bins", bins, 2) - 1)
    dtype = _wide(mean).dtype
    # The bin is a difference of two numbers that are nearly equal where std is many bins wide.
    x, mean, log_std = x.double(), mean.double(), log_std.double()
    off, precision = x - mean, torch.exp(-log_std)
    # The bin mirrored to the lower tail, where a normal's cdf and its logarithm keep their digits.
    log_near = torch.special.log_ndtr((half - off.abs()) * precision)
    log_far = torch.special.log_ndtr((-half - off.abs()) * precision)
    inner = log_near + torch.log(-torch.expm1(log_far - log_near))
    outer = torch.special.log_ndtr((half - off * x.sign()) * precision)
    return torch.where(x.abs() > 1 - half, outer, inner).to(dtype)


def log_variance_bounds(alphas_cumprod: Array) -> tuple[Array, Array]:
    """The log variances between which that of p(x_{t-1} | x_t) is learned (Nichol & Dhariwal 2021, equation 15).

    Args:
        alphas_cumprod: [T] float64.

    Returns:
        (low, high), both [T]: of q(x_{t-1} | x_t, x_0), whose entry 0, a variance of 0, is replaced by entry 1, and
        log beta. A network's v in [-1, 1] stands for high f + low (1 - f), f = (v + 1) / 2.
    """
    before = np.append(1.0, alphas_cumprod[:-1])
    beta = 1 - alphas_cumprod / before
    low = beta * (1 - before) / (1 - alphas_cumprod)
    low[0] = low[1] if len(low) > 1 else beta[0]
    return np.log(low), np.log(beta)


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0) at each timestep (Ho et al. 2020, equation 7): what `reverse_term` needs of it."""

    c_0: Tensor  # [T] weight of x_0 in the mean; the rest of it depends on x_t alone
    log_var: Tensor  # [T] entry 0 as in log_variance_bounds

    @classmethod
    def of(
        cls, alphas_cumprod: Array, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Posterior":
        """Of a schedule [T], computed in float64 and rounded once."""
        before = np.append(1.0, alphas_cumprod[:-1])
        c_0 = np.sqrt(before) * (1 - alphas_cumprod / before) / (1 - alphas_cumprod)
        low, _ = log_variance_bounds(alphas_cumprod)
        return cls(*(torch.from_numpy(table).to(device, dtype) for table in (c_0, low)))


def reverse_term(
    x_start: Tensor, t: Tensor, x0_hat: Tensor, log_var: Tensor, posterior: Posterior, bins: int = 256
) -> Tensor:
    """The bound's term of timestep t: how much worse p(x_{t-1} | x_t) is than the posterior, or at t = 0 than x_start.

    The mean of p is the posterior's with x0_hat in place of x_start. x_t is in both means alike and cancels.
    Differentiable in x0_hat and log_var; nothing waits for the device.

    Args:
        x_start: [N, ...] clean images in [-1, 1].
        t: [N] int64.
        x0_hat: like x_start, what the network makes of x_t. Detach it to train log_var alone by this term (Nichol &
            Dhariwal 2021, section 3.1).
        log_var: [N] or like x_start, log variance of p.
        posterior: on the same device.
        bins: how many values x_start may have, see `discretized_log_likelihood`.

    Returns:
        [N], bits per dimension.

    Raises:
        ValueError, TypeError: shapes or dtypes don't fit.
    """
    checks.tensor("x_start", x_start)
    checks.tensor("x0_hat", x0_hat, shape=x_start.shape)
    checks.tensor("log_var", log_var)
    checks.tensor("log_var", log_var, shape=x_start.shape[: 1 if log_var.ndim == 1 else None])
    x_start, x0_hat, log_var = _wide(x_start), _wide(x0_hat), _wide(log_var)
    each = (-1, *[1] * (x_start.ndim - 1))
    if log_var.ndim == 1:
        log_var = log_var.view(each)
    c_0, true_log_var = (extract(table, t, x_start.shape) for table in posterior)
    kl = gaussian_kl(c_0 * x_start, true_log_var, c_0 * x0_hat, log_var)
    last = t == 0
    # Elsewhere x0_hat may be far off, and what is not used must not have infinite gradients.
    mean = torch.where(last.view(each), x0_hat, x_start)
    log_likelihood = discretized_log_likelihood(x_start, mean, log_var / 2, bins)
    return torch.where(last, -_bits(log_likelihood), _bits(kl))


def prior_term(x_start: Tensor, abar_T: float) -> Tensor:
    """The bound's term of x_T: how far it is from pure noise.

    Args:
        x_start: [N, ...] clean images in [-1, 1].
        abar_T: the last of `alphas_cumprod`.

    Returns:
        [N], bits per dimension.

    Raises:
        ValueError, TypeError: x_start is no floating point tensor, or abar_T not in [0, 1].
    """
    checks.tensor("x_start", x_start)
    abar = torch.tensor(checks.number("abar_T", abar_T, 0, 1), dtype=torch.float64)
    zero = torch.zeros_like(abar)
    return _bits(gaussian_kl(abar.sqrt() * _wide(x_start), torch.log1p(-abar), zero, zero))


def _wide(x: Tensor) -> Tensor:
    """At least in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _bits(nats: Tensor) -> Tensor:
    """Means over the dimensions of an image, [N, ...] -> [N], in bits."""
    return nats.flatten(1).mean(1) / math.log(2)
