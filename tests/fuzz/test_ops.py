"""The ops: by the oracle's rule what their references are in float64, values and gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from ops.oracle import assert_rule
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ddpm_fast import ops, reference

from .harness import REFUSED, SIZES, SMALL, SPECIAL, Draw, attempt, fuzz, often, one, spoilt, tensor, unwrapped

ACTIVATIONS = st.sampled_from(("none", "silu", "relu", "mish"))


def agree(name: str, fast: Tensor, plain: Tensor, truth: Tensor, factor: float, size: float = 0) -> None:
    """The oracle's rule where the plain result is a number; what is no number in truth must not become one.

    `size`: of numbers whose rounding a result may inherit.
    """
    assert fast.shape == plain.shape and fast.dtype == plain.dtype, (name, fast.shape, plain.shape, fast.dtype)
    assert not bool(fast[truth.isnan() & plain.isnan()].isfinite().any()), f"{name}: a NaN is lost"
    numbers = plain.isfinite() & truth.isfinite()
    if torch.allclose(fast[numbers].double(), truth[numbers], rtol=0, atol=32 * torch.finfo(plain.dtype).eps * size):
        return  # where all cancels, even the truth is nothing but rounding
    assert_rule(name, fast[numbers], plain[numbers], truth[numbers], factor)


def run(function: Callable[..., Any], args: dict[str, Any], seed: int, differentiate: bool) -> Any:
    """(outputs, gradients) with repeatable cotangents; REFUSED where the function refused."""
    leaves = tree_map_only(Tensor, lambda t: t.detach(), args)
    floats = (
        [t for t in tree_leaves(leaves) if isinstance(t, Tensor) and t.is_floating_point()] if differentiate else []
    )
    for t in floats:
        t.requires_grad_()
    torch.manual_seed(seed)
    out = attempt(function, **leaves)
    if out is REFUSED:
        return REFUSED
    outs = [o for o in tree_leaves(out) if isinstance(o, Tensor)]
    if not floats or not any(o.requires_grad for o in outs) or any(t.is_meta for t in [*outs, *floats]):
        return [o.detach() for o in outs], []
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, floats, cotangents, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outs], list(grads)


def held(
    draw: Draw,
    op: Callable[..., Any],
    oracle: Callable[..., Any],
    args: dict[str, Any],
    drop: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> bool:
    """Whether an op took its arguments; if so, it agrees with its reference.

    `drop`: what the reference has not; `numbers`: what may be integers, and is float64 for the truth.
    """
    seed, differentiate = draw(st.integers(0, 99)), not any(args.get(k) is not None for k in (*drop, *numbers))
    fast = run(op, args, seed, differentiate)
    if fast is REFUSED:
        return False
    if any(o.is_meta for o in fast[0]):
        return True  # no numbers
    args = {k: v for k, v in unwrapped(args).items() if k not in drop}
    if isinstance(args.get("groups"), Tensor):
        args["groups"] = int(args["groups"])
    plain = run(oracle, args, seed, differentiate)
    exact = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
    exact |= {k: args[k].double() for k in numbers if isinstance(args[k], Tensor)}
    truth = run(oracle, exact, seed, differentiate)
    size = max([float(t[t.isfinite()].abs().amax()) for t in truth[0] if t.isfinite().any()], default=0.0)
    for factor, what, results in zip((2, 3), ("output", "gradient"), zip(fast, plain, truth, strict=True), strict=True):
        for i, (f, p, t) in enumerate(zip(*results, strict=True)):
            agree(f"{what} {i}", f, p, t, factor, size if what == "gradient" else 0)
    return True


def state(draw: Draw) -> ops.NoiseState:
    seed, draws = draw(st.integers(-(2**63), 2**64 - 1)), draw(st.integers(0, 2**40))
    return ops.NoiseState.at(seed, draws, one(draw, 0, 1, 2**32 - 1, 2**56 - 2))


def batch(draw: Draw) -> tuple[int, ...]:
    """[N, ...] of any rank."""
    return tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))


def maybe(draw: Draw, make: Callable[[], Any]) -> Any:
    return make() if often(draw) else None


def source(draw: Draw, shape: tuple[int, ...]) -> Any:
    return tensor(draw, shape) if often(draw) else state(draw)


@fuzz(600)
def test_q_sample(draw: Draw) -> bool:
    shape, steps = batch(draw), draw(SMALL)
    t = torch.tensor(draw(st.lists(st.integers(0, steps - 1), min_size=shape[0], max_size=shape[0])), dtype=torch.int64)
    args = {"x_start": tensor(draw, shape), "t": t, "noise": source(draw, shape)}
    args |= {name: tensor(draw, (steps,)) for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")}
    return held(draw, ops.q_sample, reference.q_sample.q_sample, spoilt(draw, args))


@fuzz(300)
def test_extract(draw: Draw) -> bool:
    shape, steps = batch(draw), draw(SMALL)
    t = torch.tensor(draw(st.lists(st.integers(-1, steps), min_size=shape[0], max_size=shape[0])), dtype=torch.int64)
    args = spoilt(draw, {"a": tensor(draw, (steps,)), "t": t, "x_shape": shape})
    return held(draw, ops.extract, reference.q_sample.extract, args)


@fuzz(500)
def test_diffusion_loss(draw: Draw) -> bool:
    shape = batch(draw)
    args = {"model_out": tensor(draw, shape), "noise": source(draw, shape)}
    args |= {"loss_type": one(draw, "l1", "l2", "huber"), "reduction": one(draw, "mean", "none")}
    args |= {"noise_coef": maybe(draw, lambda: tensor(draw, shape[:1]))}
    if often(draw):
        args |= {"x_coef": tensor(draw, shape[:1]), "x_start": tensor(draw, shape)}
    return held(draw, ops.diffusion_loss, reference.diffusion_loss.diffusion_loss, spoilt(draw, args))


@fuzz(700)
def test_sampler_step(draw: Draw) -> bool:
    shape, rows = batch(draw), draw(SMALL)
    args = {"x": tensor(draw, shape), "model_out": tensor(draw, shape), "rows": tensor(draw, (rows, one(draw, 9, 8)))}
    args |= {"k": torch.tensor(draw(st.integers(0, rows - 1))), "noise": maybe(draw, lambda: source(draw, shape))}
    args |= {
        "hist": maybe(draw, lambda: tensor(draw, shape)),
        "variance": maybe(draw, lambda: tensor(draw, shape)),
        "clip": one(draw, None, 1.0, 0.5, 1e300, np.float32(0.25)),
    }
    args |= {"return_x0": one(draw, True, False)}
    if not often(draw, 4):
        args |= {"out": tensor(draw, shape)}
    return held(draw, ops.sampler_step, reference.sampler_step.sampler_step, spoilt(draw, args), drop=("out", "x0_out"))


@fuzz(300)
def test_timestep_embedding(draw: Draw) -> bool:
    t = tensor(draw, (draw(SIZES),)) * 100
    args = {"t": t, "dim": 2 * draw(SMALL), "scale": one(draw, 1.0, 1000, -0.0, 1e300)}
    args["t"] = t.to(one(draw, t.dtype, torch.int64, torch.int32)) if t.isfinite().all() else t
    oracle = reference.timestep_embedding.timestep_embedding
    return held(draw, ops.timestep_embedding, oracle, spoilt(draw, args), numbers=("t",))


@fuzz(200)
def test_ema_update(draw: Draw) -> bool:
    shapes = draw(st.lists(st.lists(SIZES, max_size=3).map(tuple), max_size=3))
    averages, values = ([tensor(draw, shape) for shape in shapes] for _ in range(2))
    args = spoilt(draw, {"averages": averages, "values": values, "decay": one(draw, 0.0, 0.3, 0.9999, 1.0)})
    plain, new = (tree_map_only(Tensor, lambda t: t.detach().clone(), args[k]) for k in ("averages", "values"))
    if attempt(ops.ema_update, **args) is REFUSED:
        return False
    decay, oracle = float(args["decay"]), reference.ema_update.ema_update
    truth, exact = ([t.to(torch.float64, copy=True) for t in tensors] for tensors in (plain, new))
    oracle(truth, exact, decay)
    oracle(plain, new, decay)
    for i, (f, p, t) in enumerate(zip(args["averages"], plain, truth, strict=True)):
        if not f.is_meta:
            agree(str(i), f.detach(), p, t, 2)
    return True


@fuzz(300)
def test_residual_sum(draw: Draw) -> bool:
    shape = (draw(SIZES), draw(SIZES), draw(SIZES), draw(SIZES))
    args = {"x": tensor(draw, shape), "residual": tensor(draw, shape)}
    args |= {"bias": maybe(draw, lambda: tensor(draw, shape[1:2]))}
    return held(draw, ops.residual_sum, reference.residual_sum.residual_sum, spoilt(draw, args))


MODEST = tuple(v for v in SPECIAL if not abs(v) > 1e5)  # so that sums and products of a norm's arguments are numbers


def channels(draw: Draw, size: int) -> tuple[dict[str, Any], int]:
    """x, and x2 or not, of one dtype; and their channels together."""
    n, h, w, dtype = draw(SIZES), draw(SIZES), draw(SIZES), one(draw, *(torch.float32, torch.float16, torch.float64))
    first = draw(st.integers(0, size)) if not often(draw, 3) else size
    args = {"x": tensor(draw, (n, first, h, w), dtype, MODEST)}
    return args | ({} if first == size else {"x2": tensor(draw, (n, size - first, h, w), dtype, MODEST)}), size


@fuzz(900)
def test_group_norm_silu(draw: Draw) -> bool:
    groups = draw(SMALL)
    args, c = channels(draw, groups * draw(st.integers(0, 3)))
    n = args["x"].shape[0]
    args |= {"groups": groups, "eps": one(draw, 1e-5, 0, 1e30), "activation": draw(ACTIVATIONS)}
    args |= {"weight": None, "bias": None}
    if often(draw):
        args |= {"weight": tensor(draw, (c,), special=MODEST), "bias": tensor(draw, (c,))}
    args["add"] = maybe(draw, lambda: tensor(draw, one(draw, (c,), (n, c)), special=MODEST))
    args["residual"] = maybe(draw, lambda: tensor(draw, args["x"].shape, special=MODEST))
    args |= {name: maybe(draw, lambda: tensor(draw, (n, c), special=MODEST)) for name in ("scale", "shift")}
    if not often(draw, 3):
        args["dropout"] = ops.Dropout(one(draw, 0.0, 0.3, 1.0), state(draw), draw(st.integers(0, 256)))
    return held(draw, ops.group_norm_silu, reference.group_norm_silu.group_norm_silu, spoilt(draw, args))


@fuzz(700)
def test_conv3x3(draw: Draw) -> bool:
    args, c = channels(draw, draw(SIZES))
    n, h, w, k = args["x"].shape[0], *args["x"].shape[2:], draw(SIZES)
    dtype = args["x"].dtype if often(draw, 10) else None
    args |= {"weight": tensor(draw, (k, c, 3, 3), dtype), "bias": maybe(draw, lambda: tensor(draw, (k,), dtype))}
    args["residual"] = maybe(draw, lambda: tensor(draw, (n, k, h, w)))
    args["stats"] = one(draw, True, False)
    if not often(draw, 3):
        args["norm"] = ops.Norm(tensor(draw, (n, c)), tensor(draw, (n, c)), draw(ACTIVATIONS))
    return held(draw, ops.conv3x3, reference.conv3x3.conv3x3, spoilt(draw, args))
