"""The sum at the end of a residual block, with its convolution's bias, on the shapes of the CIFAR-10 network."""

import torch
from torch import Tensor

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops


def _ours(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    return ops.residual_sum(x, residual, bias)


def _plain(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    return x + bias[:, None, None] + residual


def _case(batch: int, channels: int, size: int, dtype: torch.dtype, training: bool) -> Case:
    shape = (batch, channels, size, size)

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x, residual = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(2))
        bias = torch.randn(channels, device=device, generator=generator).to(dtype)
        return x.to(memory_format=memory_format), residual.to(memory_format=memory_format), bias

    # Forward: read x and residual, write y. Backward: read dy for the bias; both images have it as their gradient.
    nbytes = (4 if training else 3) * torch.Size(shape).numel() * dtype.itemsize
    label = f"{list(shape)} {'forward+backward' if training else 'forward'}"
    grads = (0, 1, 2) if training else ()
    return Case("residual_sum", label, batch, nbytes, make, _ours, _plain, dtype, grads=grads, beside_copy=not training)


def cases(batch: int) -> list[Case]:
    """Return the cases: both precisions at two resolutions, forward, and one of training."""
    shapes = ((128, 32, False), (256, 16, False), (128, 32, True))
    return [
        _case(batch, *shape, dtype, training)
        for *shape, training in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]
