"""GroupNorm + time bias + SiLU on the shapes of the CIFAR-10 network."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops

GROUPS = 32


def _ours(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor) -> Tensor:
    return ops.group_norm_silu(x, weight, bias, GROUPS, add=add)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor) -> Tensor:
    return F.silu(F.group_norm(x + add[:, :, None, None], GROUPS, weight, bias))


@functools.cache
def _two_pass_norm() -> Any:
    from benchmarks.peers.common import require

    return require("benchmarks.peers.two_pass_norm").two_pass_group_norm_silu  # needs Triton


def _two_passes(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor) -> Tensor:
    return _two_pass_norm()(x, weight, bias, add, GROUPS)


def _case(batch: int, channels: int, size: int, dtype: torch.dtype, training: bool) -> Case:
    shape = (batch, channels, size, size)

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator).to(dtype)

        x = normal(*shape).to(memory_format=memory_format)
        return x, normal(channels), normal(channels), normal(batch, channels)

    numel = batch * channels * size * size
    # Forward: read x, write y. Backward: read x and dy, write dx.
    tensors = 3 if training else 2
    return Case(
        "group_norm_silu",
        f"{list(shape)} {'backward' if training else 'forward'}",
        batch,
        tensors * numel * dtype.itemsize,
        make,
        _ours,
        _plain,
        dtype,
        grads=(0, 1, 2, 3) if training else (),
        backward_alone=training,
        peers={} if training else {"two passes, as apex": _two_passes},
    )


def cases(batch: int) -> list[Case]:
    """Return the cases: both precisions at the two resolutions that hold most of the bytes, and at small batch."""
    dtypes = (torch.float32, torch.bfloat16)
    large = [
        _case(batch, channels, size, dtype, training)
        for training in (False, True)
        for channels, size in ((128, 32), (256, 16))
        for dtype in dtypes
    ]
    small = [
        _case(few, channels, size, dtype, False)
        for few in (1, 4)
        for channels, size in ((128, 32), (256, 8))
        for dtype in dtypes
    ]
    return large + small
