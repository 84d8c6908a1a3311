import numpy as np
import pytest
import torch

from ddpm_fast import generate_cosine_schedule, generate_linear_schedule
from ddpm_fast.schedules import check_betas


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
    ],
)
def test_bad_input(call, text) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        call()
