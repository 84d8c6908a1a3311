"""Worker processes: decoding images, and batches assembled ahead of time. The results don't depend on their number.

They are spawned (nothing is inherited, threads and CUDA stay out of it), leave Ctrl-C to the parent and end with it.
"""

import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
import torch.multiprocessing
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
Batch = tuple[Tensor, Tensor | None]
CHUNK = 16  # images sent at a time: a message costs as much as a small image
DIED = (
    "a worker process died: out of memory, or started by a script that lacks `if __name__ == '__main__':`; "
    "workers=0 (--workers 0) does without"
)

_shared: Any = None  # in a worker: what all its calls work on


class Picker(Protocol):
    """What can pick a batch, in this process or in a copy in another."""

    def pick(self, position: int, count: int) -> Batch:
        """`count` images from `position` on, and their labels."""
        ...


def ordered(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Like map, by `workers` processes where that isn't 0; in the order of the items, few of which wait in memory."""
    if workers == 0:
        yield from map(function, items)
        return
    items, waiting = iter(items), deque[Future[list[Result]]]()
    pool = start_pool(workers)
    try:
        while chunk := list(islice(items, CHUNK)):
            waiting.append(pool.submit(_each, function, chunk))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(DIED) from error
    finally:
        pool.shutdown(cancel_futures=True)


class Ahead:
    """Batches picked by worker processes before they are asked for.

    They guess that each batch follows the one before it. A wrong guess costs time and changes nothing: what is returned
    is `picker.pick(position, count)`.
    """

    def __init__(self, picker: Picker, workers: int) -> None:
        self.picker, self.workers = picker, workers
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: deque[tuple[tuple[int, int], Future[Any]]] = deque()

    def pick(self, position: int, count: int) -> Batch:
        """As `Picker.pick`."""
        if self._pool is None:  # not before the first batch: who never trains starts no processes
            self._pool = start_pool(self.workers, self.picker)
        if self._waiting and self._waiting[0][0] != (position, count):
            while self._waiting:
                self._waiting.popleft()[1].cancel()
        try:
            first = position + count * len(self._waiting)
            for start in range(first, position + count * (2 * self.workers + 1), count):
                self._waiting.append(((start, count), self._pool.submit(_pick, start, count)))
            pixels, labels = self._waiting.popleft()[1].result()
        except BrokenProcessPool as error:
            raise RuntimeError(DIED) from error
        return torch.from_numpy(pixels), None if labels is None else torch.from_numpy(labels)


def start_pool(workers: int, shared: Any = None) -> ProcessPoolExecutor:
    """`workers` processes that hold `shared`, its tensors in shared memory; they end when no one holds the pool."""
    # torch's context knows how to share tensors.
    context: Any = torch.multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (shared,))
    with _ctrl_c_blocked():
        pool.submit(int)  # with the first task all processes start
    return pool


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """A process started in here never sees Ctrl-C, not even while it imports torch."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(shared: Any) -> None:
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it can't be blocked
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _shared = shared


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])  # also after a SIGKILL, when no one is left to say goodbye
    os._exit(1)


def _each(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [function(item) for item in items]


def _pick(position: int, count: int) -> tuple[Any, Any]:
    """As arrays: a tensor would take a file descriptor each, and the worker's life to the end of the transfer."""
    pixels, labels = _shared.pick(position, count)
    return pixels.numpy(), None if labels is None else labels.numpy()
