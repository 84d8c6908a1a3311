"""Standard normals: Philox by counter against torch's generator."""

import torch
from torch import Tensor

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops


def _case(batch: int, *image: int) -> Case:
    shape = (batch, *image)

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        return (ops.NoiseState.at(seed, 0, device=device),)

    def ours(state: ops.NoiseState) -> Tensor:
        return ops.noise(shape, state, ops.REVERSE)

    def plain(state: ops.NoiseState) -> Tensor:
        return torch.randn(shape, device=state.seed.device)

    nbytes = torch.Size(shape).numel() * 4  # written once
    return Case("noise", str(list(shape)), batch, nbytes, make, ours, plain, random=True, layouts=False)


def cases(batch: int) -> list[Case]:
    """Return the cases: a batch of CIFAR-10 images, and one of large images."""
    return [_case(batch, 3, 32, 32), _case(batch, 3, 256, 256)]
