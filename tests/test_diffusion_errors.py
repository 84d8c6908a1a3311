"""What Diffusion says of bad input: a table of cases."""

import numpy as np
import pytest
import torch
from toys import BETAS, Pixelwise, pixelwise, small

from ddpm_fast import Diffusion, Plan, UNet

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
    ({"loss_type": "l3"}, ValueError, "loss_type must be one of l1, l2, huber"),
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
    ({"loss_type": ["l1", "l2"]}, ValueError, "loss_type must be one of l1, l2, huber"),
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


NET = {"img_channels": 2, "base_channels": 4, "channel_mults": (1, 2, 2), "num_res_blocks": 1, "num_groups": 1}
MISMATCHES = [
    ({}, ((8, 8), 3, None), "img_channels is 3, but the UNet was built with img_channels=2: give both one value"),
    ({}, ((8, 30), 2, None), "img_size: width 30 is not divisible by 4: resize or pad to 32"),
    ({}, ((30, 30), 2, None), "img_size: height 30 .* or build the network with initial_pad=1"),
    ({}, ((8,), 2, None), r"img_size must be \(height, width\) for a UNet, got \(8,\)"),
]


@pytest.mark.parametrize(("options", "data", "text"), MISMATCHES)
def test_a_unet_for_other_data_is_refused_at_once(options, data, text) -> None:
    with pytest.raises(ValueError, match=text):
        Diffusion(UNet(**NET | options), *data, BETAS)


@pytest.mark.parametrize(("net", "num_classes"), [(None, 10), (10, None), (10, 3)])
def test_the_networks_number_of_classes_counts(net, num_classes) -> None:
    """The original scripts have 10 classes beside a network without, and Diffusion ignores its own number."""
    diffusion = Diffusion(UNet(**NET, num_classes=net), (8, 8), 2, num_classes, BETAS)
    assert diffusion(torch.zeros(1, 2, 8, 8), None if net is None else Y[:1]).isfinite()


def test_a_network_that_turns_its_data_into_the_unets_is_let_through() -> None:
    class Doubled(UNet):
        def forward(self, x, time=None, y=None):
            return super().forward(torch.cat([x, x], dim=1), time, y)[:, :1]

    hooked = UNet(**NET)
    hooked.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], args[0]], dim=1), *args[1:]))
    hooked.register_forward_hook(lambda module, args, out: out[:, :1])
    for net in (Doubled(**NET), hooked):
        assert Diffusion(net, (8, 8), 1, None, BETAS)(X).isfinite()


def test_a_last_beta_of_one_is_allowed_where_it_can_be_inverted() -> None:
    betas = np.append(BETAS, 1.0)
    for prediction in ("x0", "v"):
        diffusion = Diffusion(Pixelwise(), (4, 4), 1, None, torch.from_numpy(betas), prediction=prediction)
        assert diffusion.sample(2, "cpu", seed=0).isfinite().all()


def told(times: list[float]) -> Plan:
    return Plan([[t, 1, 1, 0, 1, 0, 0, 0] for t in times])


OF_X0 = Diffusion(Pixelwise(), (4, 4), 1, None, BETAS, prediction="x0").plan()

CALLS = [
    (lambda d: d(X[:, :, :7]), ValueError, r"x must have shape \[N, 1, 8, 8\] with N >= 1, got"),
    (lambda d: d(X.byte()), TypeError, r"x must be a floating point tensor, got uint8 .*: pixels become it by"),
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
    (lambda d: d.sample(2, "cpu", y=Y, sampler=OF_X0), ValueError, "is for prediction 'x0', the network's is"),
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
    (lambda d: d(X, Y.to("meta")), ValueError, "y must hold numbers, got int64"),
    (lambda d: d.sample(2, "cpu", y=Y, noise=X.to("meta")), ValueError, "noise must hold numbers"),
    (lambda d: d.load_state_dict({3: X}), TypeError, "state_dict must have names as its keys, got 3"),
    (lambda d: d.sample(2, "cpu", y=Y, use_ema=X), TypeError, "use_ema must be True or False"),
    (lambda d: d.sample(2, "cpu", y=Y, progress=X), TypeError, "progress must be True or False"),
    (lambda d: d.load_state_dict(d.state_dict(), step=-1), ValueError, "step must be an integer of at least 0"),
    (lambda d: d.load_extra_state({"step": "a"}), TypeError, "step must be an integer"),
    (lambda d: Diffusion.from_config({}), TypeError, "config must be a Config"),
    (lambda d: d.sample(2, "cpu", y=Y, noise=X[:1]), ValueError, "noise must have shape"),
    (lambda d: d([X, X], Y), TypeError, r"x must be a tensor, got \[float32 \[2, 1, 8, 8\] on cpu, .* \(list\)"),
    (lambda d: d({"image": X}), TypeError, r"got \{'image': float32 \[2, 1, 8, 8\] on cpu\} \(dict\)$"),
    (lambda d: d(X.numpy(), Y), TypeError, r"x must be a tensor, got float32 \[2, 1, 8, 8\] of numpy: torch.as_ten"),
    (lambda d: d.sample(2, "cpu", y=Y, sampler=told([5000, 1])), ValueError, "row 0 has t = 5000, expected 0 to 11"),
    (lambda d: d.sample(2, "cpu", y=Y, sampler=told([11, -1])), ValueError, "row 1 has t = -1, expected 0 to 11"),
    (lambda d: d.sample_diffusion_sequence(2, "cpu", Y, sampler=told([12])), ValueError, "row 0 has t = 12"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), CALLS)
def test_bad_calls(call, kind, text) -> None:
    with pytest.raises(kind, match=text):
        call(small(num_classes=3))


def test_a_noise_level_is_no_index() -> None:
    diffusion = pixelwise()
    diffusion.sample(2, "cpu", sampler=told([80.5, -0.25]))
    assert [t.tolist() for t in diffusion.ema_model.times] == [[80.5] * 2, [-0.25] * 2]


def test_torch_rng_refuses_what_only_philox_can_do() -> None:
    diffusion = pixelwise(rng="torch")
    for options in ({"seed": 1}, {"first_index": 2}):
        with pytest.raises(ValueError, match="with rng='torch' call torch.manual_seed"):
            diffusion.sample(2, "cpu", **options)
