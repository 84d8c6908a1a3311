"""Steps as long as the error allows, against the textbook loop, a known solution and single images."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import BETAS, NormalData, pixelwise

from ddpm_fast import Diffusion, UNet, generate_cosine_schedule, generate_linear_schedule, ops
from ddpm_fast.adaptive import adaptive
from ddpm_fast.reference.samplers import dpm_adaptive_loop
from ddpm_fast.samplers.steps import time_at

ABARS = {
    "linear": np.cumprod(1 - generate_linear_schedule(1000, 1e-4, 0.02)),
    "cosine": np.cumprod(1 - generate_cosine_schedule(40)),
}
ABAR = ABARS["linear"]
GAINS = torch.tensor([0.2, 0.5, 0.8, 1.1, 1.4], dtype=torch.float64)  # a network of its own for each image
PURE = np.append(ABAR[:-1], 0.0)


def predict(x: Tensor, t: Tensor | float, gain: Tensor) -> Tensor:
    """Non-linear, bounded, different at each timestep, told as a float32."""
    time = torch.as_tensor(t, dtype=torch.float32).to(x.dtype)
    shape = (-1, *[1] * (x.ndim - 1))
    return torch.tanh(gain.to(x.dtype).view(shape) * x + 0.3 * torch.sin(0.01 * time.view(shape)))


class Network:
    """What `adaptive` calls; remembers of each call the images, the timesteps and its x."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], list[float]]] = []

    def __call__(self, x: Tensor, t: Tensor, places: Tensor) -> Tensor:
        assert t.dtype == torch.float32 and places.dtype == torch.int64 and len(x) == len(t) == len(places)
        self.seen.append((places.tolist(), t.tolist()))
        return predict(x, t, GAINS[places % 5])

    def calls(self, place: int) -> int:
        return sum(place in places for places, _ in self.seen)


def textbook(x: Tensor, abar: np.ndarray, final: str = "clean", **options: Any) -> Tensor:
    levels = [float(abar[-1]), float(abar[0])] + [1.0] * (final == "clean")

    def one(i: int) -> Tensor:
        def network(x: Tensor, t: float) -> Tensor:
            return predict(x, t, GAINS[i % 5 : i % 5 + 1])

        return dpm_adaptive_loop(network, x[i : i + 1], levels, time_at=lambda s: float(time_at(abar, s)), **options)

    return torch.cat([one(i) for i in range(len(x))])


@pytest.mark.parametrize("schedule", ABARS)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("clip", [False, True])
def test_against_the_textbook(schedule: str, prediction: str, clip: bool) -> None:
    x_T = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    for more in ({}, {"final": "first", "rtol": 0.01, "atol": 0.001}, {"first_step": 20.0, "safety": 0.7}):
        options = {"prediction": prediction, "clip": clip} | more
        got, exact = adaptive(Network(), x_T, ABARS[schedule], **options), textbook(x_T, ABARS[schedule], **options)
        assert float((got - exact).abs().max()) <= 1e-10 * max(1, float(exact.abs().max())), more


@pytest.mark.parametrize("clip", [False, True])
def test_float32_is_as_close_to_float64_as_the_textbook_loop(clip: bool) -> None:
    x_T = torch.randn(40, 3, 4, 4, dtype=torch.float64)
    exact = textbook(x_T.float().double(), ABAR, clip=clip)
    results = adaptive(Network(), x_T.float(), ABAR, clip=clip), textbook(x_T.float(), ABAR, clip=clip)
    ours, theirs = (float((v.double() - exact).abs().max() / exact.abs().max()) for v in results)
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps


def test_smaller_errors_for_more_calls() -> None:
    """Where the solution is known. The estimate is the error of a step of first order, h^2: a hundredth of it takes
    steps a tenth as long, and leaves second order a hundredth of its error.
    """
    data, x_T = NormalData(ABAR), torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1)
    errors, calls = [], []
    for tolerance in (1e-1, 1e-3, 1e-5):
        count = Network()

        def network(x: Tensor, t: Tensor, places: Tensor, count: Network = count) -> Tensor:
            count(x, t, places)
            return data.x0_hat(x, t)

        got = adaptive(network, x_T, ABAR, "x0", rtol=tolerance, atol=tolerance / 10, final="first", max_calls=9999)
        errors.append(float((got - data.flow(x_T)).abs().max()))
        calls.append(len(count.seen))
    assert all(errors[i + 1] < errors[i] / 50 and 5 < calls[i + 1] / calls[i] < 20 for i in range(2)), (errors, calls)


