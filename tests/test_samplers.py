"""Plans against textbook loops, and the plan itself."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast import Plan, generate_cosine_schedule, generate_linear_schedule
from ddpm_fast.engine import denoise
from ddpm_fast.reference.samplers import ddpm_loop
from ddpm_fast.samplers import COLUMNS, SAMPLERS, make_plan
from ddpm_fast.samplers.ddpm import spaced_timesteps

SHAPE = (2, 3, 4, 4)
SCHEDULES = {"linear": generate_linear_schedule(1000, 1e-4, 0.02), "cosine": generate_cosine_schedule(40)}


def network(x: Tensor, t: Tensor | int) -> Tensor:
    """Non-linear, bounded, different at each timestep."""
    time = t.view(-1, 1, 1, 1) if isinstance(t, Tensor) else t
    return torch.tanh(0.8 * x + 0.1 * torch.sin(torch.as_tensor(time * 1.0, dtype=x.dtype)))


class Recorded:
    """Replays one list of normals to both loops, through torch.randn."""

    def __init__(self, n: int):
        self.noise = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(n)]

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        numbers = iter(self.noise)
        monkeypatch.setattr(torch, "randn", lambda shape, dtype, device: next(numbers).to(dtype))


def both(monkeypatch, betas, dtype, num_steps, prediction="eps", **options) -> tuple[Tensor, Tensor, Tensor]:
    """(plan through the engine, textbook loop, the loop in float64), from the same noise."""
    abar = np.cumprod(1 - betas)
    plan = make_plan("ddpm", abar, prediction, num_steps, options)
    taken = plan.column("t").long().tolist()[::-1]
    noise = Recorded(len(plan))
    x_T = torch.randn(SHAPE, dtype=torch.float64)
    options["prediction"] = prediction
    exact = ddpm_loop(network, x_T, abar[taken], taken, noise.noise, **options)
    rounded = [z.to(dtype) for z in noise.noise]
    loop = ddpm_loop(network, x_T.to(dtype), abar[taken], taken, rounded, **options)
    with monkeypatch.context() as m:
        noise.patch(m)
        got = denoise(network, x_T.to(dtype).clone(), plan)
    return got, loop, exact


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("num_steps", [None, 10, 1])
def test_ddpm_against_the_textbook(monkeypatch, schedule, prediction, variance, clip, num_steps) -> None:
    options = {"prediction": prediction, "variance": variance, "clip": clip}
    got, _, exact = both(monkeypatch, SCHEDULES[schedule], torch.float64, num_steps, **options)
    assert float((got - exact).abs().max()) <= 1e-10 * max(1, float(exact.abs().max()))


@pytest.mark.parametrize("clip", [False, True])
def test_float32_is_as_close_to_float64_as_the_textbook_loop(monkeypatch, clip: bool) -> None:
    got, loop, exact = both(monkeypatch, SCHEDULES["linear"], torch.float32, None, clip=clip)
    scale = float(exact.abs().max())
    ours, theirs = (float((v.double() - exact).abs().max()) / scale for v in (got, loop))
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps


def test_spaced_timesteps_include_both_ends() -> None:
    assert spaced_timesteps(1000, 5).tolist() == [0, 250, 500, 749, 999]
    assert spaced_timesteps(10, 10).tolist() == list(range(10))


def test_rows_in_full() -> None:
    """Two steps by hand: abar = 0.9, 0.72."""
    plan = make_plan("ddpm", np.array([0.9, 0.72]), options={"variance": "posterior", "clip": True})
    beta, posterior = 0.2, 0.2 * 0.1 / 0.28
    expected = [
        [1, 1, 0.72**-0.5, -((0.28 / 0.72) ** 0.5), 0.8**0.5 * 0.1 / 0.28, 0.9**0.5 * beta / 0.28, 0, posterior**0.5],
        [0, 1, 0.9**-0.5, -((0.1 / 0.9) ** 0.5), 0, 1, 0, 0],
    ]
    assert torch.allclose(plan.rows, torch.tensor(expected, dtype=torch.float64), rtol=1e-12) and plan.clip == 1.0


def test_a_plan_of_ones_own() -> None:
    """Any table runs: columns c_in, history and fractional t included."""
    rows = torch.tensor([[0.5, 2, 0, 1, 0.5, 0.25, 0.0, 0], [0.25, 3, 0, 1, 0.5, 0.25, 0.125, 0]], dtype=torch.float64)
    told = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        told.append((x.clone(), t))
        return x + 1

    x = torch.ones(1, 1, dtype=torch.float64)
    got = denoise(net, x.clone(), Plan(rows))
    first = 0.5 * 1 + 0.25 * 3
    second = 0.5 * first + 0.25 * (3 * first + 1) + 0.125 * 3
    assert float(got) == second and [float(x) for x, _ in told] == [2.0, 3 * first]
    assert [float(t) for _, t in told] == [0.5, 0.25] and told[0][1].dtype == torch.float32


ABAR = np.cumprod(1 - SCHEDULES["cosine"])


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: Plan(torch.zeros(3, 7)), ValueError, r"rows must have shape \[S, 8\]"),
        (lambda: Plan(torch.zeros(0, 8)), ValueError, "S >= 1"),
        (lambda: Plan(torch.full((2, 8), float("inf"))), ValueError, "row 0 has t = inf"),
        (lambda: Plan(torch.zeros(2, 8), clip=-1), ValueError, "clip must be positive or None"),
        (
            lambda: make_plan("ddpm", ABAR, options="clip"),
            TypeError,
            "sampler_options must be a dictionary, got 'clip'",
        ),
        (lambda: Plan(None), TypeError, "rows must be a table of numbers, got None"),
        (lambda: Plan("abc"), TypeError, "rows must be a table of numbers"),
        (lambda: Plan(torch.zeros(2, 8, dtype=torch.complex64)), TypeError, "rows must be a table of numbers"),
        (lambda: Plan([[10**400] * 8]), TypeError, "rows must be a table of numbers"),
        (lambda: Plan(torch.zeros(2, 8)).timesteps("nowhere"), ValueError, "device must be one such as"),
        (lambda: Plan(torch.zeros(2, 8), clip="a"), TypeError, "clip must be a finite number"),
        (lambda: Plan(torch.zeros(2, 8)).column("sigma"), ValueError, "name must be one of t, c_in"),
        (lambda: make_plan("ddim2", ABAR), ValueError, "sampler must be a Plan or one of " + ", ".join(SAMPLERS)),
        (lambda: make_plan("ddpm", ABAR, num_steps=0), ValueError, r"num_steps must be an integer in \[1, 40\]"),
        (
            lambda: make_plan("ddpm", ABAR, options={"variance": "learned"}),
            ValueError,
            "variance must be one of",
        ),
        (lambda: make_plan("ddpm", ABAR, options={"eta": 0}), TypeError, "sampler_options: 'ddpm' has no option 'eta'"),
    ],
)
def test_bad_input(call, kind, text) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_columns() -> None:
    plan = make_plan("ddpm", ABAR)
    assert len(plan) == 40 and [plan.column(c).shape for c in COLUMNS] == [torch.Size([40])] * 8
    assert plan.timesteps("cpu").tolist() == list(reversed(range(40)))


def test_a_time_beyond_64_bits_stays_a_number() -> None:
    rows = torch.zeros(1, 8)
    rows[0, 0] = 1e30
    assert Plan(rows).timesteps("cpu").tolist() == [pytest.approx(1e30)]
