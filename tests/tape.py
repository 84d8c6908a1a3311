"""A stand-in for CUDA graphs where there is no GPU: records operators with their tensors, and runs just these again.

As in a graph, addresses and numbers of the host are those of the recording, Python doesn't run again, and whoever reads
a value while it is recorded gets an error.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from ddpm_fast.footprint import NotRecorded
from ddpm_fast.graphs import FAILED, Recording
from ddpm_fast.ops import _checks

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)


def tape_is_recording() -> bool:
    """For networks that fail just then."""
    return any(isinstance(mode, _Recording) for mode in _get_current_dispatch_mode_stack())


def _tensors(tree: object) -> Iterator[Tensor]:
    return (t for t in tree_leaves(tree) if isinstance(t, Tensor))


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # of what was there and is written, by its address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs, schema = kwargs or {}, func._schema
        named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in _tensors(named.get(argument.name)):
                    self.before.setdefault(t.data_ptr(), (t, t.detach().clone()))
        out = func(*args, **kwargs)
        # What is no view, and was not written in place, is memory of its own.
        made = [] if any(r.alias_info for r in schema.returns) else list(_tensors(out))
        self.calls.append((func, args, kwargs, made))
        return out


class _Watch(TorchDispatchMode):
    def __init__(self, all_reads: bool) -> None:
        super().__init__()
        self.reads, self.all_reads = 0, all_reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in READS and (self.all_reads or args[0].is_floating_point())
        return func(*args, **(kwargs or {}))


class Tape:
    """In the place of graphs.Recorder."""

    def __init__(self) -> None:
        self.lengths: list[int] = []  # operators of each recording
        self.recorders: list[torch.device] = []  # devices for which one was made
        self.replays = 0

    @property
    def records(self) -> int:
        return len(self.lengths)

    def warm_up(self, run: Callable[[], object]) -> None:
        """As a recorder does, once."""
        self.watched(run, all_reads=True)

    def watched(self, run: Callable[[], object], all_reads: bool = False) -> None:
        """As a recorder does; an eager training step reads its own counters, which beside a GPU are the host's."""
        watch = _Watch(all_reads)
        with watch, mock.patch.object(_checks, "indices"):
            run()
        if watch.reads:
            raise NotRecorded(f"{FAILED}: it waits for the device")

    def record(self, run: Callable[[], object]) -> Recording:
        """Record it. Other than a capture this runs it, too; what was there before is put back."""
        recording = _Recording()
        with recording, mock.patch.object(_checks, "indices"):  # which looks at numbers, but only at those of a CPU
            run()
        with torch.no_grad():
            for tensor, value in recording.before.values():
                tensor.copy_(value)
        self.lengths.append(len(recording.calls))

        @torch.no_grad()
        def replay() -> None:
            self.replays += 1
            with torch.autocast("cpu", enabled=False):
                for func, args, kwargs, made in recording.calls:
                    again = func(*args, **kwargs)
                    for to, new in zip(made, _tensors(again), strict=True) if made else ():
                        to.copy_(new)

        return Recording(replay, 1 << 20)
