"""The two ceilings of a machine, measured in the run: a large matrix product and a large copy, the best of several."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from benchmarks.harness import NAMES, Row, time_interleaved

T = TypeVar("T")

LONG_MS = 500.0  # for one product; a CPU takes so long for 1024 rows in a precision that it hasn't


def cache_bytes(device: torch.device) -> int:
    """Return how many bytes must pass before a buffer is out of the caches, on a CPU those of its cores alone.

    A core's inputs have just been written by another op, so the last level, which cores share, may well hold them.
    """
    if device.type == "cuda":
        return 2 * torch.cuda.get_device_properties(device).L2_cache_size
    try:
        private = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, OSError, ValueError):
        private = 0
    return 2 * torch.get_num_threads() * (private if private > 0 else 2 << 20)


def rotation(make: Callable[[int], T], nbytes: int, device: torch.device) -> list[T]:
    """Return ``make(0), make(1), ...``, enough (at most 64) that one used in turn is out of the caches each time."""
    return [make(i) for i in range(min(64, cache_bytes(device) // max(nbytes, 1) + 2))]


def matmul(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = (), repetitions: int = 9) -> Row:
    """Return the row of the fastest square matrix product on random data; 2 FLOP per multiply-add. None is larger than
    the first one that takes long."""
    rows = []
    for size in sizes or ((4096, 8192) if device.type == "cuda" else (512, 1024, 2048)):
        a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        times = time_interleaved({"": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, device, repetitions, warmup=2)
        row: Row = {
            "case": f"matrix product [{size}, {size}]",
            "precision": NAMES[dtype],
            "batch": 1,
            "name": "torch.mm",
        }
        rows.append(row | {"ms": min(times[""]), "tflops": 2 * size**3 / min(times[""]) * 1e-9})
        if min(times[""]) > LONG_MS:
            break
    return max(rows, key=lambda row: row["tflops"])


def copy(device: torch.device, nbytes: int | None = None, repetitions: int = 9) -> Row:
    """Return the row of a copy within the device; bytes read plus bytes written."""
    nbytes = nbytes or (4 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.rand(nbytes // 4, device=device)
    target = torch.empty_like(source)
    times = time_interleaved({"": lambda: target.copy_(source)}, device, repetitions, warmup=2)
    row: Row = {"case": f"copy of {nbytes >> 20} MiB", "precision": "float32", "batch": 1, "name": "torch copy_"}
    return row | {"ms": min(times[""]), "gbytes_per_s": 2 * nbytes / min(times[""]) * 1e-6}
