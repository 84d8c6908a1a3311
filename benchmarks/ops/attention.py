"""Attention of one head, on the shapes of the CIFAR-10 network and half its size."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops
from ddpm_fast.reference.attention import attention as plain


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * q.shape[2] ** -0.5).softmax(-1), v)


def _make(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device, memory_format: torch.memory_format
) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(3))


def _case(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> Case:
    shape = (batch, tokens, channels)
    return Case(
        "attention",
        str(list(shape)),
        batch,
        4 * torch.Size(shape).numel() * dtype.itemsize,
        partial(_make, shape, dtype),
        ops.attention,
        plain,
        dtype,
        4 * batch * tokens**2 * channels,
        layouts=False,
        peers={"two products": _products},
        peers_on="cpu",
    )


def cases(batch: int) -> list[Case]:
    """Return the cases, without gradients."""
    return [_case(batch, *shape, torch.float32) for shape in ((256, 256), (64, 256), (64, 64))]
