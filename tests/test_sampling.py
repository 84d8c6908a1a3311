"""Sampling beyond the original's contract: what an image depends on, what the network is told, warnings."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import BETAS, Pixelwise, pixelwise, small

from ddpm_fast import Diffusion, sample


def test_an_image_depends_on_seed_and_index_alone() -> None:
    diffusion = pixelwise()
    whole = diffusion.sample(8, "cpu", seed=1)
    parts = [diffusion.sample(3, "cpu", seed=1), diffusion.sample(5, "cpu", seed=1, first_index=3)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, diffusion.sample(8, "cpu", seed=2))
    assert whole.flatten(1).unique(dim=0).shape[0] == 8


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_with_a_unet_batches_agree_up_to_rounding(memory_format) -> None:
    diffusion = small(num_classes=5).to(memory_format=memory_format)
    y = torch.arange(8) % 5
    whole = diffusion.sample(8, "cpu", y=y, seed=1)
    parts = [diffusion.sample(3, "cpu", y=y[:3], seed=1), diffusion.sample(5, "cpu", y=y[3:], seed=1, first_index=3)]
    assert float((whole - torch.cat(parts)).abs().max()) < 1e-3


def test_torch_manual_seed_makes_sampling_repeatable() -> None:
    diffusion = pixelwise()
    torch.manual_seed(3)
    first, second = diffusion.sample(2, "cpu"), diffusion.sample(2, "cpu")
    torch.manual_seed(3)
    assert torch.equal(diffusion.sample(2, "cpu"), first) and not torch.equal(first, second)


def test_given_noise_starts_the_chain() -> None:
    diffusion = pixelwise()
    x_T = torch.randn(3, 2, 5, 7)
    kept = x_T.clone()
    sequence = diffusion.sample_diffusion_sequence(3, "cpu", seed=1, noise=x_T)
    assert torch.equal(sequence[0], x_T) and torch.equal(x_T, kept), "the caller's tensor stays as it was"
    assert len(sequence) == 13
    assert torch.equal(sequence[-1], diffusion.sample(3, "cpu", seed=1, noise=x_T))


@pytest.mark.parametrize("size", [(6,), (5, 7), (3, 4, 5)])
def test_data_of_any_rank(size: tuple[int, ...]) -> None:
    diffusion = pixelwise(size)
    assert float(diffusion(torch.randn(3, 2, *size)).detach()) > 0
    images = diffusion.sample(2, "cpu", seed=0)
    assert images.shape == (2, 2, *size) and images.isfinite().all()


def test_the_network_is_told_each_timestep() -> None:
    diffusion = pixelwise()
    diffusion.sample(2, "cpu")
    times = diffusion.ema_model.times
    assert [t.tolist() for t in times] == [[k, k] for k in reversed(range(12))]
    assert all(t.dtype == torch.int64 for t in times)


def test_sampling_is_in_eval_mode_and_restores_each_module() -> None:
    diffusion = small().train()
    diffusion.update_ema()
    diffusion.ema_model.mid[0].eval()
    modes = [m.training for m in diffusion.modules()]
    seen = []
    diffusion.ema_model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    diffusion.sample(1, "cpu")
    assert seen and not any(seen)
    assert [m.training for m in diffusion.modules()] == modes


def test_threads_that_share_a_network_sample_in_eval_mode() -> None:
    """The first chain, which found it in train mode, ends within the second."""
    net, plan, seen = Pixelwise().train(), pixelwise().plan(), []
    entered, both_in, first_out = (Event() for _ in range(3))

    def first(k: int, x: Tensor) -> None:
        entered.set()
        assert both_in.wait(30)

    def second(k: int, x: Tensor) -> None:
        both_in.set()
        assert first_out.wait(30)
        seen.append(net.training)

    with ThreadPoolExecutor(2) as pool:
        chains = [pool.submit(sample, net, (1, 2, 5, 7), plan, seed=1, callback=first)]
        assert entered.wait(30)
        chains.append(pool.submit(sample, net, (1, 2, 5, 7), plan, seed=1, callback=second))
        chains[0].result()
        first_out.set()
        chains[1].result()
    assert len(seen) == len(plan) and not any(seen) and net.training


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_remove_noise_is_the_mean_of_the_posterior(prediction: str) -> None:
    """Equation 7 of Ho et al. written out, for each network and in the plan's precision also for half images."""
    diffusion = pixelwise(prediction=prediction)
    diffusion.model.gain.data.fill_(0.7)
    x, t = torch.randn(3, 2, 5, 7), torch.tensor([0, 5, 11])
    abar = torch.from_numpy(np.cumprod(1 - BETAS))
    a, before = (v.view(3, 1, 1, 1) for v in (abar[t], torch.cat([torch.ones(1), abar])[t]))
    beta = torch.from_numpy(BETAS)[t].view(3, 1, 1, 1)
    means = []
    for use_ema, network in ((True, diffusion.ema_model), (False, diffusion.model)):
        out = network(x, t).detach().double()
        x0 = {"eps": (x - (1 - a).sqrt() * out) / a.sqrt(), "x0": out, "v": a.sqrt() * x - (1 - a).sqrt() * out}
        mean = before.sqrt() * beta / (1 - a) * x0[prediction] + (1 - beta).sqrt() * (1 - before) / (1 - a) * x
        means.append(diffusion.remove_noise(x, t, None, use_ema=use_ema))
        assert torch.allclose(means[-1].double(), mean, atol=1e-4)
    assert not torch.allclose(*means, atol=1e-3)
    assert diffusion.remove_noise(x.half(), t, None).dtype == torch.float32


