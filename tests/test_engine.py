"""The denoising loop: no host reads, splitting, progress, callbacks, interruption."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import BETAS, TINY, Pixelwise, pixelwise, small

from ddpm_fast import Diffusion, UNet, ops
from ddpm_fast.chain import Chain, Predictor, told_by
from ddpm_fast.memory import batch_that_fits, in_parts
from ddpm_fast.samplers import make_plan


class NoHostReads(TorchDispatchMode):
    """Refuses operations that bring a device's value to the host or mix devices, as they would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"host read: {func}")
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim}
        out = func(*args, **kwargs)
        devices |= {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
        assert devices <= {"meta"}, f"{func} leaves the device: {devices}"
        return out


def meta_loop(network, **options) -> None:
    """Run a whole chain on the meta device, where a read of a value can't succeed."""
    plan = make_plan("ddpm", np.cumprod(1 - BETAS), num_steps=3, options=options)
    told = told_by(network, plan.timesteps("meta"))
    chain = Chain(torch.zeros(2, 1, 8, 8, device="meta"), plan, ops.NoiseState.at(1, 0, device="meta"), told)
    with NoHostReads(), torch.no_grad():
        for _ in range(len(plan)):
            chain.step(network)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_loop_never_reads_the_device(clip: bool, embedded: bool, num_classes: int | None) -> None:
    """Network, ops and counter; the network told t, or rows of what it makes of t."""
    net = UNet(1, 8, (1, 2), 1, time_emb_dim=8, num_groups=4, attention_resolutions=(1,), num_classes=num_classes)
    net = net.eval().to("meta")
    y = None if num_classes is None else torch.zeros(2, dtype=torch.int64, device="meta")
    meta_loop(Predictor(net, net, [y]) if embedded else lambda x, t: net(x, t, y), clip=clip)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_training_never_reads_the_device(prediction: str) -> None:
    """Timesteps, perturbation, network with dropout, loss and backward of a call that the device counts."""
    diffusion = small(num_classes=3, prediction=prediction).train().to("meta")
    state = ops.NoiseState.at(1, 0, device="meta")
    x, y = torch.zeros(2, 1, 8, 8, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with NoHostReads():
        state.draw.add_(1)
        diffusion.at(state, x, y).backward()
    assert all(p.grad is not None for p in diffusion.model.parameters())


OPTIONS: dict[str, dict[str, Any]] = {
    "weights": {"loss_weighting": "min_snr", "timestep_sampling": "log_normal", "loss_type": "huber"},
    "their losses": {"timestep_sampling": "loss_second_moment"},
    "learned variance": {"learned_variance": True},
    "label dropout": {"label_dropout": 0.3},
    "noise levels": {"time_input": "noise_level"},
    "a condition": {"cond_channels": 2},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_no_objective_reads_the_device(option: str) -> None:
    config = replace(TINY, num_classes=3, **OPTIONS[option])
    diffusion = Diffusion.from_config(config).train().to("meta")
    state = ops.NoiseState.at(1, 0, device="meta")
    x, y = torch.zeros(2, 1, 8, 8, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    cond = torch.zeros(2, 2, 8, 8, device="meta") if config.cond_channels else None
    with NoHostReads():
        state.draw.add_(1)
        diffusion.at(state, x, y, cond=cond).backward()


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("learned", [False, True])
def test_no_conditional_step_reads_the_device(learned: bool, guidance: float | None) -> None:
    net = UNet(3, 8, (1, 2), 1, time_emb_dim=8, num_groups=4, num_classes=4, out_channels=1 + learned).to("meta").eval()
    options = {"variance": "learned" if learned else "beta"}
    plan = make_plan("ddpm", np.cumprod(1 - BETAS), options=options).guided(1.0 if guidance is None else guidance)
    y, cond = torch.zeros(2, dtype=torch.int64, device="meta"), torch.zeros(2, 2, 8, 8, device="meta")
    call = lambda x, t, y, cond: net(torch.cat([x, cond.to(x.dtype)], 1), t, y)  # noqa: E731
    predictor = Predictor(net, call, [y, cond], None if guidance is None else [y + 3, cond])
    x, state = torch.zeros(2, 1, 8, 8, device="meta"), ops.NoiseState.at(0, 0, device="meta")
    chain = Chain(x, plan, state, told_by(predictor, plan.timesteps(x.device)))
    with torch.no_grad(), NoHostReads():
        chain.step(predictor)


@pytest.mark.parametrize(
    "read",
    [
        lambda x, t: x * t[0].item(),
        lambda x, t: x.cpu(),
        lambda x, t: x if t[0] > 1 else -x,
        lambda x, t: x + torch.ones(8, 8),
        lambda x, t: x[x > 0].sum() + x,
    ],
    ids=["item", "cpu", "if", "host constant", "boolean mask"],
)
def test_a_network_that_reads_the_device_is_caught(read) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        meta_loop(read)


def test_callbacks_see_each_step() -> None:
    diffusion = pixelwise()
    seen = []
    images = diffusion.sample(2, "cpu", seed=1, callback=lambda k, x: seen.append((k, x.clone())))
    assert [k for k, _ in seen] == list(range(12)) and torch.equal(seen[-1][1], images)


def test_progress_shows_a_bar(capsys) -> None:
    pixelwise().sample(2, "cpu", progress=True)
    shown = capsys.readouterr().err
    assert "sampling" in shown and "24/24" in shown
    pixelwise().sample(2, "cpu")
    assert not capsys.readouterr().err


class Limited(Pixelwise):
    """Takes at most three images at once, as a full memory would."""

    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error
        self.batches: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.batches.append(x.shape[0])
        if x.shape[0] > 3:
            raise self.error
        return super().forward(x, t, y)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory"), MemoryError()],
    ids=["cuda", "cpu", "python"],
)
def test_a_batch_too_large_is_split_and_gives_the_same_images(error) -> None:
    y = torch.arange(10)
    whole = Diffusion(Pixelwise(), (5, 7), 2, 10, BETAS).sample(10, "cpu", y=y, seed=1)
    limited = Diffusion(Limited(error), (5, 7), 2, 10, BETAS)
    assert torch.equal(limited.sample(10, "cpu", y=y, seed=1), whole)
    assert limited.ema_model.batches[:3] == [10, 5, 3]


def test_other_errors_and_hopeless_cases_come_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        Diffusion(Limited(RuntimeError("shapes differ")), (5, 7), 2, None, BETAS).sample(10, "cpu")
    with pytest.raises(MemoryError):
        in_parts(lambda part: (_ for _ in ()).throw(MemoryError()), 4, 4)


def test_the_batch_is_bounded_by_what_is_free() -> None:
    """Beyond a size no retry can help on a CPU - the process is killed - so the batch is chosen beforehand."""

    class Hungry(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            torch.empty(2**34 // x.element_size(), dtype=x.dtype)  # 16 GiB an image, never touched
            return x

    fits = batch_that_fits(Hungry(), torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64))
    light = batch_that_fits(lambda x, t: x + 1, torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64))
    assert fits < 100 < light


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interruption_restores_the_model(error) -> None:
    diffusion = pixelwise().train()

    def stop(k: int, x: Tensor) -> None:
        if k == 3:
            raise error

    with pytest.raises(error):
        diffusion.sample(2, "cpu", callback=stop, use_ema=False, progress=True)
    assert diffusion.model.training and torch.is_grad_enabled()
    assert diffusion.sample(2, "cpu", seed=0).isfinite().all()


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and tuple(args[0].shape) == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_autocast_casts_each_weight_once_a_chain() -> None:
    class Network(nn.Conv2d):
        def forward(self, x, t, y):
            return super().forward(x)

    diffusion = Diffusion(Network(1, 1, 3, padding=1), (8, 8), 1, None, BETAS[:5]).eval()
    with torch.autocast("cpu", torch.bfloat16):
        with Casts((1, 1, 3, 3)) as casts:
            before = diffusion.sample(2, "cpu", seed=1)
        assert casts.count == 1
        assert not any(p.requires_grad for p in diffusion.ema_model.parameters())
        for p in diffusion.ema_model.parameters():
            p.data.mul_(2)
        after = diffusion.sample(2, "cpu", seed=1)
        diffusion.sample(1, "cpu", use_ema=False)
    assert not torch.equal(before, after), "a cast of the old weights was used"
    assert all(p.requires_grad for p in diffusion.model.parameters()), "trained weights stay trainable"
