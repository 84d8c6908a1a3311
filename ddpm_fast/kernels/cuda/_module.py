"""The module ddpm_fast._cuda, and how tensors are told to it: by address."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ...reference.philox import NoiseState

module: Any = importlib.import_module("ddpm_fast._cuda")

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as csrc/cuda/numbers.h numbers them


def address(x: Tensor | None) -> int:
    """Where x lies; 0 for none."""
    return 0 if x is None else x.data_ptr()


def place(x: Tensor) -> tuple[int, int]:
    """The device and the stream to launch on."""
    return (x.device.index, torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else (0, 0)


def draws(state: NoiseState | None, stream: int) -> tuple[int, int, int, int, int]:
    """Where random numbers come from: addresses of seed, draw and maybe the first sample, else its value."""
    if state is None:
        return 0, 0, 0, 0, stream
    seed, draw = state[:2]
    first: int | Tensor = state.first_sample
    at, value = (address(first), 0) if isinstance(first, Tensor) else (0, first)
    return address(seed), address(draw), at, value, stream


@functools.cache
def limits(device: int) -> tuple[int, int, int]:
    """Compute capability, processors, and bytes of shared memory that a block may have."""
    of: tuple[int, int, int] = module.limits(device)
    return of
