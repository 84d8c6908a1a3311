"""Diffusion: the loss is its formula, a chain is the textbook's, and what does not fit is named."""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from toys import Pixelwise, condition

from ddpm_fast import Diffusion, ops, reference
from ddpm_fast.reference.samplers import ddpm_loop
from ddpm_fast.samplers import SAMPLERS
from ddpm_fast.samplers.steps import SPACINGS

from .harness import FLOATS, JUNK, REFUSED, Draw, attempt, fuzz, often, one, other, spoilt, tensor
from .test_noise import state

BETAS = np.linspace(0.05, 0.4, 5)
HALF = (torch.float16, torch.bfloat16)
SIDES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def made(draw: Draw, **options: Any) -> Diffusion:
    size, prediction = tuple(draw(SIDES)), one(draw, "eps", "x0", "v")
    options = {"prediction": prediction, "loss_type": one(draw, "l1", "l2"), "seed": 3} | options
    return Diffusion(Pixelwise(), size, one(draw, 1, 2), one(draw, None, 3), BETAS, **options)


def batch(draw: Draw, d: Diffusion, n: int, dtype: torch.dtype | None = None) -> Tensor:
    return tensor(draw, (n, d.img_channels, *d.img_size), dtype)


def same(result: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Equal up to float32's rounding of the largest value; where the one is no number, neither is the other."""
    known = expected.isfinite() & (expected.abs() < 1e30)
    assert result.shape == expected.shape and bool(result[expected.isnan()].isnan().all())
    if known.any():
        top = float(expected[known].abs().max())
        eps = torch.finfo(result.dtype if result.dtype in HALF else torch.float32).eps  # of the network
        assert float((result[known].double() - expected[known].double()).abs().max()) <= 64 * eps * max(top, scale)


@fuzz(250)
def test_constructor(draw: Draw) -> bool:
    args = {"model": Pixelwise(), "img_size": tuple(draw(SIDES)), "img_channels": one(draw, 1, 3)}
    args |= {"num_classes": one(draw, None, 1, 10), "betas": BETAS, "loss_type": one(draw, "l1", "l2")}
    args |= {"ema_decay": draw(st.floats(0, 1)), "ema_start": draw(st.integers(0, 9)), "ema_update_rate": 1}
    args |= {"rng": one(draw, "philox", "torch"), "seed": one(draw, None, None, 5, -1, 2**64 - 1)}
    args |= {"prediction": one(draw, "eps", "x0", "v")}
    return attempt(Diffusion, **spoilt(draw, args)) is not REFUSED


@fuzz(350)
def test_forward(draw: Draw) -> bool:
    """The mean distance of gain x_t + t / 1000 + y / 100 from the noise, x_start or v at the drawn timesteps."""
    d, n = made(draw), one(draw, 1, 2, 3)
    x = batch(draw, d, n)
    args = spoilt(draw, {"x": x, "y": one(draw, None, torch.arange(n) % 3)})
    loss = attempt(d.forward, **args, names=("model_out",))
    if loss is REFUSED:
        return False
    x, noise_state = args["x"].double(), ops.NoiseState.at(3, 1)
    t = reference.noise.timesteps(len(x), 5, noise_state)
    z = reference.noise.noise(x.shape, noise_state, ops.PERTURB).double()
    column = (-1, *[1] * (x.ndim - 1))
    abar = torch.tensor(np.cumprod(1 - BETAS))[t].view(column)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    shift = 0 if args["y"] is None else condition(torch.as_tensor(args["y"])).view(column) * 0.01
    out = 0.3 * (a * x + s * z) + 0.001 * t.view(column) + shift
    distance = out - {"eps": z, "x0": x, "v": a * z - s * x}[d.prediction]
    expected = distance.abs().mean() if d.loss_type == "l1" else distance.square().mean()
    if float(args["x"].abs().max()) < 1e3:  # else it overflows, or drowns what it should show
        coarse = torch.finfo(args["x"].dtype).eps / torch.finfo(torch.float32).eps
        same(loss.detach(), expected, scale=max(1.0, coarse) * max(1.0, float(x.abs().max()) ** 2))
    return True


@fuzz(300)
def test_perturb_x(draw: Draw) -> bool:
    d, n = made(draw), one(draw, 0, 1, 3)
    x = batch(draw, d, n)
    args = {"x": x, "t": torch.arange(n) % 5, "noise": batch(draw, d, n) if often(draw) else state(draw)}
    args = spoilt(draw, args)
    result = attempt(d.perturb_x, **args, names=("x_start",))
    if result is REFUSED:
        return False
    tables = (d.sqrt_alphas_cumprod, d.sqrt_one_minus_alphas_cumprod)
    expected = reference.q_sample.q_sample(args["x"], args["t"], *tables, args["noise"])
    same(result, expected)
    return True


@fuzz(300)
def test_remove_noise(draw: Draw) -> bool:
    """Ho et al. 2020, equation 11, in its own words."""
    d, n = made(draw, prediction="eps"), one(draw, 1, 3)
    args = {"x": batch(draw, d, n), "t": torch.arange(n) % 5, "y": one(draw, None, torch.arange(n)), "use_ema": True}
    args = spoilt(draw, args)
    result = attempt(d.remove_noise, **args)
    if result is REFUSED:
        return False
    x, t = args["x"].double(), args["t"]
    column = (-1, *[1] * (x.ndim - 1))
    beta, abar = (torch.tensor(v)[t].view(column) for v in (BETAS, np.cumprod(1 - BETAS)))
    shift = 0 if args["y"] is None else condition(torch.as_tensor(args["y"])).view(column) * 0.01
    out = 0.3 * x + 0.001 * t.view(column) + shift
    expected = (x - beta / (1 - abar).sqrt() * out) / (1 - beta).sqrt()
    known = x.abs() < 1e3
    coarse = torch.finfo(args["x"].dtype).eps / torch.finfo(torch.float32).eps  # the input as the network rounds it
    same(result[known], expected[known], scale=16 * max(1.0, coarse))
    return True


@fuzz(350)
def test_every_sampler(draw: Draw) -> bool:
    """Any spacing and end on any schedule give finite tables, and finite images."""
    d = made(draw)
    spacing = one(draw, *SPACINGS, [1, 2], [0], "even", 3)
    args: dict[str, Any] = {"sampler": one(draw, *SAMPLERS), "num_steps": one(draw, None, 1, 2, 3, 4, 9)}
    args["sampler_options"] = {"spacing": spacing, "final": one(draw, "clean", "first"), "clip": one(draw, True, False)}
    images = attempt(d.sample, batch_size=1, device="cpu", seed=1, **args, names=("clip", "final", "spacing"))
    if images is REFUSED:
        return False
    assert images.isfinite().all()
    return True


@fuzz(350)
def test_sample(draw: Draw) -> bool:
    """Ancestral sampling: Ho et al. 2020, algorithm 2, over the noise that seed and index name."""
    d = made(draw)
    n, seed, first = one(draw, 1, 2, 3), draw(st.integers(0, 2**64 - 1)), one(draw, 0, 7, 2**40)
    args: dict[str, Any] = {"batch_size": n, "device": "cpu", "y": None, "use_ema": True, "sampler": "ddpm"}
    args |= {"num_steps": one(draw, None, 1, 3, 5), "seed": seed, "first_index": first, "progress": False}
    args |= {"sampler_options": one(draw, None, {"variance": "posterior"}, {"clip": True}), "callback": None}
    args |= {"noise": batch(draw, d, n) if often(draw, 2) else None}
    args = spoilt(draw, args)
    images = attempt(d.sample, **args, names=("clip", "variance"))
    if images is REFUSED:
        return False
    assert images.shape == (args["batch_size"], d.img_channels, *d.img_size) and images.dtype == torch.float32
    if args["seed"] is None or args["y"] is not None:
        return True
    options = dict(args["sampler_options"] or {})
    plan = d.plan("ddpm", args["num_steps"])
    t = plan.column("t").long().tolist()
    where = ops.NoiseState.at(args["seed"], 0, args["first_index"])
    start = args["noise"] if args["noise"] is not None else reference.noise.noise(images.shape, where, ops.X_T)
    zs = [reference.noise.noise(images.shape, where._replace(draw=torch.tensor(k)), ops.REVERSE) for k in range(len(t))]
    expected = ddpm_loop(
        lambda x, i: 0.3 * x + 0.001 * i,
        start.float().double(),
        t,
        [*d.exact_alphas_cumprod()[t].tolist(), 1.0],
        [z.double() for z in zs],
        prediction=d.prediction,
        variance=options.get("variance", "beta"),
        clip=options.get("clip", False),
    )
    if float(start.abs().max()) < 1e3:
        same(images, expected, scale=16.0 * max(1.0, float(start.abs().max())))
    return True


@fuzz(200)
def test_load_state_dict(draw: Draw) -> bool:
    """Exactly the saved tensors, or torch's own complaint (RuntimeError), or ours."""
    d = made(draw)
    saved: Any = {k: v.clone() for k, v in d.state_dict().items()}
    name = one(draw, *saved)
    change = one(draw, "nothing", "value", "missing", "surplus", "all", "step")
    if change == "value":
        saved[name] = other(draw, saved[name])
    elif change == "missing":
        del saved[name]
    elif change == "surplus":
        saved[one(draw, "x", 3, None)] = torch.zeros(1)
    elif change == "all":
        saved = one(draw, *JUNK)
    step = one(draw, *JUNK) if change == "step" else 2
    try:
        if attempt(d.load_state_dict, saved, step=step, names=("betas",)) is REFUSED:
            return False
    except RuntimeError as error:
        assert "Error(s) in loading state_dict" in str(error)
        return False
    now = d.state_dict()
    assert d.step == int(step) if step is not None else True
    for name, value in saved.items():  # torch takes one number for a scalar
        expected = value.to(now[name].dtype).reshape(now[name].shape)
        assert torch.equal(now[name].nan_to_num(), expected.nan_to_num())
    return True


@fuzz(100)
def test_dtypes_of_the_network(draw: Draw) -> bool:
    """In any floating dtype of the network and of x the loss is finite, and at least float32."""
    d = made(draw).to(one(draw, *FLOATS))
    x = batch(draw, d, 2).nan_to_num(0, 1, -1).clamp(-1, 1)
    loss = attempt(d.forward, **spoilt(draw, {"x": x, "y": None}))
    if loss is REFUSED:
        return False
    assert loss.isfinite() or not torch.as_tensor(x).isfinite().all()
    return loss.dtype in (torch.float32, torch.float64)
