"""What changes x0_hat outside of the table: dynamic thresholding and the gradient of a classifier."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tape import Tape
from torch import Tensor, nn
from toys import BETAS, Pixelwise, pixelwise, small

from ddpm_fast import Diffusion, Plan, classifier_guidance, dynamic_threshold, make_plan, sample
from ddpm_fast.chain import Now
from ddpm_fast.reference import samplers as loops
from ddpm_fast.samplers.steps import steps_of
from ddpm_fast.schedules import zero_terminal_snr

ABAR = np.cumprod(1 - BETAS)
NOWHERE = Now(torch.zeros(2, 3), torch.zeros(2), (), None, None)


def threshold(x0: Tensor, ratio: float) -> Tensor:
    """An image at a time, by numpy's quantile."""
    images = []
    for image in x0:
        q = max(1.0, float(np.quantile(image.abs().numpy(), ratio)))
        images.append(image.clamp(-q, q) / q)
    return torch.stack(images)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (4, 2, 5, 7)])
def test_dynamic_threshold(ratio: float, shape: tuple[int, ...]) -> None:
    x0 = torch.randn(shape, dtype=torch.float64) * torch.tensor([0.3, 2.0, 5.0, 1.0])[: shape[0]].view(
        -1, *[1] * (len(shape) - 1)
    )
    torch.testing.assert_close(dynamic_threshold(ratio)(x0, NOWHERE), threshold(x0, ratio), rtol=1e-13, atol=1e-13)


def test_largest_threshold() -> None:
    x0 = torch.tensor([[4.0, -8.0], [0.5, 0.25]])
    assert torch.equal(dynamic_threshold(1.0, largest=2.0)(x0, NOWHERE), torch.tensor([[1.0, -1.0], [0.5, 0.25]]))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_in_the_textbook_loops(monkeypatch, sampler: str, prediction: str) -> None:
    """The loops with the corrected x0 where theirs is clipped."""
    net = lambda x, t: 2 * torch.tanh(2 * x + 0.1 * torch.as_tensor(t).double().view(-1, 1))  # noqa: E731
    x_T = 2 * torch.randn(4, 30, dtype=torch.float64)
    plan = make_plan(sampler, ABAR, prediction, 9, {"spacing": "linspace"})
    got = sample(net, x_T, plan, corrections=[dynamic_threshold(0.9)])
    plain = loops.x0_of

    def corrected(prediction: str, x: Tensor, out: Tensor, abar: float, clip: bool) -> Tensor:
        return threshold(plain(prediction, x, out, abar, False), 0.9)

    monkeypatch.setattr(loops, "x0_of", corrected)
    t, level, after = steps_of(ABAR, 9, "linspace", "clean")
    loop = {"ddim": loops.ddim_loop, "heun": loops.heun_loop, "dpmpp_2m": loops.dpmpp_2m_loop}[sampler]
    more: dict[str, Any] = {"time_at": None} if sampler == "heun" else {}
    levels = [*level.tolist(), after[-1]]
    expected = loop(net, x_T, t.tolist(), levels, [torch.zeros(())] * 10, prediction=prediction, **more)
    assert float((got - expected).abs().max()) <= 1e-10
    assert not torch.allclose(got, sample(net, x_T, plan), atol=1e-3)


MEANS = torch.tensor([-0.6, 0.2, 0.9], dtype=torch.float64)  # of three classes, as likely; each of this deviation
DEVIATION = 0.15


