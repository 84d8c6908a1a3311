"""3x3 convolution on the shapes of the CIFAR-10 network that hold most of its FLOP."""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops


def _ours(x: Tensor, weight: Tensor) -> Tensor:
    return ops.conv3x3(x, weight)


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def _case(batch: int, channels: int, out_channels: int, size: int, dtype: torch.dtype, training: bool) -> Case:
    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(batch, channels, size, size, device=device, generator=generator)
        weight = torch.randn(out_channels, channels, 3, 3, device=device, generator=generator) / (9 * channels) ** 0.5
        return tuple(a.to(dtype).to(memory_format=memory_format) for a in (x, weight))

    x, y, w = batch * channels * size**2, batch * out_channels * size**2, 9 * channels * out_channels
    # Forward: read x and w, write y. Backward: read x, w and dy, write dx and dw.
    numel = 3 * x + 2 * y + 3 * w if training else x + y + w
    flops = 2 * batch * size**2 * w * (3 if training else 1)
    label = f"{[batch, channels, size, size]} -> {out_channels} {'forward+backward' if training else 'forward'}"
    grads = (0, 1) if training else ()
    return Case("conv3x3", label, batch, numel * dtype.itemsize, make, _ours, _plain, dtype, flops, grads)


def cases(batch: int) -> list[Case]:
    """Return the cases: both precisions, three shapes of inference and one of training."""
    shapes = ((128, 128, 32, False), (256, 256, 16, False), (384, 128, 32, False), (128, 128, 32, True))
    return [
        _case(batch, *shape, dtype, training)
        for *shape, training in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]
