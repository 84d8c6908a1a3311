"""Activations that are not kept for the backward but computed again in it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops import Dropout, NoiseState, exact_convolutions, use_backend
from ..ops._conv3x3 import is_exact
from ..ops._dispatch import forced

T = TypeVar("T")

RECOMPUTE = ("none", "norm", "block")


def kept(y: Tensor, keep: bool, prepare: Callable[[], Callable[[], Tensor]]) -> AbstractContextManager[None]:
    """`recomputed` by what `prepare` returns, unless y is to be kept."""
    return nullcontext() if keep else recomputed(y, prepare())


@contextmanager
def recomputed(y: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """In here whoever keeps y for its backward keeps `make` instead, which returns y from what is kept anyway."""
    place, shape = y.data_ptr(), y.shape  # not y itself
    again = in_its_backend(make)

    def pack(saved: Tensor) -> Any:
        return again if saved.data_ptr() == place and saved.shape == shape else (saved, saved._version)

    def unpack(kept: Any) -> Tensor:
        if not callable(kept):
            check_unchanged([kept[0]], [kept[1]])
            return cast(Tensor, kept[0])
        with torch.no_grad():
            return again()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def check_unchanged(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Raise RuntimeError, as autograd does for what it keeps itself, if one was changed since it had this version."""
    if any(t._version != version for t, version in zip(tensors, versions, strict=True)):
        raise RuntimeError("a weight needed for gradient computation has been modified by an inplace operation")


def whole(run: Callable[[], T], like: Tensor, draws: bool) -> T:
    """run(), nothing of which is kept but its arguments.

    Args:
        like: a tensor of the device whose generator's state is kept, too, if it `draws` from torch's.
    """
    again = in_its_backend(run)
    return cast(T, checkpoint(lambda like: again(), like, use_reentrant=False, preserve_rng_state=draws))


def in_its_backend(run: Callable[[], T]) -> Callable[[], T]:
    """`run` on the backend that is forced now, with convolutions as exact as now: the backward knows nothing of it."""
    backend, exact = forced(), is_exact()

    def again() -> T:
        with nullcontext() if backend is None else use_backend(backend), exact_convolutions(exact):
            return run()

    return again


def frozen(dropout: Dropout | None) -> Dropout | None:
    """The same masks also after the owner of the noise has gone on."""
    return dropout if dropout is None else dropout._replace(state=frozen_state(dropout.state))


def frozen_state(state: NoiseState | None) -> NoiseState | None:
    """As it is now."""
    return None if state is None else NoiseState(state.seed.clone(), state.draw.clone(), state.first_sample)
