"""Lazy load of the native module ddpm_fast._C; remembers why it failed."""

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ._dispatch import Unavailable, forced

ARRAY_DTYPES = (torch.float32, torch.bfloat16)
_STRIDED = torch.strided
MAX_NDIM = 8  # of a tensor [N, ...] that a kernel takes by its strides

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """How many a kernel may use: torch's number; one in a forked child, where OpenMP would wait for its parent's."""
    return 1 if _forked else torch.get_num_threads()


@functools.cache
def _load(name: str) -> tuple[Any, str | None]:
    try:
        return importlib.import_module(f"ddpm_fast.{name}"), None
    except ImportError as error:
        # Written by setup.py when the build was skipped or failed.
        note = Path(__file__).parent.parent / f"{name}_unavailable.txt"
        reason = note.read_text().strip() if note.exists() else f"import of ddpm_fast.{name} failed: {error}"
        return None, reason


def load(name: str = "_C") -> Any:
    """The module ddpm_fast._C, or another one that setup.py builds.

    Raises:
        Unavailable: it was not built, or can't be imported.
    """
    module, reason = _load(name)
    if module is None:
        raise Unavailable(reason)
    return module


_NOTED: ContextVar[Callable[..., Any] | None] = ContextVar("ddpm_fast_noted", default=None)


@contextmanager
def noted(run: Callable[..., Any]) -> Iterator[None]:
    """In here a network's kernels run by way of `run(kernel, *arguments)`, which may note them, beside a dispatch mode
    that notes torch's operators."""
    token = _NOTED.set(run)
    try:
        yield
    finally:
        _NOTED.reset(token)


def kernel(name: str) -> Callable[..., Any]:
    """The kernel of this name."""
    run, note = getattr(load(), name), _NOTED.get()
    return run if note is None else partial(note, run)


def is_watched() -> bool:
    """Whether a dispatch mode wants to see torch's own operators, and not kernels in their place."""
    modes: int = _C._len_torch_dispatch_stack()
    return modes > 0 and modes > (_NOTED.get() is not None)


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """For a text: "float32 and bfloat16"."""
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


_PLACES = {"cpu": "the CPU", "cuda": "a GPU"}


def unfit(*values: Tensor | None, device: str = "cpu") -> str | None:
    """Why kernels of our own, for one kind of device, can't run on these tensors, or in torch's present state."""
    for value in values:
        if value is not None:
            kind = type(value)
            if kind is not Tensor and kind is not Parameter:
                return f"needs plain tensors, got a {kind.__name__}"
            if value.device.type != device:
                return f"runs on {_PLACES[device]}, the data is on {value.device}"
            if value.layout is not _STRIDED:
                return f"needs plain memory, got {value.layout}"
    if torch.compiler.is_compiling():
        return None  # the rest is of the moment, and compilers can't follow it
    if any(value is not None and value.is_neg() for value in values):
        return "needs plain memory, got a negated view"
    return in_the_way()


def in_the_way() -> str | None:
    """What of torch's present state would not see a kernel's work."""
    if is_watched() or _C._get_tracing_state() is not None:
        return "a dispatch mode or tracer wants to see torch's own operators"
    if _C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return "has no transforms of torch.func and no forward-mode gradient"
    return None


def unfit_arrays(
    *values: Tensor | None, grads: bool = False, dtypes: tuple[torch.dtype, ...] = ARRAY_DTYPES
) -> str | None:
    """Why a kernel with or without `grads` for these tensors can't take them by their strides; see `unfit`, too."""
    wanted = not grads and torch.is_grad_enabled()
    for value in values:
        if value is not None:
            if value.dtype not in dtypes:
                return f"takes {dtype_names(dtypes)}, got {value.dtype}"
            if value.ndim > MAX_NDIM:
                return f"takes at most {MAX_NDIM} dimensions"
            if wanted and value.requires_grad:
                return "has no gradient for these arguments"
    return None


def check_backward(op: str, *grads: Tensor | None) -> None:
    """Raise where a backward is to be differentiated itself, or gets several gradients at once."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: this backend has no second derivative; ops.use_backend('reference') has one")
    for g in grads:
        if g is not None and _C._functorch.is_legacy_batchedtensor(g):
            raise RuntimeError(f"{op}: this backend takes no batched gradients; ops.use_backend('reference') does")


def wanted() -> bool:
    """Whether the module can be loaded, and no other backend is forced."""
    return forced() in (None, "native") and _load("_C")[0] is not None


# For a compiler: torch.compiler.assume_constant_result, which imports all of it, as long again as torch itself.
wanted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_not_forced_away(op: str) -> None:
    """Raise where another backend is forced than the one that a graph was compiled for."""
    if forced() not in (None, "native"):
        raise RuntimeError(f"{op}: the graph was compiled for native, {forced()!r} is forced: compile it there")
