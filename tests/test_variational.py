"""The terms of the variational bound against densities, sums and integrals written out."""

import math

import numpy as np
import pytest
import torch
from test_engine import NoHostReads
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm_fast import generate_cosine_schedule, generate_linear_schedule
from ddpm_fast.schedules import zero_terminal_snr
from ddpm_fast.variational import (
    Posterior,
    discretized_log_likelihood,
    gaussian_kl,
    log_variance_bounds,
    prior_term,
    reverse_term,
)

ABAR = np.cumprod(1 - generate_linear_schedule(1000, 1e-4, 0.02))
EPS = torch.finfo(torch.float32).eps


def levels(bins: int = 256) -> Tensor:
    return (2 * torch.arange(bins, dtype=torch.float64) / (bins - 1) - 1).view(-1, 1)


def test_kl_is_that_of_torch() -> None:
    mean_1, log_var_1, mean_2, log_var_2 = torch.randn(4, 1000, dtype=torch.float64)
    p, q = Normal(mean_1, (log_var_1 / 2).exp()), Normal(mean_2, (log_var_2 / 2).exp())
    assert torch.allclose(gaussian_kl(mean_1, log_var_1, mean_2, log_var_2), kl_divergence(p, q), rtol=1e-12)


def test_kl_keeps_its_digits_where_variances_are_nearly_alike() -> None:
    """In float32, where gap^2 / 4 is far below a rounding of 1."""
    gap = torch.tensor([1e-3, -1e-3, 1e-2])
    zero = torch.zeros(3)
    exact = gaussian_kl(*(v.double() for v in (zero, zero, zero, gap)))
    expected = gap.double() ** 2 / 4 - gap.double() ** 3 / 12 + gap.double() ** 4 / 48
    assert torch.allclose(exact, expected, rtol=1e-6)
    assert float((gaussian_kl(zero, zero, zero, gap) - exact).abs().max()) <= EPS * float(gap.abs().max())


@pytest.mark.parametrize("bins", [2, 16, 256])
def test_probabilities_of_the_bins_sum_to_1(bins: int) -> None:
    """Also where they lie in one tail, in an outer bin, or where a bin is a small part of a deviation."""
    for mean in (-3.0, -1.0, -0.2, 0.0, 0.71, 1.0, 5.0):
        for std in (1e-3, 0.02, 0.5, 30.0):
            arguments = torch.tensor(mean).double(), torch.tensor(std).log()
            found = discretized_log_likelihood(levels(bins), *arguments, bins)
            assert found.dtype == torch.float64 and float(found.exp().sum()) == pytest.approx(1, rel=1e-11)


