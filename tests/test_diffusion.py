"""Diffusion beyond the original's contract: counted noise, saved counters, precise errors, warnings."""

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_fast import Config, Diffusion, UNet, generate_linear_schedule, ops

BETAS = generate_linear_schedule(12, 1e-2, 0.3)


class Pixelwise(nn.Module):
    """A network whose result for an image depends on that image alone, bit for bit, in any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.times.append(t)
        shape = (-1, *[1] * (x.ndim - 1))
        shift = 0 if y is None else y.view(shape) * 0.01
        return self.gain * x + 0.001 * t.view(shape) + shift


def pixelwise(size: tuple[int, ...] = (5, 7), **options: Any) -> Diffusion:
    return Diffusion(Pixelwise(), size, 2, None, BETAS, **options)


def small(num_classes: int | None = None, **options: Any) -> Diffusion:
    torch.manual_seed(0)
    net = UNet(1, 8, (1, 2), 1, time_emb_dim=8, num_classes=num_classes, num_groups=4, dropout=0.2)
    return Diffusion(net, (8, 8), 1, num_classes, BETAS, **options)


# Training


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


# Sampling


def test_an_image_depends_on_seed_and_index_alone() -> None:
    diffusion = pixelwise()
    whole = diffusion.sample(8, "cpu", seed=1)
    parts = [diffusion.sample(3, "cpu", seed=1), diffusion.sample(5, "cpu", seed=1, first_index=3)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, diffusion.sample(8, "cpu", seed=2))
    assert whole.flatten(1).unique(dim=0).shape[0] == 8


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_with_a_unet_batches_agree_up_to_rounding(memory_format) -> None:
    diffusion = small(num_classes=5).to(memory_format=memory_format)
    y = torch.arange(8) % 5
    whole = diffusion.sample(8, "cpu", y=y, seed=1)
    parts = [diffusion.sample(3, "cpu", y=y[:3], seed=1), diffusion.sample(5, "cpu", y=y[3:], seed=1, first_index=3)]
    assert float((whole - torch.cat(parts)).abs().max()) < 1e-3


def test_torch_manual_seed_makes_sampling_repeatable() -> None:
    diffusion = pixelwise()
    torch.manual_seed(3)
    first, second = diffusion.sample(2, "cpu"), diffusion.sample(2, "cpu")
    torch.manual_seed(3)
    assert torch.equal(diffusion.sample(2, "cpu"), first) and not torch.equal(first, second)


def test_given_noise_starts_the_chain() -> None:
    diffusion = pixelwise()
    x_T = torch.randn(3, 2, 5, 7)
    kept = x_T.clone()
    sequence = diffusion.sample_diffusion_sequence(3, "cpu", seed=1, noise=x_T)
    assert torch.equal(sequence[0], x_T) and torch.equal(x_T, kept), "the caller's tensor stays as it was"
    assert len(sequence) == 13
    assert torch.equal(sequence[-1], diffusion.sample(3, "cpu", seed=1, noise=x_T))


@pytest.mark.parametrize("size", [(6,), (5, 7), (3, 4, 5)])
def test_data_of_any_rank(size: tuple[int, ...]) -> None:
    diffusion = pixelwise(size)
    assert float(diffusion(torch.randn(3, 2, *size)).detach()) > 0
    images = diffusion.sample(2, "cpu", seed=0)
    assert images.shape == (2, 2, *size) and images.isfinite().all()


def test_the_network_is_told_each_timestep() -> None:
    diffusion = pixelwise()
    diffusion.sample(2, "cpu")
    times = diffusion.ema_model.times
    assert [t.tolist() for t in times] == [[k, k] for k in reversed(range(12))]
    assert all(t.dtype == torch.int64 for t in times)


def test_sampling_is_in_eval_mode_and_restores_each_module() -> None:
    diffusion = small().train()
    diffusion.update_ema()
    diffusion.ema_model.mid[0].eval()
    modes = [m.training for m in diffusion.modules()]
    seen = []
    diffusion.ema_model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    diffusion.sample(1, "cpu")
    assert seen and not any(seen)
    assert [m.training for m in diffusion.modules()] == modes


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


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_remove_noise_is_the_mean_of_the_posterior(prediction: str) -> None:
    """Equation 7 of Ho et al. written out, for each network and in the plan's precision also for half images."""
    diffusion = pixelwise(prediction=prediction)
    diffusion.model.gain.data.fill_(0.7)
    x, t = torch.randn(3, 2, 5, 7), torch.tensor([0, 5, 11])
    abar = torch.from_numpy(np.cumprod(1 - BETAS))
    a, before = (v.view(3, 1, 1, 1) for v in (abar[t], torch.cat([torch.ones(1), abar])[t]))
    beta = torch.from_numpy(BETAS)[t].view(3, 1, 1, 1)
    means = []
    for use_ema, network in ((True, diffusion.ema_model), (False, diffusion.model)):
        out = network(x, t).detach().double()
        x0 = {"eps": (x - (1 - a).sqrt() * out) / a.sqrt(), "x0": out, "v": a.sqrt() * x - (1 - a).sqrt() * out}
        mean = before.sqrt() * beta / (1 - a) * x0[prediction] + (1 - beta).sqrt() * (1 - before) / (1 - a) * x
        means.append(diffusion.remove_noise(x, t, None, use_ema=use_ema))
        assert torch.allclose(means[-1].double(), mean, atol=1e-4)
    assert not torch.allclose(*means, atol=1e-3)
    assert diffusion.remove_noise(x.half(), t, None).dtype == torch.float32


