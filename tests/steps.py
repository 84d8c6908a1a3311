"""Training steps, and the lines of a script that they stand for."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toys import TINY

from ddpm_fast import Diffusion, TrainStep, ops

CONFIG = replace(TINY, ema_start=6, num_classes=5)  # copies, then averages


@pytest.fixture(autouse=True)
def on_reference() -> Iterator[None]:
    """What a tape sees are torch's operators."""
    with ops.use_backend("reference"):
        yield


def diffusion(**options) -> Diffusion:
    torch.manual_seed(0)
    return Diffusion.from_config(replace(CONFIG, **options), seed=7).train()


def adam(d: Diffusion, **options) -> torch.optim.Optimizer:
    return torch.optim.Adam(d.model.parameters(), **{"lr": 2**-7, "fused": True} | options)


def batch(k: int, size: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(k)
    return torch.rand(size, 1, 8, 8, generator=g) * 2 - 1, torch.randint(5, (size,), generator=g)


def script(d: Diffusion, optimizer, x: Tensor, y: Tensor, clip=None, accumulate=1, dtype=None) -> Tensor:
    """The lines that a TrainStep stands for."""
    optimizer.zero_grad()
    total = torch.zeros(())
    for x_part, y_part in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = d(x_part, y_part)
        (loss / accumulate).backward()
        total += loss.detach() / accumulate
    if clip:
        nn.utils.clip_grad_norm_(d.model.parameters(), clip)
    optimizer.step()
    d.update_ema()
    return total


def same(a: Diffusion, b: Diffusion) -> None:
    """Every tensor and every count is equal."""
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert (a.step, a.calls, a.seed) == (b.step, b.calls, b.seed)


def pair(**options) -> tuple[Diffusion, torch.optim.Optimizer, TrainStep]:
    """A diffusion for the script, its optimizer, and a step of a copy."""
    a = diffusion()
    b = copy.deepcopy(a)
    return a, adam(a), TrainStep(b, adam(b), **options)


def recorded(**options) -> tuple[Diffusion, torch.optim.Optimizer, TrainStep]:
    """As `pair`, after the recording."""
    a, optimizer, step = pair(engine="graph", **options)
    for d in (a, step.diffusion):
        d.model.out_norm.requires_grad_(False)
    for k in range(12):
        script(a, optimizer, *batch(k))
        step(*batch(k))
    assert len(step.graphs) == 2
    return a, optimizer, step
