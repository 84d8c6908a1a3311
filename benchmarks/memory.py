"""What training holds in memory, of each contender in a process of its own, so that nobody's leftovers count.

The peak: on a GPU what torch's allocator gives out at most, else the resident memory, which sees the scratch space of
every library, too. Both in an iteration after two others (so with weights, gradients, optimizer and EMA, and without
what only building or compiling took), less what the process held before the contender was built.
"""

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row, describe, progress
from benchmarks.problem import Builder, Problem

MIB = 2**20


def measure(make: Callable[[], dict[str, Builder]], problem: Problem, rows: Iterable[Row]) -> None:
    """Add ``peak_mib`` and ``saved_mib`` to the rows of contenders that were timed.

    Args:
        make: returns the contenders; a new process calls it.
        problem: what they train on.
        rows: theirs; a ``setting`` that was found the fastest is built alone.
    """
    context = multiprocessing.get_context("spawn")
    alone = replace(problem, steps=1)
    for row in rows:
        if "ms" not in row:
            continue
        progress(f"memory: {row['name']}")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            call = pool.submit(_held, make, row["name"], row.get("setting"), alone, torch.get_num_threads())
            try:
                row |= call.result()
            except Exception as error:  # as in problem.measure; its times stand
                describe(error)


def _held(
    make: Callable[[], dict[str, Builder]], name: str, setting: str | None, problem: Problem, threads: int
) -> Row:
    torch.set_num_threads(threads)
    build: Any = make()[name]
    if setting is not None:
        build = build.settings[setting]
    _ = problem.inputs
    before = _now(problem.device)
    contender = build(problem)
    solved = contender.problem or problem
    shapes = {tuple(sorted(weight.shape)) for weight in solved.weights.values()}
    for each in (solved, problem):
        vars(each).pop("weights", None)  # the contender has its own
    for _ in range(2):
        contender.run()
    _start_peak(problem.device)
    contender.run()
    peak = _peak(problem.device)
    row: Row = {"saved_mib": saved_bytes(contender.run, shapes) / MIB}
    return row if before is None or peak is None else row | {"peak_mib": (peak - before) / MIB}


def saved_bytes(run: Callable[[], Tensor], weight_shapes: set[tuple[int, ...]]) -> int:
    """Return the bytes of activations that an iteration keeps for its backward, each storage once.

    Weights are none, nor are their copies in another dtype: whatever has a shape in ``weight_shapes``, sorted sizes.
    Only what autograd's ``save_for_backward`` holds is seen.
    """
    storages: dict[int, int] = {}
    forward = True

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if forward and tuple(sorted(x.shape)) not in weight_shapes:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    def unpack(x: Tensor) -> Tensor:
        nonlocal forward
        forward = False  # what a backward recomputes was not kept
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        run()
    return sum(storages.values())


def _start_peak(device: torch.device) -> None:
    """Start a new peak, without what is free already."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _now(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int | None:
    """Return bytes of resident memory, now or at its peak; None where the system doesn't say."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
