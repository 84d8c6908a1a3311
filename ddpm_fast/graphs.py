"""What runs again and again, recorded once as a CUDA graph and replayed: the one place that captures.

A replay runs no Python and reads the addresses of the recording. So a recording keeps alive whatever it reads, and is
used again only while nothing that its code looked at has changed: modules, their attributes, where their tensors lie,
and torch's switches.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops._dispatch import forced

ENGINES = ("auto", "eager", "graph")
MOST = 4  # recordings that are kept, the last used ones
WARM_UPS = 3  # runs before a capture, in which libraries search for algorithms and take their workspaces


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


class Footprint(NamedTuple):
    """What recorded code looks at, as marks to compare, and what must live on for them to keep their meaning."""

    subject: tuple[int, ...]  # which modules
    marks: tuple[Hashable, ...]
    held: tuple[object, ...]


def footprint(*modules: nn.Module, others: Sequence[object] = ()) -> Footprint:
    """Of all of the modules, and of other objects by identity.

    Raises:
        NotRecorded: a module has hooks, which are Python to be run every time.
    """
    if nn.modules.module._has_any_global_hook():
        raise NotRecorded("a global module hook must run every time")
    marks: list[Hashable] = [*map(id, others)]
    held: list[object] = [*others]

    def note(name: str, value: object) -> None:
        plain = value is None or isinstance(value, (bool, int, float, str))
        marks.append((name, value if plain else id(value)))
        if not plain:
            held.append(value)

    for module in modules:
        for name, m in module.named_modules():
            if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
                raise NotRecorded(f"{name or type(m).__name__} has hooks, which must run every time")
            marks.append((name, id(m), type(m)))
            held.append(m)
            for key, value in vars(m).items():
                if not key.startswith("_"):
                    note(key, value)
            for table in (m._parameters, m._buffers):
                for key, tensor in table.items():
                    marks.append((key, *_place(tensor)))
                    held.append(tensor if tensor is None else tensor.detach())  # the same memory, whoever moves it on
    return Footprint(tuple(map(id, modules)), tuple(marks), tuple(held))


def _place(tensor: Tensor | None) -> tuple[Hashable, ...]:
    if tensor is None:
        return ()
    grad = torch.is_grad_enabled() and tensor.requires_grad
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), grad


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
        self._entries: OrderedDict[Hashable, tuple[Footprint, Any]] = OrderedDict()
        self._recorder: Any = None
        self._busy = False
        self._told: set[str] = set()

    def __len__(self) -> int:
        """How many there are."""
        return sum(not isinstance(made, str) for _, made in self._entries.values())

    def __repr__(self) -> str:
        lines = [made if isinstance(made, str) else f"{made}" for _, made in self._entries.values()]
        return "\n".join(["Graphs:", *(f"  {line}" for line in lines)]) if lines else "Graphs: none"

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
        self, key: Hashable, seen: Footprint, device: torch.device, make: Callable[[Any], Any], due: bool = True
    ) -> Any:
        """What `make` returned for this key, made now where that is due, or where what it had seen has changed.

        Args:
            make: takes a recorder and returns an object with what it recorded.
            due: whether making one is worth it.

        Raises:
            NotRecorded: it can't be made, and why.
        """
        if self._busy:
            raise NotRecorded("another recorded chain is under way")
        if torch._C._len_torch_dispatch_stack():
            raise NotRecorded("a dispatch mode wants to see every operation")
        kept = self._entries.items()
        for stale in [k for k, (old, _) in kept if old.subject == seen.subject and old.marks != seen.marks]:
            del self._entries[stale]
        if not self._entries:
            self.clear()
        if key not in self._entries:
            if not due:
                raise NotRecorded("too short to be worth a recording")
            self._entries[key] = seen, self._made(device, make)
            while len(self._entries) > MOST:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        made = self._entries[key][1]
        if isinstance(made, str):
            raise NotRecorded(made)
        return made

    def _made(self, device: torch.device, make: Callable[[Any], Any]) -> Any:
        """What was made, or a text that says why not: it isn't tried again."""
        self._recorder = self._recorder or Recorder(device)
        try:
            grads = torch.is_grad_enabled()
            # Tensors that can also be written outside of it; leaving it would switch gradients on.
            with torch.inference_mode(False), torch.set_grad_enabled(grads):
                return make(self._recorder)
        except (torch.OutOfMemoryError, MemoryError):
            self.clear()
            raise
        except Exception as error:  # whatever a network does that a capture can't follow
            self._recorder = None
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"it can't be recorded: {type(error).__name__}: {text}"

    def tell(self, why: NotRecorded, wanted: bool) -> None:
        """Say why something runs eagerly, once, if a recording was asked for or has failed."""
        text = str(why)
        if text not in self._told and (wanted or text.startswith("it can't be recorded")):
            self._told.add(text)
            warnings.warn(f"no CUDA graph: {text}; running eagerly", stacklevel=3)
