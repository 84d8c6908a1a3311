"""The step with a variance that the network predicts; test_sampler_step.py has it among all other arguments."""

import math

import pytest
import torch
from oracle import LAYOUTS, backends, laid_out

from ddpm_fast import ops
from ddpm_fast.ops import REVERSE, NoiseState
from ddpm_fast.ops.sampler_step import OP
from ddpm_fast.reference import sampler_step as reference

STATE = NoiseState.at(1, 2, 3)
SHAPE = (2, 3, 16, 16)


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    x, model_out = torch.randn(2, *SHAPE, dtype=dtype)
    return {"x": x, "model_out": model_out, "rows": torch.rand(4, 9, dtype=dtype), "k": torch.tensor(2)}


def test_a_variance_interpolates_between_the_logs_of_its_bounds() -> None:
    """As Nichol & Dhariwal 2021 write it, equation 15; v = -1 and 1 are the bounds themselves."""
    a, (lower, upper) = arguments(torch.float64), (0.1, 0.3)
    z, v = torch.randn(2, *SHAPE, dtype=torch.float64)
    v[0] = v[0].sign()
    a["rows"][2, 7:] = torch.tensor([math.sqrt(lower * upper), math.log(upper / lower) / 2], dtype=torch.float64)
    share = (v + 1) / 2
    deviation = torch.exp((share * math.log(upper**2) + (1 - share) * math.log(lower**2)) / 2)
    expected = ops.sampler_step(**a) + deviation * z
    assert torch.allclose(ops.sampler_step(**a, noise=z, variance=v), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("backend", backends("sampler_step"))
def test_a_variance_without_noise_has_no_effect(backend: str) -> None:
    a = arguments()
    with ops.use_backend(backend):
        assert torch.equal(ops.sampler_step(**a, variance=torch.full_like(a["x"], torch.nan)), ops.sampler_step(**a))


@pytest.mark.parametrize("backend", backends("sampler_step"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_variance_are_halves_of_one_tensor(backend: str, layout: str, dtype: torch.dtype) -> None:
    """As networks return them; where they are contiguous, no backend copies them."""
    both = laid_out(torch.randn(2, 6, 16, 16).to(dtype), layout)
    model_out, variance = both.chunk(2, dim=1)
    a = arguments() | {"noise": STATE, "clip": 1.0}
    with ops.use_backend(backend):
        expected = ops.sampler_step(**a | {"model_out": model_out.clone()}, variance=variance.clone())
        got = ops.sampler_step(**a | {"model_out": model_out}, variance=variance)
    assert torch.equal(got, expected)
    if layout == "contiguous" and backend == "native":
        ready = OP.impls[0].ready
        assert ready and ready(a["x"], model_out, a["rows"], a["k"], STATE, None, variance, 1.0, False, None, None)
    if layout == "contiguous" and backend == "triton":
        from ddpm_fast.kernels.layouts import array

        assert all(array(half).data is half for half in (model_out, variance))


@pytest.mark.parametrize("backend", backends("sampler_step"))
@pytest.mark.parametrize("c_z", [0.0, 1.0])
def test_a_variance_beyond_all_bounds_gives_what_it_gives_in_plain_torch(backend: str, c_z: float) -> None:
    """Also where the row has no noise: 0 times infinity is no number."""
    v = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 87.5, 88.5, 89.0, -200.0])[None]
    rows, x = torch.zeros(1, 9), torch.ones_like(v)
    rows[0, 4:] = torch.tensor([1.0, 0.0, 0.0, c_z, 1.0])
    for noise in (x, STATE):
        z = ops.noise(v.shape, STATE, REVERSE) if noise is STATE else noise
        expected = reference.sampler_step(x, x, rows, torch.tensor(0), noise=z, variance=v)
        with ops.use_backend(backend):
            got = ops.sampler_step(x, x, rows, torch.tensor(0), noise=noise, variance=v)
        beyond = (torch.where(t.isfinite(), 0.0, t) for t in (got, expected))
        assert torch.equal(*(t.nan_to_num(7.0) for t in beyond))
