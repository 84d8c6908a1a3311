"""What training weighs: weights of timesteps, how often they are drawn, learned variance, noise levels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import BETAS, pixelwise, small

from ddpm_fast import Config, Diffusion, generate_cosine_schedule, generate_linear_schedule
from ddpm_fast.objectives import (
    log_normal_probabilities,
    min_snr_weights,
    p2_weights,
)
from ddpm_fast.samplers import make_plan
from ddpm_fast.samplers.steps import sigma_of
from ddpm_fast.schedules import zero_terminal_snr
from ddpm_fast.variational import log_variance_bounds

ABAR = np.cumprod(1 - BETAS)
SNR = ABAR / (1 - ABAR)


def test_weights_as_the_papers_have_them() -> None:
    """Hang et al. 2023: min(SNR, 5) / SNR for eps, min(SNR, 5) for x0, over SNR + 1 for v; Choi et al. 2022."""
    capped = np.minimum(SNR, 5)
    for prediction, expected in (("eps", capped / SNR), ("x0", capped), ("v", capped / (SNR + 1))):
        np.testing.assert_allclose(min_snr_weights(ABAR, prediction), expected, rtol=1e-14)
    np.testing.assert_allclose(min_snr_weights(ABAR, "eps", gamma=1e9), 1, rtol=1e-14)
    np.testing.assert_allclose(p2_weights(ABAR, "eps"), 1 / (1 + SNR), rtol=1e-14)
    np.testing.assert_allclose(p2_weights(ABAR, "eps", gamma=0.5, k=2), (2 + SNR) ** -0.5, rtol=1e-14)
    ended = np.cumprod(1 - zero_terminal_snr(generate_linear_schedule(50, 1e-3, 0.2)))
    for weights in (min_snr_weights(ended, "v"), p2_weights(ended, "x0")):
        assert np.isfinite(weights).all() and weights[-1] == 0


class Knows(nn.Module):
    """Says x0_hat, in any prediction."""

    def __init__(self, prediction: str, x0_hat: Tensor):
        super().__init__()
        self.prediction, self.x0_hat = prediction, x0_hat

    def forward(self, x_t: Tensor, t: Tensor, y: None) -> Tensor:
        a, s = (torch.from_numpy(np.sqrt(v))[t].view(-1, 1, 1, 1) for v in (ABAR, 1 - ABAR))
        eps = (x_t.double() - a * self.x0_hat) / s
        return {"eps": eps, "x0": self.x0_hat, "v": a * eps - s * self.x0_hat}[self.prediction].float()


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_weights_train_all_predictions_alike(weighting: str) -> None:
    """Three networks that say the same have the same loss, up to the one factor that eps' weight has."""
    x, t, noise = torch.randn(6, 2, 5, 7), torch.tensor([0, 2, 4, 6, 8, 11]), torch.randn(6, 2, 5, 7)
    x0_hat = torch.randn(6, 2, 5, 7).double()
    losses = []
    for prediction in ("eps", "x0", "v"):
        diffusion = Diffusion(
            Knows(prediction, x0_hat), (5, 7), 2, None, BETAS, prediction=prediction, loss_weighting=weighting
        )
        losses.append(float(diffusion.loss_of(diffusion.model, x, t, None, noise)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) == pytest.approx(losses[2], rel=1e-4)


@pytest.mark.parametrize("loss_type", ["l1", "l2", "huber"])
def test_the_weighted_loss(loss_type: str) -> None:
    weights = np.linspace(0, 2, 12)
    plain, weighted = pixelwise(loss_type=loss_type), pixelwise(loss_type=loss_type, loss_weighting=list(weights))
    x, t, noise = torch.randn(4, 2, 5, 7), torch.tensor([3, 0, 11, 3]), torch.randn(4, 2, 5, 7)
    with torch.no_grad():
        each = [float(plain.loss_of(plain.model, x[k : k + 1], t[k : k + 1], None, noise[k : k + 1])) for k in range(4)]
        got = float(weighted.loss_of(weighted.model, x, t, None, noise))
    assert got == pytest.approx(np.mean(np.array(each) * weights[t]), rel=1e-6)
    seen: list[Tensor] = []
    weighted.observer = lambda t, losses: seen.append(losses)
    weighted.get_losses(x, t, None)
    assert seen[0].shape == (4,)
    assert weighted.state_dict().keys() == plain.state_dict().keys()


def test_log_normal_probabilities() -> None:
    """The share of log sigma around each timestep, by sampling."""
    abar = np.cumprod(1 - generate_cosine_schedule(60))
    drawn = -1.2 + 1.2 * np.random.default_rng(0).standard_normal(10**6)
    log_sigma = np.log(sigma_of(abar))
    nearest = np.searchsorted((log_sigma[1:] + log_sigma[:-1]) / 2, drawn)
    share = np.bincount(nearest, minlength=60) / 10**6
    np.testing.assert_allclose(log_normal_probabilities(abar), share, atol=2e-3)
    ended = np.cumprod(1 - zero_terminal_snr(generate_linear_schedule(50, 1e-3, 0.2)))
    probabilities = log_normal_probabilities(ended, mean=3.0)
    assert probabilities.sum() == pytest.approx(1) and 0 < probabilities[-1] < 1


class Halves(nn.Module):
    """A network with a learned variance, both halves with a weight of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.v = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor, t: Tensor, y: None) -> Tensor:
        return torch.cat([self.gain * x, self.v * torch.ones_like(x)], dim=1)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_learned_variance(prediction: str) -> None:
    """L_simple + 0.001 T L_vlb, element by element in float64; the bound moves the variance alone."""
    diffusion = Diffusion(Halves(), (5, 7), 2, None, BETAS, prediction=prediction, learned_variance=True).double()
    x = (torch.randint(0, 256, (6, 2, 5, 7)) / 127.5 - 1).double()
    t, noise = torch.tensor([0, 1, 5, 11, 0, 7]), torch.randn(6, 2, 5, 7, dtype=torch.float64)
    loss = diffusion.loss_of(diffusion.model, x, t, None, noise)
    loss.backward()
    a, s = (torch.from_numpy(np.sqrt(v))[t].view(-1, 1, 1, 1) for v in (ABAR, 1 - ABAR))
    x_t = a * x + s * noise
    gain = diffusion.model.gain.detach().clone().requires_grad_()
    v = diffusion.model.v.detach().clone().requires_grad_()
    out = gain * x_t
    target = {"eps": noise, "x0": x, "v": a * noise - s * x}[prediction]
    x0 = {"eps": (x_t - s * out) / a, "x0": out, "v": a * x_t - s * out}[prediction].detach()
    terms = []
    for n, k in enumerate(t.tolist()):
        before = ABAR[k - 1] if k else 1.0
        beta = 1 - ABAR[k] / before
        first = BETAS[1] * (1 - ABAR[0]) / (1 - ABAR[1])
        low = beta * (1 - before) / (1 - ABAR[k]) if k else first
        log_var = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(low)
        if k:
            c_0 = math.sqrt(before) * beta / (1 - ABAR[k])
            gap = c_0 * (x[n] - x0[n])
            nats = 0.5 * (log_var - math.log(low) - 1 + (low + gap**2) / log_var.exp())
        else:
            off, std = x[n] - x0[n], (log_var / 2).exp()
            side = torch.where(off > 0, -1.0, 1.0).double()  # the lower tail, where a cdf keeps its digits
            ends = [side * (off + h) / std for h in (1 / 255, -1 / 255)]
            ends[0] = torch.where(x[n] > 0.999, side * math.inf, ends[0])
            ends[1] = torch.where(x[n] < -0.999, -side * math.inf, ends[1])
            upper, lower = (torch.special.erfc(-end / math.sqrt(2)) / 2 for end in ends)
            nats = -(upper - lower).abs().log()
        terms.append(nats.mean() / math.log(2))
    expected = ((out - target) ** 2).mean() + 0.001 * 12 * torch.stack(terms).mean()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(diffusion.model.gain.grad) == pytest.approx(float(gain.grad), rel=1e-5)
    assert float(diffusion.model.v.grad) == pytest.approx(float(v.grad), rel=1e-4)


def test_tables_follow_the_schedule_that_is_loaded() -> None:
    """And are as exact as the others in any dtype of the network."""
    options: dict[str, Any] = {"learned_variance": True, "loss_weighting": "min_snr", "timestep_sampling": "log_normal"}
    other = generate_cosine_schedule(12)
    source, target = (Diffusion(Halves(), (5, 7), 2, None, betas, seed=1, **options) for betas in (other, BETAS))
    target.load_state_dict(source.state_dict())
    x = torch.randn(6, 2, 5, 7)
    assert float(target(x)) == pytest.approx(float(source(x)), rel=1e-5)
    for move, dtype in ((source.half, torch.float32), (source.float, torch.float32), (source.double, torch.float64)):
        moved = move()
        exact = torch.from_numpy(np.stack(log_variance_bounds(np.cumprod(1 - other))))
        assert moved.log_variances.dtype == moved.loss_weights.dtype == dtype
        torch.testing.assert_close(moved.log_variances.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
    remembers = pixelwise(timestep_sampling="loss_second_moment")
    remembers.timestep_sampler.seen += 3
    assert int(remembers.double().timestep_sampler.seen.sum()) == 36
    remembers.weigh("p2", "loss_second_moment")
    assert int(remembers.timestep_sampler.seen.sum()) == 36 and remembers.loss_weights is not None
    remembers.weigh("none", "uniform")
    assert remembers.timestep_sampler is None and remembers.loss_weights is None


def test_from_a_config() -> None:
    config = Config(
        img_size=(8, 8), img_channels=1, base_channels=8, channel_mults=(1, 2), num_groups=4, num_timesteps=20,
        schedule="cosine", loss_type="huber", loss_weighting="p2", timestep_sampling="log_normal",
        learned_variance=True, cond_channels=2,
    )  # fmt: skip
    diffusion = Diffusion.from_config(config)
    assert diffusion.model.img_channels == 3 and diffusion.model.out_channels == 2
    assert diffusion(torch.zeros(2, 1, 8, 8), cond=torch.zeros(2, 2, 8, 8)).isfinite()
    told = Config(base_channels=8, channel_mults=(1, 2), num_groups=4, time_input="noise_level")
    assert told.build_unet().time_mlp[0].scale == 1000


ERRORS: dict[str, tuple[Any, str]] = {
    "weighting": (lambda: pixelwise(loss_weighting="snr"), "loss_weighting must be one of none, min_snr, p2"),
    "weights": (lambda: pixelwise(loss_weighting=[1.0, 2.0]), "loss_weighting must be a name or 12 numbers"),
    "negative": (lambda: pixelwise(loss_weighting=[-1.0] * 12), "loss_weighting must be a name or 12 numbers of at"),
    "sampling": (lambda: pixelwise(timestep_sampling="lognormal"), "timestep_sampling must be one of uniform, log"),
    "nothing": (lambda: pixelwise(timestep_sampling=[0.0] * 12), "timestep_sampling must hold a positive probability"),
    "gamma": (lambda: min_snr_weights(ABAR, "eps", 0), "gamma must be positive"),
    "k": (lambda: p2_weights(ABAR, "eps", k=0), "k must be positive"),
    "std": (lambda: log_normal_probabilities(ABAR, std=0), "std must be positive"),
    "time_input": (lambda: pixelwise(time_input="sigma"), "time_input must be one of timestep, noise_level"),
    "both": (lambda: pixelwise(time_input="noise_level", learned_variance=True), "learned_variance needs time_input"),
    "not twice": (
        lambda: pixelwise(learned_variance=True)(torch.zeros(1, 2, 5, 7)), "model must return 4 channels, the pred"
    ),
    "unet": (lambda: small(learned_variance=True), "the UNet returns 1 channels, expected 2: build .* out_channels=2"),
    "cond": (lambda: small(cond_channels=1), "img_channels is 1 and cond_channels 1, but .* build .* img_channels=2"),
    "no cond": (lambda: pixelwise(cond_channels=1)(torch.zeros(1, 2, 5, 7)), "cond is required"),
    "a cond": (lambda: pixelwise().sample(1, "cpu", cond=torch.zeros(1, 1, 5, 7)), "cond is for a Diffusion made with"),
    "its shape": (
        lambda: pixelwise(cond_channels=1).sample(1, "cpu", cond=torch.zeros(1, 2, 5, 7)), "cond must have shape"
    ),
    "told": (
        lambda: pixelwise(time_input="noise_level").sample(1, "cpu", sampler=make_plan("ddim", ABAR)), "tells timesteps"
    ),
    "complex": (lambda: pixelwise(loss_weighting=torch.ones(12, dtype=torch.complex64)), "loss_weighting must"),
    "not learned": (
        lambda: pixelwise().sample(1, "cpu", sampler_options={"variance": "learned"}), "this plan has a learned var"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_input(call: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        call()
