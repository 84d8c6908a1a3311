"""Random numbers: the same bits from every backend, or a refusal by all of them."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from ops.oracle import backends

from ddpm_fast import ops, reference

from .harness import REFUSED, SCALE, SIZES, Draw, attempt, fuzz, one, spoilt, tensor, unwrapped

STREAMS = st.integers(0, 255)


def state(draw: Draw) -> ops.NoiseState:
    first = one(draw, 0, 1, 2**32 - 2, 2**40, 2**56 - 9)
    made = ops.NoiseState.at(draw(st.integers(-(2**63), 2**64 - 1)), draw(st.integers(0, 2**63 - 1)), first)
    if one(draw, True, False):  # an element of a larger tensor
        made = made._replace(seed=torch.stack([made.draw, made.seed])[1])
    return made


MOST = 2 if SCALE == 1 else 8  # samples, each a program of its own, that Triton's interpreter is given


def same_bits(function: Callable[..., Any], oracle: Callable[..., Any], args: dict[str, Any]) -> bool:
    """Whether the arguments were taken; then every backend gives the bits of the reference."""
    results, shape = [], args.get("shape")
    many = isinstance(shape, (list, tuple)) and shape and isinstance(shape[0], int) and shape[0] > MOST
    skipped = "triton" if many and not torch.cuda.is_available() else None
    taking = [backend for backend in backends("noise") if backend != skipped]
    for backend in taking:
        with ops.use_backend(backend):
            results.append(attempt(function, **args))
    if any(r is REFUSED for r in results):
        assert all(r is REFUSED for r in results)
        return False
    args = unwrapped(args)
    if "shape" in args:  # the reference takes tuples only
        args["shape"] = tuple(map(int, args["shape"]))
    expected = oracle(**args)
    for backend, result in zip(taking, results, strict=True):
        assert result.dtype == expected.dtype and result.shape == expected.shape
        if backend == "triton" and result.dtype is torch.bfloat16 and not torch.cuda.is_available():
            continue  # its interpreter truncates
        assert torch.equal(result, expected) and torch.equal(result.signbit(), expected.signbit())
    return True


def shape(draw: Draw, rank: int | None = None) -> Any:
    made = draw(st.lists(SIZES, min_size=rank or 1, max_size=rank or 4))
    return one(draw, tuple, list, torch.Size)(made)


@fuzz(400)
def test_noise(draw: Draw) -> bool:
    args = {"shape": shape(draw), "state": state(draw), "stream": draw(STREAMS)}
    args["dtype"] = one(draw, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
    return same_bits(ops.noise, reference.noise.noise, spoilt(draw, args))


@fuzz(300)
def test_timesteps(draw: Draw) -> bool:
    most = one(draw, 1, 2, 1000, 2**31)
    return same_bits(
        ops.timesteps,
        reference.noise.timesteps,
        spoilt(draw, {"num_samples": draw(SIZES), "num_timesteps": draw(st.integers(1, most)), "state": state(draw)}),
    )


@fuzz(300)
def test_dropout_mask(draw: Draw) -> bool:
    args = {"shape": shape(draw, 4), "p": draw(st.floats(0, 1)), "state": state(draw), "stream": draw(STREAMS)}
    return same_bits(ops.dropout_mask, reference.noise.dropout_mask, spoilt(draw, args))


@fuzz(300)
def test_apply_dropout(draw: Draw) -> bool:
    dropout = ops.Dropout(draw(st.floats(0, 1)), state(draw), draw(STREAMS))
    args = spoilt(draw, {"x": tensor(draw, tuple(shape(draw, 4))), "dropout": dropout})
    result = attempt(ops.apply_dropout, **args)
    if result is REFUSED:
        return False
    torch.manual_seed(0)  # where the state was taken away, torch's generator draws
    again = attempt(ops.apply_dropout, **args)
    torch.manual_seed(0)
    expected = reference.noise.apply_dropout(**unwrapped(args))
    assert again.dtype == args["x"].dtype and torch.equal(again.isnan(), expected.isnan())
    assert torch.equal(again.nan_to_num(), expected.nan_to_num())
    return True


@fuzz(200)
def test_noise_state(draw: Draw) -> bool:
    whole = st.integers(-(2**64), 2**65)
    args = spoilt(draw, {"seed": draw(whole), "draw": draw(st.integers(0, 2**33)), "first_sample": draw(SIZES)})
    made = attempt(ops.NoiseState.at, **args)
    if made is REFUSED:
        return False
    assert int(made.seed) % 2**64 == int(args["seed"]) % 2**64 and int(made.draw) == int(args["draw"])
    return True
