"""In which configuration a kernel runs: by name, from the committed table of this GPU, else by the kernel's own rule.

A table, `tables/<gpu>.json`, is written by `benchmarks/gpu_suite.py --part tune`: {"header": ..., op: {key: name}}.
So every process that runs the same package on the same kind of GPU chooses alike. `DDPM_FAST_TUNE=FILE` asks for a
search: where a kernel's call can be repeated (the norm's), what neither FILE nor the table has is timed at its first
call, and kept in FILE, {gpu: {op: {key: name}}}, which later processes read.
"""

import functools
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from triton.runtime.errors import TritonError

from .lookup import Names, committed, read, slug

C = TypeVar("C")
RUNS = 20
EVEN = 1.05  # so close to the fastest, which single launches don't tell, an earlier one, the rule's first, is kept


@functools.cache
def _own(path: Path) -> dict[str, Names]:
    """What FILE has, and then what this process has found, by the slug of a GPU."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"DDPM_FAST_TUNE: {path} is no file of configurations: {error}") from error


_gpu_name = functools.cache(torch.cuda.get_device_name)


def chosen(
    op: str, key: str, listed: Mapping[str, C], device: torch.device, run: Callable[[C], None] | None = None
) -> C:
    """The configuration of a call.

    Args:
        op, key: where a table has the name.
        listed: configurations by name, the rule's first; a name that is not among them is passed over.
        device: of the data; a table is for a GPU.
        run: the call in a configuration, which can be repeated; without it nothing is searched.
    """
    rule = next(iter(listed))
    if device.type != "cuda":
        return listed[rule]
    gpu, tune = _gpu_name(device.index), os.environ.get("DDPM_FAST_TUNE")
    own = _own(Path(tune)).get(slug(gpu), {}) if tune else {}
    name = own.get(op, {}).get(key) or committed(gpu).get(op, {}).get(key)
    if name is None and tune and run is not None and not torch.cuda.is_current_stream_capturing():
        times = {name: milliseconds(functools.partial(run, cut)) for name, cut in listed.items()}
        name = next(name for name, ms in times.items() if ms <= min(times.values()) * EVEN)
        keep(Path(tune), slug(gpu), op, key, name)
    return listed[rule if name is None or name not in listed else name]


def milliseconds(run: Callable[[], None]) -> float:
    """The median of several runs, launches included, after two that don't count; infinite where it is too much."""
    try:
        for _ in range(2):
            run()
    except (TritonError, RuntimeError) as error:  # too much for this GPU, its memory, or the compiler
        print(f"passed over: {type(error).__name__}", file=sys.stderr)
        return float("inf")
    times = []
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def keep(path: Path, gpu: str, op: str, key: str, name: str) -> None:
    """Adds a name to FILE, and to what this process knows, beside what other processes have written since."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for found in (_own(path), now := read(path)):
        found.setdefault(gpu, {}).setdefault(op, {})[key] = name
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    part.replace(path)
