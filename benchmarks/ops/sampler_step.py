"""One reverse step with its noise drawn inside, the coefficients on the device."""

import torch
from torch import Tensor

from benchmarks.ops import Case, Inputs
from benchmarks.original import extract
from ddpm_fast import ops
from ddpm_fast.samplers.ddpm import ddpm

ROW = 500


def _ours(x: Tensor, model_out: Tensor, rows: Tensor, tables: Tensor, k: Tensor, state: ops.NoiseState) -> Tensor:
    return ops.sampler_step(x, model_out, rows, k, noise=state)


def _ours_without_noise(
    x: Tensor, model_out: Tensor, rows: Tensor, tables: Tensor, k: Tensor, state: ops.NoiseState
) -> Tensor:
    return ops.sampler_step(x, model_out, rows, k)


def _plain_without_noise(
    x: Tensor, model_out: Tensor, rows: Tensor, tables: Tensor, k: Tensor, state: ops.NoiseState
) -> Tensor:
    t = k.expand(x.shape[0])
    return extract(tables[0], t, x.shape) * x + extract(tables[1], t, x.shape) * model_out


def _plain(x: Tensor, model_out: Tensor, rows: Tensor, tables: Tensor, k: Tensor, state: ops.NoiseState) -> Tensor:
    """The update and its gathers as the original code has them."""
    without = _plain_without_noise(x, model_out, rows, tables, k, state)
    return without + extract(tables[2], k.expand(x.shape[0]), x.shape) * torch.randn_like(x)


def _case(batch: int, *image: int, noise: bool = True) -> Case:
    shape = (batch, *image)
    rows = ddpm((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).numpy()).rows
    _, _, p_x, p_m, c_x, c_0, _, c_z = rows.unbind(1)
    tables = torch.stack([c_x + c_0 * p_x, c_0 * p_m, c_z]).float()  # the same update by x and model_out

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x, model_out = (
            torch.randn(shape, device=device, generator=generator).to(memory_format=memory_format) for _ in range(2)
        )
        k = torch.tensor(ROW, device=device)
        return x, model_out, rows.float().to(device), tables.to(device), k, ops.NoiseState.at(seed, ROW, device=device)

    return Case(
        "sampler_step",
        f"{list(shape)}{'' if noise else ' without noise'}",
        batch,
        3 * torch.Size(shape).numel() * 4,  # read x and model_out, write x'
        make,
        _ours if noise else _ours_without_noise,
        _plain if noise else _plain_without_noise,
        random=noise,
        layouts=False,
        beside_copy=not noise,
    )


def cases(batch: int) -> list[Case]:
    """Return the cases: CIFAR-10 images and large ones with noise, and the step alone, which only moves bytes."""
    return [_case(4 * batch, 3, 32, 32), _case(batch, 3, 256, 256), _case(4 * batch, 3, 256, 256, noise=False)]
