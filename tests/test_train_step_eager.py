"""Training steps that can't be recorded, and arguments that are refused."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from steps import CONFIG, adam, batch, diffusion, pair, recorded, same, script
from steps import on_reference as on_reference  # for every test here
from tape import Tape
from torch import Tensor, nn

from ddpm_fast import Diffusion, TrainStep
from ddpm_fast.graphs import WARM_UPS


class Own(Diffusion):
    """Does more in Python."""

    def get_losses(self, x, t, y):
        return super().get_losses(x, t, y) * self.step


class Lookahead(torch.optim.Adam):
    """Steps in a way of its own."""

    def step(self, closure=None):
        self.count = getattr(self, "count", 0) + 1
        return super().step(closure)


def _patched(d: Diffusion) -> Diffusion:
    forward = d.forward
    d.forward = lambda x, y=None: 2 * forward(x, y)
    return d


def _hooked(d: Diffusion) -> Diffusion:
    d.model.mid[0].register_forward_hook(lambda *_: None)
    return d


def _watched(d: Diffusion) -> Diffusion:
    d.observer = lambda t, losses: None
    return d


def _gradients_watched(d: Diffusion) -> Diffusion:
    d.model.out_conv.weight.register_hook(lambda grad: None)
    return d


def _from_torch() -> Diffusion:
    return Diffusion.from_config(CONFIG, rng="torch").train()


def _optimizer_watched(d: Diffusion):
    optimizer = adam(d)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


EAGER: dict[str, tuple[Callable, Callable, str]] = {
    "hook": (lambda: _hooked(diffusion()), adam, r"model\.mid\.0 has hooks"),
    "hook of a parameter": (lambda: _gradients_watched(diffusion()), adam, "hooks of parameters"),
    "hook of the optimizer": (diffusion, _optimizer_watched, "hooks of the optimizer"),
    "observer": (lambda: _watched(diffusion()), adam, r"diffusion\.observer"),
    "generator": (_from_torch, adam, "torch's generator"),
    "subclass": (lambda: Own.from_config(CONFIG, seed=7).train(), adam, r"Own\.get_losses must run"),
    "patched": (lambda: _patched(diffusion()), adam, r"Diffusion\.forward must run"),
    "another step": (diffusion, lambda d: Lookahead(d.model.parameters(), lr=1e-2, fused=True), "Lookahead.step must"),
    "host counts": (diffusion, lambda d: adam(d, fused=False), "made? with fused=True|make it with fused=True"),
}


@pytest.mark.parametrize("case", EAGER)
def test_what_can_not_be_recorded_runs_eagerly_and_says_why(tape: Tape, case: str) -> None:
    """Bit for bit as the script, the rate unrounded."""
    make, optimizer_of, reason = EAGER[case]
    d = make()
    a = copy.deepcopy(d) if case in ("host counts", "another step") else None
    step = TrainStep(d, optimizer_of(d), engine="graph")
    with pytest.warns(UserWarning, match=reason):
        step(*batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(1, 6):
            step(*batch(k))
    with pytest.warns(UserWarning, match=reason):  # "auto", where graphs are possible
        TrainStep(d, optimizer_of(d))(*batch(10))
    assert tape.records == 0 and d.step == d.calls == 7
    if a is not None:
        optimizer = optimizer_of(a)
        for k in range(6):
            script(a, optimizer, *batch(k))
        script(a, optimizer_of(a), *batch(10))
        same(d, a)


def test_hooks_that_come_later_run_from_then_on(tape: Tape) -> None:
    for register in (
        lambda step, f: step.diffusion.model.out_conv.weight.register_hook(lambda grad: f()),
        lambda step, f: step.optimizer.register_step_post_hook(lambda *_: f()),
        lambda step, f: step.diffusion.model.mid[0].register_forward_hook(lambda *_: f()),
    ):
        _, _, step = recorded()
        calls: list[int] = []
        register(step, lambda calls=calls: calls.append(1))
        with pytest.warns(UserWarning, match="must run every time"):
            for k in range(WARM_UPS + 2):
                step(*batch(k))
        assert len(calls) == WARM_UPS + 2


def test_a_network_that_reads_the_device_runs_eagerly(tape: Tape, monkeypatch) -> None:
    """Also when it is tried again: then, too, the steps before a capture are watched."""
    monkeypatch.setattr("ddpm_fast.training.step.PATIENCE", 2)
    a, optimizer, step = pair(engine="graph")
    for d in (a, step.diffusion):
        d.model.out_conv = Reading(8, 1, 3, padding=1)
    step.optimizer = adam(step.diffusion)
    optimizer = adam(a)
    step.diffusion.load_state_dict(a.state_dict(), step=0)
    with pytest.warns(UserWarning, match="can't be recorded: it waits for the device"):
        for k in range(WARM_UPS):
            assert torch.equal(step(*batch(k)), script(a, optimizer, *batch(k)))
    for k in range(3 * (WARM_UPS + 2)):
        assert torch.equal(step(*batch(k)), script(a, optimizer, *batch(k)))
    same(step.diffusion, a)
    assert tape.records == 0


class Reading(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if float(x.detach().sum()) > 0 else 2)


def test_without_a_gpu_it_is_eager() -> None:
    a, optimizer, step = pair()
    for k in range(5):
        assert torch.equal(step(*batch(k)), script(a, optimizer, *batch(k)))
    with pytest.warns(UserWarning, match="CUDA graphs need a GPU"):
        TrainStep(a, optimizer, engine="graph")(*batch(1))


D = diffusion()
BAD = [
    (
        lambda: TrainStep(diffusion(), adam(diffusion())),
        ValueError,
        "optimizer must be one of diffusion.model.parameters",
    ),
    (lambda: TrainStep(nn.Linear(1, 1), adam(D)), TypeError, "diffusion must be a Diffusion, got Linear"),
    (lambda: TrainStep(D, 3), TypeError, "optimizer must be a torch.optim.Optimizer, got 3"),
    (lambda: TrainStep(D, adam(D), clip=-1.0), ValueError, "clip must be"),
    (lambda: TrainStep(D, adam(D), accumulate=0), ValueError, "accumulate must be"),
    (lambda: TrainStep(D, adam(D), dtype=torch.float64), ValueError, "dtype must be"),
    (lambda: TrainStep(D, adam(D), engine="cuda"), ValueError, "engine must be"),
    (lambda: TrainStep(D, adam(D, fused=False), dtype=torch.float16), ValueError, r"float16 needs an .*fused=True"),
    (lambda: TrainStep(D, adam(D, fused=False), check=lambda a, b: a), ValueError, r"check needs an .*fused=True"),
    (lambda: TrainStep(D, adam(D))(3), TypeError, "x must be a tensor"),
    (lambda: TrainStep(D, adam(D), accumulate=3)(*batch(0)), ValueError, r"x must have a batch that 3 divides"),
    (lambda: TrainStep(D, adam(D))(batch(0)[0][:, :, :4], batch(0)[1]), ValueError, "x must have shape"),
    (lambda: TrainStep(D, adam(D))(batch(0)[0], [1, 2, 3, 4]), TypeError, "y must be a tensor"),
    (
        lambda: TrainStep(D, adam(D), accumulate=2)(batch(0)[0], batch(0)[1][:2]),
        ValueError,
        r"y must have shape \[4\], a class per image; got int64 \[2\]",
    ),
    (
        lambda: TrainStep(D, adam(D), dtype=torch.float16).load_state_dict({}),
        ValueError,
        "state has no scale: it comes from a step without dtype=torch.float16",
    ),
    (lambda: TrainStep(D, adam(D))(batch(0)[0], batch(0)[1] + 5), ValueError, r"y must lie in \[0, 5\)"),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind, text) -> None:
    with pytest.raises(kind, match=text):
        call()
