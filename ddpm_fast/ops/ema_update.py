"""The exponential moving average of a network's weights, all tensors in one call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..reference import ema_update as reference
from . import _checks, _native, _triton
from ._dispatch import Impl, Op, forced
from ._library import opaque

_NODE = opaque(
    "ema_update(Tensor(a!)[] averages, Tensor[] values, float decay) -> ()",
    lambda averages, values, decay: OP.unchecked(averages, values, decay),
    lambda averages, values, decay: None,
)


def _ready(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> bool:
    fits: bool = _native.load().ema_update_ready(averages, values, decay)
    return fits and _native.in_the_way() is None


def _rejects(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> str | None:
    if _ready(averages, values, decay):
        return None
    return "takes lists of dense float32 tensors of the CPU, each pair with the same strides, that share no memory"


def _load() -> Callable[..., None]:
    native = _native.load().ema_update

    def run(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
        for average in averages:  # first, as it may raise
            increment_version(average)
        native(averages, values, 1 - decay, _native.threads())

    return run


def _rejects_triton(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> str | None:
    if forced() != "triton":
        return "is not preferred to torch's own update of many tensors, until a benchmark says so"
    pairs = list(zip(averages, values, strict=True))
    if len({(a.dtype, v.dtype) for a, v in pairs}) > 1 or len({a.device for a in averages}) > 1:
        return "takes averages of one dtype, values of one, and one device"
    if not all(a.stride() == v.stride() and _dense(a) for a, v in pairs):
        return "takes dense tensors, each pair with the same strides"
    if not _apart(pairs):
        return "takes averages that share no memory"
    tensors = *averages, *values
    return _triton.unfit(*tensors) or _native.unfit_arrays(*tensors, grads=True, dtypes=_triton.ARRAY_DTYPES)


def _apart(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether no average shares memory; values, which are only read, may among themselves."""
    ranges = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, i == 0) for pair in pairs for i, x in enumerate(pair))
    ends = {True: 0, False: 0}  # of averages and of values, so far
    for start, end, is_average in ranges:
        if start < ends[True] or (is_average and start < ends[False]):
            return False
        ends[is_average] = max(ends[is_average], end)
    return True


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _load_triton() -> Callable[..., None]:
    kernels = _triton.load("ema_update")

    def run(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
        if averages:
            for average in averages:
                increment_version(average)
            with _triton.on(averages[0]):
                kernels.ema_update(averages, values, decay)

    return run


def _check(averages: Any, values: Any, decay: float) -> tuple[Any, ...]:
    for name, tensors in (("averages", averages), ("values", values)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, got {_checks.text(tensors)}")
    if len(averages) != len(values):
        raise ValueError(f"averages and values must be as many, got {len(averages)} and {len(values)}")
    for i, (average, value) in enumerate(zip(averages, values, strict=True)):
        _checks.tensor(f"averages[{i}]", average)
        _checks.own_memory(f"averages[{i}]", average)
        _checks.tensor(f"values[{i}]", value, shape=average.shape, device=average.device)
    return list(averages), list(values), _checks.number("decay", decay, 0, 1)


OP: Op = Op(
    "ema_update",
    Impl("native", _load, _rejects, _ready),
    Impl("triton", _load_triton, _rejects_triton),
    Impl("reference", lambda: reference.ema_update),
    check=_check,
    traced=_NODE,
)


def ema_update(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """average = decay average + (1 - decay) value, in place (Ho et al. 2020, appendix B).

    Args:
        averages: tensors of any shapes, floating point; each keeps its dtype, float32 also beside bfloat16 weights.
        values: as many, of the same shapes and devices.
        decay: weight of the old average, in [0, 1].

    Raises:
        ValueError, TypeError: an argument has the wrong type, number, shape or device, or an average has elements that
            share memory.
    """
    OP(averages, values, decay)
