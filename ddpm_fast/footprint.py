"""What recorded code has looked at, and whether all of that is still the same."""

import dataclasses
from argparse import Namespace
from collections.abc import Container, Hashable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .ops._dispatch import forced

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EVERY_MODULE = vars(nn.Module()).keys() - {"training"}  # what no code of a network's own sets
PLAIN = (bool, int, float, str)  # what is the same when it is equal

Table = dict[Any, Any] | list[Any] | tuple[Any, ...]
Place = tuple[object, ...]


class NotRecorded(Exception):
    """Why something runs eagerly."""


class Footprint:
    """Of modules all attributes, tensors, submodules and hooks, and what is in attributes that are lists, tuples,
    dictionaries, dataclasses or namespaces; and the entries of other dictionaries. It holds on to all of that, so that
    another object can't pass for it. What lies in other objects isn't seen.

    Args:
        modules: with all that is in them.
        tables: other dictionaries, each with its keys that don't matter.

    Raises:
        NotRecorded: a module has hooks, which are Python to be run every time, or works with other devices.
    """

    def __init__(self, *modules: nn.Module, tables: Iterable[tuple[Table, Container[object]]] = ()):
        if nn.modules.module._has_any_global_hook():
            raise NotRecorded("a hook of all modules must run every time")
        self._sizes: list[tuple[Table, int]] = []
        self._entries: list[tuple[Table, Any, object, Place | None]] = []
        self._watched: set[int] = set()
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
        if id(table) in self._watched:
            return
        self._watched.add(id(table))
        self._sizes.append((table, len(table)))
        for key, value in _items(table):
            if key in ignored:
                continue
            self._entries.append((table, key, value, _place(value) if isinstance(value, Tensor) else None))
            inside = _inside(value)
            if inside is not None and not (isinstance(key, str) and key.startswith("_")):
                self._watch(inside, ())

    def unchanged(self) -> bool:
        """Whether all of it is still the same, in the same memory."""
        if nn.modules.module._has_any_global_hook() or any(len(table) != size for table, size in self._sizes):
            return False
        for table, key, value, place in self._entries:
            now = table.get(key) if isinstance(table, dict) else table[key]
            if now is value:
                if place is not None and place != _place(value):
                    return False
            elif type(now) is not type(value) or not isinstance(value, PLAIN) or now != value:
                return False
        return True


def _items(table: Table) -> Iterator[tuple[Any, Any]]:
    return iter(table.items()) if isinstance(table, dict) else enumerate(table)


def _inside(value: object) -> Table | None:
    """What of a value is watched, too."""
    if isinstance(value, (dict, list, tuple)):
        return value
    if isinstance(value, (SimpleNamespace, Namespace)) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")
    ):
        return vars(value)
    return None


def _place(tensor: Any) -> Place:
    grad = tensor.requires_grad and torch.is_grad_enabled()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, grad


def switches(device: torch.device) -> tuple[Hashable, ...]:
    """The settings that decide which kernels run; part of the key of a recording."""
    kind, of = device.type, torch.backends
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    reduced = "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"
    settings: list[tuple[Any, tuple[str, ...]]] = [
        (of.cudnn, ("enabled", "benchmark", "deterministic", "allow_tf32", "conv.fp32_precision")),
        (of.cuda.matmul, ("allow_tf32", "fp32_precision", *reduced)),
        (of, ("fp32_precision",)),
    ]
    libraries = [_setting(owner, name) for owner, names in settings for name in names]
    attention = of.cuda.flash_sdp_enabled(), of.cuda.mem_efficient_sdp_enabled(), of.cuda.math_sdp_enabled()
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return forced(), autocast, *map(str, libraries), *attention, *modes


def _setting(owner: Any, name: str) -> object:
    """A switch; None where torch has no such one, or forbids to read it after its successor was set."""
    try:
        for part in name.split("."):
            owner = getattr(owner, part)
    except (AttributeError, RuntimeError):
        return None
    return owner
