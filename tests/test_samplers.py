"""Plans against textbook loops, and the plan itself."""

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import NormalData

from ddpm_fast import Plan, generate_cosine_schedule, generate_linear_schedule, ops
from ddpm_fast.engine import denoise
from ddpm_fast.reference import samplers as loops
from ddpm_fast.samplers import COLUMNS, SAMPLERS, make_plan
from ddpm_fast.samplers.steps import sigma_of, steps_of, time_at

SHAPE = (2, 3, 4, 4)
SCHEDULES = {"linear": generate_linear_schedule(1000, 1e-4, 0.02), "cosine": generate_cosine_schedule(40)}


def network(x: Tensor, t: Tensor | int) -> Tensor:
    """Non-linear, bounded, different at each timestep; a real one as the engine tells it, in float32."""
    time = t.view(-1, 1, 1, 1) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float32)
    return torch.tanh(0.8 * x + 0.1 * torch.sin(time.to(x.dtype)))


def with_variance(x: Tensor, t: Tensor | int) -> Tensor:
    """And says where between its bounds the variance lies, beyond them, too."""
    return torch.cat([network(x, t), 1.5 * torch.cos(3 * x)], dim=1)


class Recorded:
    """Replays one list of normals to both loops, through torch.randn."""

    def __init__(self, n: int, shape: tuple[int, ...]):
        self.noise = [torch.randn(shape, dtype=torch.float64) for _ in range(n)]

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        numbers = iter(self.noise)
        monkeypatch.setattr(torch, "randn", lambda shape, dtype, device: next(numbers).to(dtype))


# sampler, its options, those that its textbook loop has, too
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "ddpm beta": ("ddpm", {}, ()),
    "ddpm posterior": ("ddpm", {"variance": "posterior"}, ("variance",)),
    "ddpm between": ("ddpm", {"variance": 0.3}, ("variance",)),
    "ddpm learned": ("ddpm", {"variance": "learned"}, ("variance",)),
    "ddim": ("ddim", {}, ()),
    "ddim eta": ("ddim", {"eta": 0.5}, ("eta",)),
    "euler": ("euler", {}, ()),
    "ancestral_euler": ("ancestral_euler", {}, ()),
    "ancestral_euler half": ("ancestral_euler", {"eta": 0.5}, ("eta",)),
    "heun": ("heun", {}, ()),
    "heun churn": (
        "heun",
        {"s_churn": 2.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.007},
        ("s_churn", "s_tmin", "s_tmax", "s_noise"),
    ),
    "dpmpp_2m": ("dpmpp_2m", {}, ()),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, ()),
    "dpmpp_2m_sde half": ("dpmpp_2m_sde", {"eta": 0.5}, ("eta",)),
}
LOOPS = {
    "ddpm": loops.ddpm_loop,
    "ddim": loops.ddim_loop,
    "euler": loops.euler_loop,
    "ancestral_euler": partial(loops.euler_loop, eta=1.0),
    "heun": loops.heun_loop,
    "dpmpp_2m": loops.dpmpp_2m_loop,
    "dpmpp_2m_sde": loops.dpmpp_2m_sde_loop,
}


