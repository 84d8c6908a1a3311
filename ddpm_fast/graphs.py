"""What runs again and again, recorded once as a CUDA graph and replayed: the one place that captures.

A replay runs no Python and reads the addresses of the recording. So a recording keeps alive whatever it reads, and is
used again only while nothing that its code looked at has changed: modules, their attributes, where their tensors lie,
and torch's switches.
"""

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .ops._dispatch import forced

ENGINES = ("auto", "eager", "graph")
MOST = 4  # recordings that are kept, the last used ones
MOST_CHANGES = 8  # after so many recordings that were of no use any more, no other one is made
FAILED = "it can't be recorded"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EVERY_MODULE = vars(nn.Module()).keys() - {"training"}  # what no code of a network's own sets
PLAIN = (bool, int, float, str)  # what is the same when it is equal
WARM_UPS = 3  # runs before a capture, in which libraries search for algorithms and take their workspaces


Table = dict[Any, Any]
Place = tuple[object, ...]


class NotRecorded(Exception):
    """Why something runs eagerly."""


@dataclass(frozen=True)
class Recording:
    """What was recorded: `replay()` runs it, on the current stream."""

    replay: Callable[[], None]
    num_bytes: int  # of device memory that it took beyond that of earlier ones


class Recorder:
    """Records on a GPU. All that one records shares a stream, so libraries' workspaces, too, and a memory pool: its
    recordings can't run at the same time, and keep nothing for each other in memory that they allocated themselves.

    Args:
        device: the GPU.

    Raises:
        NotRecorded: it is none.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise NotRecorded(f"CUDA graphs need a GPU, the data is on {device}")
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run it as often as a capture needs."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

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
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own
        return Recording(graph.replay, torch.cuda.memory_reserved(self.device) - before)


class Footprint:
    """What recorded code has looked at: attributes, tensors, submodules and hooks of modules, and the entries of other
    dictionaries. It holds on to all of that, so that another object can't pass for it.

    Args:
        modules: with all that is in them.
        tables: other dictionaries, each with its keys that don't matter.

    Raises:
        NotRecorded: a module has hooks, which are Python to be run every time, or is spread over processes.
    """

    def __init__(self, *modules: nn.Module, tables: Iterable[tuple[Table, Container[object]]] = ()):
        if nn.modules.module._has_any_global_hook():
            raise NotRecorded("a hook of all modules must run every time")
        self._sizes: list[tuple[Table, int]] = []
        self._entries: list[tuple[Table, object, object, Place | None]] = []
        for module in modules:
            for name, m in module.named_modules():
                if any(vars(m)[hooks] for hooks in HOOKS):
                    raise NotRecorded(f"{name or type(m).__name__} has hooks, which must run every time")
                if isinstance(m, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
                    raise NotRecorded(f"{type(m).__name__} works with other devices")
                self._watch(vars(m), EVERY_MODULE)
                for table in (m._modules, m._parameters, m._buffers, *(vars(m)[hooks] for hooks in HOOKS)):
                    self._watch(table, ())
        for table, ignored in tables:
            self._watch(table, ignored)

    def _watch(self, table: Table, ignored: Container[object]) -> None:
        self._sizes.append((table, len(table)))
        for key, value in table.items():
            if key not in ignored:
                self._entries.append((table, key, value, _place(value) if isinstance(value, Tensor) else None))

    def unchanged(self) -> bool:
        """Whether all of it is still the same, in the same memory."""
        if nn.modules.module._has_any_global_hook() or any(len(table) != size for table, size in self._sizes):
            return False
        for table, key, value, place in self._entries:
            now = table.get(key)
            if now is value:
                if place is not None and place != _place(value):
                    return False
            elif type(now) is not type(value) or not isinstance(value, PLAIN) or now != value:
                return False
        return True


def _place(tensor: Any) -> Place:
    return tensor.data_ptr(), tensor.shape, tensor.requires_grad and torch.is_grad_enabled()


def switches(device: torch.device) -> tuple[Hashable, ...]:
    """The settings that decide which kernels run; part of the key of a recording."""
    kind = device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    libraries = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    exact = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return forced(), autocast, *libraries, *exact, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class Graphs:
    """Recordings by key, of which the last used ones are kept.

    `print(graphs)` lists them with the device memory that they take, or why something couldn't be recorded;
    `clear()` releases them.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Hashable, ...], _Entry] = OrderedDict()
        self._changes: Counter[Hashable] = Counter()  # how often a recording was of no more use
        self._recorder: Recorder | None = None
        self._busy = False
        self._told: set[str] = set()

    def __len__(self) -> int:
        """How many there are."""
        return sum(not isinstance(entry.made, str) for entry in self._entries.values())

    def __repr__(self) -> str:
        lines = [f"\n  {entry.made}" for entry in self._entries.values()]
        return "Graphs:" + ("".join(lines) or " none")

    def __deepcopy__(self, memo: object) -> "Graphs":
        return Graphs()  # of a copy, whose tensors are others

    def __reduce__(self) -> tuple[type["Graphs"], tuple[()]]:
        return Graphs, ()

    def clear(self) -> None:
        """Release them and their memory; what is still wanted is recorded again."""
        self._entries.clear()
        # A pool that nobody uses any more can't be captured into again.
        self._recorder = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the time of a replayed chain: what a callback asks for meanwhile runs eagerly, as memory is shared."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def get(
        self,
        key: tuple[Hashable, ...],
        look: Callable[[], Footprint],
        device: torch.device,
        make: Callable[[Any], Any],
        due: bool,
    ) -> Any:
        """What `make` returned for this key: made now, where what it had looked at has changed since or there is none.

        Args:
            key: its first item says of what; all recordings of that are looked at, and released where it has changed.
            look: says what `make` looks at.
            make: takes a Recorder and returns an object with what it recorded.
            due: whether making one now is worth it; without it and without one, the result is None.

        Raises:
            NotRecorded: it can't be made, and why.
        """
        if self._busy:
            raise NotRecorded("another recorded chain is under way")
        if torch._C._len_torch_dispatch_stack():
            raise NotRecorded("a dispatch mode wants to see every operation")
        same = [k for k in self._entries if k[0] == key[0]]
        for old in [k for k in same if not self._entries[k].seen.unchanged()]:
            del self._entries[old]
            self._changes[old] += 1
        if not self._entries:
            self.clear()
        if key not in self._entries:
            self._recorder = self._recorder or Recorder(device)
            if not due:
                return None
            if self._changes[key] > MOST_CHANGES:
                raise NotRecorded("what it looks at changes all the time")
            look()  # raises where there is no point in trying
            made = self._made(make, self._recorder)
            self._entries[key] = _Entry(look(), made)
            while len(self._entries) > MOST:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        made = self._entries[key].made
        if isinstance(made, str):
            raise NotRecorded(made)
        return made

    def _made(self, make: Callable[[Any], Any], recorder: Recorder) -> Any:
        """What was made, or a text that says why not: it isn't tried again."""
        grads = torch.is_grad_enabled()
        try:
            # Tensors that can also be written outside of inference mode; leaving that would switch gradients on.
            with torch.inference_mode(False), torch.set_grad_enabled(grads):
                return make(recorder)
        except (torch.OutOfMemoryError, MemoryError):
            self.clear()
            raise
        except Exception as error:  # whatever a network does that a capture can't follow
            self._recorder = None
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"{FAILED}: {type(error).__name__}: {text}"

    def tell(self, why: NotRecorded, wanted: bool) -> None:
        """Say why something runs eagerly, once, if a recording was asked for or has failed."""
        text = str(why)
        if text not in self._told and (wanted or text.startswith(FAILED)):
            self._told.add(text)
            warnings.warn(f"no CUDA graph: {text}; running eagerly", stacklevel=3)


@dataclass(frozen=True)
class _Entry:
    seen: Footprint
    made: Any  # or a text that says why it couldn't be