def test_likelihood_is_the_integral_over_the_bin() -> None:
    """Far from the mean, too, where the probability itself is below the smallest number; and its gradients."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(80))
    x = levels()[1:-1]
    for mean in (-1.5, 0.0, 0.3, 4.0):
        for std in (0.02, 0.1, 1.0, 100.0):
            m, log_std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mean, math.log(std)))
            found = discretized_log_likelihood(x, m, log_std)[:, 0]
            z = (x + nodes / 255 - mean) / std
            parts = -(z**2) / 2 - math.log(std * math.sqrt(2 * math.pi)) + weights.log() - math.log(255)
            assert torch.allclose(found, torch.logsumexp(parts, 1), rtol=1e-9)
            share = torch.softmax(parts, 1)
            expected = (share * z).sum() / std, (share * (z**2 - 1)).sum()
            for grad, value in zip(torch.autograd.grad(found.sum(), (m, log_std)), expected, strict=True):
                assert float(grad) == pytest.approx(float(value), rel=1e-7, abs=1e-7)


def test_likelihood_in_float32() -> None:
    """A rounding of the result, of whatever size, and of the gradients."""
    x = levels().float()
    for mean in (-1.0, 0.3, 40.0):
        for log_std in (-7.0, -2.0, 3.0):
            pairs = []
            for dtype in (torch.float32, torch.float64):
                values = (torch.full((256, 1), v, dtype=torch.float32) for v in (mean, log_std))
                m, s = (v.to(dtype).requires_grad_() for v in values)
                out = discretized_log_likelihood(x, m, s)
                assert out.dtype == dtype
                pairs.append((out, *torch.autograd.grad(out.sum(), (m, s))))
            for got, exact in zip(*pairs, strict=True):
                assert bool(exact.isfinite().all()) and bool(((got - exact).abs() <= EPS * exact.abs()).all())


def test_gradients() -> None:
    """Of both branches, by differences."""
    x = levels(16)
    mean, log_std = (torch.randn(16, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda m, s: discretized_log_likelihood(x, m, s, 16), (mean, log_std))
    t, posterior = torch.arange(16), Posterior.of(ABAR, dtype=torch.float64)
    log_var = (posterior.log_var[t].view(16, 1) + torch.randn(16, 1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: reverse_term(x, t, m, s, posterior, 16), (mean, log_var))


@pytest.mark.parametrize("t", [1, 5, 300, 999])
def test_reverse_term_is_the_integral(t: int) -> None:
    """In one dimension, with the posterior made of the forward process by Bayes' rule, on a grid."""
    x_start, x0_hat = 0.4, 0.35
    before, beta = float(ABAR[t - 1]), float(1 - ABAR[t] / ABAR[t - 1])
    x_t = math.sqrt(ABAR[t]) * x_start + math.sqrt(1 - ABAR[t]) * 0.7
    spread = math.sqrt(beta * (1 - before) / (1 - ABAR[t]))
    grid = x_t / math.sqrt(1 - beta) + torch.linspace(-1, 1, 400001, dtype=torch.float64) * 40 * max(spread, beta)

    def log_posterior(x_0: float) -> Tensor:
        log_q = Normal(math.sqrt(before) * x_0, math.sqrt(1 - before)).log_prob(grid)
        log_q = log_q + Normal(math.sqrt(1 - beta) * grid, math.sqrt(beta)).log_prob(torch.tensor(x_t))
        return log_q - torch.logsumexp(log_q, 0)

    log_q, log_p = log_posterior(x_start), log_posterior(x0_hat)
    mean, var = (log_p.exp() * grid).sum(), (log_p.exp() * grid**2).sum() - (log_p.exp() * grid).sum() ** 2
    log_var = torch.tensor([math.log(var) + 0.3], dtype=torch.float64)
    log_p = Normal(mean, (log_var / 2).exp()).log_prob(grid)
    log_p = log_p - torch.logsumexp(log_p, 0)
    expected = float((log_q.exp() * (log_q - log_p)).sum()) / math.log(2)
    x, x_hat = (torch.tensor([[v]], dtype=torch.float64) for v in (x_start, x0_hat))
    found = reverse_term(x, torch.tensor([t]), x_hat, log_var, Posterior.of(ABAR, dtype=torch.float64))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_first_and_prior_term() -> None:
    x = levels()[torch.randint(0, 256, (3, 2, 5))].view(3, 2, 5)
    x0_hat, log_var = x + 0.01 * torch.randn(3, 2, 5), torch.tensor([-9.0, -8.0, -4.0], dtype=torch.float64)
    posterior = Posterior.of(ABAR, dtype=torch.float64)
    found = reverse_term(x, torch.zeros(3, dtype=torch.int64), x0_hat, log_var, posterior)
    each = discretized_log_likelihood(x, x0_hat, log_var.view(3, 1, 1) / 2)
    assert torch.allclose(found, -each.sum((1, 2)) / 10 / math.log(2), rtol=1e-12)
    wide = reverse_term(x, torch.zeros(3, dtype=torch.int64), x0_hat, log_var.view(3, 1, 1).expand(x.shape), posterior)
    assert torch.equal(wide, found)
    for abar in (0.0, 4e-5, 0.3):
        q = Normal(math.sqrt(abar) * x, math.sqrt(1 - abar))
        expected = kl_divergence(q, Normal(torch.zeros_like(x), 1.0)).mean((1, 2)) / math.log(2)
        assert torch.allclose(prior_term(x, abar), expected, rtol=1e-9, atol=1e-15)
        assert torch.allclose(prior_term(x.float(), abar).double(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine", "zero", "one"])
def test_log_variance_bounds(name: str) -> None:
    betas = {
        "linear": generate_linear_schedule(1000, 1e-4, 0.02),
        "cosine": generate_cosine_schedule(40),
        "zero": zero_terminal_snr(generate_linear_schedule(100, 1e-4, 0.02)),
        "one": np.array([0.3]),
    }[name]
    abar = np.cumprod(1 - betas)
    low, high = log_variance_bounds(abar)
    assert np.allclose(high, np.log(betas), rtol=1e-9, atol=1e-12)
    for t in range(1, len(betas)):  # variances of a product of Gaussians add as reciprocals
        if betas[t] < 1:
            assert np.exp(-low[t]) == pytest.approx((1 - betas[t]) / betas[t] + 1 / (1 - abar[t - 1]), rel=1e-9)
    assert low[0] == (low[1] if len(betas) > 1 else high[0]) and (low <= high).all()
    posterior = Posterior.of(abar)
    assert torch.equal(posterior.log_var, torch.from_numpy(low).float()) and posterior.c_0[0] == 1


def bound(T: int, bins: int) -> tuple[float, float]:
    """(expected bound, entropy) in nats, of data that are normal up to rounding and their best x0_hat."""
    abar = np.cumprod(1 - generate_cosine_schedule(T))
    x = levels(bins)
    log_prior = discretized_log_likelihood(x, torch.tensor(-0.1).double(), torch.tensor(0.4).log(), bins)[:, 0]
    prior = log_prior.exp()
    z, weight = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(60))
    weight = weight / weight.sum()
    posterior = Posterior.of(abar, dtype=torch.float64)
    total = float((prior * prior_term(x, abar[-1])).sum())
    for t in range(T):
        a, s = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
        x_t = (a * x + s * z).reshape(-1, 1)
        x0_hat = torch.softmax(log_prior - (x_t - a * x.T) ** 2 / (2 * s**2), 1) @ x
        x_start, time = x.expand(bins, 60).reshape(-1, 1), torch.full((bins * 60,), t)
        terms = reverse_term(x_start, time, x0_hat, posterior.log_var[time], posterior, bins)
        total += float((prior.view(-1, 1) * weight * terms.view(bins, 60)).sum())
    return total * math.log(2), -float((prior * log_prior).sum())


def test_the_bound_is_above_the_entropy_and_comes_close() -> None:
    """What it loses to steps of finite length falls with their number."""
    found = [bound(T, 16) for T in (100, 400, 1600)]
    gaps = [total - entropy for total, entropy in found]
    assert 0 < gaps[-1] < found[-1][1] / 40 and all(gaps[i + 1] < gaps[i] / 3 for i in range(2)), (found, gaps)


def test_reverse_term_never_reads_the_device_and_its_gradients_are_finite() -> None:
    def term(device: str, size: float) -> tuple[Tensor, Tensor]:
        x = torch.zeros(3, 2, 4, 4, device=device)
        x0_hat = torch.full_like(x, size)
        x0_hat[1:] *= size  # at t > 0 nothing bounds it
        x0_hat.requires_grad_()
        log_var = torch.full_like(x, -8.0).requires_grad_()
        t = torch.arange(3, device=device) * 499
        return torch.autograd.grad(reverse_term(x, t, x0_hat, log_var, posterior).sum(), (x0_hat, log_var))

    posterior = Posterior.of(ABAR)
    for size in (0.0, 1.0, 1e4):
        for grad in term("cpu", size):
            assert bool(grad.isfinite().all()) and bool((grad.flatten(1) != 0).any(1).all() or not size)
    posterior = Posterior(*(table.to("meta") for table in posterior))
    with NoHostReads():
        term("meta", 1.0)


def test_half_precision_is_widened() -> None:
    x = levels().float()[:3]
    x0_hat, log_var = (x + 0.01).bfloat16(), torch.full((3,), -9.1).bfloat16()
    posterior, t = Posterior.of(ABAR), torch.tensor([0, 1, 900])
    assert torch.equal(
        reverse_term(x, t, x0_hat, log_var, posterior), reverse_term(x, t, x0_hat.float(), log_var.float(), posterior)
    )
    assert prior_term(x.bfloat16(), 0.1).dtype == torch.float32


X = torch.zeros(2, 3)
T0 = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda p: reverse_term(X, T0, X[:1], X, p), ValueError, r"x0_hat must have shape \[2, 3\]"),
        (lambda p: reverse_term(X, T0, X, X[:, 0][:1], p), ValueError, r"log_var must have shape \[2\]"),
        (lambda p: reverse_term(X, T0, X, 0.0, p), TypeError, "log_var must be a tensor"),
        (lambda p: reverse_term(X.long(), T0, X, X, p), TypeError, "x_start must be a floating point tensor"),
        (lambda p: reverse_term(X, T0 + 1000, X, X, p), ValueError, r"t must lie in \[0, 1000\)"),
        (lambda p: reverse_term(X, T0, X, X, p, 1), ValueError, "bins must be an integer of at least 2"),
        (lambda p: prior_term(X, 1.5), ValueError, r"abar_T must be a finite number in \[0, 1\]"),
    ],
)
def test_bad_input(call, kind, text) -> None:
    with pytest.raises(kind, match=text):
        call(Posterior.of(ABAR))