def test_an_image_depends_on_itself_alone() -> None:
    """Each goes its own way, and is left out once it has arrived."""
    x_T, together = torch.randn(5, 3, 4, 4), Network()
    images = adaptive(together, x_T, ABAR, rtol=0.01)
    counts = set()
    for i in range(5):
        alone = Network()

        def network(x: Tensor, t: Tensor, places: Tensor, i: int = i, alone: Network = alone) -> Tensor:
            return alone(x, t, places + i)

        assert torch.equal(adaptive(network, x_T[i : i + 1], ABAR, rtol=0.01)[0], images[i])
        times = [t[places.index(i)] for places, t in together.seen if i in places]
        assert times == [t[0] for _, t in alone.seen] and times[0] == 999 and times[-1] == 0
        counts.add(len(times))
    assert len(counts) > 1 and together.seen[-1][0] == [0, 1, 2, 3, 4]
    # Nor is it refused for the calls of others, whose steps fall between its own.
    assert len(together.seen) > max(counts)
    assert torch.equal(adaptive(Network(), x_T, ABAR, rtol=0.01, max_calls=max(counts)), images)


def test_a_refused_step_asks_the_network_once() -> None:
    network = Network()
    adaptive(network, torch.randn(1, 2, 3, 3), ABAR, first_step=20.0)
    times = [t[0] for _, t in network.seen]
    assert times[0] == 999 and times.count(999) == 1
    # At first the middles of steps each shorter than the one before: nearer to where the image stands.
    assert times[1] < times[2] < times[3]


def test_from_pure_noise() -> None:
    """The first step goes to the last level with an image, as it is that of an x0_hat which stays."""
    x_T = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    for prediction in ("x0", "v"):
        network = Network()
        got = adaptive(network, x_T, PURE, prediction)
        assert network.seen[0] == ([0, 1, 2, 3, 4], [999.0] * 5) and network.seen[1][1] == [998.0] * 5
        out = predict(x_T, torch.full((5,), 999.0), GAINS)
        x0_hat = out if prediction == "x0" else -out
        start = math.sqrt(PURE[-2]) * x0_hat + math.sqrt(1 - PURE[-2]) * x_T
        assert float((got - textbook(start, PURE[:-1], prediction=prediction)).abs().max()) <= 1e-10
    with pytest.raises(ValueError, match="'eps' says nothing of pure noise"):
        adaptive(Network(), x_T, PURE)


def test_one_timestep() -> None:
    x_T, network = torch.randn(2, 1, 2, 2), Network()
    assert torch.equal(adaptive(network, x_T, ABAR[:1], "x0"), predict(x_T, torch.zeros(2), GAINS[:2]))
    assert torch.equal(adaptive(network, x_T, ABAR[:1], final="first"), x_T) and len(network.seen) == 1


def test_what_on_step_is_told() -> None:
    x_T, seen = torch.randn(3, 1, 2, 2), []
    given = x_T.clone()
    images = adaptive(Network(), x_T, ABAR, on_step=lambda share, x: seen.append((share, x.clone())))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and 0 < shares[0] < 0.02 and shares[-2:] == [1, 1]
    assert torch.equal(seen[-1][1], images) and not torch.equal(seen[-2][1], images) and torch.equal(x_T, given)


def test_it_does_not_go_on_for_ever() -> None:
    network, x_T = Network(), torch.randn(1, 1, 2, 2)
    adaptive(network, x_T, ABAR)
    needed = len(network.seen)
    adaptive(Network(), x_T, ABAR, max_calls=needed)
    text = f"image 0 .* max_calls = {needed - 1} calls .* come to timestep 0.0: allow more calls, or larger errors"
    with pytest.raises(RuntimeError, match=text):
        adaptive(network := Network(), x_T, ABAR, max_calls=needed - 1)
    assert len(network.seen) == needed - 1
    bad = torch.randn(2, 1, 2, 2)
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"image 1 is no longer finite at timestep 99"):
        adaptive(Network(), bad, ABAR)


X = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"prediction": "score"}, ValueError, "prediction must be one of eps, x0, v"),
        ({"rtol": -0.1}, ValueError, "rtol must be a finite number of at least 0"),
        ({"atol": 0}, ValueError, "atol must be positive, got 0"),
        ({"atol": "a"}, TypeError, "atol must be a finite number"),
        ({"first_step": 0.0}, ValueError, "first_step must be positive"),
        ({"safety": 1.1}, ValueError, r"safety must be a finite number in \[0, 1\]"),
        ({"safety": 0.0}, ValueError, "safety must be positive"),
        ({"clip": 1}, TypeError, "clip must be True or False"),
        ({"final": "last"}, ValueError, "final must be one of clean, first"),
        ({"max_calls": 0}, ValueError, "max_calls must be an integer of at least 1"),
        ({"x": torch.zeros(3)}, ValueError, r"x must have shape \[N, ...\]"),
        ({"x": torch.zeros(1, 2).long()}, TypeError, "x must be a floating point tensor"),
        ({"alphas_cumprod": np.zeros(1), "prediction": "v"}, ValueError, "alphas_cumprod must have a timestep"),
    ],
)
def test_bad_input(options, kind, text) -> None:
    with pytest.raises(kind, match=text):
        adaptive(Network(), **{"x": X, "alphas_cumprod": ABAR} | options)


def test_by_name() -> None:
    """What `Diffusion.sample` draws: each image its own, in parts, guided, with noise levels."""
    y = torch.tensor([0, 2, 1])
    net = UNet(1, 8, (1, 2), 1, time_emb_dim=8, num_classes=4, num_groups=4).double()
    diffusion = Diffusion(net, (8, 8), 1, 3, BETAS, label_dropout=0.1).double()
    options = {"rtol": 0.1, "clip": True}
    draw = lambda **more: diffusion.sample(  # noqa: E731
        3, "cpu", y, seed=1, sampler="adaptive", **{"sampler_options": options} | more
    )
    images = draw()
    x_T = ops.noise((3, 1, 8, 8), ops.NoiseState.at(1, 0), ops.X_T, dtype=torch.float64)
    model = diffusion.ema_model.eval()
    abar = np.cumprod(1 - BETAS)
    expected = adaptive(lambda x, t, i: model(x, t, y[i]), x_T, abar, **options)
    torch.testing.assert_close(images, expected)
    one = diffusion.sample(1, "cpu", y[2:], seed=1, first_index=2, sampler="adaptive", sampler_options=options)
    torch.testing.assert_close(one, images[2:])
    null = torch.full((3,), 3)

    def guided(x: Tensor, t: Tensor, i: Tensor) -> Tensor:
        return 2 * model(x, t, y[i]) - model(x, t, null[i])

    torch.testing.assert_close(draw(guidance=2.0), adaptive(guided, x_T, abar, **options))
    steps: list[int] = []
    sequence = diffusion.sample_diffusion_sequence(3, "cpu", y, seed=1, sampler="adaptive", sampler_options=options)
    draw(callback=lambda k, x: steps.append(k))
    assert torch.equal(sequence[-1], images) and steps == list(range(len(sequence) - 1))
    told: list[Tensor] = []
    levels = Diffusion(net, (8, 8), 1, 3, BETAS, time_input="noise_level").double()
    levels.ema_model.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    levels.sample(3, "cpu", y, seed=1, sampler="adaptive")
    for found, level in ((told[0], abar[-1]), (told[-1], abar[0])):
        assert found.tolist() == pytest.approx([level**0.5] * 3)


def test_progress_of_a_chain_without_a_number_of_steps(capsys) -> None:
    pixelwise().sample(2, "cpu", seed=1, sampler="adaptive", progress=True)
    assert "200/200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"num_steps": 5}, ValueError, "num_steps and corrections are for tables: 'adaptive' takes as many"),
        ({"corrections": [lambda x0, now: x0]}, ValueError, "num_steps and corrections are for tables"),
        ({"sampler_options": {"eta": 1}}, TypeError, "'adaptive' has no option 'eta'; it has rtol, atol"),
        ({"sampler_options": {"time_input": "timestep"}}, TypeError, "'adaptive' has no option 'time_input'"),
        ({"guidance": [1.0, 2.0]}, TypeError, "guidance must be a finite number"),
        ({"guidance": 2.0}, ValueError, "guidance needs y, and"),
    ],
)
def test_bad_options_by_name(options, kind, text) -> None:
    with pytest.raises(kind, match=text):
        pixelwise().sample(1, "cpu", sampler="adaptive", **options)
