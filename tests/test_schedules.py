import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import TINY

from ddpm_fast import Config, Diffusion, generate_cosine_schedule, generate_linear_schedule
from ddpm_fast.models.presets import SCHEDULES
from ddpm_fast.schedules import (
    check_betas,
    generate_constant_schedule,
    generate_jsd_schedule,
    generate_quadratic_schedule,
    generate_sigmoid_schedule,
    generate_warmup_schedule,
    zero_terminal_snr,
)


def test_few_linear_steps_are_warned_of() -> None:
    """Ends scaled by 1000 / T pass 1 from T = 20 down."""
    with pytest.warns(UserWarning, match="20 linear betas reach 1, and nothing is left .*more than 20"):
        Config(num_timesteps=20).betas()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config(num_timesteps=21).betas()


def test_linear() -> None:
    betas = generate_linear_schedule(5, 0.1, 0.5)
    assert betas.dtype == np.float64 and np.allclose(betas, [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-15)


def test_cosine() -> None:
    """alphas_cumprod follows cos^2, and the last beta is clipped."""
    betas = generate_cosine_schedule(100)
    t = np.arange(1, 100)
    f = np.cos((t / 100 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert np.allclose(np.cumprod(1 - betas)[:-1], f, rtol=1e-10) and betas[-1] == 0.999


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: generate_linear_schedule(0, 0.1, 0.2), "T must be an integer of at least 1, got 0"),
        (lambda: generate_linear_schedule(5, None, 0.2), "low must be a finite number, got None"),
        (lambda: generate_cosine_schedule(5, float("inf")), "s must be a finite number"),
        (lambda: generate_linear_schedule(2.5, 0.1, 0.2), "T must be an integer of at least 1"),
        (lambda: generate_linear_schedule(5, float("nan"), 0.2), "low must be a finite number"),
        (lambda: generate_cosine_schedule(-1), "T must be an integer of at least 1"),
        (lambda: generate_linear_schedule(5, -1e308, 1e308), "low and high must be closer together"),
        (lambda: generate_linear_schedule(5, 10**400, 0.2), "low must be a finite number"),
        (lambda: generate_linear_schedule(10**400, 0.1, 0.2), "T must be an integer of at least 1, .* too large"),
        (lambda: check_betas([10**400]), "betas must be a vector of numbers"),
        (lambda: check_betas(torch.full((3,), 0.1 + 0.1j)), "betas must be a vector of numbers"),
        (lambda: check_betas(torch.empty(3, device="meta")), "betas must be a vector of numbers"),
        (lambda: generate_cosine_schedule(5, -0.1), "s must be a finite number of at least 0"),
        (lambda: generate_quadratic_schedule(5, -0.1, 0.2), "low must be a finite number of at least 0"),
        (lambda: generate_warmup_schedule(5, 0.1, 0.2, 1.5), r"share must be a finite number in \[0, 1\]"),
        (lambda: generate_jsd_schedule(0), "T must be an integer of at least 1"),
        (lambda: generate_sigmoid_schedule(5, 0.1, 0.2, "a"), "width must be a finite number"),
        (lambda: generate_constant_schedule(5, None), "beta must be a finite number"),
        (lambda: zero_terminal_snr([0.1]), "at least two timesteps"),
    ],
)
def test_bad_input(call, text) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        call()


def test_others_by_hand() -> None:
    assert np.allclose(generate_quadratic_schedule(3, 0.01, 0.09), [0.01, 0.04, 0.09], rtol=1e-14)
    sigmoid = generate_sigmoid_schedule(3, 0.1, 0.5, 2.0)
    assert np.allclose(sigmoid, [0.1 + 0.4 / (1 + np.e**2), 0.3, 0.1 + 0.4 / (1 + np.e**-2)], rtol=1e-14)
    assert np.allclose(generate_warmup_schedule(10, 0.1, 0.5, 0.3), [0.1, 0.3, *[0.5] * 8], rtol=1e-14)
    assert generate_warmup_schedule(3, 0.1, 0.5, 0).tolist() == [0.5] * 3
    assert generate_constant_schedule(2, 0.3).tolist() == [0.3, 0.3]
    assert np.allclose(generate_jsd_schedule(4), [1 / 4, 1 / 3, 1 / 2, 1], rtol=1e-14)
    assert np.allclose(np.cumprod(1 - generate_jsd_schedule(4)), [3 / 4, 2 / 4, 1 / 4, 0], atol=1e-15)


def test_zero_terminal_snr_moves_the_end_alone() -> None:
    """The first level stays, the last becomes 0, those between keep their order; beta is 1 at the end only."""
    betas = generate_linear_schedule(1000, 1e-4, 0.02)
    stretched = zero_terminal_snr(betas)
    signal, before = np.sqrt(np.cumprod(1 - stretched)), np.sqrt(np.cumprod(1 - betas))
    assert signal[-1] == 0 and stretched[-1] == 1 and np.isclose(signal[0], before[0], rtol=1e-12)
    assert ((stretched[:-1] > 0) & (stretched[:-1] < 1)).all() and (np.diff(signal) < 0).all()
    ratio = signal[1:-1] / (before[1:-1] - before[-1])
    assert np.allclose(ratio, ratio[0], rtol=1e-9)
    assert check_betas(stretched, "v").shape == (1000,)
    with pytest.raises(ValueError, match=r"1 at the last index needs prediction='x0' or 'v'"):
        check_betas(stretched, "eps")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: generate_quadratic_schedule(100, 1e-4, 0.02), {"beta_schedule": "scaled_linear"}),
        (lambda: generate_sigmoid_schedule(100, 1e-4, 0.02), {"beta_schedule": "sigmoid"}),
        (lambda: generate_linear_schedule(100, 1e-4, 0.02), {"beta_schedule": "linear"}),
        (lambda: generate_cosine_schedule(100), {"beta_schedule": "squaredcos_cap_v2"}),
        (lambda: zero_terminal_snr(generate_linear_schedule(100, 1e-4, 0.02)), {"rescale_betas_zero_snr": True}),
    ],
)
def test_diffusers_has_the_same(ours, theirs) -> None:
    """In float32, which theirs are."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    common = {"num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02}
    expected = diffusers.DDPMScheduler(**common | theirs).betas
    assert np.allclose(ours(), expected.numpy(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stretched", [False, True])
def test_every_schedule_of_a_configuration_trains_and_samples(schedule: str, stretched: bool) -> None:
    """With as few timesteps as a thousandth part of the noise of each allows; pure noise at the end only with "v"."""
    config = replace(TINY, num_timesteps=40, schedule=schedule, zero_terminal_snr=stretched, prediction="v")
    betas = config.betas()
    assert betas.shape == (40,) and (betas[-1] == 1) == (stretched or schedule == "jsd")
    diffusion = Diffusion.from_config(config, seed=0).eval()
    y = torch.tensor([0, 1])
    assert diffusion(torch.zeros(2, 1, 8, 8), y).isfinite()
    for sampler in ("ddpm", "ddim", "dpmpp_2m"):
        images = diffusion.sample(2, "cpu", y, use_ema=False, seed=0, sampler=sampler, num_steps=5)
        assert images.isfinite().all()
    assert Config.from_dict(config.to_dict()) == config
    if betas[-1] == 1:
        with pytest.raises(ValueError, match="1 at the last index needs prediction"):
            Diffusion.from_config(replace(config, prediction="eps"))
