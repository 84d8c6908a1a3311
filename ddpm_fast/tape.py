"""A network's call that comes again and again on a CPU, recorded as the operators and kernels that it consists of.

A step for a single image takes a quarter of its time in the Python around them. So a chain records its second call, and
from the third on it runs what was recorded, as do chains to come.
"""

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from itertools import count
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .footprint import Footprint, NotRecorded, switches
from .models.fusing import code
from .models.made import Table
from .ops import _native

MOST = 3  # recordings of a chain whose callback changes the network
APART = 256  # bytes between the places of results

_ALONE = Lock()

aten = torch.ops.aten
EMPTY = aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default
INTO = {  # operators that can also write their result into room that is there
    f.default: f.out
    for f in (aten.cat, aten.bmm, aten.baddbmm, aten.mm, aten.addmm, aten._softmax, aten.upsample_nearest2d)
}


class _Room(NamedTuple):
    """Memory that a line makes, to be written by it or by those that follow."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    num_bytes: int
    filled: str  # the line that writes it, where the memory is there; nothing where others do


class _Line(NamedTuple):
    """A call as a line of Python."""

    text: str
    makes: list[str]
    reads: list[str]  # of what lines before it made, or what is given
    of: str | None = None  # what all that it makes are other views of, "" for what was there before
    room: _Room | None = None


class _Recording(TorchDispatchMode):
    """Notes torch's operators and our kernels while they run, as lines of Python that take each other's results.

    Tensors are held weakly: they are freed, and their memory is used again, as without a recording.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self._space: dict[str, Any] = {}  # functions, and values that were there before
        self._names = WeakTensorKeyDictionary()
        self._count = count()
        self._lines: list[_Line] = []
        self._given = [self._made(tensor) for tensor in given]

    def _made(self, tensor: Tensor) -> str:
        name = self._names[tensor] = f"x{next(self._count)}"
        return name

    def _text(self, value: Any, reads: list[str]) -> str:
        """The value as an argument."""
        if isinstance(value, (tuple, list)):
            inside = "".join(f"{self._text(v, reads)}, " for v in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if isinstance(value, Tensor) and value in self._names:
            reads.append(self._names[value])
            return reads[-1]
        name = f"c{id(value)}"
        self._space[name] = value
        return name

    def _call(self, run: Callable[..., Any], args: Any, kwargs: Any, reads: list[str]) -> str:
        given = [self._text(v, reads) for v in args] + [f"{k}={self._text(v, reads)}" for k, v in kwargs.items()]
        return f"{self._text(run, [])}({', '.join(given)})"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads: list[str] = []
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = list(out) if isinstance(out, (tuple, list)) else [out]
        if not all(isinstance(tensor, Tensor) for tensor in results):
            raise NotRecorded(f"{func} asks for a number")
        call, of = self._call(func, args, kwargs, reads), self._viewed(results, (args, kwargs))
        makes = [self._made(tensor) for tensor in results if tensor not in self._names]  # else it was written in place
        if makes and len(makes) < len(results):
            raise NotRecorded(f"{func} returns something twice")
        text = f"{', '.join(makes)}{'' if isinstance(out, Tensor) else ','} = {call}"
        room = None
        if makes and (func in EMPTY or func in INTO):
            filled = self._call(INTO[func], args, kwargs | {"out": out}, []) if func in INTO else ""
            room = _Room(out.dtype, out.size(), out.stride(), out.untyped_storage().nbytes(), filled)
        self._lines.append(_Line(text if makes else call, makes, reads, of, room))
        return out

    def _viewed(self, results: list[Tensor], given: Any) -> str | None:
        """What the results are views of, as `_Line.of`. By their memory: not every operator says that it makes a view,
        and some may make one or a copy."""
        memory = {_memory(t): t for t in tree_leaves(given) if isinstance(t, Tensor) and t.layout is torch.strided}
        bases = {_memory(t) for t in results if t.layout is torch.strided}
        base = memory.get(bases.pop()) if len(bases) == 1 else None
        return None if base is None else self._names.get(base, "")

    def kernel(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run one of our own, which writes into tensors that it is given."""
        done = run(*args)
        if done is not False:
            reads: list[str] = []
            self._lines.append(_Line(self._call(run, args, {}, reads), [], reads))
        return done

    def constants(self) -> list[Tensor]:
        """What was there before, and is read; ask before `replay`."""
        return [value for value in self._space.values() if isinstance(value, Tensor)]

    def replay(self, result: Tensor) -> tuple[Callable[..., Tensor], int]:
        """What does all of it again, for other tensors in the place of those given, and returns what `result` then is.

        Room that is written lies in one piece of memory, where others of it aren't read any more; views of it are made
        here, once. The second result is how many bytes that takes.
        """
        end = self._text(result, [])
        there, num_bytes = self._place(end)
        lines, kept = [f"    return {end}"], {end, *there}
        for line in reversed(self._lines):
            text = line.text
            if line.makes and line.makes[0] in there:
                text = line.room.filled if line.room else ""
            if text:
                last = [name for name in dict.fromkeys([*line.makes, *line.reads]) if name not in kept]
                kept.update(last)
                lines.append(f"    {text}" + (f"; del {', '.join(last)}" if last else ""))
        lines.append(f"def replay({', '.join(self._given)}):")
        exec("\n".join(reversed(lines)), self._space)
        run: Callable[..., Tensor] = self._space.pop("replay")  # else it would keep itself
        return run, num_bytes

    def _place(self, end: str) -> tuple[set[str], int]:
        """Put into the space the room of all but the result, and views of it; their names, and its bytes."""
        whole = {name: name for name in self._given}  # of which memory each name is a view
        for line in self._lines:
            whole |= {name: whole[line.of] if line.of else name for name in line.makes}
        rooms = {line.makes[0]: line.room for line in self._lines if line.room and line.makes[0] != whole[end]}
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i, line in enumerate(self._lines):
            for name in (*line.makes, *line.reads):
                first.setdefault(whole[name], i)
                last[whole[name]] = i
        at: dict[str, int] = {}
        for name, room in rooms.items():
            start = 0
            for low, other in sorted((at[other], other) for other in at if last[other] >= first[name]):
                if start + room.num_bytes <= low:
                    break
                start = max(start, up(low + rooms[other].num_bytes, APART))
            at[name] = start
        memory = torch.empty(
            max((at[name] + room.num_bytes for name, room in rooms.items()), default=0), dtype=torch.uint8
        )
        for name, room in rooms.items():
            piece = memory[at[name] : at[name] + room.num_bytes].view(room.dtype)
            self._space[name] = piece.as_strided(room.size, room.stride)
        there = set(rooms)
        for line in self._lines:
            if line.of is not None and there.issuperset(line.reads):
                exec(line.text, self._space)
                there.update(line.makes)
        return there, memory.nbytes


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


class Recorded(NamedTuple):
    """A call of a network that was recorded."""

    seen: Footprint
    state: Any
    replay: Callable[..., Tensor]
    num_bytes: int  # of memory of its own
    held: list[Tensor]  # what was there before
    text: str

    def __repr__(self) -> str:
        return f"{self.text}: {self.num_bytes / 2**20:.0f} MiB"


class Repeated:
    """A network that is called again and again, in a chain: what it does is recorded where that is always the same.

    Args:
        model: the network.
        call: (x, t or row, *inputs) -> model_out, which calls it; always with tensors of the same kind.
        alone: whether nobody's code runs between the calls. Else each of them looks whether something has changed.
        table: what was made of its weights, and recorded of such calls under this key, before, or will be.

    Raises:
        NotRecorded: it may do something else in each call.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Tensor], alone: bool, table: Table, key: Hashable):
        same = getattr(type(model), "does_the_same_each_time", None)
        if not callable(same) or same(model) is not True:
            raise NotRecorded("what this network does in each call is not known")
        self._model, self._call, self._alone, self._table, self._key = model, call, alone, table, key
        self._modules, self._weights = [*model.modules()], [*model.parameters(), *model.buffers()]
        self._state: Any = None  # at the last call that looked
        self._replay: Callable[..., Tensor] | None = None
        self._left, self._looks = MOST, True
        before = table.recorded.get(key)
        if before is not None and before.seen.unchanged():
            self._seen, self._state, self._replay = before.seen, before.state, before.replay
        else:
            self._seen = Footprint(model)

    def __call__(self, x: Tensor, t: Tensor, *inputs: Tensor | None) -> Tensor:
        looks, self._looks = self._looks, not self._alone
        if looks and self._has_changed(x.device):
            self._replay = None
            self._table.note(self._weights)  # before any of them is cast, or something else is made of it
            if torch.is_autocast_enabled("cpu"):
                torch.clear_autocast_cache()  # it sees no changes
            return self._call(x, t, *inputs)  # in which weights are prepared for all calls
        if self._replay is None:
            return self._recorded(x, t, *inputs) if self._left else self._call(x, t, *inputs)
        with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
            return self._replay(x, t, *(i for i in inputs if i is not None))

    def _has_changed(self, device: torch.device) -> bool:
        """Whether anything has since the last look, which decides about what a call does."""
        versions = [weight._version for weight in self._weights if not weight.is_inference()]
        known = [code(type(module)) for module in self._modules]
        before, self._state = self._state, (versions, known, _native.threads(), switches(device))
        return self._state != before or not self._seen.unchanged()

    def _recorded(self, x: Tensor, t: Tensor, *inputs: Tensor | None) -> Tensor:
        self._left -= 1
        recording = _Recording(x, t, *(i for i in inputs if i is not None))
        try:
            # One at a time: entering and leaving a mode changes flags that are the process's.
            with _ALONE, recording, _native.noted(recording.kernel):
                out = self._call(x, t, *inputs)
        except NotRecorded:
            self._left = 0
            return self._call(x, t, *inputs)
        held = recording.constants()
        self._replay, num_bytes = recording.replay(out)
        text = f"{type(self._model).__name__} on {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        self._table.recorded[self._key] = Recorded(self._seen, self._state, self._replay, num_bytes, held, text)
        return out
