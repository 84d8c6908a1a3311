"""Diffusion beyond the original's contract: counted noise, saved counters, copies, averaging."""

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import BETAS, Pixelwise, pixelwise, small

from ddpm_fast import Config, Diffusion, UNet, generate_linear_schedule, ops


def test_the_loss_is_that_of_its_counters() -> None:
    """The forward's timesteps, noise and target come from seed and call, and the loss is the mean squared error."""
    diffusion = pixelwise(seed=5)
    x = torch.randn(4, 2, 5, 7)
    diffusion(x)
    loss = diffusion(x)
    state = ops.NoiseState.at(5, 2)
    t = ops.timesteps(4, 12, state)
    z = ops.noise(x.shape, state, ops.PERTURB)
    abar = torch.from_numpy(np.cumprod(1 - BETAS))[t].view(4, 1, 1, 1).float()
    x_t = abar.sqrt() * x + (1 - abar).sqrt() * z
    expected = ((diffusion.model(x_t, t) - z) ** 2).mean()
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_forwards_without_update_ema_see_different_noise() -> None:
    diffusion = small(seed=1).eval()
    x = torch.zeros(4, 1, 8, 8)
    losses = [float(diffusion(x).detach()) for _ in range(4)]
    assert len(set(losses)) == 4
    again = small(seed=1).eval()
    assert [float(again(x).detach()) for _ in range(4)] == losses
    assert float(small(seed=2).eval()(x).detach()) != losses[0]


def test_accumulation_and_an_evaluation_in_between_continue_the_count() -> None:
    diffusion = small(seed=1)
    x = torch.zeros(4, 1, 8, 8)
    seen = []
    for _ in range(2):
        diffusion.train()
        seen += [float(diffusion(x[:2]).detach()), float(diffusion(x[2:]).detach())]  # accumulation
        diffusion.update_ema()
        diffusion.eval()
        with torch.no_grad():
            seen.append(float(diffusion(x)))  # a test loop
    assert len(set(seen)) == 6 and diffusion.extra_state()["calls"] == 6


