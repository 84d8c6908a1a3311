"""Classifier-free guidance: label dropout in training, one call for both halves in sampling."""

from typing import Any

import numpy as np
import pytest
import torch
from recordings import network as unet
from recordings import same
from tape import Tape
from torch import Tensor, nn
from toys import BETAS, Pixelwise, pixelwise, small

from ddpm_fast import Config, Diffusion, Plan, UNet, make_plan
from ddpm_fast.reference import samplers as loops
from ddpm_fast.samplers.steps import steps_of

Y = torch.tensor([0, 2, 1, 2, 0])


class Labelled(nn.Module):
    """Non-linear in x, and different for each label; 3 is none."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.5, -0.3, 0.1, 0.0], dtype=torch.float64))
        self.calls: list[tuple[int, list[int]]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((x.shape[0], y.tolist()))
        shape = (-1, *[1] * (x.ndim - 1))
        return torch.tanh(0.8 * x + 0.1 * torch.sin(t.to(x.dtype)).view(shape) + self.shift[y].view(shape))


def labelled(**options: Any) -> Diffusion:
    return Diffusion(Labelled(), (5, 3), 2, 3, BETAS, label_dropout=0.5, **options).double()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_against_two_calls_a_step(sampler: str, prediction: str) -> None:
    """The textbook's: the network twice, w times the one plus 1 - w times the other, in the loops of the reference."""
    diffusion = labelled(prediction=prediction)
    net, scale = diffusion.ema_model, 3.0

    def guided(x: Tensor, t: int) -> Tensor:
        time = torch.full((5,), t, dtype=torch.float32)
        return scale * net(x, time, Y) + (1 - scale) * net(x, time, torch.full((5,), 3))

    x_T = torch.randn(5, 2, 5, 3, dtype=torch.float64)
    abar = np.cumprod(1 - BETAS)
    t, level, after = steps_of(abar, 8, "linspace", "clean")
    loop = {"ddim": loops.ddim_loop, "heun": loops.heun_loop, "dpmpp_2m": loops.dpmpp_2m_loop}[sampler]
    more: dict[str, Any] = {"prediction": prediction, "clip": True}
    if sampler == "heun":
        more["time_at"] = None  # without churn
    expected = loop(guided, x_T, t.tolist(), [*level.tolist(), after[-1]], [torch.zeros_like(x_T)] * 9, **more)
    options = {"clip": True, "spacing": "linspace"}
    got = diffusion.sample(
        5, "cpu", Y, sampler=sampler, num_steps=8, sampler_options=options, guidance=scale, noise=x_T
    )
    assert float((got - expected).abs().max()) <= 1e-10


def test_a_step_is_one_call_for_both_halves() -> None:
    diffusion = labelled()
    diffusion.sample(5, "cpu", Y, seed=1, guidance=2.0, num_steps=3)
    assert diffusion.ema_model.calls == [(10, [*Y.tolist(), 3, 3, 3, 3, 3])] * 3


def test_scales() -> None:
    diffusion = labelled()

    def draw(y: Tensor | None = Y, guidance: Any = None) -> Tensor:
        return diffusion.sample(5, "cpu", y, seed=1, num_steps=6, guidance=guidance)

    plain, without = draw(), draw(torch.full((5,), 3))
    assert torch.equal(draw(guidance=1), plain) and not torch.allclose(plain, without)
    assert torch.equal(draw(None), without)  # no class
    torch.testing.assert_close(draw(guidance=0.0), without)
    torch.testing.assert_close(draw(guidance=[1.0] * 5 + [1.0 + 1e-12]), plain)
    # Each row has its own: after rows without guidance the chain stands where it does without.
    seen: list[Tensor] = []
    keep = lambda k, x: seen.append(x.clone())  # noqa: E731
    diffusion.sample(5, "cpu", Y, seed=1, num_steps=6, callback=keep)
    diffusion.sample(5, "cpu", Y, seed=1, num_steps=6, callback=keep, guidance=[1, 1, 1, 4, 4, 4])
    close = [torch.allclose(a, b, atol=1e-12) for a, b in zip(seen[:6], seen[6:], strict=True)]
    assert close == [True] * 3 + [False] * 3
    assert torch.equal(draw(guidance=torch.full((6,), 2.5)), draw(guidance=2.5))
    assert torch.equal(
        torch.cat([diffusion.sample(n, "cpu", Y[f : f + n], seed=1, first_index=f, num_steps=6, guidance=2.0)
                   for f, n in ((0, 2), (2, 3))]), draw(guidance=2.0),
    )  # fmt: skip
    sequence = diffusion.sample_diffusion_sequence(5, "cpu", Y, seed=1, num_steps=6, guidance=2.0)
    assert torch.equal(sequence[-1], draw(guidance=2.0)) and len(sequence) == 7


