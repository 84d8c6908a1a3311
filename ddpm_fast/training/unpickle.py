"""Pickles read as data: dicts, lists, tuples, strings, numbers and numpy arrays, and nothing is ever executed.

Python's unpickler calls what a file names. This one is a stack machine of its own, which knows the few names that numpy
writes and calls none of them: they select a piece of code below, and any other name is an error.
"""

import pickletools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
LITERAL = r"(SHORT_)?BIN(STRING|UNICODE8?|BYTES8?)|BYTEARRAY8|STRING|UNICODE|(BIN)?INT[12]?|(BIN)?FLOAT|LONG[14]?"
LITERALS = {opcode.name for opcode in pickletools.opcodes if re.fullmatch(LITERAL, opcode.name)}
ARRAY_TYPE = re.compile(r"[biuf][1248]")
MAX_CONTAINERS = 10**6  # a batch of CIFAR has fewer than a hundred


class _Name(NamedTuple):
    """Something the pickle would like to call."""

    module: str
    name: str


class _Type:
    """A numpy dtype in the making."""

    def __init__(self, code: object) -> None:
        if not (isinstance(code, str) and ARRAY_TYPE.fullmatch(code)):
            raise ValueError("holds an array of another type than numbers")
        self.dtype = np.dtype(code)


class _Array:
    """A numpy array in the making."""

    value: np.ndarray | None = None


def unpickle(data: bytes) -> dict[str, Any]:
    """The dict a pickle holds; bytes among its keys become str.

    Raises:
        ValueError: damaged, not a dict, or it asks for anything but plain data and numpy arrays.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        (result,) = machine.stack
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise ValueError(f"no valid pickle ({type(error).__name__})") from error
    if not isinstance(result, dict):
        raise ValueError(f"holds a {type(result).__name__}, expected a dict")
    return {_text(key): value.value if isinstance(value, _Array) else value for key, value in result.items()}


class _Machine:
    """The stack, the marks on it, and the memo, of https://docs.python.org/3/library/pickletools.html."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}  # not a list: an index of a billion costs nothing
        self.containers = 0

    def step(self, name: str, argument: Any) -> None:
        """Does what one opcode says."""
        stack = self.stack
        if name in LITERALS:
            stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("APPEND", "APPENDS"):
            items = self._items() if name == "APPENDS" else [stack.pop()]
            _kind(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._items() if name == "SETITEMS" else self._last(2)
            _kind(stack[-1], dict).update(_pairs(items))
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        """The opcodes that make something new."""
        stack = self.stack
        self.containers += 1
        if self.containers > MAX_CONTAINERS:
            raise ValueError(f"holds more than {MAX_CONTAINERS} lists, dicts and tuples")
        if name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in TUPLES:
            stack.append(tuple(self._last(TUPLES[name])))
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self._items()
            stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else dict(_pairs(items)))
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_Name(*(str(part) for part in self._last(2))))
        elif name == "REDUCE":
            called, arguments = self._last(2)
            stack.append(_reduce(_kind(called, _Name), _kind(arguments, tuple)))
        elif name == "BUILD":
            state = _kind(stack.pop(), tuple)
            _set_state(stack[-1], state)
        else:
            raise ValueError(f"asks for {name}")

    def _items(self) -> list[Any]:
        """Takes off what lies above the last mark."""
        return self._last(len(self.stack) - self.marks.pop())

    def _last(self, count: int) -> list[Any]:
        if not 0 <= count <= len(self.stack):
            raise IndexError(count)
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items


def _kind(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} where a {kind.__name__} belongs")
    return value


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    for key in items[::2]:
        if not isinstance(key, (str, bytes, int)):  # the hash of a tuple nested a million deep overflows C's stack
            raise TypeError(f"{type(key).__name__} as a key")
    return zip(items[::2], items[1::2], strict=True)


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> bytes:
    """The bytes of an array; a str in a pickle of Python 2."""
    return value.encode("latin1") if isinstance(value, str) else bytes(_kind(value, bytes))


def _reduce(called: _Name, arguments: tuple[Any, ...]) -> Any:
    """What `called(*arguments)` would have made, for the four functions numpy's pickles name."""
    module = called.module.replace("numpy._core", "numpy.core")
    if (module, called.name) == ("_codecs", "encode") and arguments[1:] == ("latin1",):
        return _kind(arguments[0], str).encode("latin1")
    if (module, called.name) == ("numpy", "dtype"):
        return _Type(arguments[0])
    if (module, called.name) == ("numpy.core.multiarray", "_reconstruct"):
        if arguments[0] == ("numpy", "ndarray"):
            return _Array()
    if (module, called.name) == ("numpy.core.numeric", "_frombuffer"):
        data, kind, shape, order = arguments
        array = _Array()
        array.value = _array(data, kind, shape, order == "F")
        return array
    raise ValueError(f"asks for {called.module}.{called.name}, which no array needs"[:200])


def _set_state(target: Any, state: tuple[Any, ...]) -> None:
    if isinstance(target, _Type):
        if state[1] not in ("|", "<", ">", "="):
            raise ValueError("holds an array of unknown byte order")
        target.dtype = target.dtype.newbyteorder(state[1])
    else:
        _, shape, kind, fortran, data = state
        _kind(target, _Array).value = _array(data, kind, shape, bool(fortran))


def _array(data: Any, kind: Any, shape: Any, fortran: bool) -> np.ndarray:
    flat = np.frombuffer(_bytes(data), _kind(kind, _Type).dtype)
    sides = tuple(_kind(side, int) for side in _kind(shape, tuple))
    if len(sides) > 8 or min(sides, default=0) < 0:
        raise ValueError(f"holds an array of shape {sides}")
    return flat.reshape(sides, order="F" if fortran else "C")
