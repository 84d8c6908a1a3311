"""What tests of Winograd's filtering share: how it is watched and told what to do, and what it may round."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from native_state import _C
from oracle import error
from torch import Tensor

from ddpm_fast.ops import _conv3x3
from ddpm_fast.ops._conv3x3 import CHANGING, FIXED, WEIGHT, Way
from ddpm_fast.ops._dispatch import forced

FORCED = pytest.mark.skipif(forced() is not None, reason="they compare backends, and leave the choice to the table")
BEST = _C.isas()[-1]
BOUND = (5, 3)  # of the filtering in float32, against the direct convolution: largest error, root of the mean square


@pytest.fixture(autouse=True)
def looked_up_again() -> Iterator[None]:
    """What a test had the table say is forgotten."""
    yield
    _conv3x3._nearest.cache_clear()


@pytest.fixture(name="calls")
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Way]:
    """The way of every call of the kernel."""
    seen, plain = [], _C.conv3x3
    monkeypatch.setattr(_C, "conv3x3", lambda *args: seen.append(Way(*args[8:10])) or plain(*args))
    return seen


@pytest.fixture(name="table")
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts rows in the place of the committed ones, on this set."""

    def put(*rows: list[Any], fixed: tuple[list[Any], ...] = (), weight: tuple[list[Any], ...] = ()) -> None:
        both = {CHANGING: rows, FIXED: fixed or rows}
        found = {_C.isa(): {"float32": both | {WEIGHT: weight}, "bfloat16": both}}
        monkeypatch.setattr(_conv3x3, "_table", lambda: found)
        _conv3x3._nearest.cache_clear()

    return put


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def rms(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).square().mean().sqrt() / truth.abs().max())


def hold(got: Tensor, plain: Tensor, truth: Tensor, factors: tuple[float, float]) -> None:
    """The largest error and the root of the mean square, against those of another computation in the same dtype."""
    assert got.shape == truth.shape and got.dtype == plain.dtype
    for measure, factor in zip((error, rms), factors, strict=True):
        eps = torch.finfo(got.dtype).eps
        bound = factor * measure(plain, truth) + eps
        assert measure(plain, truth) < eps**0.5, "what it is held against is no such convolution"
        assert measure(got, truth) <= bound, (measure.__name__, measure(got, truth), bound)