def test_a_condition_of_ones_own() -> None:
    """Not a class: a tensor an image, with a tensor that stands for none."""
    null = torch.tensor([0.5, -0.5, 1.0])
    diffusion = Diffusion(Pixelwise(), (5, 7), 2, None, BETAS, label_dropout=0.5, null_label=null, seed=1)
    y = torch.randn(4, 3)
    guided = diffusion.sample(4, "cpu", y, seed=1, guidance=2.0)
    plain, without = diffusion.sample(4, "cpu", y, seed=1), diffusion.sample(4, "cpu", null.expand(4, 3), seed=1)
    torch.testing.assert_close(guided, 2 * plain - without)  # a linear network
    assert torch.equal(diffusion.sample(4, "cpu", seed=1), without)
    assert "null_label" not in diffusion.state_dict()


def test_remove_noise_of_ones_own_is_guided() -> None:
    class Own(Diffusion):
        def remove_noise(self, x, t, y, use_ema=True):
            return 0.9 * x + 0.01 * y.view(-1, 1, 1, 1)

    diffusion = Own(Pixelwise(), (5, 7), 2, 3, BETAS, label_dropout=0.1)
    draw = lambda **options: diffusion.sample(2, "cpu", torch.tensor([1, 2]), seed=1, **options)  # noqa: E731
    null = diffusion.sample(2, "cpu", torch.tensor([3, 3]), seed=1)
    torch.testing.assert_close(draw(guidance=2.0), 2 * draw() - null)


def recorded() -> UNet:
    return unet(num_classes=4)


@pytest.mark.parametrize("scale", [2.0, [1.0] * 6 + [3.0] * 6])
def test_recorded_steps_are_guided(tape: Tape, scale: Any) -> None:
    make = lambda engine: Diffusion(net, (8, 8), 1, 3, BETAS, engine=engine, label_dropout=0.1)  # noqa: E731
    net = recorded()
    graph, eager = make("graph"), make("eager")
    for y in (torch.tensor([0, 2]), torch.tensor([1, 1])):
        same(graph, eager, y=y, seed=3, guidance=scale)
        same(graph, eager, y=y, seed=4, guidance=scale if isinstance(scale, list) else 1.5)
    assert len(graph.graphs) == 1
    same(graph, eager, y=torch.tensor([0, 2]), seed=3)
    assert len(graph.graphs) == 2


@pytest.mark.parametrize("scale", [None, 2.0])
def test_recorded_steps_with_a_learned_variance_and_an_image(tape: Tape, scale: float | None) -> None:
    net = UNet(3, 8, (1, 2), 1, time_emb_dim=8, num_classes=4, num_groups=4, out_channels=2)
    options: dict[str, Any] = {"label_dropout": 0.1, "learned_variance": True, "cond_channels": 2}
    make = lambda engine: Diffusion(net, (8, 8), 1, 3, BETAS, engine=engine, **options)  # noqa: E731
    graph, eager = make("graph"), make("eager")
    for k in range(2):
        cond, y = torch.randn(2, 2, 8, 8), torch.tensor([k, 2])
        same(graph, eager, y=y, cond=cond, seed=k, guidance=scale)
        same(graph, eager, y=y, cond=cond, seed=k, guidance=scale, sampler="ddim", num_steps=9)
    assert len(graph.graphs) == 2  # ddim leaves the variance out


def test_label_dropout_in_training() -> None:
    """A share of the images, each by its own random number: in any batch, in a second run again, not in eval mode."""
    net = Labelled()
    diffusion = Diffusion(net, (5, 3), 2, 3, BETAS, label_dropout=0.3, seed=7).train()
    x, y = torch.randn(2000, 2, 5, 3), torch.arange(2000) % 3
    diffusion(x, y)
    seen = torch.tensor(net.calls[-1][1])
    dropped = seen == 3
    assert 0.27 < dropped.double().mean() < 0.33 and torch.equal(seen[~dropped], y[~dropped])
    diffusion(x, y)
    assert not torch.equal(torch.tensor(net.calls[-1][1]), seen)  # another call
    again = Diffusion(net, (5, 3), 2, 3, BETAS, label_dropout=0.3, seed=7).train()
    again(x[:50], y[:50])
    assert net.calls[-1][1] == seen[:50].tolist()
    again.eval()(x[:50], y[:50])
    assert net.calls[-1][1] == y[:50].tolist()
    diffusion = Diffusion(net, (5, 3), 2, 3, BETAS, label_dropout=0.3, rng="torch").train()
    diffusion(x, y)
    assert 0.27 < (torch.tensor(net.calls[-1][1]) == 3).double().mean() < 0.33
    everything = Diffusion(net, (5, 3), 2, 3, BETAS, label_dropout=1.0).train()
    everything(x[:50], y[:50])
    assert net.calls[-1][1] == [3] * 50