def both(
    monkeypatch, case, betas, dtype, num_steps, *, spacing="linspace", final="clean", images=2, **common
) -> list[Tensor]:
    """[plan through the engine, textbook loop, the loop in float64], from the same noise."""
    name, options, shared = CASES[case]
    abar = np.cumprod(1 - betas)
    prediction, clip = common.get("prediction", "eps"), common.get("clip", False)
    plan = make_plan(name, abar, prediction, num_steps, options | {"spacing": spacing, "final": final, "clip": clip})
    t, level, after = steps_of(abar, num_steps, spacing, final)
    # The noise of row k is that of a step: its own, or in Heun's correction that before the next one.
    noisy, steps = (plan.column("c_z") != 0).nonzero()[:, 0].tolist(), len(t)
    shape = (images, *SHAPE[1:])
    numbers = [torch.zeros(shape, dtype=torch.float64) for _ in range(steps + 1)]
    drawn = Recorded(len(noisy), shape)
    for row, z in zip(noisy, drawn.noise, strict=True):
        numbers[row if name != "heun" else row // 2 + 1] = z
    x_T = torch.randn(shape, dtype=torch.float64)
    more = {name: options[name] for name in shared} | common
    if name == "heun":
        more["time_at"] = lambda sigma: float(time_at(abar, np.array(sigma)))
    levels = [*level.tolist(), after[-1]]
    found, net = [], with_variance if options.get("variance") == "learned" else network
    for kind in (dtype, torch.float64):
        z = [v.to(kind) for v in numbers]
        found.append(LOOPS[name](net, x_T.to(kind), t.tolist(), levels, z, **more))
    with monkeypatch.context() as m:
        drawn.patch(m)
        got = denoise(net, x_T.to(dtype).clone(), plan)
    return [got, *found]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("clip", [False, True])
def test_against_the_textbook(monkeypatch, case, schedule, prediction, clip) -> None:
    """Every spacing and end, some and all steps."""
    whole = 40 if schedule == "cosine" else 60  # steps that Karras' levels are still apart for
    for spacing, final, num_steps in (
        ("linspace", "clean", whole), ("linspace", "clean", 1), ("linspace", "first", 7), ("leading", "clean", 10),
        ("trailing", "first", 10), ("quadratic", "clean", 10), ("logsnr", "first", 10), ("karras", "clean", 13),
        ([3, 5, 4], "clean", None),
    ):  # fmt: skip
        options = {"prediction": prediction, "clip": clip, "spacing": spacing, "final": final}
        got, _, exact = both(monkeypatch, case, SCHEDULES[schedule], torch.float64, num_steps, **options)
        error = float((got - exact).abs().max()) / max(1, float(exact.abs().max()))
        assert error <= 1e-10, f"{spacing}, {final}, {num_steps}: {error}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clip", [False, True])
def test_float32_is_as_close_to_float64_as_the_textbook_loop(monkeypatch, case: str, clip: bool) -> None:
    options = {"spacing": "karras", "clip": clip, "images": 64}  # the largest error of few numbers is a matter of luck
    got, loop, exact = both(monkeypatch, case, SCHEDULES["linear"], torch.float32, 50, **options)
    ours, theirs = (float((v.double() - exact).abs().max() / exact.abs().max()) for v in (got, loop))
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps


ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
@pytest.mark.parametrize("sampler", ORDERS)
def test_order_of_convergence(sampler: str, spacing: str) -> None:
    """Data that are normal, where the flow's solution is known: twice the steps, half or a quarter of the error."""
    abar = np.cumprod(1 - SCHEDULES["linear"])
    data, errors = NormalData(abar), []
    x_T = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1)
    for num_steps in (40, 80, 160):
        plan = make_plan(sampler, abar, "x0", num_steps, {"spacing": spacing, "final": "first"})
        errors.append(float((denoise(data.x0_hat, x_T.clone(), plan) - data.flow(x_T)).abs().max()))
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(abs(order - ORDERS[sampler]) < 0.35 for order in orders), (errors, orders)


def test_spacings() -> None:
    """By hand, and for all steps every timestep once."""
    abar = np.cumprod(1 - generate_linear_schedule(1000, 1e-4, 0.02))
    expected = {
        "linspace": [999, 749, 500, 250, 0],
        "leading": [800, 600, 400, 200, 0],
        "trailing": [999, 799, 599, 399, 199],
        "quadratic": [800, 450, 200, 50, 0],
    }
    for spacing, times in expected.items():
        assert steps_of(abar, 5, spacing).t.tolist() == times
        if spacing != "quadratic":
            assert steps_of(abar, None, spacing).t.tolist() == list(range(999, -1, -1))
    assert (
        steps_of(abar, None, [10, 15, 20]).t.tolist()[:20] == spread(667, 999, 20)
        and len(steps_of(abar, 45, [10, 15, 20]).t) == 45
    )
    for spacing in ("logsnr", "karras"):
        t, level, after = steps_of(abar, 5, spacing, "first")
        power = (lambda s: s ** (1 / 7)) if spacing == "karras" else np.log
        gaps = np.diff(power(sigma_of(level)))
        assert np.allclose(gaps, gaps[0], rtol=1e-9) and np.allclose(t[[0, -1]], [999, 0]) and after[-1] == abar[0]
        assert np.array_equal(level[1:], after[:-1])