def test_resume_continues_the_count(tmp_path) -> None:
    def run(diffusion: Diffusion, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(float(diffusion(torch.zeros(4, 1, 8, 8)).detach()))
            diffusion.update_ema()
        return losses

    whole = run(small(seed=9, ema_start=3), 6)
    first = small(seed=9, ema_start=3)
    begun = run(first, 3)
    torch.save(first.state_dict(), tmp_path / "file.pth")
    second = small(ema_start=3)  # the seed comes with the file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(torch.load(tmp_path / "file.pth", weights_only=True))
    assert begun + run(second, 3) == whole
    assert second.extra_state() == {"step": 6, "calls": 6, "seed": 9}


def test_dropout_is_redrawn_by_counter() -> None:
    """With the same call number and seed, dropout drops the same elements; torch's generator plays no part."""
    diffusion = small(seed=3).train()
    x = torch.randn(2, 1, 8, 8)
    first = diffusion(x).detach()
    torch.manual_seed(99)
    diffusion.load_extra_state({"calls": 0})
    assert torch.equal(diffusion(x).detach(), first)
    diffusion.load_extra_state({"calls": 0})
    assert not torch.equal(diffusion.eval()(x).detach(), first), "dropout must have been at work"


def test_the_seed_comes_from_torch_when_first_needed() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    diffusion = pixelwise()
    assert torch.equal(torch.get_rng_state(), before), "construction must not draw"
    diffusion(torch.zeros(1, 2, 5, 7))
    torch.manual_seed(4)
    again = pixelwise()
    again(torch.zeros(1, 2, 5, 7))
    assert diffusion.seed is not None and diffusion.seed == again.seed


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predictions_train_towards_their_target(prediction: str) -> None:
    """With a network that returns exactly the target, the loss is zero."""

    class Oracle(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            state = ops.NoiseState.at(5, 1)
            z = ops.noise(x.shape, state, ops.PERTURB)
            abar = torch.from_numpy(np.cumprod(1 - BETAS))[t].view(-1, 1, 1, 1).float()
            a, s = abar.sqrt(), (1 - abar).sqrt()
            x0 = (x - s * z) / a
            return {"eps": z, "x0": x0, "v": a * z - s * x0}[prediction]

    diffusion = Diffusion(Oracle(), (4, 4), 1, None, BETAS, prediction=prediction, seed=5)
    assert float(diffusion(torch.randn(3, 1, 4, 4))) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_keep_tables_and_state_in_float32(dtype: torch.dtype) -> None:
    diffusion = small()
    diffusion.update_ema()
    expected = diffusion.sample(2, "cpu", seed=1)
    betas = diffusion.betas.clone()
    diffusion.to(dtype)
    assert diffusion.betas.dtype == torch.float32 and torch.equal(diffusion.betas, betas)
    assert next(diffusion.ema_model.parameters()).dtype == dtype
    images = diffusion.sample(2, "cpu", seed=1)
    assert images.dtype == torch.float32 and float((images - expected).abs().max()) < 0.2
    assert diffusion(torch.zeros(2, 1, 8, 8)).dtype == torch.float32
    diffusion.double()
    exact = torch.from_numpy(1 - np.cumprod(1 - BETAS)).sqrt()
    assert torch.equal(diffusion.sqrt_one_minus_alphas_cumprod, exact)
    assert diffusion.sample(1, "cpu").dtype == torch.float64


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(clone) -> None:
    diffusion = small(num_classes=3, seed=6)
    y = torch.tensor([0, 2])
    diffusion(torch.zeros(2, 1, 8, 8), y)
    other = clone(diffusion)
    assert torch.equal(diffusion.sample(2, "cpu", y=y, seed=1), other.sample(2, "cpu", y=y, seed=1))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(diffusion(x, y), other(x, y)), "the count goes on in both"
    with torch.no_grad():
        other.model.init_conv.weight.zero_()
    assert diffusion.model.init_conv.weight.abs().max() > 0


def test_loaded_betas_are_used() -> None:
    """Tables come with the file; plans follow them, whatever schedule the constructor was given."""
    saved = Diffusion(Pixelwise(), (5, 7), 2, None, generate_linear_schedule(12, 0.05, 0.1))
    loaded = pixelwise()
    loaded.load_state_dict(saved.state_dict())
    assert torch.allclose(loaded.sample(2, "cpu", seed=1), saved.sample(2, "cpu", seed=1), atol=1e-5)


def test_the_exact_schedule_survives_a_file() -> None:
    """A file holds float32 betas; where they are the constructor's, plans keep the float64 ones."""
    diffusion = pixelwise()
    rows = diffusion.plan().rows
    diffusion.load_state_dict(diffusion.state_dict())
    assert torch.equal(diffusion.plan().rows, rows)
    diffusion.double().load_state_dict(pixelwise().state_dict())
    assert torch.equal(diffusion.betas, torch.from_numpy(BETAS)), "in float64 the tables are exact"


def test_a_diffusion_inside_another_module_keeps_its_counts() -> None:
    outer = nn.Sequential(pixelwise(seed=4))
    outer[0](torch.zeros(2, 2, 5, 7))
    other = nn.Sequential(pixelwise())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(outer.state_dict())
    assert other[0].extra_state() == {"step": 0, "calls": 1, "seed": 4}


def test_load_state_dict_can_assign() -> None:
    diffusion = pixelwise()
    state = pixelwise().double().state_dict()
    diffusion.load_state_dict(state, assign=True)
    assert diffusion.model.gain.dtype == torch.float64


def test_each_process_draws_its_own_noise(monkeypatch) -> None:
    losses = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        losses.append(float(pixelwise(seed=3)(torch.zeros(4, 2, 5, 7)).detach()))
    assert losses[0] != losses[1]


def test_get_losses_checks_too() -> None:
    with pytest.raises(ValueError, match="x must have shape"):
        pixelwise().get_losses(torch.zeros(2, 2, 5, 6), torch.tensor([0, 1]), None)


def test_numpy_integers_and_lists_work() -> None:
    four = np.int64(4)
    diffusion = Diffusion(Pixelwise(), [four, np.int32(6)], np.int64(2), None, BETAS, ema_update_rate=np.int64(1))
    images = diffusion.sample(four, "cpu", num_steps=np.int64(3), first_index=np.int64(2), seed=np.uint64(5))
    assert torch.equal(images, diffusion.sample(4, "cpu", num_steps=3, first_index=2, seed=5))
    Diffusion(Pixelwise(), np.array([8, 8]), 2, None, BETAS, seed=np.int64(5))
    net = UNet(np.int64(1), np.int64(8), np.array([1, 2]), np.int64(1), num_groups=np.int64(4), initial_pad=np.int64(1))
    assert net(torch.zeros(1, 1, 6, 6)).shape == (1, 1, 6, 6)
    assert len(generate_linear_schedule(np.int64(5), 0.1, np.float32(0.2))) == 5


def test_buffers_follow_before_ema_start() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2))
    diffusion = Diffusion(net, (4, 4), 2, None, BETAS, ema_start=10)
    net[0].running_mean.fill_(3)
    diffusion.update_ema()
    assert float(diffusion.ema_model[0].running_mean[0]) == 3


