"""Recorded chains and training steps against eager ones, bit for bit, and their memory over many replays.

Without a GPU nothing is recorded: both are eager, and the checks are walked through.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import Diffusion, TrainStep, preset

REPLAYS = 10**5
SAMPLERS: tuple[dict[str, Any], ...] = ({}, {"sampler_options": {"clip": True, "variance": "posterior"}})


# Of the digits: what training weighs and networks are told, each with what it brings to a chain.
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "guided, learned variance": ({"label_dropout": 0.1, "learned_variance": True}, {"guidance": 3.0}),
    "weighed by losses": (
        {"loss_weighting": "min_snr", "timestep_sampling": "loss_second_moment"},
        {"sampler": "dpmpp_2m"},
    ),
    "noise levels, Huber": ({"time_input": "noise_level", "loss_type": "huber"}, {"sampler": "heun"}),
}


def _diffusion(
    device: torch.device, dry: bool, model: str, changes: dict[str, Any] | None = None, **options: Any
) -> Diffusion:
    torch.manual_seed(0)
    config = replace(preset(model), ema_start=6, **changes or {})
    config = replace(config, base_channels=16, num_res_blocks=1) if dry else config
    return Diffusion.from_config(config, seed=1, **options).to(device).train()


def _labels(diffusion: Diffusion, images: int, device: torch.device) -> Tensor | None:
    return None if diffusion.num_classes is None else torch.arange(images, device=device) % diffusion.num_classes


@contextmanager
def _repeatable() -> Iterator[None]:
    """With convolutions that give the same bits twice; and without the warning that there is no GPU."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="no recorded step")  # nothing may fall back
            warnings.filterwarnings(
                "ignore", message="no recorded step: CUDA graphs need a GPU|sampling from ema_model"
            )
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _recorded(graphs: Any, device: torch.device, least: int) -> None:
    assert device.type != "cuda" or len(graphs) >= least, f"nothing was recorded: {graphs!r}"


def chains(device: torch.device, dry: bool) -> str:
    """Samples of both engines: precisions, batches, samplers, numbers of steps, seeds."""
    count = 0
    for model in ("digits",) if dry else ("digits", "cifar10"):
        graph = _diffusion(device, dry, model, engine="graph")
        eager = copy.deepcopy(graph)
        eager.engine = "eager"
        for bf16 in (False, True):
            for images in (2,) if dry else (1, 8, 64):
                for k, options in enumerate(SAMPLERS):
                    more: dict[str, Any] = {"seed": k, "num_steps": 3 + k if dry else 20 + k, "first_index": 5 * k}
                    y = _labels(graph, images, device)
                    with _repeatable(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        got, expected = (d.sample(images, device, y, **options, **more) for d in (graph, eager))
                    what = f"{model}, {'bf16' if bf16 else 'float32'}, {images} images, {options}"
                    assert torch.equal(got, expected), f"{what}: {int((got != expected).sum())} numbers differ"
                    assert bool(got.isfinite().all()), what
                    _recorded(graph.graphs, device, 1)
                    count += 1
    return f"{count} chains have the eager bits"


def iterations(device: torch.device, dry: bool) -> str:
    """Weights, averages and losses after steps of both engines, over the copying and the averaging ones."""
    steps, count = (3, 0) if dry else (14, 0)
    for model in ("digits",) if dry else ("digits", "cifar10"):
        for dtype in (None, torch.bfloat16):
            eager = _diffusion(device, dry, model)
            graph = copy.deepcopy(eager)
            images = 2 if dry else 16
            x = torch.rand(images, eager.img_channels, *eager.img_size, device=device) * 2 - 1
            y = _labels(eager, images, device)
            with _repeatable():
                taken = []
                for d, engine in ((graph, "graph"), (eager, "eager")):
                    # A power of two: recorded steps have their rate in float32.
                    optimizer = torch.optim.Adam(d.model.parameters(), lr=2**-12, fused=True)
                    step = TrainStep(d, optimizer, clip=1.0, accumulate=2, dtype=dtype, engine=engine)
                    losses = [float(step(x.roll(k, 0), y)) for k in range(steps)]
                    taken.append((losses, step))
            _recorded(taken[0][1].graphs, device, 2)
            what = f"{model}, {dtype or 'float32'}"
            assert taken[0][0] == taken[1][0], f"{what}: losses {taken[0][0]} and {taken[1][0]}"
            for (name, p), q in zip(graph.state_dict().items(), eager.state_dict().values(), strict=True):
                assert torch.equal(p, q), f"{what}: {name} differs"
            count += steps
    return f"{count} training steps leave the eager weights"


def objectives(device: torch.device, dry: bool) -> str:
    """Training steps and chains of both engines for each objective, whose own numbers are made on the device, too."""
    steps = 3 if dry else 30
    for name, (changes, options) in OBJECTIVES.items():
        eager = _diffusion(device, dry, "digits", changes)
        graph = copy.deepcopy(eager)
        x, y = torch.rand(16, 1, 8, 8, device=device) * 2 - 1, _labels(eager, 16, device)
        losses, images = [], []
        with _repeatable():
            for d, engine in ((graph, "graph"), (eager, "eager")):
                d.engine = engine
                optimizer = torch.optim.Adam(d.model.parameters(), lr=2**-12, fused=True)
                step = TrainStep(d, optimizer, clip=1.0, engine=engine)
                losses.append([float(step(x.roll(k, 0), y)) for k in range(steps)])
                images.append(d.sample(16, device, y, seed=1, num_steps=3 if dry else 20, **options))
                if engine == "graph":
                    _recorded(step.graphs, device, 2)
                    _recorded(d.graphs, device, 1)
        assert losses[0] == losses[1], f"{name}: losses {losses[0]} and {losses[1]}"
        assert graph.extra_state() == eager.extra_state(), f"{name}: what is remembered differs"
        assert torch.equal(*images) and bool(images[0].isfinite().all()), f"{name}: images differ"
    return f"{len(OBJECTIVES)} objectives train and sample as eagerly"


def replays(device: torch.device, dry: bool) -> str:
    """The device's memory over many replays of one recorded step."""
    diffusion = _diffusion(device, dry, "digits", engine="graph")
    y = _labels(diffusion, 4, device)

    def run() -> Tensor:
        with _repeatable():
            return diffusion.sample(4, device, y, seed=0, num_steps=3 if dry else None)

    def memory() -> tuple[int, ...]:
        if device.type != "cuda":
            return ()
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)

    first = run()
    _recorded(diffusion.graphs, device, 1)
    before, chains = memory(), 2 if dry else -(-REPLAYS // diffusion.num_timesteps)
    for _ in range(chains):
        last = run()
    assert torch.equal(first, last), "the images of a seed change"
    assert memory() == before, f"memory: {before} bytes allocated and reserved before, {memory()} after"
    return f"memory is the same after {chains * (3 if dry else diffusion.num_timesteps)} replays"


GRAPHS: dict[str, Callable[[torch.device, bool], str]] = {
    "recorded chains": chains,
    "recorded training steps": iterations,
    "recorded objectives": objectives,
    "many replays": replays,
}
