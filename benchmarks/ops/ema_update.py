"""The moving average of a network's weights, as many tensors as the presets have."""

import torch
from torch import Tensor

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops
from ddpm_fast.models.presets import preset

DECAY = 0.9999


def _ours(averages: list[Tensor], values: list[Tensor]) -> tuple[Tensor, ...]:
    ops.ema_update(averages, values, DECAY)
    return tuple(averages)


def _plain(averages: list[Tensor], values: list[Tensor]) -> tuple[Tensor, ...]:
    torch._foreach_lerp_(averages, values, 1 - DECAY)
    return tuple(averages)


def _case(name: str) -> Case:
    with torch.device("meta"):
        shapes = [p.shape for p in preset(name).build_unet().parameters()]

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        return tuple([torch.randn(s, device=device, generator=generator) for s in shapes] for _ in range(2))

    numel = sum(shape.numel() for shape in shapes)
    label = f"of the {name} network, {len(shapes)} tensors of {numel / 1e6:.1f} M"
    # Read both, write the average.
    return Case("ema_update", label, 1, 3 * 4 * numel, make, _ours, _plain, layouts=False)


def cases(batch: int) -> list[Case]:
    """Return the cases: the two presets."""
    return [_case("digits"), _case("cifar10")]