def test_get_losses_checks_too() -> None:
    with pytest.raises(ValueError, match="x must have shape"):
        pixelwise().get_losses(torch.zeros(2, 2, 5, 6), torch.tensor([0, 1]), None)


def test_labels_are_checked_for_any_network() -> None:
    diffusion = Diffusion(Pixelwise(), (5, 7), 2, 3, BETAS)
    with pytest.raises(ValueError, match=r"y must lie in \[0, 3\)"):
        diffusion(torch.zeros(2, 2, 5, 7), torch.tensor([0, 3]))


def test_numpy_integers_and_lists_work() -> None:
    four = np.int64(4)
    diffusion = Diffusion(Pixelwise(), [four, np.int32(6)], np.int64(2), None, BETAS, ema_update_rate=np.int64(1))
    images = diffusion.sample(four, "cpu", num_steps=np.int64(3), first_index=np.int64(2), seed=np.uint64(5))
    assert torch.equal(images, diffusion.sample(4, "cpu", num_steps=3, first_index=2, seed=5))
    Diffusion(Pixelwise(), np.array([8, 8]), 2, None, BETAS, seed=np.int64(5))
    net = UNet(np.int64(1), np.int64(8), np.array([1, 2]), np.int64(1), num_groups=np.int64(4), initial_pad=np.int64(1))
    assert net(torch.zeros(1, 1, 6, 6)).shape == (1, 1, 6, 6)
    assert len(generate_linear_schedule(np.int64(5), 0.1, np.float32(0.2))) == 5


def test_one_step_starts_at_the_last_timestep() -> None:
    diffusion = pixelwise()
    diffusion.sample(1, "cpu", num_steps=1)
    assert [t.tolist() for t in diffusion.ema_model.times] == [[11]]


def test_torch_rng_draws_in_the_order_of_memory_and_not_for_given_noise() -> None:
    diffusion = Diffusion(Pixelwise(), (5, 7), 2, None, BETAS, rng="torch")
    noise = torch.randn(2, 2, 5, 7)
    samples = []
    for given in (noise, noise.double(), noise.to(memory_format=torch.channels_last)):
        torch.manual_seed(0)
        samples.append(diffusion.sample(2, "cpu", noise=given))
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
    torch.manual_seed(0)
    for _ in range(11):
        torch.randn(2, 2, 5, 7)
    after = torch.randn(1)
    torch.manual_seed(0)
    diffusion.sample(2, "cpu", noise=noise)
    assert torch.equal(torch.randn(1), after), "one draw for each step with t > 0, none for x_T"


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


# Warnings


