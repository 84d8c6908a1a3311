"""What runs again and again, recorded once as a CUDA graph and replayed: the one place that captures.

A replay runs no Python and reads the addresses of the recording. So a recording is used again only while nothing that
its code has looked at has changed (footprint.py), and keeps alive whatever it reads.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from .footprint import Footprint, NotRecorded
from .models.made import Kept

ENGINES = ("auto", "eager", "graph")
MOST = 8  # recordings that are kept at a time
MOST_CHANGES = 8  # after so many recordings in turn that were soon of no more use, no other one is made
MANY_USES = 20  # of a recording that was worth its making
WARM_UPS = 3  # runs before a capture, in which libraries search for algorithms and take their workspaces
FAILED = "it can't be recorded"

Key = tuple[Hashable, ...]


def possible(device: torch.device) -> bool:
    """Whether there are graphs on this device."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Recording:
    """What was recorded: `replay()` runs it, on the current stream."""

    replay: Callable[[], None]
    num_bytes: int  # of device memory that it took beyond that of earlier ones


class Recorder:
    """Records on a GPU. All that one records shares a stream, so libraries' workspaces, too, and a memory pool: its
    recordings can't run at the same time, keep nothing for each other in memory that they allocated themselves, and
    are released together, as torch gives back the stream's workspaces with the first of them.

    Args:
        device: the GPU.

    Raises:
        NotRecorded: it is none, or a capture has failed in this process.
    """

    broken = False  # a failed capture leaves torch's allocator and generators in a state of their own

    def __init__(self, device: torch.device):
        if not possible(device):
            raise NotRecorded(f"CUDA graphs need a GPU, the data is on {device}")
        if Recorder.broken:
            raise NotRecorded("an earlier capture failed in this process")
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run it as often as a capture needs, the last time watched."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS - 1):
                run()
            self.watched(run)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def watched(self, run: Callable[[], object]) -> None:
        """Run it, to its end, and raise NotRecorded if it has waited for the device, which a capture can't."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [w for w in seen if "synchronizing CUDA operation" in str(w.message)]
        for other in seen:
            if other not in waits:
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if waits:
            raise NotRecorded(f"{FAILED}: it waits for the device, in {waits[0].filename}:{waits[0].lineno}")

    def record(self, run: Callable[[], object]) -> Recording:
        """Record what it launches; nothing of that runs yet."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load data, may go on meanwhile.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            try:
                with capture:
                    run()
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception:
                Recorder.broken = True
                for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):  # torch has not
                    with suppress(Exception):
                        getattr(torch._C, name)(self.device.index, self._pool)
                raise
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own
        return Recording(graph.replay, torch.cuda.memory_reserved(self.device) - before)


@dataclass
class _Entry:
    seen: Footprint
    made: Any  # or a text that says why it couldn't be
    uses: int = 0


