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


def _ours_with_variance(
    x: Tensor, both: Tensor, rows: Tensor, tables: Tensor, k: Tensor, state: ops.NoiseState
) -> Tensor:
    model_out, variance = both.chunk(2, dim=1)
    return ops.sampler_step(x, model_out, rows, k, noise=state, variance=variance)


def _plain_with_variance(
    x: Tensor, both: Tensor, rows: Tensor, tables: Tensor, k: Tensor, state: ops.NoiseState
) -> Tensor:
    """As improved-diffusion has it: between the logs of the least and the largest variance."""
    model_out, variance = both.chunk(2, dim=1)
    t, share = k.expand(x.shape[0]), (variance + 1) / 2
    log_variance = share * extract(tables[4], t, x.shape) + (1 - share) * extract(tables[3], t, x.shape)
    without = _plain_without_noise(x, model_out, rows, tables, k, state)
    return without + torch.exp(0.5 * log_variance) * torch.randn_like(x)


_WAYS = {
    "": (_ours, _plain),
    " without noise": (_ours_without_noise, _plain_without_noise),
    " with variance": (_ours_with_variance, _plain_with_variance),
}


def _tables() -> tuple[Tensor, Tensor]:
    """The rows, and by step what the update is without them: factors of x, model_out and z, and two log variances."""
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).numpy()
    rows, least = (ddpm(abar, variance=variance).rows[:-1] for variance in ("beta", "posterior"))  # those with noise
    _, _, p_x, p_m, c_x, c_0, _, largest = rows.unbind(1)
    logs = torch.stack([least[:, 7], largest]).log()
    middle, c_v = logs.mean(0).exp(), (logs[1] - logs[0]) / 2
    return (
        torch.cat([rows[:, :7], torch.stack([middle, c_v], 1)], 1),
        torch.stack([c_x + c_0 * p_x, c_0 * p_m, middle, *(2 * logs)]),
    )


def _case(batch: int, *image: int, way: str = "") -> Case:
    shape, learned, noise = (batch, *image), "variance" in way, "without" not in way
    rows, tables = (table.float() for table in _tables())
    ours, plain = _WAYS[way]

    def make(seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x, model_out = (
            torch.randn(batch, channels, *image[1:], device=device, generator=generator).to(memory_format=memory_format)
            for channels in (image[0], (1 + learned) * image[0])
        )
        k = torch.tensor(ROW, device=device)
        return x, model_out, rows.to(device), tables.to(device), k, ops.NoiseState.at(seed, ROW, device=device)

    return Case(
        "sampler_step",
        f"{list(shape)}{way}",
        batch,
        (3 + learned) * torch.Size(shape).numel() * 4,  # read x, model_out and the variance, write x'
        make,
        ours,
        plain,
        random=noise,
        layouts=False,
        beside_copy=not noise,
    )


def cases(batch: int) -> list[Case]:
    """Return the cases: images of CIFAR-10 and large ones, these also with a variance, and the step without noise,
    which only moves bytes.
    """
    large = batch, 3, 256, 256
    return [
        _case(4 * batch, 3, 32, 32),
        _case(*large),
        _case(*large, way=" with variance"),
        _case(4 * batch, *large[1:], way=" without noise"),
    ]
