"""What the backward computes again instead of keeping it."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import DTYPES, hold, inputs, network
from test_trainer import RECIPE, assert_same_state, trainer
from torch import Tensor, nn

from ddpm_fast import ResidualBlock, UNet, ops
from ddpm_fast.models import layers
from ddpm_fast.models.sums import Sum
from ddpm_fast.training.data import digits
from ddpm_fast.training.trainer import Trainer


def trained(net: UNet, dtype: torch.dtype, state: ops.NoiseState | None = None) -> list[Tensor]:
    """The result, and the weights' gradients, which the owner of the noise goes on before."""
    x, t, y = inputs(net)
    exact = next(net.parameters()).dtype is torch.float64
    x = x.double() if exact else x
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32 and not exact):
        out = net(x, t, y, noise_state=state)
    if state is not None:
        state.draw.add_(1)
    torch.manual_seed(4)
    grads = torch.autograd.grad(out, list(net.parameters()), torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    return [out.detach(), *grads]


OPTIONS = {"dropout": 0.3, "num_classes": 5, "attention_resolutions": (1,)}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("recompute", ["norm", "block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputing_changes_no_bit(recompute: str, fused: bool, dtype: torch.dtype) -> None:
    """Also with dropout, whose masks are drawn again. But where sums are made later a whole block in half precision
    rounds its input's gradient once more."""
    net, results = network(**OPTIONS, fused=fused), []
    for net.recompute in ("none", recompute):
        results.append(trained(net, dtype, ops.NoiseState.at(5, 0)))
    if (recompute, fused, dtype) == ("block", True, torch.bfloat16):
        net.fused = False
        plain = trained(net, dtype, ops.NoiseState.at(5, 0))
        hold(results[1], plain, trained(net.double(), dtype, ops.NoiseState.at(5, 0)))
    else:
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "options",
    [dict, lambda: {"activation": F.rrelu}, lambda: {"norm": "bn"}, lambda: {"activation": nn.PReLU(), "dropout": 0.0}],
    ids=["dropout", "random activation", "batch norm", "activation that autocast changes"],
)
def test_what_another_run_would_change_is_kept(options: Callable[[], dict]) -> None:
    """Dropout of torch's generator is drawn again from its state; whatever is not known to repeat isn't repeated."""
    results = []
    for recompute in ("none", "norm", "block"):
        net = network(recompute=recompute, **{"dropout": 0.3} | options())
        torch.manual_seed(3)
        results.append([*trained(net, torch.bfloat16), *(b.clone() for b in net.buffers())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_replaced_attention_with_dropout_of_its_own() -> None:
    results = []
    for recompute in ("none", "norm", "block"):
        net = network(recompute=recompute)
        net.mid[0].attention = nn.Sequential(net.mid[0].attention, nn.Dropout(0.5))
        torch.manual_seed(3)
        results.append(trained(net, torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """Of what goes into convolutions, and what comes out of them, the tensors that are alive before the backward."""
    went_in, came_out, plain = [], [], layers.convolve3x3

    def watched(x: Tensor, conv: nn.Conv2d, *rest: object, **more: object) -> Tensor:
        if conv in ups:  # which keeps what goes in, in any case
            return plain(x, conv, *rest, **more)
        went_in.append(weakref.ref(x))
        y = plain(x, conv, *rest, **more)
        if fused or conv in firsts:  # else it is the block's own result, which the next one keeps
            came_out.append(weakref.ref(y))
        return y

    monkeypatch.setattr(layers, "convolve3x3", watched)
    alive = {}
    for recompute in ("none", "norm", "block"):
        net = network(num_res_blocks=2, attention_resolutions=(), fused=fused, recompute=recompute)
        ups = [m.upsample[1] for m in net.modules() if isinstance(m, layers.Upsample)]
        firsts = [m.conv_1 for m in net.modules() if isinstance(m, ResidualBlock)]
        went_in.clear(), came_out.clear()
        x, t, _ = inputs(net)
        out = net(x, t, noise_state=ops.NoiseState.at(5, 0))
        alive[recompute] = [sum(r() is not None for r in refs) for refs in (went_in, came_out)]
        out.sum().backward()
        del out
        assert not any(r() is not None for r in came_out), "something is left after the backward"
    blocks = sum(isinstance(m, ResidualBlock) for m in net.modules())
    assert alive["none"][0] == 2 * blocks
    assert alive["norm"][0] == 0 and alive["norm"][1] >= blocks
    assert alive["block"] == [0, alive["block"][1]] and alive["block"][1] <= (blocks if fused else 0)


@pytest.mark.parametrize("later", [False, True])
def test_recomputation_goes_on_in_double_backward(later: bool) -> None:
    """Under backends whose backward can be differentiated."""
    block, results = ResidualBlock(8, 12, 0.0, activation=F.silu, num_groups=4).double(), []
    x = torch.randn(2, 8, 6, 6).double()
    for keep in (True, False):
        leaf = x.clone().requires_grad_()
        out = block.summed(Sum(leaf, later=later), block.bias(2, None), None, keep=keep).tensor()
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("recompute", ["norm", "block"])
def test_a_recomputation_takes_the_backend_of_its_forward(recompute: str) -> None:
    results = []
    for net in (network(), network(recompute=recompute)):
        with ops.use_backend("reference"):
            out = net(*inputs(net))
        results.append(torch.autograd.grad(out.sum(), list(net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("recompute", ["none", "norm", "block"])
@pytest.mark.parametrize("name", ["conv_1", "conv_2.1", "norm_1", "norm_2"])
def test_weights_that_change_before_the_backward_are_refused(name: str, recompute: str) -> None:
    net = network(recompute=recompute)
    out = net(*inputs(net))
    with torch.no_grad():
        net.downs[0].get_submodule(name).weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


@pytest.mark.parametrize("recompute", ["norm", "block"])
def test_the_mode_of_the_forward_counts(recompute: str) -> None:
    results = []
    for what in ("none", recompute):
        net = network(recompute=what, dropout=0.3)
        torch.manual_seed(3)
        out = net(*inputs(net))
        net.eval()
        results.append(torch.autograd.grad(out.square().sum(), list(net.parameters())))
        assert not net.downs[0].conv_2[0].training
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_recomputing_trains_the_same_weights(tmp_path: Path) -> None:
    """And rides in the checkpoint."""
    runs = []
    for what in ("none", "norm", "block"):
        t = trainer(tmp_path / what, recipe=replace(RECIPE, recompute=what))
        assert t.diffusion.model.recompute == what
        t.run(6)
        runs.append(t)
    assert_same_state(runs[0], runs[1])
    assert_same_state(runs[0], runs[2])
    assert Trainer.resume(digits(), tmp_path / "block").diffusion.model.recompute == "block"
    changed = Trainer.resume(digits(), tmp_path / "block", changes={"recompute": "none"})
    assert changed.diffusion.model.recompute == "none"
