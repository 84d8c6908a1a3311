"""Schedules, plans, averages and configurations: numbers that have a formula, written out again here."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from ddpm_fast import EMA, Config, Plan, generate_cosine_schedule, generate_linear_schedule, ops, preset, use_backend
from ddpm_fast.models.presets import PRESETS
from ddpm_fast.samplers import COLUMNS, make_plan
from ddpm_fast.schedules import check_betas, tables

from .harness import JUNK, REFUSED, SMALL, Draw, attempt, fuzz, often, one, spoilt, tensor

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
BETAS = st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=9)


def close(result: Any, expected: Any, bound: float = 1e-12) -> None:
    assert np.shape(result) == np.shape(expected)
    for a, b in zip(np.ravel(result), np.ravel(expected), strict=True):
        assert abs(float(a) - float(b)) <= bound * max(1.0, abs(float(b))), (a, b)


@fuzz(200)
def test_linear_schedule(draw: Draw) -> bool:
    args = spoilt(draw, {"T": draw(SMALL), "low": draw(NUMBERS), "high": draw(NUMBERS)})
    betas = attempt(generate_linear_schedule, **args)
    if betas is REFUSED:
        return False
    low, high, last = Fraction(float(args["low"])), Fraction(float(args["high"])), max(1, len(betas) - 1)
    assert betas.dtype == np.float64 and len(betas) == args["T"]
    for i, beta in enumerate(betas):
        exact = low + (high - low) * i / last
        assert abs(Fraction(beta) - exact) <= max(abs(low), abs(high)) * Fraction(1, 2**50) + Fraction(5, 2**1074)
    return True


@fuzz(200)
def test_cosine_schedule(draw: Draw) -> bool:
    args = spoilt(draw, {"T": draw(st.integers(0, 40)), "s": draw(st.floats(0, 4) | NUMBERS)})
    betas = attempt(generate_cosine_schedule, **args)
    if betas is REFUSED:
        return False
    steps, s = int(args["T"]), float(args["s"])
    assert len(betas) == steps and np.isfinite(betas).all()
    if s < 10:  # beyond, all angles are one in float64
        f = [math.cos((i / steps + s) / (1 + s) * math.pi / 2) ** 2 for i in range(steps + 1)]
        close(betas, [min(1 - b / a, 0.999) for a, b in zip(f, f[1:], strict=False)], 1e-9)
    return True


def as_any(draw: Draw, values: list[float]) -> Any:
    """The numbers as a list, tuple, array or tensor of some dtype."""
    kind = one(draw, list, tuple, np.array, torch.tensor, torch.DoubleTensor, np.float32)
    return kind(values)


def doubles(values: Any) -> np.ndarray:
    """The numbers as float64; numpy has no bfloat16."""
    return np.asarray(values.double() if isinstance(values, torch.Tensor) else values, dtype=np.float64)


@fuzz(200)
def test_betas(draw: Draw) -> bool:
    values = draw(BETAS if often(draw) else st.lists(NUMBERS | st.sampled_from((0.0, 1.0, 1e-20)), max_size=4))
    prediction = one(draw, "eps", "x0", "v")
    args = spoilt(draw, {"betas": as_any(draw, values)}) | {"prediction": prediction}
    betas = attempt(check_betas, **args)
    if betas is REFUSED:
        return False
    assert betas.dtype == np.float64 and np.array_equal(betas, doubles(args["betas"]))
    made, alphas_cumprod = tables(betas), [math.prod(1 - betas[: i + 1]) for i in range(len(betas))]
    close(made["alphas_cumprod"], alphas_cumprod)
    close(made["sqrt_one_minus_alphas_cumprod"], [math.sqrt(1 - a) for a in alphas_cumprod])
    return True


@fuzz(300)
def test_plan(draw: Draw) -> bool:
    rows: Any = tensor(draw, (draw(SMALL), 8)).double().clone(memory_format=torch.contiguous_format)
    if often(draw):
        rows[:, 0] = rows[:, 0].nan_to_num().round()
    rows = one(draw, rows, rows.tolist(), rows.numpy())
    args = spoilt(draw, {"rows": rows, "clip": one(draw, None, 1, 0.5, 1e300, np.float32(2))})
    plan = attempt(Plan, **args)
    if plan is REFUSED:
        return False
    expected = doubles(args["rows"])
    assert np.array_equal(plan.rows.numpy(), expected) and len(plan) == len(expected)
    column = attempt(plan.column, one(draw, *COLUMNS, *JUNK))
    assert column is REFUSED or column.shape == (len(plan),)
    t = attempt(plan.timesteps, one(draw, "cpu", torch.device("cpu"), "nowhere", 3.5, None))
    if t is not REFUSED:
        close(t[np.abs(expected[:, 0]) < 1e30], expected[:, 0][np.abs(expected[:, 0]) < 1e30], 1e-6)
    return True


@fuzz(300)
def test_make_plan(draw: Draw) -> bool:
    """Ancestral sampling: the posterior mean and its noise (Ho et al. 2020, equation 7)."""
    abar = np.cumprod(1 - np.array(draw(BETAS)))
    options = {"variance": one(draw, "beta", "posterior"), "clip": one(draw, True, False)}
    prediction = one(draw, "x0", "v", "eps")
    chosen = {"sampler": "ddpm", "num_steps": draw(st.none() | st.integers(0, len(abar) + 1)), "options": options}
    chosen = spoilt(draw, chosen)
    if not often(draw, 4) and isinstance(chosen["options"], dict):
        name = one(draw, "variance", "clip", "eta")
        chosen["options"] = chosen["options"] | {name: one(draw, *JUNK)}
    plan = attempt(
        make_plan, alphas_cumprod=abar, prediction=prediction, **chosen, names=("variance", "clip", "sampler_options")
    )
    if plan is REFUSED:
        return False
    t = plan.column("t").long().numpy()
    now, then = abar[t], np.append(abar[t[1:]], 1.0)
    assert t[0] == len(abar) - 1 and (np.diff(t) < 0).all()
    close(plan.column("c_0"), np.sqrt(then) * (1 - now / then) / (1 - now))
    close(plan.column("c_x"), np.sqrt(now / then) * (1 - then) / (1 - now))
    return True


@fuzz(200)
def test_ema(draw: Draw) -> bool:
    args = spoilt(draw, {"decay": draw(st.floats(-0.2, 1.2))})
    ema = attempt(EMA, **args)
    if ema is REFUSED:
        return False
    a, b = (nn.Linear(draw(st.integers(1, 2)), 2).to(one(draw, torch.float32, torch.float64)) for _ in range(2))
    before, new = a.weight.detach().double().clone(), b.weight.detach().double()
    done = attempt(ema.update_model_average, **spoilt(draw, {"ema_model": a, "current_model": b}))
    if done is not REFUSED:
        close(a.weight.detach(), (float(args["decay"]) * (before - new) + new).detach(), 1e-6)
    pair = spoilt(draw, {"old": one(draw, None, before), "new": new})
    average = attempt(ema.update_average, **pair)
    if average is not REFUSED and pair["old"] is None:
        assert average is pair["new"]
    return True


@fuzz(200)
def test_config(draw: Draw) -> bool:
    field = one(draw, *Config.__dataclass_fields__)
    values = PRESETS["digits"].to_dict()
    values[field] = one(draw, *JUNK, values[field])
    config = attempt(Config.from_dict, values if often(draw, 9) else one(draw, *JUNK), names=(*values, "key"))
    if config is REFUSED:
        return False
    assert Config.from_dict(config.to_dict()) == config
    return True


@fuzz(50)
def test_preset(draw: Draw) -> bool:
    name = one(draw, *PRESETS, *JUNK)
    config = attempt(preset, name, names=("preset",))
    return config is not REFUSED and config is PRESETS[name]


@fuzz(50)
def test_use_backend(draw: Draw) -> bool:
    name = one(draw, *ops.BACKENDS, *JUNK)

    def enter(name: Any) -> str:
        with use_backend(name):
            return "entered"

    return attempt(enter, name, names=("use_backend",)) == "entered"
