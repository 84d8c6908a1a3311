"""The one dispatch point: which implementation of an op runs, and why the others don't."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch

BACKENDS = ("cuda", "triton", "native", "reference")


class Unavailable(Exception):
    """A backend can't be loaded on this machine; the message says why."""


def _check_backend(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


# Checked when an op finds no such backend: an import must not fail over it.
_forced: ContextVar[str | None] = ContextVar("ddpm_fast_backend", default=os.environ.get("DDPM_FAST_BACKEND") or None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside the block; where it can't run, the op raises and never falls back.

    Args:
        name: "cuda", "triton", "native" or "reference".

    Raises:
        ValueError: `name` is no backend.
    """
    token = _forced.set(_check_backend(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend that is forced here, or None."""
    return _forced.get()


class Impl:
    """One implementation of an op.

    Args:
        backend: its name, one of BACKENDS.
        load: returns the function that runs it, or raises Unavailable; called once, at the first use.
        rejects: takes the op's arguments and answers, from metadata alone, why they can't run here, or None;
            without it everything can.
        ready: takes the op's arguments before they are checked and answers, fast, whether all is right with them
            and they run here, as nearly always; else they are checked, and `rejects` asked. Used once loaded.
    """

    def __init__(
        self,
        backend: str,
        load: Callable[[], Callable[..., Any]],
        rejects: Callable[..., str | None] | None = None,
        ready: Callable[..., bool] | None = None,
    ):
        self.backend, self.rejects, self.ready, self._load = backend, rejects, ready, load
        self.run: Callable[..., Any] | None = None  # once loaded
        self._reason: str | None = None

    def unavailable(self) -> str | None:
        """Why this implementation can't be loaded here, or None."""
        if self.run is None and self._reason is None:
            try:
                self.run = self._load()
            except Unavailable as error:
                self._reason = str(error)
        return self._reason


class Op:
    """An op's implementations in order of preference; the last one, the reference, takes everything.

    Args:
        name: of the op.
        impls: the implementations.
        check: takes the op's arguments as a user gave them and returns them as implementations take them, or raises.
        traced: the same call as a node of a graph, for compilers, which can't follow what happens here.
    """

    def __init__(self, name: str, *impls: Impl, check: Callable[..., tuple[Any, ...]], traced: Callable[..., Any]):
        self.name, self.impls, self.check, self.traced = name, impls, check, traced

    def __call__(self, *args: Any) -> Any:
        return self._run(args, self.check)

    def unchecked(self, *args: Any) -> Any:
        """The call with arguments that are right by construction."""
        return self._run(args, None)

    def _run(self, args: tuple[Any, ...], check: Callable[..., tuple[Any, ...]] | None) -> Any:
        if torch.compiler.is_compiling():
            return self.traced(*(check(*args) if check else args))
        forced = _forced.get()
        for impl in self.impls:
            if impl.ready and impl.run and (forced is None or forced == impl.backend) and impl.ready(*args):
                return impl.run(*args)
        if check:
            args = check(*args)
        for impl in self.impls:
            if (forced is None or forced == impl.backend) and not impl.unavailable():
                run = cast(Callable[..., Any], impl.run)
                if not (impl.rejects and impl.rejects(*args)):
                    return run(*args)
        assert forced is not None
        raise RuntimeError(self._why_not(_check_backend(forced, "DDPM_FAST_BACKEND"), args))

    def _why_not(self, forced: str, args: Any) -> str:
        reasons = {i.backend: i.unavailable() or (i.rejects and i.rejects(*args)) or "can run" for i in self.impls}
        lines = [f"  {b}: {reasons.get(b, 'not implemented for this op')}" for b in BACKENDS]
        return f"{self.name}: the forced backend {forced!r} can't run these arguments\n" + "\n".join(lines)
