"""What the properties share: how they are run and counted, what a refusal must look like, right and wrong arguments."""

import inspect
import linecache
import os
import re
import signal
import tempfile
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

import ddpm_fast

CASES = 15_350  # the sum of what the properties declare; DDPM_FAST_FUZZ asks for another number
SCALE = int(os.environ.get("DDPM_FAST_FUZZ") or CASES) / CASES
ROOM = tempfile.TemporaryDirectory(prefix="fuzz-")  # for files, gone with the process
PATIENCE = 60  # seconds until a case counts as hanging
PACKAGE = str(Path(ddpm_fast.__file__).parent)

settings.register_profile(
    "fuzz",
    derandomize=SCALE == 1,  # a plain run is repeatable
    database=None,
    deadline=None,
    phases=[Phase.generate] if SCALE == 1 else [Phase.generate, Phase.shrink],  # shrinking takes minutes
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
FUZZ = settings.get_profile("fuzz")

Draw = Callable[..., Any]


class Tally:
    """How the cases of one property went."""

    def __init__(self, cases: int, both: bool):
        self.cases, self.both = cases, both
        self.accepted = self.refused = 0

    def suspicious(self) -> str | None:
        """What a property that ran to its end has not seen and should have."""
        if not self.both or self.accepted + self.refused < 50:
            return None
        return "nothing was accepted" if not self.accepted else "nothing was refused" if not self.refused else None


TALLIES: dict[str, Tally] = {}


def fuzz(cases: int, *, both: bool = True) -> Callable[[Callable[[Draw], bool]], Callable[..., None]]:
    """Makes a test of a property: a function that draws its arguments and answers whether the call was accepted.

    Args:
        cases: its part of CASES.
        both: whether some calls must be accepted and some refused.
    """

    def decorate(prop: Callable[[Draw], bool]) -> Callable[..., None]:
        tally = TALLIES[f"{prop.__module__}.{prop.__name__}"] = Tally(max(1, round(cases * SCALE)), both)

        def run(data: Any) -> None:
            torch.manual_seed(0)
            if hasattr(signal, "alarm"):
                signal.signal(signal.SIGALRM, _hangs)
                signal.alarm(PATIENCE)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    accepted = prop(data.draw)
            finally:
                if hasattr(signal, "alarm"):
                    signal.alarm(0)
            tally.accepted += accepted
            tally.refused += not accepted

        run.__name__, run.__qualname__ = prop.__name__, prop.__qualname__
        run.__module__, run.__doc__ = prop.__module__, prop.__doc__
        return settings(FUZZ, max_examples=tally.cases)(given(data=st.data())(run))

    return decorate


def _hangs(*_: Any) -> None:
    raise AssertionError(f"still running after {PATIENCE} s")


class Refused:
    """Stands for the result of a call that was refused, as it may be."""


REFUSED = Refused()


def attempt(function: Callable[..., Any], *args: Any, names: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """The result, or REFUSED for a ValueError or TypeError of ours that names an argument; all else passes through.

    Args:
        names: what an error may name beside the function's own arguments.
    """
    note((getattr(function, "__qualname__", function), args, kwargs))
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        called = function.forward if isinstance(function, torch.nn.Module) else function
        wanted = [*names, *inspect.signature(called).parameters]
        assert re.search(rf"(?<!\w)({'|'.join(map(re.escape, wanted))})(?!\w)", str(error)), f"names none of {wanted}"
        assert deliberate(error), "not raised on purpose"
        return REFUSED


def deliberate(error: BaseException) -> bool:
    """Whether a line of this package that says `raise` raised it."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    assert at is not None
    file = at.tb_frame.f_code.co_filename
    return file.startswith(PACKAGE) and linecache.getline(file, at.tb_lineno).strip().startswith("raise")


# --- arguments ---

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 3e38, -65504.0, 1e-40, 1e30)
LAYOUTS = ("contiguous", "channels_last", "slice", "stepped", "transposed", "expanded")
JUNK = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**63, -(2**63) - 1, 10**400),
    *(0.0, -0.0, 0.5, 1.5, 1e300, float("nan"), float("inf"), 1j, Fraction(1, 3)),
    *("", "x", "cpu", b"x", (), [], {}, (1,), [2, 3], (1, None), ("1", "2"), {"a": 1}, object(), len, int, slice(2)),
    *(np.float32(0.5), np.float64("nan"), np.int64(2), np.uint8(255), np.bool_(True), np.str_("l2"), np.zeros(3)),
    *(np.array(2), np.array([1, 2]), np.array(["a"]), np.array([None])),
    *(torch.tensor(1.0), torch.tensor(2), torch.zeros(0), torch.zeros(2, 3), torch.tensor(True), torch.float32),
)
SMALL = st.sampled_from((1, 2, 3, 4, 5, 7, 8))
SIZES = st.sampled_from((0, 1, 1, 2, 3, 4, 5, 7, 8))  # where nothing is a size, too


def unwrapped(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments for a reference, which takes neither an array nor a fraction in the place of a number."""

    def plain(value: Any) -> Any:
        if isinstance(value, Fraction):
            return float(value)
        return value.item() if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0 else value

    return {k: tree_map(plain, v) for k, v in args.items()}


def one(draw: Draw, *values: Any) -> Any:
    return draw(st.sampled_from(values))


def often(draw: Draw, chance: int = 2) -> bool:
    """False once in `chance` times."""
    return draw(st.integers(1, chance)) > 1


def tensor(
    draw: Draw, shape: tuple[int, ...], dtype: torch.dtype | None = None, special: tuple[float, ...] = SPECIAL
) -> Tensor:
    """Normals, a special value among them now and then, in any memory layout."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype or one(draw, *FLOATS))
    if x.is_floating_point() and x.numel() and not often(draw, 4):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = one(draw, *special)
    return laid_out(draw, x)


def laid_out(draw: Draw, x: Tensor) -> Tensor:
    """The same values (but "expanded", which repeats some) in another memory layout."""
    layout = one(draw, *LAYOUTS)
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout in ("slice", "stepped") and x.ndim:
        step = 2 if layout == "stepped" else 1
        larger = torch.full([1 + s * step + 2 for s in x.shape], 77, dtype=x.dtype)
        return larger[tuple(slice(1, 1 + s * step, step) for s in x.shape)].copy_(x)
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and x.numel():
        dim = draw(st.integers(0, x.ndim - 1)) if x.ndim else None
        return x if dim is None else x.narrow(dim, 0, 1).expand(x.shape)
    return x


def changed(draw: Draw, x: Tensor) -> Any:
    """A tensor that is not quite `x`: of another type, shape or device."""
    kind = one(draw, "dtype", "more", "less", "narrow", "wide", "empty", "meta", "numpy", "list")
    if kind == "dtype":
        return x.to(one(draw, *DTYPES))
    if kind == "more":
        return x.unsqueeze(draw(st.integers(0, x.ndim)))
    if kind in ("meta", "numpy", "list"):
        values = x.to("meta") if kind == "meta" else x.float()
        return values if kind == "meta" else values.numpy() if kind == "numpy" else values.tolist()
    if x.ndim == 0 or x.numel() == 0:
        return x.reshape(-1)
    dim = draw(st.integers(0, x.ndim - 1))
    if kind == "less":
        return x.select(dim, 0)
    length = {"narrow": x.shape[dim] - 1, "wide": x.shape[dim] + 1, "empty": 0}[kind]
    return torch.cat([x, x], dim).narrow(dim, 0, length)


def other(draw: Draw, value: Any) -> Any:
    """Something else in the place of an argument: near it, or far off."""
    if isinstance(value, Tensor) and often(draw):
        return changed(draw, value)
    if hasattr(value, "_replace") and often(draw):
        field = one(draw, *value._fields)
        return value._replace(**{field: other(draw, getattr(value, field))})
    return one(draw, *JUNK)


def spoilt(draw: Draw, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, in half of the cases one of them replaced by another."""
    if not often(draw):
        return args
    name = one(draw, *sorted(args))
    replaced = other(draw, args[name])
    if name in ("activation", "callback") and callable(replaced):
        return args  # whatever can be called is taken, and fails in its own way
    return args | {name: replaced}
