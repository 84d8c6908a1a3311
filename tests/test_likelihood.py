"""Bits per dimension of a model: the sum of its terms, above the truth."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import BETAS, Pixelwise, pixelwise

from ddpm_fast import Diffusion, generate_linear_schedule
from ddpm_fast.evaluation.likelihood import bits_per_dimension
from ddpm_fast.ops import PERTURB, NoiseState
from ddpm_fast.reference import noise as reference
from ddpm_fast.variational import Posterior, log_variance_bounds, prior_term, reverse_term

IMAGES = torch.randint(0, 256, (5, 2, 4, 3), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
ABAR = np.cumprod(1 - BETAS)


class Halves(Pixelwise):
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.cat([super().forward(x, t, y), torch.tanh(x)], dim=1)


@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_term_by_term(variance: str, prediction: str) -> None:
    learned = variance == "learned"
    net = Halves() if learned else Pixelwise()
    diffusion = Diffusion(net, (4, 3), 2, None, BETAS, prediction=prediction, learned_variance=learned)
    y = torch.randn(5, 3)
    got = bits_per_dimension(diffusion, IMAGES, y, variance=None if learned else variance, seed=4, batch_size=2)
    low, high = (torch.from_numpy(v) for v in log_variance_bounds(ABAR))
    posterior, x = Posterior.of(ABAR, dtype=torch.float64), IMAGES.double()
    for k in range(12):
        t, a, s = torch.full((5,), k), math.sqrt(ABAR[k]), math.sqrt(1 - ABAR[k])
        x_t = a * x + s * reference.noise(x.shape, NoiseState.at(4, k), PERTURB).double()
        out = diffusion.ema_model(x_t.float(), t, y).double()[:, :2]
        x0_hat = ((x_t - s * out) / a if prediction == "eps" else a * x_t - s * out).clamp(-1, 1)
        share = (torch.tanh(x_t) + 1) / 2 if learned else torch.tensor(float(variance == "beta")).expand(5)
        log_variance = share * high[k] + (1 - share) * low[k]
        expected = reverse_term(x, t, x0_hat, log_variance, posterior)
        torch.testing.assert_close(got.terms[:, k].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.prior.double(), prior_term(x, ABAR[-1]))
    torch.testing.assert_close(got.total, got.prior + got.terms.sum(1))


class Denoiser(nn.Module):
    """The optimal one for pixels that are normal, of mean 0.1 and deviation 0.2."""

    def __init__(self, abar: np.ndarray):
        super().__init__()
        self.abar = torch.from_numpy(abar)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        abar = self.abar[t].view(-1, 1)
        gain = abar.sqrt() * 0.04 / (abar * 0.04 + 1 - abar)
        return (0.1 + gain * (x.double() - abar.sqrt() * 0.1)).float()


def test_close_to_the_entropy_of_known_data() -> None:
    """Above it, and the closer the more timesteps there are."""
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    normal = torch.distributions.Normal(0.1, 0.2)
    edges = torch.cat([torch.tensor([-math.inf]), (values[1:] + values[:-1]) / 2, torch.tensor([math.inf])])
    shares = normal.cdf(edges).diff()
    entropy = -float((shares * shares.log2()).sum())
    x = values[torch.multinomial(shares, 4000, replacement=True, generator=torch.Generator().manual_seed(0))].float()
    found = []
    for steps in (50, 400):
        betas = generate_linear_schedule(steps, 0.1 / steps, 20 / steps)
        abar = np.cumprod(1 - betas)
        diffusion = Diffusion(Denoiser(abar), (), 1, None, betas, prediction="x0")
        found.append(float(bits_per_dimension(diffusion, x.view(-1, 1), clip=False, batch_size=4000).total.mean()))
    assert entropy < found[1] < found[0] and found[1] - entropy < 0.11 < 0.15 < found[0] - entropy


ERRORS: dict[str, tuple[Any, str]] = {
    "variance": (lambda: bits_per_dimension(pixelwise(), IMAGES, variance="large"), "variance must be one of beta"),
    "learned": (
        lambda: bits_per_dimension(pixelwise(), IMAGES, variance="learned"), "variance 'learned' needs a Diffusion made"
    ),
    "levels": (
        lambda: bits_per_dimension(pixelwise(time_input="noise_level"), IMAGES), "the bound is of integer timesteps"
    ),
    "no bytes": (lambda: bits_per_dimension(pixelwise(), IMAGES + 0.001), "x must be images of bytes, k / 127.5 - 1"),
    "shape": (lambda: bits_per_dimension(pixelwise(), IMAGES), "x must have shape"),
    "batch": (lambda: bits_per_dimension(pixelwise(), IMAGES, batch_size=0), "batch_size must be"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_input(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
