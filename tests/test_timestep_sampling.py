"""How often timesteps are drawn: by given probabilities, and by what their losses were."""

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from test_trainer import TINY as TRAINED
from test_trainer import assert_same_state, trainer
from torch import Tensor
from toys import BETAS, pixelwise, small

from ddpm_fast import Diffusion, UNet
from ddpm_fast.objectives import (
    LossSecondMoment,
    TimestepSampler,
)
from ddpm_fast.ops import NoiseState
from ddpm_fast.training.data import digits
from ddpm_fast.training.trainer import Trainer


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


def test_a_failure_is_explained_by_the_timesteps_it_had(tmp_path: Path) -> None:
    """Also where timesteps go by losses, which then stay as they were before the step."""
    config = replace(TRAINED, num_timesteps=6, timestep_sampling="loss_second_moment")
    t = trainer(tmp_path, config=config, log_every=20)
    for _ in range(14):
        t.train_step()
    before = cast(LossSecondMoment, t.diffusion.timestep_sampler).state()
    with torch.no_grad():
        t.diffusion.model.out_conv.bias[0] = torch.inf
    for _ in range(3):
        t.train_step()
    assert cast(LossSecondMoment, t.diffusion.timestep_sampler).state() == before
    with pytest.raises(FloatingPointError, match="the loss is inf at step 15 .*out_conv"):
        t._check()


def test_a_resumed_run_goes_by_the_same_losses(tmp_path: Path) -> None:
    """Timesteps drawn by their losses: what they were rides in the checkpoint."""
    config = replace(TRAINED, num_timesteps=6, timestep_sampling="loss_second_moment", label_dropout=0.2)
    whole, first = (trainer(tmp_path / name, config=config) for name in ("whole", "parts"))
    whole.run(14)
    sampler = cast(LossSecondMoment, whole.diffusion.timestep_sampler)
    assert int(sampler.seen.min()) >= sampler.history and float(sampler.probabilities().max()) > 0.2
    first.run(9)
    second = Trainer.resume(digits(), tmp_path / "parts", progress=False, log_every=5, save_every=0)
    second.run(14)
    assert_same_state(second, whole)
