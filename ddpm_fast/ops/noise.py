"""Random numbers as a function of (seed, stream, draw, sample, element): the same bits on every backend."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reference import noise as reference
from ..reference.philox import MAX_STREAM, TIMESTEPS, Dropout, NoiseState
from . import _checks, _native, _triton
from ._dispatch import Impl, Op
from ._library import opaque


def _rejects(fit: Any, *args: Any) -> str | None:
    state = next(a for a in args if isinstance(a, NoiseState))
    if fit is _triton and isinstance(state.first_sample, Tensor):
        return "takes a first sample that the host knows"
    reason: str | None = fit.unfit(state.seed, state.draw)
    return reason


def _rejects_noise(shape: Any, state: NoiseState, stream: int, dtype: torch.dtype) -> str | None:
    takes = *_triton.ARRAY_DTYPES, torch.float64
    if dtype not in takes:
        return f"draws {_triton.dtype_names(takes)}, not {dtype}"
    return _rejects(_triton, state)


def _load_triton(name: str) -> Callable[..., Tensor]:
    kernel = getattr(_triton.load("noise"), name)

    def run(*args: Any) -> Tensor:
        with _triton.on(next(a for a in args if isinstance(a, NoiseState)).seed):
            out: Tensor = kernel(*args)
        return out

    return run


_CPU = torch.device("cpu")


def _load_noise() -> Callable[..., Tensor]:
    native = _native.load().noise

    def run(shape: Sequence[int], state: NoiseState, stream: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=torch.float32, device=_CPU)
        native(out, state, stream, _native.threads())
        return out if dtype is torch.float32 else out.to(dtype)

    return run


def _load_timesteps() -> Callable[..., Tensor]:
    native = _native.load().timesteps

    def run(num_samples: int, num_timesteps: int, state: NoiseState, stream: int) -> Tensor:
        out = torch.empty(num_samples, dtype=torch.int64, device=_CPU)
        native(out, num_timesteps, state, stream)
        return out

    return run


def _load_dropout_mask() -> Callable[..., Tensor]:
    native = _native.load().dropout_mask

    def run(shape: Sequence[int], p: float, state: NoiseState, stream: int) -> Tensor:
        n, c, h, w = shape
        out = torch.empty(n, h, w, c, dtype=torch.float32, device=_CPU)
        native(out, *reference.dropout_threshold(p), state, stream, _native.threads())
        return out.permute(0, 3, 1, 2)

    return run


def _check_state(state: object, name: str = "state") -> None:
    if not isinstance(state, NoiseState):
        raise TypeError(f"{name} must be a NoiseState, got {_checks.text(state)}: NoiseState.at(seed, draw) makes one")
    _checks.tensor(f"{name}.seed", state.seed, shape=(), dtype=torch.int64)
    _checks.tensor(f"{name}.draw", state.draw, shape=(), dtype=torch.int64, device=state.seed.device)
    first: object = state.first_sample
    if isinstance(first, (Tensor, np.ndarray)):  # operator.index would take them, the sums to come would not
        raise TypeError(f"{name}.first_sample must be an integer, got {_checks.text(first)}")
    _checks.integer(f"{name}.first_sample", first, 0, 2**56 - 1)


def _check_noise(shape: Any, state: NoiseState, stream: int, dtype: Any) -> tuple[Any, ...]:
    shape = _checks.integers("shape", shape, 0)
    if not shape:
        raise ValueError("shape must be [N, ...], got an empty one")
    if math.prod(shape[1:]) > 2**34:
        raise ValueError(f"shape: a sample holds at most 2^34 elements, got {math.prod(shape[1:])}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type, got {dtype}")
    _check_state(state)
    return shape, state, _checks.integer("stream", stream, 0, MAX_STREAM), dtype


def _check_timesteps(num_samples: int, num_timesteps: int, state: NoiseState, stream: int) -> tuple[Any, ...]:
    num_samples = _checks.integer("num_samples", num_samples, 0)
    num_timesteps = _checks.integer("num_timesteps", num_timesteps, 1, 2**31)
    _check_state(state)
    return num_samples, num_timesteps, state, _checks.integer("stream", stream, 0, MAX_STREAM)


def _check_dropout_mask(shape: Any, p: float, state: NoiseState, stream: int) -> tuple[Any, ...]:
    shape, p = _checks.integers("shape", shape, 0), _checks.number("p", p, 0, 1)
    if len(shape) != 4:
        raise ValueError(f"shape must be [N, C, H, W], got {list(shape)}")
    _check_state(state)
    return shape, p, state, _checks.integer("stream", stream, 0, MAX_STREAM)


def _ready(shape: Any, state: NoiseState, stream: int, dtype: Any) -> bool:
    fits: bool = _native.load().draw_ready(shape, state, stream)
    return fits and dtype is torch.float32 and _native.in_the_way() is None


# Opaque to compilers, which would be free to fuse what must not be fused, and to draw it slower.
_NOISE = opaque(
    "noise(SymInt[] shape, Tensor seed, Tensor draw, SymInt first_sample, int stream, *, ScalarType dtype) -> Tensor",
    lambda shape, *state, dtype: OP(shape, NoiseState(*state[:3]), state[3], dtype),
    lambda shape, seed, *_, dtype: seed.new_empty(shape, dtype=dtype),
)
_TIMESTEPS = opaque(
    "timesteps(SymInt num_samples, int num_timesteps, Tensor seed, Tensor draw, SymInt first_sample, int stream) "
    "-> Tensor",
    lambda num_samples, most, *state: _timesteps(num_samples, most, NoiseState(*state[:3]), state[3]),
    lambda num_samples, _, seed, *__: seed.new_empty(num_samples),
)
_DROPOUT_MASK = opaque(
    "dropout_mask(SymInt[] shape, float p, Tensor seed, Tensor draw, SymInt first_sample, int stream) -> Tensor",
    lambda shape, p, *state: _dropout_mask(shape, p, NoiseState(*state[:3]), state[3]),
    lambda shape, _, seed, *__: seed.new_empty([shape[i] for i in (0, 2, 3, 1)], dtype=torch.float32).permute(
        0, 3, 1, 2
    ),
)
OP: Op = Op(
    "noise",
    Impl("native", _load_noise, partial(_rejects, _native), _ready),
    Impl("triton", partial(_load_triton, "noise"), _rejects_noise),
    Impl("reference", lambda: lambda *args: reference.noise(*args[:3], dtype=args[3])),
    check=_check_noise,
    traced=lambda shape, state, stream, dtype: _NOISE(shape, *state, stream, dtype=dtype),
)
_timesteps: Op = Op(
    "noise",
    Impl("native", _load_timesteps, partial(_rejects, _native)),
    Impl("triton", partial(_load_triton, "timesteps"), partial(_rejects, _triton)),
    Impl("reference", lambda: reference.timesteps),
    check=_check_timesteps,
    traced=lambda num_samples, num_timesteps, state, stream: _TIMESTEPS(num_samples, num_timesteps, *state, stream),
)
_dropout_mask: Op = Op(
    "noise",
    Impl("native", _load_dropout_mask, partial(_rejects, _native)),
    Impl("triton", partial(_load_triton, "dropout_mask"), partial(_rejects, _triton)),
    Impl("reference", lambda: reference.dropout_mask),
    check=_check_dropout_mask,
    traced=lambda shape, p, state, stream: _DROPOUT_MASK(shape, p, *state, stream),
)


def noise(shape: Sequence[int], state: NoiseState, stream: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals from Philox4x32-10 and Box-Muller (formula and error bound: docs/architecture.md).

    Args:
        shape: [N, ...]; N = 0 is allowed.
        state: seed, draw and first sample; its device is the result's.
        stream: what the numbers are for, 0 to 255 (X_T, PERTURB, REVERSE...).
        dtype: of the result; the numbers are float32, rounded.

    Returns:
        A contiguous tensor of `shape`. Sample n depends on `state.first_sample` + n, not on N.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
    """
    return OP(shape, state, stream, dtype)


