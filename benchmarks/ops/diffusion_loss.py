"""The l2 loss with its backward; ours draws the noise again from its counter, PyTorch reads it back."""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops


def _ours(model_out: Tensor, noise: Tensor, state: ops.NoiseState) -> Tensor:
    return ops.diffusion_loss(model_out, state)


def _plain(model_out: Tensor, noise: Tensor, state: ops.NoiseState) -> Tensor:
    return F.mse_loss(model_out, noise)


def _case(batch: int, *image: int) -> Case:
    shape = (batch, *image)

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        model_out = torch.randn(shape, device=device, generator=generator)
        state = ops.NoiseState.at(seed, 0, device=device)
        noise = ops.noise(shape, state, ops.PERTURB)
        return model_out.to(memory_format=memory_format), noise.to(memory_format=memory_format), state

    nbytes = 3 * torch.Size(shape).numel() * 4  # forward: read model_out; backward: read it, write its gradient
    return Case(
        "diffusion_loss",
        f"{list(shape)} forward+backward",
        batch,
        nbytes,
        make,
        _ours,
        _plain,
        grads=(0,),
        layouts=False,
    )


def cases(batch: int) -> list[Case]:
    """Return the cases: a batch of CIFAR-10 images, and one of large images."""
    return [_case(batch, 3, 32, 32), _case(batch, 3, 256, 256)]
