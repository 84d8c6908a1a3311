"""`sample`: chains for any callable, on data of any rank."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import BETAS, Pixelwise, small

from ddpm_fast import Diffusion, Plan, UNet, make_plan, ops, sample
from ddpm_fast.graphs import Graphs

ABAR = np.cumprod(1 - BETAS)
PLAN = make_plan("ddim", ABAR, "eps", 6)
NOISY = make_plan("ddpm", ABAR)


def each(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def function(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.5 * x + 0.1 * each(t, x))


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 5), (3, 2, 4, 5), (3, 2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """DDIM's loop in three lines."""
    x_T = torch.randn(shape, dtype=dtype)
    x, t = x_T.double(), PLAN.column("t").long()
    for k, step in enumerate(t):
        a, s = ABAR[step] ** 0.5, (1 - ABAR[step]) ** 0.5
        after = ABAR[t[k + 1]] if k + 1 < len(t) else 1.0
        eps = function(x, step.repeat(3))
        x = after**0.5 * (x - s * eps) / a + (1 - after) ** 0.5 * eps
    got = sample(function, x_T, PLAN)
    assert got.dtype == dtype and got.shape == shape
    torch.testing.assert_close(got.double(), x, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)
    assert not torch.equal(got, x_T)  # which is the caller's


def test_as_a_diffusion_does() -> None:
    diffusion = Diffusion(Pixelwise(), (5, 7), 2, None, BETAS)
    expected = diffusion.sample(5, "cpu", seed=3)
    assert torch.equal(sample(diffusion.ema_model, (5, 2, 5, 7), NOISY, seed=3), expected)
    assert torch.equal(sample(diffusion.ema_model, (3, 2, 5, 7), NOISY, seed=3, first_index=2), expected[2:])
    torch.manual_seed(1)
    first = sample(function, (2, 3), NOISY)
    torch.manual_seed(1)
    assert torch.equal(sample(function, (2, 3), NOISY), first)
    assert not torch.equal(sample(function, (2, 3), NOISY), first)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda out: (out, 1),
        lambda out: [out],
        lambda out: SimpleNamespace(sample=out),
        lambda out: torch.cat([out, out], 1),
    ],
    ids=["tuple", "list", "attribute", "a variance that no row uses"],
)
def test_what_a_network_returns(wrap: Any) -> None:
    x_T = torch.randn(3, 2, 4)
    expected = sample(function, x_T, PLAN)
    assert torch.equal(sample(lambda x, t: wrap(function(x, t)), x_T, PLAN), expected)


class TwoArguments(nn.Module):
    """Someone else's: no labels, a tuple as result."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv1d(2, 2, 3, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        return (self.dropout(self.net(x)) + each(t, x) / 100,)


def test_a_network_of_someone_else_trains_and_samples() -> None:
    net = TwoArguments()
    diffusion = Diffusion(net, (4,), 2, None, BETAS, seed=1).train()
    diffusion(torch.randn(3, 2, 4)).backward()
    assert net.net.weight.grad.abs().max() > 0
    torch.testing.assert_close(
        sample(net, (3, 2, 4), NOISY, seed=3), diffusion.sample(3, "cpu", use_ema=False, seed=3), rtol=0, atol=0
    )
    assert net.training and net.dropout.training  # it was in eval mode meanwhile


def test_diffusers_network() -> None:
    """A peer's class as it is: its output is an object, its labels come third."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=4,
    )  # fmt: skip
    diffusion = Diffusion(net, (8, 8), 1, 3, BETAS, label_dropout=0.1, seed=1).train()
    y = torch.tensor([0, 2])
    diffusion(torch.randn(2, 1, 8, 8), y).backward()
    images = diffusion.sample(2, "cpu", y, use_ema=False, seed=1, guidance=2.0)
    again = sample(net, (2, 1, 8, 8), NOISY, y, seed=1, guidance=2.0, without=[torch.tensor([3])])
    assert torch.equal(images, again) and images.isfinite().all()


