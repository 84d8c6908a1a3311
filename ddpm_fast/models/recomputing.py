"""Activations that are not kept for the backward but computed again in it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops import Dropout, NoiseState, use_backend
from ..ops._dispatch import forced

RECOMPUTE = ("none", "norm", "block")


def kept(y: Tensor, keep: bool, prepare: Callable[[], Callable[[], Tensor]]) -> AbstractContextManager[None]:
    """`recomputed` by what `prepare` returns, unless y is to be kept."""
    return nullcontext() if keep else recomputed(y, prepare())


@contextmanager
def recomputed(y: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """In here whoever keeps y for its backward keeps `make` instead, which returns y from what is kept anyway."""
    place, shape, backend = y.data_ptr(), y.shape, forced()  # not y itself

    def pack(saved: Tensor) -> Any:
        same = saved.data_ptr() == place and saved.shape == shape
        return again if same else saved

    def again() -> Tensor:
        # In the backward: on a GPU that is another thread, which knows nothing of a forced backend.
        with torch.no_grad(), nullcontext() if backend is None else use_backend(backend):
            return make()

    def unpack(kept: Any) -> Tensor:
        return cast(Tensor, kept() if callable(kept) else kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def whole(run: Callable[[], Any], draws: bool) -> Any:
    """run(), nothing of which is kept but its arguments; `draws` from torch's generator, whose state then is."""
    return checkpoint(run, use_reentrant=False, preserve_rng_state=draws)


def frozen(dropout: Dropout | None) -> Dropout | None:
    """The same masks also after the owner of the noise has gone on."""
    return dropout if dropout is None else dropout._replace(state=frozen_state(dropout.state))


def frozen_state(state: NoiseState | None) -> NoiseState | None:
    """As it is now."""
    return None if state is None else NoiseState(state.seed.clone(), state.draw.clone(), state.first_sample)
