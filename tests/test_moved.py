"""Bytes counted from the real forwards, against the arithmetic that the design of the network rests on."""

import pytest
import torch

from benchmarks import memory, moved, training
from benchmarks.problem import Problem
from ddpm_fast import preset
from ddpm_fast.models.sums import Sum

# MB of an image and step in bf16, by hand from the shapes of the layers (docs/fused.md).
EXPECTED = {
    "original, eager": 98.3,
    "plain path": 68.1,
    "sums made later": 44.9,
    "sums made later, in a chain": 44.9,
}
NETWORKS = moved.networks()


@pytest.mark.parametrize("name", EXPECTED)
def test_bytes_of_a_step(name: str) -> None:
    found = moved.bytes_of_an_image(*NETWORKS[name])
    assert found.total() / 1e6 == pytest.approx(EXPECTED[name], rel=0.03)
    assert found["the rest"] < 1e-3 * found.total(), "an operator that no kind names"


@pytest.mark.parametrize("name", EXPECTED)
def test_passes_that_are_left(name: str) -> None:
    """None where sums are made later: no sum, concat or activation of its own, and no convolution with a bias."""
    left = moved.step(*NETWORKS[name][:1], moved.SEVERAL, NETWORKS[name][1]).passes()
    if name.startswith("sums made later"):
        assert not left
    else:
        assert left["cat"] == 12 and left["convolution with a bias"] + left["conv3x3 with a bias"] > 50


def test_what_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stray pass over an activation is seen."""
    net, chain = NETWORKS["sums made later"]
    before, plus = moved.bytes_of_an_image(net, chain), Sum.plus
    monkeypatch.setattr(Sum, "plus", lambda a, b: plus(Sum(a.x + 1, a.bias, a.residual, True, True), b))
    assert moved.bytes_of_an_image(net, chain).total() > 1.02 * before.total()
    assert moved.step(net, moved.SEVERAL, chain).passes()["add.Tensor"] > 5


def test_sizes() -> None:
    x = torch.zeros(4, 3)
    assert moved.size([x, {"y": x.half()}, None]) == 48 + 24
    assert moved.size(x[:1].expand(4, 3)) == 12


def test_what_training_keeps() -> None:
    """Activations, of the real network; the share does not depend on the batch."""
    problem = Problem(preset("cifar10"), torch.device("cpu"), 1, 1, "float32", num_timesteps=1000)
    shapes, contenders, kept = (
        {tuple(sorted(w.shape)) for w in problem.weights.values()},
        training.contenders(False),
        {},
    )
    for name in ("torch eager channels_last", "ddpm_fast", "ddpm_fast recompute=norm"):
        kept[name] = memory.saved_bytes(contenders[name](problem).run, shapes)
    eager, ours, norm = kept.values()
    assert ours < 0.7 * eager and norm < 0.5 * eager