def test_inputs_and_guidance() -> None:
    def conditional(x: Tensor, t: Tensor, y: Tensor, text: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return 0.5 * x + each(y, x) + text.sum(1).view(-1, 1)

    y, text, null = torch.tensor([1.0, 2.0, 3.0]), torch.randn(3, 5), torch.zeros(1, 5)
    calls: list[int] = []
    plain = sample(conditional, (3, 2), NOISY, y, text, seed=1)
    assert calls == [3] * 12
    without = sample(conditional, (3, 2), NOISY, 0 * y, null.expand(3, 5), seed=1)
    calls.clear()
    guided = sample(conditional, (3, 2), NOISY, y, text, seed=1, guidance=3.0, without=[torch.zeros(1), null])
    assert calls == [6] * 12
    torch.testing.assert_close(guided, without + 3 * (plain - without))
    for none in ([0.0, null], [torch.zeros(1), null[0]], [torch.zeros(3), null.expand(3, 5)]):
        again = sample(conditional, (3, 2), NOISY, y, text, seed=1, guidance=3.0, without=none)
        assert torch.equal(again, guided)
    rows = sample(conditional, (3, 2), NOISY, y, text, seed=1, guidance=[1.0] * 11 + [3.0], without=[0 * y, null])
    assert not torch.allclose(rows, plain) and not torch.allclose(rows, guided)


def test_a_network_in_another_dtype() -> None:
    net = Pixelwise().bfloat16()
    seen: list[torch.dtype] = []
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    images = sample(net, (2, 3, 4), PLAN, seed=1)
    assert images.dtype == torch.float32 and set(seen) == {torch.bfloat16}


def test_recorded_steps_are_kept_by_the_caller(tape) -> None:
    torch.manual_seed(0)
    net = UNet(1, 8, (1, 2), 1, time_emb_dim=8, num_classes=3, num_groups=4)
    y, graphs = torch.tensor([0, 2]), Graphs()
    plan = make_plan("ddpm", ABAR, num_steps=12)
    big = Plan(torch.cat([plan.rows] * 2))  # of enough steps to be worth it
    with ops.use_backend("reference"):
        for k in range(2):
            got = sample(net, (2, 1, 8, 8), big, y, seed=k, graphs=graphs)
            assert torch.equal(got, sample(net, (2, 1, 8, 8), big, y, seed=k))
    assert len(graphs) == 1


def test_progress_and_callbacks(capsys) -> None:
    rows: list[int] = []
    sample(function, (2, 3), PLAN, progress=True, callback=lambda k, x: rows.append(k))
    assert rows == list(range(6)) and "12/12" in capsys.readouterr().err


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "no function": (lambda: sample(3, (2, 3), PLAN), TypeError, "model_fn must be a function"),
    "no plan": (lambda: sample(function, (2, 3), "ddim"), TypeError, "plan must be a Plan, got .ddim. .*: make_plan"),
    "no shape": (lambda: sample(function, (), PLAN), ValueError, "x must have a batch dimension"),
    "a bad shape": (lambda: sample(function, (2, 0), PLAN), ValueError, "x"),
    "output": (lambda: sample(lambda x, t: x[:1], (2, 3), PLAN), ValueError, r"model must return .* like x, \[2, 3\]"),
    "no output": (lambda: sample(lambda x, t: None, (2, 3), PLAN), TypeError, "model must return .* a NoneType"),
    "inputs": (lambda: sample(function, (2, 3), PLAN, torch.ones(3)), ValueError, "inputs must be tensors .* 2"),
    "guidance alone": (lambda: sample(function, (2, 3), PLAN, guidance=2), ValueError, "guidance needs inputs, and"),
    "without": (
        lambda: sample(function, (2, 3), PLAN, torch.ones(2), guidance=2, without=[]), ValueError, "without must hold"
    ),
    "without alone": (
        lambda: sample(function, (2, 3), PLAN, torch.ones(2), guidance=2, without=torch.ones(1)), TypeError, "without m"
    ),
    "without like": (
        lambda: sample(function, (2, 3), PLAN, torch.ones(2), guidance=2, without=[torch.ones(1).long()]),
        ValueError, "without must be like inputs",
    ),
    "graphs": (lambda: sample(function, (2, 3), PLAN, graphs=3), TypeError, "graphs must be a ddpm_fast.graphs.Graphs"),
    "one for all": (lambda: sample(function, (2, 3), PLAN, torch.ones(1)), ValueError, "inputs must be tensors .* 2"),
    "callback": (lambda: sample(function, (2, 3), PLAN, callback=1), TypeError, "callback must be a function"),
    "learned": (
        lambda: sample(function, (2, 3), make_plan("ddpm", ABAR, options={"variance": "learned"})),
        ValueError, "this plan has a learned variance, but the network returns .* twice the channels",
    ),
    "guided plan": (
        lambda: sample(function, (2, 3), PLAN.guided(2.0)), ValueError, "guidance needs inputs, and"
    ),
    "wrong network": (lambda: small().sample(1, "cpu", sampler=PLAN.guided(2.0)), ValueError, "guidance needs y, and"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_input(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()
