"""What a call costs beside its arithmetic: every op on so few numbers that nothing else counts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops

N, C = 1, 32


def _make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    x, weight, bias, add = (
        torch.randn(shape, device=device, generator=generator) for shape in ((N, C, 2, 2), (C,), (C,), (N, C))
    )
    return x.to(memory_format=memory_format), weight, bias, add


def _norm(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor) -> Tensor:
    return ops.group_norm_silu(x, weight, bias, 8, add=add)


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor) -> Tensor:
    return F.silu(F.group_norm(x + add[:, :, None, None], 8, weight, bias))


def _step(x: Tensor, rows: Tensor, k: Tensor, state: ops.NoiseState) -> Tensor:
    return ops.sampler_step(x, x, rows, k, noise=state)


def _plain_step(x: Tensor, rows: Tensor, k: Tensor, state: ops.NoiseState) -> Tensor:
    row = rows.index_select(0, k.reshape(1))[0]
    return row[4] * x + row[5] * (row[2] * x + row[3] * x) + row[7] * torch.randn_like(x)


def _make_step(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    x, rows = (torch.randn(shape, device=device, generator=generator) for shape in ((N, 3, 2, 2), (4, 8)))
    return x, rows, torch.tensor(2, device=device), ops.NoiseState.at(seed, 2, device=device)


def cases(batch: int) -> list[Case]:
    """Return the cases; all is in the caches, and the bytes are of no importance."""
    common = {"op": "group_norm_silu", "batch": N, "nbytes": 8 * N * C * 4, "make": _make, "hot": True}
    return [
        Case(label="one call, forward", ours=_norm, plain=_plain_norm, **common),
        Case(label="one call, forward+backward", ours=_norm, plain=_plain_norm, grads=(0, 1, 2, 3), **common),
        Case("sampler_step", "one call", N, 144, _make_step, _step, _plain_step, random=True, layouts=False, hot=True),
    ]