def timesteps(num_samples: int, num_timesteps: int, state: NoiseState, stream: int = TIMESTEPS) -> Tensor:
    """Training timesteps, uniform in [0, num_timesteps): int64 [num_samples]. Errors as in `noise`."""
    return _timesteps(num_samples, num_timesteps, state, stream)


def dropout_mask(shape: Sequence[int], p: float, state: NoiseState, stream: int) -> Tensor:
    """Dropout factors, 0 or 1 / (1 - p): float32 [N, C, H, W] in channels_last order. Errors as in `noise`."""
    return _dropout_mask(shape, p, state, stream)


def drawn(source: Tensor | NoiseState, like: Tensor, stream: int) -> Tensor:
    """The noise itself where that is given, else drawn by the best backend like `like`, at least in float32."""
    if not isinstance(source, NoiseState):
        return source
    # Unchecked: the op that draws has checked its own arguments, and a recorded step has its first sample in a tensor.
    return OP.unchecked(like.shape, source, stream, torch.promote_types(like.dtype, torch.float32))


def drawn_dropout(dropout: Dropout | None, shape: Sequence[int]) -> Dropout | Tensor | None:
    """The factors of a dropout with a NoiseState, drawn by the best backend; any other dropout as it came."""
    if dropout is None or dropout.state is None:
        return dropout
    return _dropout_mask(shape, dropout.p, dropout.state, dropout.stream)


def apply_dropout(x: Tensor, dropout: Dropout) -> Tensor:
    """x [N, C, H, W] times dropout factors, where the norm is not `group_norm_silu`. Errors as in `noise`."""
    _checks.tensor("x", x, ndim=4)
    dropout = check_dropout(dropout, x)
    factors = drawn_dropout(dropout, x.shape)
    return reference.apply_dropout(x, dropout if factors is None else factors)


def check_dropout(dropout: object, like: Tensor) -> Dropout:
    """The dropout with plain numbers; raise TypeError or ValueError unless it is a Dropout for data like `like`."""
    if not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be a Dropout, got {_checks.text(dropout)}")
    p = _checks.number("dropout.p", dropout.p, 0, 1)
    stream = _checks.integer("dropout.stream", dropout.stream, 0, MAX_STREAM)
    if dropout.state is not None:
        _check_state(dropout.state, "dropout.state")
        if dropout.state.seed.device != like.device:
            raise ValueError(f"dropout: the state is on {dropout.state.seed.device}, the data on {like.device}")
    return Dropout(p, dropout.state, stream)


def check_source(source: Tensor | NoiseState, like: Tensor) -> None:
    """Raise unless `source` is noise of the shape of `like`, or a state to draw it from."""
    if isinstance(source, NoiseState):
        _check_state(source, "noise")
        if source.seed.device != like.device:
            raise ValueError(f"noise: the state is on {source.seed.device}, the data on {like.device}")
    else:
        _checks.tensor("noise", source, shape=like.shape, device=like.device)
