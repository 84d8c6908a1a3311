"""What training weighs: weights of timesteps, how often they are drawn, learned variance, noise levels."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import BETAS, Pixelwise, pixelwise, small

from ddpm_fast import Config, Diffusion, TrainStep, UNet, generate_cosine_schedule, generate_linear_schedule
from ddpm_fast.objectives import (
    LossSecondMoment,
    TimestepSampler,
    log_normal_probabilities,
    min_snr_weights,
    p2_weights,
)
from ddpm_fast.ops import NoiseState
from ddpm_fast.reference import noise as reference
from ddpm_fast.reference.philox import LEVELS, PERTURB
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


def test_draws_follow_the_probabilities() -> None:
    wanted = np.array([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    sampler = TimestepSampler(5 * wanted)
    t = sampler(200_000, NoiseState.at(3, 1))
    np.testing.assert_allclose(np.bincount(t, minlength=6) / 200_000, wanted, atol=5e-3)
    assert torch.equal(sampler(5, NoiseState.at(3, 1, 100)), t[100:105])  # an image's own, in any batch
    torch.manual_seed(0)
    np.testing.assert_allclose(np.bincount(sampler(200_000, None), minlength=6) / 200_000, wanted, atol=5e-3)
    for move in (lambda m: m.half(), lambda m: m.to("meta"), lambda m: m.double()):
        assert move(TimestepSampler(wanted)).below.dtype == torch.int64


class OneAtATime:
    """The last ten losses of each timestep, as a list (Nichol & Dhariwal 2021, section 3.3)."""

    def __init__(self, size: int):
        self.losses: list[list[float]] = [[] for _ in range(size)]

    def observe(self, t: Tensor, losses: Tensor) -> None:
        for k, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.losses[k] = [*self.losses[k], loss][-10:]

    def probabilities(self) -> np.ndarray:
        size = len(self.losses)
        if any(len(v) < 10 for v in self.losses):
            return np.full(size, 1 / size)
        weights = np.sqrt([np.mean(np.square(v)) for v in self.losses])
        return 0.999 * weights / weights.sum() + 0.001 / size


def test_loss_second_moment_against_lists() -> None:
    """Batches in which a timestep occurs many times over, and ones in which it does not."""
    sampler, plain = LossSecondMoment(7), OneAtATime(7)
    rng = torch.Generator().manual_seed(0)
    for step in range(40):
        t = torch.randint(0, 7 if step > 3 else 2, (33,), generator=rng)
        losses = torch.rand(33, generator=rng)
        sampler.observe(t, losses)
        plain.observe(t, losses)
        np.testing.assert_allclose(sampler.probabilities(), plain.probabilities(), rtol=1e-6)
        if step == 20:
            restored = LossSecondMoment(7)
            restored.load(sampler.state())
            sampler = restored
    np.testing.assert_allclose(sampler.weights(torch.arange(7)), 1 / (7 * plain.probabilities()), rtol=1e-6)
    before = sampler.state()
    for bad in (math.nan, math.inf):  # a step that changes no weights, either
        sampler.observe(torch.tensor([2, 3]), torch.tensor([1.0, bad]))
    sampler.held = torch.ones(())
    sampler.observe(torch.tensor([2]), torch.tensor([1.0]))
    assert sampler.state() == before
    sampler.losses[2, 0] = math.inf  # of an older file
    np.testing.assert_allclose(sampler.probabilities(), 1 / 7)


def test_importance_sampling_keeps_the_mean() -> None:
    """Of the gradient, too: large losses are drawn more often, and count less."""
    diffusion = pixelwise(timestep_sampling="loss_second_moment", seed=1).train()
    sampler = diffusion.timestep_sampler
    assert isinstance(sampler, LossSecondMoment)
    for _ in range(10):
        sampler.observe(torch.arange(12), torch.arange(1.0, 13.0))
    drawn: list[Tensor] = []
    diffusion.observer = lambda t, losses: drawn.append(t)
    frozen = sampler.state()
    x, total = torch.randn(4096, 2, 5, 7), 0.0
    for _ in range(20):
        total += float(diffusion(x)) / 20
        sampler.load(frozen)
    counts = np.bincount(torch.cat(drawn), minlength=12) / (20 * 4096)
    np.testing.assert_allclose(counts, 0.999 * np.arange(1, 13) / 78 + 0.001 / 12, atol=3e-3)
    plain = pixelwise(seed=1)
    noise = torch.randn(x.shape)
    expected = np.mean([float(plain.loss_of(plain.model, x, torch.full((4096,), k), None, noise)) for k in range(12)])
    assert total == pytest.approx(expected, rel=0.02)


def test_losses_are_remembered_with_the_state() -> None:
    diffusion = small(timestep_sampling="loss_second_moment", seed=1).train()
    for _ in range(30):
        diffusion(torch.randn(16, 1, 8, 8))
    assert float(diffusion.timestep_sampler.seen.min()) >= 10
    other = small(timestep_sampling="loss_second_moment", seed=1).train()
    other.load_state_dict(diffusion.state_dict())
    x = torch.randn(16, 1, 8, 8)
    assert torch.equal(diffusion(x), other(x))
    assert torch.equal(diffusion.timestep_sampler.losses, other.timestep_sampler.losses)
    before = diffusion.timestep_sampler.state()
    diffusion.eval()(x)
    diffusion.loss_of(diffusion.model, x, torch.zeros(16, dtype=torch.int64), None, x)
    assert diffusion.timestep_sampler.state() == before
    with pytest.raises(ValueError, match="timestep_losses holds"):
        Diffusion(UNet(1, 8, (1, 2), 1, time_emb_dim=8, num_groups=4), (8, 8), 1, None, BETAS[:6],
                  timestep_sampling="loss_second_moment").load_extra_state(diffusion.extra_state())  # fmt: skip


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


def test_noise_levels() -> None:
    """Told a, drawn between neighbours; the image is perturbed at just that level, and the loss's target, too."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Asks(Pixelwise):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            seen.append((x, t))
            return super().forward(x, t, y)

    diffusion = Diffusion(Asks(), (5, 7), 2, None, BETAS, time_input="noise_level", prediction="v", seed=4).train()
    x = torch.randn(500, 2, 5, 7)
    loss = diffusion(x)
    x_t, told = seen[0]
    state = NoiseState.at(4, 1)
    t = reference.timesteps(500, 12, state)
    u = (reference.timesteps(500, 2**31, state, LEVELS).double() + 0.5) / 2**31
    edges = torch.from_numpy(np.append(1.0, ABAR))
    abar = edges[t] + u * (edges[t + 1] - edges[t])
    torch.testing.assert_close(told.double(), abar.sqrt(), rtol=1e-6, atol=0)
    a, s = (v.sqrt().view(-1, 1, 1, 1) for v in (abar, 1 - abar))
    noise = reference.noise(x.shape, state, PERTURB).double()
    torch.testing.assert_close(x_t.double(), a * x + s * noise, rtol=1e-5, atol=1e-5)
    out = 0.3 * x_t.double() + 0.001 * told.double().view(-1, 1, 1, 1)
    assert float(loss) == pytest.approx(float(((out - (a * noise - s * x)) ** 2).mean()), rel=1e-5)
    seen.clear()
    diffusion.loss_of(diffusion.model, x[:12], torch.arange(12), None, noise[:12].float())
    torch.testing.assert_close(seen[0][1].double(), torch.from_numpy(np.sqrt(ABAR)), rtol=1e-6, atol=0)
    seen.clear()
    images = diffusion.sample(2, "cpu", seed=1)
    levels = torch.stack([told[0] for _, told in seen]).double()
    torch.testing.assert_close(levels, torch.from_numpy(np.sqrt(ABAR[::-1].copy())), rtol=1e-6, atol=0)
    assert images.isfinite().all()
    x0_hat, v = diffusion.pred_x_start(x[:2], torch.tensor([3, 4]))
    assert v is None and x0_hat.shape == (2, 2, 5, 7) and seen[-1][1].tolist() == pytest.approx(np.sqrt(ABAR[3:5]))


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