def mixture(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the mixture: log p(x_t, y) [N, 3, D] up to a constant, E[x_0 | x_t, y] likewise, and the level."""
    abar = torch.from_numpy(ABAR)[t.long()].view(-1, 1, 1)
    a, variance = abar.sqrt(), abar * DEVIATION**2 + 1 - abar
    mean = MEANS.view(1, 3, 1)
    off = x[:, None] - a * mean
    return -(off**2) / (2 * variance), mean + a * DEVIATION**2 / variance * off, abar


def unconditional(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    log_p, x0, _ = mixture(x, t)
    return (log_p.softmax(1) * x0).sum(1)


def log_classifier(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    log_p, _, _ = mixture(x, t)
    chosen: Tensor = log_p.log_softmax(1)[torch.arange(len(y)), y]
    return chosen.sum(1)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_exact_classifier_gives_the_conditional_model(prediction: str) -> None:
    """Bayes' rule: E[x_0 | x_t, y] = E[x_0 | x_t] + s^2 / a grad log p(y | x_t), in every step of a chain."""
    y = torch.tensor([0, 1, 2, 2, 0])

    def said(x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 as the network would predict it."""
        abar = torch.from_numpy(ABAR)[t.long()].view(-1, 1)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        eps = (x - a * x0) / s
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0}[prediction]

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return said(mixture(x, t)[1][torch.arange(5), y], x, t)

    x_T = torch.randn(5, 8, dtype=torch.float64)
    plan = make_plan("ddim", ABAR, prediction)
    expected = sample(conditional, x_T, plan)
    guide = classifier_guidance(log_classifier)
    got = sample(lambda x, t, y: said(unconditional(x, t), x, t), x_T, plan, y, corrections=[guide])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (got - MEANS[y].view(-1, 1)).abs().max() < 4 * DEVIATION
    doubled = sample(
        lambda x, t, y: said(unconditional(x, t), x, t), x_T, plan, y,
        corrections=[classifier_guidance(log_classifier, 0.5)] * 2,
    )  # fmt: skip
    torch.testing.assert_close(doubled, expected, rtol=1e-9, atol=1e-9)


def test_of_a_diffusion() -> None:
    """In parts as in one batch, with the labels of each part; under inference mode; with noise levels."""
    y = torch.tensor([0, 1, 2, 2, 0])
    asked: list[tuple[list[int], Tensor]] = []

    def pull(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        asked.append((y.tolist(), t))
        return -((x - y.view(-1, 1, 1, 1)) ** 2).flatten(1).sum(1) / 2

    diffusion = pixelwise()
    draw = lambda part, **options: diffusion.sample(  # noqa: E731
        part.stop - part.start, "cpu", y[part], seed=1, first_index=part.start, corrections=[classifier_guidance(pull)],
        **options,
    )  # fmt: skip
    whole = draw(slice(0, 5))
    assert asked[0][0] == y.tolist() and asked[0][1].tolist() == [11] * 5 and asked[-1][1].tolist() == [0] * 5
    assert torch.equal(torch.cat([draw(slice(0, 2)), draw(slice(2, 5))]), whole)
    with torch.inference_mode():
        assert torch.equal(draw(slice(0, 5)), whole)
    assert not torch.allclose(whole, diffusion.sample(5, "cpu", y, seed=1))
    guided = Diffusion(Pixelwise(), (5, 7), 2, None, BETAS, null_label=torch.tensor(0.0))
    both = guided.sample(2, "cpu", torch.ones(2), seed=1, guidance=2.0, corrections=[classifier_guidance(pull)])
    assert asked[-1][0] == [1.0, 1.0] and both.isfinite().all()  # without the half that has no condition


class NoLabels(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x


@pytest.mark.parametrize("net", [NoLabels(), None], ids=["own", "unet"])
def test_the_labels_of_a_network_without_classes_are_the_classifier_s(net: nn.Module | None) -> None:
    diffusion = small() if net is None else Diffusion(net, (8, 8), 1, None, BETAS)
    guide = classifier_guidance(lambda x, t, y: -((x - y.view(-1, 1, 1, 1)) ** 2).flatten(1).sum(1))
    y = torch.tensor([0, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guided = diffusion.sample(2, "cpu", y, seed=1, corrections=guide)
        plain = diffusion.sample(2, "cpu", seed=1)
    assert not torch.allclose(guided, plain)
    with pytest.warns(UserWarning, match="y is ignored"):
        assert torch.equal(diffusion.sample(2, "cpu", y, seed=1), plain)


def test_from_pure_noise() -> None:
    """Where x_T holds nothing of the image, a classifier moves nothing."""
    betas = zero_terminal_snr(BETAS)
    pull = classifier_guidance(lambda x, t: -(x**2).flatten(1).sum(1))
    for prediction in ("x0", "v"):
        diffusion = Diffusion(Pixelwise(), (5, 7), 2, None, betas, prediction=prediction)
        guided = diffusion.sample_diffusion_sequence(2, "cpu", seed=1, corrections=pull)
        plain = diffusion.sample_diffusion_sequence(2, "cpu", seed=1)
        assert torch.equal(guided[1], plain[1]) and guided[-1].isfinite().all()
        assert not torch.equal(guided[-1], plain[-1])


def test_what_predicts_a_mean_has_no_x0_hat() -> None:
    class Own(Diffusion):
        def remove_noise(self, x, t, y, use_ema=True):
            return super().remove_noise(x, t, y, use_ema)

    with pytest.raises(ValueError, match="corrections need x0_hat: remove_noise was overridden"):
        Own(Pixelwise(), (5, 7), 2, None, BETAS).sample(1, "cpu", corrections=dynamic_threshold())


def test_a_graph_says_why_it_is_eager(tape: Tape) -> None:
    diffusion = small(engine="graph")
    with pytest.warns(UserWarning, match="what corrects x0_hat is Python"):
        diffusion.sample(1, "cpu", seed=1, corrections=[dynamic_threshold()])


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "ratio": (lambda: dynamic_threshold(1.5), ValueError, r"ratio must be a finite number in \[0, 1\]"),
    "largest": (lambda: dynamic_threshold(0.9, 0.5), ValueError, "largest must be"),
    "scale": (lambda: classifier_guidance(log_classifier, math.inf), ValueError, "scale must be a finite number"),
    "no function": (lambda: classifier_guidance(3), TypeError, "log_probability must be a function"),
    "no list": (lambda: small().sample(1, "cpu", corrections=3), TypeError, "corrections must be a list"),
    "its result": (
        lambda: small().sample(1, "cpu", corrections=lambda x0, now: x0[0]), ValueError, "the result of a correction"
    ),
    "no result": (lambda: small().sample(1, "cpu", corrections=lambda x0, now: None), TypeError, "the result of a"),
    "no gradient": (
        lambda: small().sample(2, "cpu", corrections=classifier_guidance(lambda x, t: torch.zeros(2))),
        ValueError, "log_probability's result must depend on x",
    ),
    "shape": (
        lambda: small().sample(2, "cpu", corrections=[classifier_guidance(lambda x, t, *_: x.sum())]),
        ValueError, r"log_probability's result must have shape \[2\]",
    ),
    "no levels": (
        lambda: sample(lambda x, t: x, (2, 3), Plan(torch.ones(1, 8)), corrections=[classifier_guidance(max)]),
        ValueError, "classifier guidance needs the level of each row",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_input(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()
