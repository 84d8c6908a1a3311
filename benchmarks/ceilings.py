"""The two ceilings of a machine, measured in the run: a large matrix product and a large copy, the best of several."""

from collections.abc import Callable
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.harness import time_interleaved

T = TypeVar("T")


def cache_bytes(device: torch.device) -> int:
    """Return how many bytes of inputs must pass before a buffer is cold again."""
    if device.type == "cuda":
        return 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return 64 << 20  # beyond any private cache; the last level of a virtual machine is shared and unknown


def rotation(make: Callable[[int], T], nbytes: int, device: torch.device) -> Callable[[], T]:
    """Return a function giving ``make(0), make(1), ...`` in turn, enough of them (at most 64) to pass the cache."""
    sets = min(64, cache_bytes(device) // max(nbytes, 1) + 2)
    made = cycle([make(i) for i in range(sets)])
    return lambda: next(made)


def matmul_flops(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = (), repetitions: int = 9) -> float:
    """Return the FLOP/s of the fastest square matrix product on random data (2 FLOP per multiply-add)."""
    best = 0.0
    for size in sizes or ((4096, 8192) if device.type == "cuda" else (512, 1024, 2048)):
        a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        times = time_interleaved({"": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, device, repetitions, warmup=2)
        best = max(best, 2 * size**3 / (min(times[""]) * 1e-3))
    return best


def copy_bytes(device: torch.device, nbytes: int | None = None, repetitions: int = 9) -> float:
    """Return the bytes/s of a copy within the device, bytes read plus bytes written."""
    nbytes = nbytes or (4 << 30 if device.type == "cuda" else 256 << 20)
    source: Tensor = torch.randint(256, (nbytes // 8,), device=device)
    target = torch.empty_like(source)
    times = time_interleaved({"": lambda: target.copy_(source)}, device, repetitions, warmup=2)
    return 2 * nbytes / (min(times[""]) * 1e-3)
