"""The forward process in one jump (Ho et al. 2020, equation 4)."""

from collections.abc import Sequence

from torch import Tensor

from .noise import drawn
from .philox import PERTURB, NoiseState


def extract(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """a[t], shaped [N, 1, ...] to broadcast against a batch of shape `x_shape`."""
    return a.gather(-1, t).reshape(t.shape[0], *([1] * (len(x_shape) - 1)))


def q_sample(
    x_start: Tensor,  # [N, ...]
    t: Tensor,  # [N] int64
    sqrt_alphas_cumprod: Tensor,  # [T]
    sqrt_one_minus_alphas_cumprod: Tensor,  # [T]
    noise: Tensor | NoiseState,
) -> Tensor:  # [N, ...]
    """x_t = sqrt(alphas_cumprod[t]) x_start + sqrt(1 - alphas_cumprod[t]) noise."""
    z = drawn(noise, x_start, PERTURB)
    signal = extract(sqrt_alphas_cumprod, t, x_start.shape)
    sigma = extract(sqrt_one_minus_alphas_cumprod, t, x_start.shape)
    return (signal * x_start + sigma * z).to(x_start.dtype)