class Graphs:
    """Recordings by key; and on a CPU, what was made of a network's weights.

    `print(graphs)` lists them with the memory that they take, or why something couldn't be recorded; `clear()` releases
    them.

    Attributes:
        made: the latter.
    """

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._failed: dict[Key, _Entry] = {}
        self._changes: Counter[Key] = Counter()  # recordings in turn that were of no more use
        self._recorder: Recorder | None = None
        self._busy = False
        self.made = Kept()
        self._of: tuple[object, ...] = ()  # what `made` is for
        self._why: dict[str, bool] = {}  # reasons why something ran eagerly, and whether they were said

    def __len__(self) -> int:
        """How many recordings there are."""
        return len(self._entries) + len(self.made.recorded)

    def __repr__(self) -> str:
        lines = [f"\n  {entry.made}" for entry in self._entries.values()]
        lines += [f"\n  {recorded}" for recorded in self.made.recorded.values()]
        if self.made:
            lines.append(f"\n  made of weights: {self.made.num_bytes() / 2**20:.0f} MiB")
        lines += [f"\n  eager: {why}" for why in self._why]
        return "Graphs:" + ("".join(lines) or " none")

    def __deepcopy__(self, memo: object) -> "Graphs":
        return Graphs()  # of a copy, whose tensors are others

    def __reduce__(self) -> tuple[type["Graphs"], tuple[()]]:
        return Graphs, ()

    def clear(self) -> None:
        """Release them and their memory; what is still wanted is recorded again, with another stream and pool."""
        self.made.clear()
        self._of = ()
        self._entries.clear()
        self._recorder = None

    def made_of(self, *of: object) -> Kept:
        """`made`, for the chains of a network and whatever else they depend on; of others nothing is kept, nor of what
        are no longer the network's weights."""
        of += tuple(t for m in of if isinstance(m, torch.nn.Module) for t in m.parameters())
        if len(of) != len(self._of) or any(a is not b for a, b in zip(of, self._of, strict=True)):
            self.made, self._of = Kept(), of
        return self.made

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the time of a replayed chain: what a callback asks for meanwhile runs eagerly, as memory is shared."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def recorder(self, device: torch.device) -> Recorder:
        """What records now."""
        self._recorder = self._recorder or Recorder(device)
        return self._recorder

    def get(
        self,
        key: Key,
        look: Callable[[], Footprint],
        device: torch.device,
        make: Callable[[Recorder], Any],
        due: Callable[[bool], bool],
    ) -> Any:
        """What `make` returned for this key: made now, where there is none or what it had looked at has changed.

        Args:
            key: its first item says of what; if one recording of that has changed, all are released.
            look: says what `make` looks at.
            make: returns an object with what it recorded.
            due: whether making one now is worth it, told whether older ones were released just now; without it, and
                without one, the result is None.

        Raises:
            NotRecorded: it can't be made, and why.
        """
        if self._busy:
            raise NotRecorded("another recorded chain is under way")
        if torch._C._len_torch_dispatch_stack():
            raise NotRecorded("a dispatch mode wants to see every operation")
        if key in self._failed:
            if self._failed[key].seen.unchanged():
                raise NotRecorded(self._failed[key].made)
            del self._failed[key]
        released = self._release_changed(key[0])
        if key not in self._entries:
            self.recorder(device)
            if not due(released):
                return None
            if self._changes[key] > MOST_CHANGES:
                raise NotRecorded(f"{FAILED}: what it looks at changes all the time")
            if len(self._entries) >= MOST:
                self.clear()
            self._make(key, look, make, self.recorder(device))
        self._entries[key].uses += 1
        return self._entries[key].made

    def _release_changed(self, subject: Hashable) -> bool:
        old = [k for k, entry in self._entries.items() if k[0] == subject and not entry.seen.unchanged()]
        for k in old:
            self._changes[k] = 1 if self._entries[k].uses >= MANY_USES else self._changes[k] + 1
        if old:
            self.clear()
        return bool(old)

    def _make(self, key: Key, look: Callable[[], Footprint], make: Callable[[Recorder], Any], by: Recorder) -> None:
        """Add an entry, or one that says why not, which isn't tried again."""
        seen, grads, why = look(), torch.is_grad_enabled(), ""
        try:
            # Tensors that can also be written outside of inference mode; leaving that would switch gradients on.
            with torch.inference_mode(False), torch.set_grad_enabled(grads):
                self._entries[key] = _Entry(seen, make(by))
            if not seen.unchanged():
                why = f"{FAILED}: it changes what it looks at when it runs"
        except NotRecorded as error:
            why = str(error)
        except Exception as error:  # whatever a network does that a capture can't follow
            why = f"{FAILED}: {_told(error)}"
        if why:
            self.clear()
            self._failed[key] = _Entry(look(), why)
            raise NotRecorded(why)

    def tell(self, why: NotRecorded, wanted: bool) -> None:
        """Say why something runs eagerly, once, if a recording was asked for or has failed."""
        text = str(why)
        said = self._why.setdefault(text, False)
        if not said and (wanted or text.startswith(FAILED)):
            self._why[text] = True
            warnings.warn(f"no recorded step: {text}; running eagerly", stacklevel=_depth_of_the_caller())


def _depth_of_the_caller() -> int:
    """As a stacklevel for whoever called this: the first frame outside of this package and of torch."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (__package__, "torch"):
        frame, depth = frame.f_back, depth + 1
    return depth


def _told(error: BaseException) -> str:
    """The first of the errors that led to this one, in a line: a failed capture says no more than that it failed."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
