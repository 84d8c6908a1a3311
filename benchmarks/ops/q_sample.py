"""The forward process with its noise drawn inside."""

import torch
from torch import Tensor

from benchmarks.ops import Case, Inputs
from benchmarks.original import extract
from ddpm_fast import ops

TIMESTEPS = 1000


def _ours(x_start: Tensor, t: Tensor, signal: Tensor, spread: Tensor, state: ops.NoiseState) -> Tensor:
    return ops.q_sample(x_start, t, signal, spread, state)


def _plain(x_start: Tensor, t: Tensor, signal: Tensor, spread: Tensor, state: ops.NoiseState) -> Tensor:
    return extract(signal, t, x_start.shape) * x_start + extract(spread, t, x_start.shape) * torch.randn_like(x_start)


def _case(batch: int, *image: int) -> Case:
    shape = (batch, *image)

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x_start = torch.rand(shape, device=device, generator=generator) * 2 - 1
        t = torch.randint(TIMESTEPS, (batch,), device=device, generator=generator)
        alphas_cumprod = torch.linspace(1 - 1e-4, 1 - 0.02, TIMESTEPS, dtype=torch.float64).cumprod(0)
        tables = (alphas_cumprod.sqrt().float().to(device), (1 - alphas_cumprod).sqrt().float().to(device))
        return x_start.to(memory_format=memory_format), t, *tables, ops.NoiseState.at(seed, 0, device=device)

    nbytes = 2 * torch.Size(shape).numel() * 4  # read x_start, write x_t
    return Case("q_sample", str(list(shape)), batch, nbytes, make, _ours, _plain, random=True, layouts=False)


def cases(batch: int) -> list[Case]:
    """Return the cases: a batch of CIFAR-10 images, and one of large images."""
    return [_case(4 * batch, 3, 32, 32), _case(batch, 3, 256, 256)]
