"""The sinusoidal embedding of a batch of timesteps."""

import math

import torch
from torch import Tensor

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops

DIM = 128


def _ours(t: Tensor) -> Tensor:
    return ops.timestep_embedding(t, DIM)


def _plain(t: Tensor) -> Tensor:
    frequencies = torch.exp(torch.arange(DIM // 2, device=t.device) * (-math.log(10000) / (DIM // 2)))
    angles = torch.outer(t, frequencies)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def cases(batch: int) -> list[Case]:
    """Return one case."""

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        return (
            torch.randint(1000, (batch,), device=device, generator=torch.Generator(device).manual_seed(seed)).float(),
        )

    nbytes = batch * DIM * 4  # written once
    return [Case("timestep_embedding", f"[{batch}] -> {DIM}", batch, nbytes, make, _ours, _plain, layouts=False)]