def test_ema_starts_as_a_copy_and_needs_no_gradient() -> None:
    diffusion = small()
    assert not any(p.requires_grad for p in diffusion.ema_model.parameters())
    assert len(list(diffusion.parameters())) == 2 * len(list(diffusion.model.parameters()))


def test_ema_update_rate() -> None:
    diffusion = small(ema_decay=0.5, ema_start=0, ema_update_rate=2)
    start = diffusion.ema_model.init_conv.weight.clone()
    with torch.no_grad():
        diffusion.model.init_conv.weight.add_(1)
    diffusion.update_ema()
    assert torch.equal(diffusion.ema_model.init_conv.weight, start)
    diffusion.update_ema()
    assert torch.allclose(diffusion.ema_model.init_conv.weight, start + 0.5)


def test_from_config_round_trips() -> None:
    config = Config(img_size=(8, 8), img_channels=1, base_channels=8, channel_mults=(1, 2), num_groups=4, num_classes=4)
    assert Config.from_dict(config.to_dict()) == config
    diffusion = Diffusion.from_config(config, rng="torch")
    assert diffusion.rng == "torch" and diffusion.num_classes == 4 and diffusion.num_timesteps == 1000
    with pytest.raises(ValueError, match="unknown configuration key 'chanels'"):
        Config.from_dict({"chanels": 3})


def test_the_counts_live_on_the_cpu_and_train_anywhere() -> None:
    """Whatever the context that a Diffusion is built in."""
    saved = small(seed=3)
    with torch.device("meta"):
        bare = small(seed=3)
    bare.to_empty(device="cpu").load_state_dict(saved.state_dict())
    x = torch.zeros(2, 1, 8, 8)
    assert bare.calls == 0 and torch.equal(bare.eval()(x), saved.eval()(x))
    with torch.inference_mode():
        built = pixelwise()
    with torch.no_grad():
        assert built(torch.zeros(2, 2, 5, 7)).isfinite() and built.calls == 1


def test_a_failed_load_leaves_the_counts() -> None:
    diffusion, state = pixelwise(seed=3), pixelwise(seed=4).state_dict()
    state["model.gain"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match="model.gain"):
        diffusion.load_state_dict(state, step=77)
    assert (diffusion.step, diffusion.calls, diffusion.seed, diffusion.loaded) == (0, 0, 3, False)


def test_replicas_in_threads_draw_apart() -> None:
    """nn.DataParallel copies a module and calls the copies in threads: here both have drawn before either is done."""
    diffusion, barrier, seen = pixelwise(seed=3), threading.Barrier(2, timeout=60), []

    class Waits(Pixelwise):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            barrier.wait()
            seen.append(t)
            return super().forward(x, t, y)

    def run(replica: Diffusion) -> None:
        replica(torch.zeros(8, 2, 5, 7))

    replicas = [diffusion._replicate_for_data_parallel() for _ in range(2)]
    for replica in replicas:
        replica._modules = {**diffusion._modules, "model": Waits()}
    threads = [threading.Thread(target=run, args=(r,)) for r in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert diffusion.calls == 2 and len(seen) == 2 and not torch.equal(*seen)
