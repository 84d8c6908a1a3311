"""What follows from weights alone, made once where they stay as they are: for a chain, or for chains to come.

A convolution's weight in the layout and dtype in which it is multiplied, which a library else makes in each call, other
weights that stand for several (phases of upsampling, products of attention's, sums of biases), and recorded calls.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from ..footprint import switches
from ..ops import _native
from ..ops._conv3x3 import is_exact

T = TypeVar("T")

MOST_KEPT = 1 << 30  # bytes, from chain to chain
MOST_RECORDED = 8  # calls


class _Entry(NamedTuple):
    of: Sequence[Tensor | None]  # held, so that no other tensor takes its identity
    versions: list[int]
    value: Any


class Table(dict[Hashable, _Entry]):
    """What was made of tensors.

    Attributes:
        recorded: calls of a network that work with it, by what they are called with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: dict[Hashable, Any] = {}

    def note(self, of: Iterable[Tensor | None]) -> None:
        """Told of tensors before something is made of them."""

    def transformed(self) -> int:
        """How many bytes of it are transformed weights of convolutions."""
        return sum(e.value.transformed() for e in self.values() if hasattr(e.value, "transformed"))


class _Noted(NamedTuple):
    """What a tensor was."""

    tensor: Tensor
    place: tuple[object, ...]
    digest: int | None  # of its numbers, as who writes them through `.data` counts no version; None where there is none

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "list[_Noted]":
        digests = _native.load().digests(tensors, _native.threads())
        return [cls(t, () if d is None else _place(t), d) for t, d in zip(tensors, digests, strict=True)]


def _place(tensor: Tensor) -> tuple[object, ...]:
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, version


class Kept(Table):
    """What chains of one network on a CPU made, for those to come: as long as no number changes that it was made of,
    and no setting of torch. Between chains it takes at most `MOST_KEPT` bytes."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: dict[int, _Noted] = {}
        self._settings: Hashable = None
        self._lock = Lock()

    def note(self, of: Iterable[Tensor | None]) -> None:
        new = []
        for t in of:
            known = None if t is None else self._noted.get(id(t))
            if t is not None and (known is None or known.digest is not None and known.place != _place(t)):
                new.append(t)
        self._noted |= {id(noted.tensor): noted for noted in _Noted.of(new)}

    def clear(self) -> None:
        """Release it and its memory."""
        super().clear()
        self.recorded.clear()
        self._noted.clear()

    def num_bytes(self) -> int:
        """How much memory it takes beside the weights."""
        held = [t for e in self.values() for t in _tensors(e.value)]
        held += [t for call in self.recorded.values() for t in call.held]
        memory = {_memory(t): t.nbytes for t in held}
        given = {_memory(noted.tensor) for noted in self._noted.values() if noted.digest is not None}
        rooms = sum(call.num_bytes for call in self.recorded.values())
        return rooms + sum(size for place, size in memory.items() if place not in given)

    @contextmanager
    def for_a_chain(self) -> Iterator[Table]:
        """This table, up to date; another one within a chain of the same, and where no change would be seen."""
        if not _native.wanted() or _native.in_the_way() or not self._lock.acquire(blocking=False):
            yield Table()
            return
        try:
            settings = *switches(torch.device("cpu")), is_exact(), _native.threads(), _native.load().isa()
            if settings != self._settings or self._changed():
                self.clear()
            if len(self.recorded) >= MOST_RECORDED:
                self.recorded.clear()
            self._settings = settings
            yield self
        finally:
            if self.num_bytes() > MOST_KEPT:
                self.clear()
            self._lock.release()

    def _changed(self) -> bool:
        before = list(self._noted.values())
        if any(noted.digest is None or noted.place != _place(noted.tensor) for noted in before):
            return True
        now = _Noted.of([noted.tensor for noted in before])
        return [noted.digest for noted in before] != [noted.digest for noted in now]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in _tensors(part)]
    return [value] if isinstance(value, Tensor) else value.tensors()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


_MADE: ContextVar[Table | None] = ContextVar("ddpm_fast_made_of_weights", default=None)
_PLAIN = Table()  # in its place on the plain path; stays empty


@contextmanager
def fixed_weights(kept: Kept | None = None) -> Iterator[Table]:
    """In here weights stay as they are: what follows from them alone is made once, and is in this table, that of chains
    before where one is given. What changed nevertheless, as torch counts changes, is made anew."""
    with nullcontext(Table()) if kept is None else kept.for_a_chain() as table:
        token = _MADE.set(table)
        try:
            yield table
        finally:
            _MADE.reset(token)


def in_use() -> Table:
    """The table here; one for the caller alone where there is none."""
    table = _MADE.get()
    return Table() if table is None or table is _PLAIN else table


@contextmanager
def plain_path() -> Iterator[None]:
    """In here nothing is made of weights, and every layer computes as it is written."""
    token = _MADE.set(_PLAIN)
    try:
        yield
    finally:
        _MADE.reset(token)


def transformed() -> bool:
    """Whether transforms of torch.func or forward-mode gradients are under way, which know torch's own functions."""
    return _C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def are_fixed() -> bool:
    """Whether something can be made of weights here: in `fixed_weights`, and without gradients."""
    if torch.compiler.is_compiling():  # compilers know no ContextVar
        return False
    table = _MADE.get()
    if table is None or table is _PLAIN or torch.is_grad_enabled():
        return False
    return not transformed()


def are_trained() -> bool:
    """Whether weights change from step to step here, and gradients are those of `backward`."""
    if torch.compiler.is_compiling() or _MADE.get() is _PLAIN:  # in this order
        return False
    return torch.is_grad_enabled() and not transformed()


def made(what: Hashable, of: Sequence[Tensor | None], make: Callable[[], T]) -> T:
    """What `make` makes of these tensors, made once; only if `are_fixed`."""
    table = cast(Table, _MADE.get())
    key = (what, *map(id, of))
    entry = table.get(key)
    versions = [t._version for t in of if t is not None and not t.is_inference()]
    if entry is None or entry.versions != versions:
        table.note(of)
        entry = table[key] = _Entry(of, versions, make())
    return cast(T, entry.value)


def once(what: Hashable, of: Sequence[Tensor | None], make: Callable[[], T]) -> T:
    """What `make` makes of these tensors, made once if `are_fixed`."""
    return made(what, of, make) if are_fixed() else make()