def test_one_step_starts_at_the_last_timestep() -> None:
    diffusion = pixelwise()
    diffusion.sample(1, "cpu", num_steps=1)
    assert [t.tolist() for t in diffusion.ema_model.times] == [[11]]


def test_torch_rng_draws_in_the_order_of_memory_and_not_for_given_noise() -> None:
    diffusion = Diffusion(Pixelwise(), (5, 7), 2, None, BETAS, rng="torch")
    noise = torch.randn(2, 2, 5, 7)
    samples = []
    for given in (noise, noise.double(), noise.to(memory_format=torch.channels_last)):
        torch.manual_seed(0)
        samples.append(diffusion.sample(2, "cpu", noise=given))
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
    torch.manual_seed(0)
    for _ in range(11):
        torch.randn(2, 2, 5, 7)
    after = torch.randn(1)
    torch.manual_seed(0)
    diffusion.sample(2, "cpu", noise=noise)
    assert torch.equal(torch.randn(1), after), "one draw for each step with t > 0, none for x_T"


def test_an_ema_that_was_never_updated_warns_once() -> None:
    diffusion = small().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.sample(1, "cpu")  # nothing was trained yet: no reason to warn
        diffusion(torch.zeros(1, 1, 8, 8))
        diffusion.sample(1, "cpu", use_ema=False)
    with pytest.warns(UserWarning, match="update_ema"):
        diffusion.sample(1, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.sample(1, "cpu")
        other = small().train()
        other(torch.zeros(1, 1, 8, 8))
        other.update_ema()
        other.sample(1, "cpu")
        evaluated = small().eval()
        evaluated(torch.zeros(1, 1, 8, 8))
        evaluated.sample(1, "cpu")
        loaded = small().train()
        loaded.load_state_dict(other.state_dict())
        loaded.load_extra_state({"step": 0})
        loaded(torch.zeros(1, 1, 8, 8))
        loaded.sample(1, "cpu")


def test_labels_for_an_unconditional_network_warn_once() -> None:
    diffusion = small()
    diffusion.update_ema()
    y = torch.tensor([1, 2])
    with pytest.warns(UserWarning, match="y is ignored"):
        diffusion(torch.zeros(2, 1, 8, 8), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.sample(2, "cpu", y=y)


def test_labels_are_checked_for_any_network() -> None:
    diffusion = Diffusion(Pixelwise(), (5, 7), 2, 3, BETAS)
    with pytest.raises(ValueError, match=r"y must lie in \[0, 3\)"):
        diffusion(torch.zeros(2, 2, 5, 7), torch.tensor([0, 3]))


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_given_noise_is_left_as_it_was(rng: str) -> None:
    noise = torch.randn(2, 2, 5, 7)
    before = noise.clone()
    pixelwise(rng=rng).sample(2, "cpu", noise=noise)
    assert torch.equal(noise, before)


def test_a_large_batch_is_cut_to_what_fits(monkeypatch) -> None:
    monkeypatch.setattr("ddpm_fast.functional.batch_that_fits", lambda *_: 30)
    diffusion = pixelwise()
    expected = torch.cat([diffusion.sample(35, "cpu", seed=1, first_index=first) for first in (0, 35)])
    network = cast(Pixelwise, diffusion.ema_model)
    network.times.clear()
    assert torch.equal(diffusion.sample(70, "cpu", seed=1), expected)
    assert {len(t) for t in network.times} <= {1, 10, 30}  # 1: batch_that_fits tries the network with one image