def test_an_ema_that_was_never_updated_warns_once() -> None:
    diffusion = small().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.sample(1, "cpu")  # nothing was trained yet: no reason to warn
        diffusion(torch.zeros(1, 1, 8, 8))
        diffusion.sample(1, "cpu", use_ema=False)
    with pytest.warns(UserWarning, match="update_ema"):
        diffusion.sample(1, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.sample(1, "cpu")
        other = small().train()
        other(torch.zeros(1, 1, 8, 8))
        other.update_ema()
        other.sample(1, "cpu")
        evaluated = small().eval()
        evaluated(torch.zeros(1, 1, 8, 8))
        evaluated.sample(1, "cpu")
        loaded = small().train()
        loaded.load_state_dict(other.state_dict())
        loaded.load_extra_state({"step": 0})
        loaded(torch.zeros(1, 1, 8, 8))
        loaded.sample(1, "cpu")


def test_labels_for_an_unconditional_network_warn_once() -> None:
    diffusion = small()
    diffusion.update_ema()
    y = torch.tensor([1, 2])
    with pytest.warns(UserWarning, match="y is ignored"):
        diffusion(torch.zeros(2, 1, 8, 8), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.sample(2, "cpu", y=y)


# Errors

X = torch.zeros(2, 1, 8, 8)
Y = torch.tensor([0, 1])

CONSTRUCTOR = [
    ({"model": lambda x, t: x}, TypeError, "model must be a torch.nn.Module"),
    ({"img_size": 8}, TypeError, "img_size must be a tuple of integers, got 8"),
    ({"img_size": (8, 0)}, ValueError, "img_size"),
    ({"img_channels": 0}, ValueError, "img_channels must be an integer of at least 1"),
    ({"betas": [0.1, 1.2]}, ValueError, r"betas\[1\] is 1.2"),
    ({"betas": [0.1, float("nan")]}, ValueError, r"betas\[1\] is nan"),
    ({"betas": [0.0, 0.1]}, ValueError, r"betas\[0\] is 0.0"),
    ({"betas": [0.1, 1.0]}, ValueError, "prediction='x0' or 'v'"),
    ({"betas": [1.0, 0.1], "prediction": "v"}, ValueError, r"betas\[0\] is 1.0"),
    ({"betas": []}, ValueError, "betas must have shape"),
    ({"betas": [[0.1]]}, ValueError, "betas must have shape"),
    ({"betas": "linear"}, TypeError, "betas must be a vector"),
    ({"loss_type": "huber"}, ValueError, "loss_type must be one of l1, l2"),
    ({"rng": "numpy"}, ValueError, "rng must be one of philox, torch"),
    ({"rng": "torch", "seed": 1}, ValueError, "seed is for rng='philox'"),
    ({"prediction": "score"}, ValueError, "prediction must be one of"),
    ({"ema_decay": 1.5}, ValueError, r"ema_decay must be a finite number in \[0, 1\]"),
    ({"ema_update_rate": 0}, ValueError, "ema_update_rate must be an integer of at least 1"),
    ({"ema_decay": None}, TypeError, "ema_decay must be a finite number"),
    ({"ema_start": "a"}, TypeError, "ema_start must be an integer"),
    ({"num_classes": "3"}, TypeError, "num_classes must be an integer"),
    ({"num_classes": 0}, ValueError, "num_classes must be an integer of at least 1"),
    ({"img_channels": True}, TypeError, "img_channels must be an integer"),
    ({"loss_type": ["l1", "l2"]}, ValueError, "loss_type must be one of l1, l2"),
    ({"seed": "5"}, TypeError, "seed must be an integer"),
    ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ({"seed": 2**64}, ValueError, "seed must be an integer in"),
    ({"betas": None}, TypeError, "betas must be a vector of numbers"),
    ({"betas": [0.1j]}, TypeError, "betas must be a vector of numbers"),
    ({"betas": [1e-17] * 5}, ValueError, r"betas\[0\] is 1e-17, too small"),
]


@pytest.mark.parametrize(("change", "kind", "text"), CONSTRUCTOR)
def test_bad_construction(change, kind, text) -> None:
    arguments = {"model": Pixelwise(), "img_size": (8, 8), "img_channels": 1, "num_classes": None, "betas": BETAS}
    with pytest.raises(kind, match=text):
        Diffusion(**arguments | change)


def test_a_last_beta_of_one_is_allowed_where_it_can_be_inverted() -> None:
    betas = np.append(BETAS, 1.0)
    for prediction in ("x0", "v"):
        diffusion = Diffusion(Pixelwise(), (4, 4), 1, None, torch.from_numpy(betas), prediction=prediction)
        assert diffusion.sample(2, "cpu", seed=0).isfinite().all()


CALLS = [
    (lambda d: d(X[:, :, :7]), ValueError, r"x must have shape \[N, 1, 8, 8\] with N >= 1, got"),
    (lambda d: d(X.byte()), TypeError, "x must be a floating point tensor, got uint8"),
    (lambda d: d("image"), TypeError, "x must be a tensor"),
    (lambda d: d(X), ValueError, "y is required: this network was built with num_classes=3"),
    (lambda d: d(X, Y[:1]), ValueError, r"y must have shape \[2\]"),
    (lambda d: d(X, Y + 2), ValueError, r"y must lie in \[0, 3\)"),
    (lambda d: d(X, Y - 1), ValueError, r"y must lie in \[0, 3\)"),
    (lambda d: d(X, Y.float()), TypeError, "y must be int64, the classes; got float32"),
    (lambda d: d.get_losses(X, torch.tensor([0, 12]), Y), ValueError, r"t must lie in \[0, 12\)"),
    (lambda d: d.get_losses(X, torch.tensor([0.0, 1.0]), Y), TypeError, "t must have dtype"),
    (lambda d: d.perturb_x(X, Y, X[:1]), ValueError, "noise must have shape"),
    (lambda d: d.remove_noise(X[:, :, 1:], Y, Y), ValueError, "x must have shape"),
    (lambda d: d.remove_noise(X, Y + 11, Y), ValueError, r"t must lie in \[0, 12\)"),
    (lambda d: d.sample(2, "cpu", y=Y[:1]), ValueError, r"y must have shape \[2\]"),
    (lambda d: d.sample(2, "cpu", y=[0, 1]), TypeError, "y must be a tensor"),
    (lambda d: d.sample(0, "cpu"), ValueError, "batch_size must be an integer of at least 1, got 0"),
    (lambda d: d.sample(2.0, "cpu"), TypeError, "batch_size must be an integer of at least 1, got 2.0"),
    (lambda d: d.sample(2, "meta", y=Y), ValueError, r"device is meta, the network is on cpu"),
    (lambda d: d.sample(2, "cpu", y=Y, sampler="ddmp"), ValueError, "sampler must be a Plan or one of ddpm"),
    (lambda d: d.sample(2, "cpu", y=Y, num_steps=13), ValueError, r"num_steps must be an integer in \[1, 12\], got 13"),
    (lambda d: d.sample(2, "cpu", y=Y, sampler_options={"eta": 1}), TypeError, "'ddpm' has no option 'eta'"),
    (lambda d: d.sample(2, "cpu", y=Y, sampler=d.plan(), num_steps=3), ValueError, "a Plan holds its own"),
    (lambda d: d.sample(2, "cpu", y=Y, first_index=-1), ValueError, r"first_index must be an integer in \[0, "),
    (lambda d: d(X[:0], Y[:0]), ValueError, "with N >= 1"),
    (lambda d: d(X.to("meta"), Y), ValueError, "x is on meta, this Diffusion on cpu"),
    (lambda d: d.sample(True, "cpu"), TypeError, "batch_size must be an integer"),
    (lambda d: d.sample(-1, "cpu", y=Y), ValueError, "batch_size must be an integer of at least 1, got -1"),
    (lambda d: d.sample(2, None), ValueError, "device must be one such as 'cpu' or 'cuda:0', got None"),
    (lambda d: d.sample(2, "gpu"), ValueError, "device must be one such as"),
    (lambda d: d.sample(2, "cpu", y=Y, num_steps="3"), TypeError, "num_steps must be an integer"),
    (lambda d: d.sample(2, "cpu", y=Y, sampler=["ddpm"]), ValueError, "sampler must be a Plan or one of ddpm"),
    (lambda d: d.sample(2, "cpu", y=Y, sampler_options={"clip": 0.5}), TypeError, "clip must be True or False"),
    (lambda d: d.sample(2, "cpu", y=Y, first_index=2.5), TypeError, "first_index must be an integer"),
    (lambda d: d.sample(2, "cpu", y=Y, first_index=2**56), ValueError, "first_index must be an integer in"),
    (lambda d: d.sample(2, "cpu", y=Y, seed=3.0), TypeError, "seed must be an integer"),
    (lambda d: d.sample(2, "cpu", y=Y, seed=2**64), ValueError, "seed must be an integer in"),
    (lambda d: d.sample(2, "cpu", y=Y, callback=5), TypeError, "callback must be a function"),
    (lambda d: d.load_state_dict(None), TypeError, "state_dict must be a dictionary, got None"),
    (lambda d: d.load_state_dict(d.state_dict(), step=-1), ValueError, "step must be an integer of at least 0"),
    (lambda d: d.load_extra_state({"step": "a"}), TypeError, "step must be an integer"),
    (lambda d: Diffusion.from_config({}), TypeError, "config must be a Config"),
    (lambda d: d.sample(2, "cpu", y=Y, noise=X[:1]), ValueError, "noise must have shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), CALLS)
def test_bad_calls(call, kind, text) -> None:
    with pytest.raises(kind, match=text):
        call(small(num_classes=3))


def test_torch_rng_refuses_what_only_philox_can_do() -> None:
    diffusion = pixelwise(rng="torch")
    for options in ({"seed": 1}, {"first_index": 2}):
        with pytest.raises(ValueError, match="with rng='torch' call torch.manual_seed"):
            diffusion.sample(2, "cpu", **options)