def test_a_refused_file_leaves_the_losses_as_they_were() -> None:
    source, target = (small(timestep_sampling="loss_second_moment", seed=1).train() for _ in range(2))
    source(torch.randn(16, 1, 8, 8))
    before = target.extra_state()
    state = source.state_dict()
    del state["model.init_conv.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict(state)
    assert target.extra_state() == before
    with pytest.raises(ValueError, match="timestep_losses is no text that"):
        target.load_extra_state({"timestep_losses": "?"})


def test_noise_levels_in_float64() -> None:
    diffusion = pixelwise(time_input="noise_level").double().train()
    assert diffusion(torch.randn(3, 2, 5, 7, dtype=torch.float64)).dtype == torch.float64
    ended = zero_terminal_snr(generate_linear_schedule(50, 1e-3, 0.2))
    plan = make_plan("ddim", np.cumprod(1 - ended), "v", 1).told_noise_levels()
    assert plan.timesteps("cpu").dtype == torch.float32 and plan.timesteps("cpu").tolist() == [0.0]


def test_an_embedding_for_timesteps_is_warned_of() -> None:
    build = lambda scale: UNet(1, 8, (1, 2), 1, time_emb_dim=8, num_groups=4, time_emb_scale=scale)  # noqa: E731
    with pytest.warns(UserWarning, match="can hardly tell noise levels, 0 to 1, apart: .* time_emb_scale=1000"):
        Diffusion(build(1.0), (8, 8), 1, None, BETAS, time_input="noise_level")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Diffusion(build(1000.0), (8, 8), 1, None, BETAS, time_input="noise_level")


def test_an_image_condition() -> None:
    """Beside x_t, in training, in a whole training step and in sampling."""
    torch.manual_seed(0)
    net = UNet(3, 8, (1, 2), 1, time_emb_dim=8, num_groups=4, out_channels=1, dropout=0.0)
    diffusion = Diffusion(net, (8, 8), 1, None, BETAS, cond_channels=2, seed=1).train()
    x, cond = torch.randn(4, 1, 8, 8), torch.randn(4, 2, 8, 8)
    inputs: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    loss = diffusion(x, cond=cond)
    assert torch.equal(inputs[0][:, 1:], cond)
    diffusion.calls = 0
    step = TrainStep(diffusion, torch.optim.SGD(net.parameters(), lr=0.0), accumulate=2)
    halves = [float(v) for v in (step(x, cond=cond),)]
    assert torch.equal(inputs[1][:, 1:], cond[:2]) and torch.equal(inputs[2][:, 1:], cond[2:]) and halves
    images = diffusion.sample(4, "cpu", cond=cond, seed=1)
    parts = [diffusion.sample(2, "cpu", cond=cond[k : k + 2], seed=1, first_index=k) for k in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), images)
    assert not torch.allclose(diffusion.sample(4, "cpu", cond=-cond, seed=1), images)
    mean = diffusion.remove_noise(x, torch.tensor([3] * 4), None, cond=cond)
    assert mean.shape == x.shape and loss.isfinite()


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
