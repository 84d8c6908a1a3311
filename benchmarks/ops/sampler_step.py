"""One reverse step with its noise drawn inside, the coefficients on the device."""

import torch
from torch import Tensor

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops
from ddpm_fast.samplers.ddpm import ddpm

ROW = 500


def _ours(x: Tensor, model_out: Tensor, rows: Tensor, coefficients: Tensor, k: Tensor, state: ops.NoiseState) -> Tensor:
    return ops.sampler_step(x, model_out, rows, k, noise=state)


def _plain(
    x: Tensor, model_out: Tensor, rows: Tensor, coefficients: Tensor, k: Tensor, state: ops.NoiseState
) -> Tensor:
    of_x, of_model_out, sigma = coefficients.index_select(0, k.reshape(1))[0].unbind()
    return of_x * x + of_model_out * model_out + sigma * torch.randn_like(x)


def _case(batch: int, *image: int) -> Case:
    shape = (batch, *image)
    rows = ddpm((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).numpy()).rows
    _, _, p_x, p_m, c_x, c_0, _, c_z = rows.unbind(1)
    coefficients = torch.stack([c_x + c_0 * p_x, c_0 * p_m, c_z], dim=1).float()  # the same update in one line

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x, model_out = (
            torch.randn(shape, device=device, generator=generator).to(memory_format=memory_format) for _ in range(2)
        )
        k = torch.tensor(ROW, device=device)
        return (
            x,
            model_out,
            rows.float().to(device),
            coefficients.to(device),
            k,
            ops.NoiseState.at(seed, ROW, device=device),
        )

    nbytes = 3 * torch.Size(shape).numel() * 4  # read x and model_out, write x'
    return Case("sampler_step", str(list(shape)), batch, nbytes, make, _ours, _plain, random=True, layouts=False)


def cases(batch: int) -> list[Case]:
    """Return the cases: a batch of CIFAR-10 images, and one of large images."""
    return [_case(batch, 3, 32, 32), _case(batch, 3, 256, 256)]