def spread(first: int, last: int, n: int) -> list[int]:
    """As improved-diffusion respaces a part: fractional strides, rounded."""
    return [first + round(i * (last - first) / (n - 1)) for i in range(n)][::-1]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "logsnr", "karras"])
def test_from_pure_noise(sampler: str, prediction: str, spacing: str) -> None:
    """beta = 1 at the last timestep: nothing is left of the image there, and no number becomes infinite."""
    abar = np.append(np.cumprod(1 - SCHEDULES["linear"])[:-1], 0.0)
    options = {"variance": "posterior"} if sampler == "ddpm" else {}  # "beta" has more noise
    plan = make_plan(sampler, abar, prediction, 5, {"spacing": spacing} | options)
    assert plan.rows.isfinite().all() and plan.column("t")[0] == 999 and len(plan) == (5 if sampler != "heun" else 8)
    # The first step is that to the posterior of an image and noise that aren't related.
    first, a = plan.rows[0], steps_of(abar, 5, spacing).abar_next[0] ** 0.5
    assert first[4] ** 2 + first[7] ** 2 == pytest.approx(1 - a**2) and first[5] == pytest.approx(a)
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert denoise(network, x, plan, ops.NoiseState.at(0, 0)).isfinite().all()
    with pytest.raises(ValueError, match="prediction 'eps' says nothing of the image"):
        make_plan(sampler, abar, "eps", 5, {"spacing": spacing})


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
        (lambda: make_plan("DPM++_2M", ABAR), ValueError, "adaptive; got .*: did you mean 'dpmpp_2m'"),
        (lambda: make_plan("adaptive", ABAR), ValueError, "'adaptive' has no plan: only sample"),
        (lambda: make_plan("ddim", 1 - ABAR), ValueError, "alphas_cumprod must fall .* np.cumprod"),
        (
            lambda: make_plan("ddim", ABAR[:, None]),
            ValueError,
            r"alphas_cumprod must fall from .*, \[T\]",
        ),
        (lambda: make_plan("ddpm", ABAR, num_steps=0), ValueError, r"num_steps must be an integer in \[1, 40\]"),
        (
            lambda: make_plan("ddpm", ABAR, options={"variance": "large"}),
            ValueError,
            "variance must be one of",
        ),
        (lambda: make_plan("heun", ABAR, options={"s_tmax": "foo"}), TypeError, "s_tmax must be a finite number"),
        (lambda: make_plan("heun", ABAR, options={"s_tmin": 2, "s_tmax": 1}), ValueError, "s_tmax must be"),
        (
            lambda: make_plan("ddim", ABAR, options={"spacing": 20.0}),
            TypeError,
            "spacing must be one of linspace, .*got 20",
        ),
        (
            lambda: make_plan("ddim", ABAR, num_steps=7, options={"spacing": [3, 3]}),
            ValueError,
            "takes 6 steps, num_steps is 7",
        ),
        (lambda: make_plan("ddpm", ABAR, options={"eta": 0}), TypeError, "sampler_options: 'ddpm' has no option 'eta'"),
    ],
)
def test_bad_input(call, kind, text) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_heun_warns_of_steps_that_are_too_long() -> None:
    with pytest.warns(UserWarning, match="heun: sigma falls to .* of itself in a step"):
        make_plan("heun", ABAR, num_steps=5, options={"spacing": "linspace"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plan("heun", ABAR, num_steps=20)
        make_plan("heun", np.cumprod(1 - SCHEDULES["linear"]), num_steps=10, options={"spacing": "karras"})


def test_a_plan_says_what_it_is() -> None:
    plan = make_plan("ddpm", ABAR, options={"variance": "learned", "clip": True}).guided(2.0)
    assert repr(plan) == "Plan(40 rows, t 39 to 0, clip=1, learned variance, guided)"


def test_columns() -> None:
    plan = make_plan("ddpm", ABAR)
    assert len(plan) == 40 and [plan.column(c).shape for c in COLUMNS] == [torch.Size([40])] * 8
    assert plan.timesteps("cpu").tolist() == list(reversed(range(40)))


def test_a_time_beyond_64_bits_stays_a_number() -> None:
    rows = torch.zeros(1, 8)
    rows[0, 0] = 1e30
    assert Plan(rows).timesteps("cpu").tolist() == [pytest.approx(1e30)]
