"""The l2 loss with its backward; ours draws the noise again from its counter, PyTorch reads it back."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops


def _ours(model_out: Tensor, noise: Tensor, state: ops.NoiseState, weight: Tensor) -> Tensor:
    return ops.diffusion_loss(model_out, state)


def _plain(model_out: Tensor, noise: Tensor, state: ops.NoiseState, weight: Tensor) -> Tensor:
    return F.mse_loss(model_out, noise)


def _ours_weighted(model_out: Tensor, noise: Tensor, state: ops.NoiseState, weight: Tensor) -> Tensor:
    return (weight * ops.diffusion_loss(model_out, state, reduction="none")).mean()


def _plain_weighted(model_out: Tensor, noise: Tensor, state: ops.NoiseState, weight: Tensor) -> Tensor:
    return (weight * F.mse_loss(model_out, noise, reduction="none").flatten(1).mean(1)).mean()


Loss = Callable[[Tensor, Tensor, ops.NoiseState, Tensor], Tensor]


def _case(image: tuple[int, ...], batch: int, ours: Loss = _ours, plain: Loss = _plain, label: str = "") -> Case:
    shape = (batch, *image)

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        model_out = torch.randn(shape, device=device, generator=generator)
        state = ops.NoiseState.at(seed, 0, device=device)
        noise = ops.noise(shape, state, ops.PERTURB)
        weight = torch.rand(batch, device=device, generator=generator)
        return model_out.to(memory_format=memory_format), noise.to(memory_format=memory_format), state, weight

    nbytes = 3 * torch.Size(shape).numel() * 4  # forward: read model_out; backward: read it, write its gradient
    return Case(
        "diffusion_loss",
        f"{list(shape)}{label} forward+backward",
        batch,
        nbytes,
        make,
        ours,
        plain,
        grads=(0,),
        layouts=False,
    )


def cases(batch: int) -> list[Case]:
    """Return the cases: a batch of CIFAR-10 images, one of large images, and CIFAR-10's with a weight for each."""
    cifar10, large = (3, 32, 32), (3, 256, 256)
    weighted = _case(cifar10, batch, _ours_weighted, _plain_weighted, ", weighted,")
    return [_case(cifar10, batch), _case(large, batch), weighted]
