"""Argument checks of the public functions: each error names the argument, what came, and what would do."""

import math
import numbers
import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Repr(reprlib.Repr):
    """repr in which tensors and arrays, however deep inside, have no numbers, and long values are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 100

    def repr1(self, x: Any, level: int) -> str:
        return text(x) if isinstance(x, (Tensor, np.ndarray)) else super().repr1(x, level)


_REPR = _Repr()


def text(value: object) -> str:
    """A value as an error message shows it: a tensor by dtype, shape and device."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)} of numpy"
    if value is None:
        return "None"
    if isinstance(value, int) and value.bit_length() > 300:  # Python shows no number of thousands of digits
        return f"an integer of {value.bit_length()} bits"
    shown = _REPR.repr(value)
    return f"{shown if len(shown) < 100 else shown[:100] + '...'} ({type(value).__name__})"


def tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int] | None = None,
    ndim: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise TypeError or ValueError unless `value` is such a tensor; without a dtype, any floating one."""
    if not isinstance(value, Tensor):
        hint = f": torch.as_tensor({name}) makes one" if isinstance(value, (np.ndarray, list, tuple)) else ""
        raise TypeError(f"{name} must be a tensor, got {text(value)}{hint}")
    if dtype is None and not value.is_floating_point():
        how = "pixels become it by .float() / 127.5 - 1" if value.dtype is torch.uint8 else "convert it with .float()"
        raise TypeError(f"{name} must be a floating point tensor, got {text(value)}: {how}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {text(value)}: convert it with .to({dtype})")
    if shape is not None and value.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {text(value)}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got {text(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {text(value)}: move it with .to({str(device)!r})")


def own_memory(name: str, value: Tensor) -> None:
    """Raise ValueError unless each element has memory of its own, for a result to be written to."""
    if value.is_contiguous():
        return
    reach = 0
    for step, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if step <= reach:
                raise ValueError(
                    f"{name} must have memory for each element, got one expanded or overlapping itself, "
                    f"{text(value)} with strides {value.stride()}: .contiguous() it"
                )
            reach += step * (size - 1)


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int, also from numpy; raise TypeError or ValueError unless it is one in [least, most].

    Without `most`, one that fits 64 bits.
    """
    low, high = -(2**63) if least is None else least, 2**63 - 1 if most is None else most
    if type(value) is int and low <= value <= high:  # nearly always; what follows costs as much as a small op
        return value
    range_ = "" if least is None else f" of at least {least}" if most is None else f" in [{least}, {most}]"
    wrong = f"{name} must be an integer{range_}, got {text(value)}"
    if isinstance(value, bool):
        raise TypeError(wrong)
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(wrong) from error
    if not low <= number <= high:
        raise ValueError(wrong if least is None or number < low or most is not None else f"{wrong}: too large")
    return number


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float; raise TypeError or ValueError unless it is a finite number in [low, high]."""
    if type(value) is float and low <= value <= high and abs(value) != math.inf:  # nearly always, as in `integer`
        return value
    ends = "" if low == -math.inf == -high else f" of at least {low}" if high == math.inf else f" in [{low}, {high}]"
    wrong = f"{name} must be a finite number{ends}, got {text(value)}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(wrong)
    try:
        result = float(value)
    except OverflowError as error:
        raise ValueError(wrong) from error
    if not (math.isfinite(result) and low <= result <= high):
        raise ValueError(wrong)
    return result


def integers(name: str, value: Any, least: int | None = None) -> tuple[int, ...]:
    """A tuple, list or array of integers as a tuple; raise TypeError or ValueError unless it is one."""
    try:
        items = None if isinstance(value, (str, bytes)) else tuple(value)
    except TypeError:
        items = None
    if items is None:
        raise TypeError(f"{name} must be a tuple of integers, got {text(value)}")
    return tuple(integer(f"{name}[{i}]", item, least) for i, item in enumerate(items))


def flag(name: str, value: Any) -> bool:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {text(value)}")
    return value


def device(name: str, value: Any) -> torch.device:
    """`value` as a device; raise ValueError unless it names one."""
    try:
        return torch.device(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be one such as 'cpu' or 'cuda:0', got {text(value)}") from error


def concatenated(x: Tensor, x2: Tensor | None) -> tuple[int, int, int, int]:
    """N, C1 + C2, H, W of x [N, C1, H, W] and x2 [N, C2, H, W]; raise TypeError or ValueError where they don't fit."""
    tensor("x", x, ndim=4)
    n, channels, height, width = x.shape
    if x2 is not None:
        tensor("x2", x2, ndim=4, device=x.device)
        if x2.shape[0] != n or x2.shape[2:] != x.shape[2:]:
            raise ValueError(f"x2 must have the batch and size of x, {list(x.shape)}; got {text(x2)}")
        channels += x2.shape[1]
    return n, channels, height, width


def indices(name: str, value: Tensor, size: int) -> None:
    """Raise ValueError unless 0 <= value < size. Only on the CPU: elsewhere the look would wait for the device."""
    if value.device.type != "cpu" or value.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(value),) * 2 if value.numel() == 1 else map(int, value.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name} must lie in [0, {size}), got values from {low} to {high}")


def choice(name: str, value: object, options: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `options`."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")