def test_the_null_class_learns() -> None:
    diffusion = Diffusion(UNet(1, 8, (1, 2), 1, time_emb_dim=8, num_classes=4, num_groups=4), (8, 8), 1, 3, BETAS,
                          label_dropout=0.5, seed=1).train()  # fmt: skip
    diffusion(torch.randn(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64)).backward()
    grad = diffusion.model.downs[0].class_bias.weight.grad
    assert grad[[0, 3]].abs().sum(1).min() > 0 and grad[[1, 2]].abs().max() == 0


def test_config() -> None:
    config = Config(
        img_size=(8, 8), base_channels=8, channel_mults=(1, 2), num_groups=4, num_classes=3, label_dropout=0.1
    )
    diffusion = Diffusion.from_config(config)
    assert diffusion.model.num_classes == 4 and diffusion.null_label == 3 and diffusion.num_classes == 3
    assert Config.from_dict(config.to_dict()) == config


Y3 = torch.zeros(2, 3)
PLAN = make_plan("ddim", np.cumprod(1 - BETAS), num_steps=4)
ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "no null label": (
        lambda: small(3).sample(2, "cpu", Y[:2], guidance=2.0), ValueError, "guidance needs y, and .* label_d"
    ),
    "no labels": (
        lambda: pixelwise(null_label=torch.zeros(3)).sample(2, "cpu", Y3, guidance=[1.0]),
        ValueError, "guidance must be one .* 12 rows"
    ),
    "wrong length": (lambda: PLAN.guided([1.0, 2.0]), ValueError, "guidance must be one finite .* 4 rows"),
    "not finite": (lambda: PLAN.guided(float("nan")), ValueError, "guidance must be a finite number"),
    "words": (lambda: PLAN.guided("strong"), TypeError, "guidance must be"),
    "a class too few": (
        lambda: small(3, label_dropout=0.1), ValueError, "null_label 3 is no class of the network, which has 3: build"
    ),
    "nothing to drop": (lambda: pixelwise(label_dropout=0.1), ValueError, "label_dropout needs num_classes, or"),
    "a share": (lambda: small(3, label_dropout=1.5), ValueError, r"label_dropout must be a finite number in \[0, 1\]"),
    "config": (lambda: Config(label_dropout=0.1), ValueError, "label_dropout needs num_classes"),
    "a plan's": (lambda: Plan(PLAN.rows, guidance=torch.ones(3)), ValueError, "guidance must be one finite number"),
    "y forgotten": (
        lambda: pixelwise(null_label=torch.zeros(3)).sample(2, "cpu", guidance=2.0), ValueError, "guidance needs y: w"
    ),
    "y of another shape": (
        lambda: pixelwise(null_label=torch.zeros(4)).sample(2, "cpu", Y3), ValueError, r"y must be like null_label"
    ),
    "y of another kind": (
        lambda: pixelwise(null_label=torch.zeros(3)).sample(2, "cpu", Y3.long()), TypeError, "y must be like null_label"
    ),
    "y of more dimensions": (
        lambda: pixelwise(null_label=0)(torch.zeros(2, 2, 5, 7), Y3), ValueError, "or null_label be a tensor"
    ),
    "too few": (
        lambda: pixelwise(null_label=torch.zeros(3)).sample(3, "cpu", Y3), ValueError, r"y must have shape \[3, 3\]"
    ),
    "y in training": (
        lambda: pixelwise(null_label=torch.zeros(3))(torch.zeros(2, 2, 5, 7)), ValueError, r"y is required: \[2, ...\]"
    ),
    "an own null class": (
        lambda: Diffusion(Labelled(), (5, 3), 2, 4, BETAS, label_dropout=0.1), ValueError, "or give Diffusion num_.*=3"
    ),
    "levels": (lambda: Plan(PLAN.rows, abar=torch.ones(3)), ValueError, "abar must be one finite number"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_input(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()
