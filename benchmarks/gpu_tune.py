"""Time every configuration that the Triton kernels may run in, and every way in which a chain of reverse steps may,
and write the table that they are looked up in.

Kernels are called again on the same tensors, which the L2 holds where they fit: as where another has just written them.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.configured import configured
from benchmarks.gpu_peers import capture
from benchmarks.harness import NAMES, Row, describe, header, progress, time_interleaved
from ddpm_fast import Diffusion, preset
from ddpm_fast.engine import WAYS, key_of

NORMS = ((128, 32), (384, 32), (256, 16), (512, 16), (256, 8))
IMAGES = (1, 8, 64, 256)
CALLS = 10  # in a graph
EVEN = 1.02  # so close to the fastest, as runs in graphs tell, an earlier one, the rule's first, is kept
CHOSEN = "chosen"
CHAIN = 97  # steps: one alone and three times the most that a recording has
SAMPLES = ((3, 32, 32), (3, 256, 256))


@dataclass(frozen=True)
class Tuned:
    """A call of one op: `listed` are the names of its configurations, the rule's first."""

    op: str
    key: str
    dtype: torch.dtype
    images: int
    listed: list[str]
    make: Callable[[torch.device], Callable[[], Any]]
    calls: int = CALLS  # that are captured together
    steps: int = 0  # of a run that isn't captured


def calls(dry: bool) -> Iterator[Tuned]:
    """Yield the shapes of the CIFAR-10 network and of samples; one of each if dry."""
    from ddpm_fast.kernels import noise

    for size in SAMPLES[:1] if dry else SAMPLES:
        for images in (1,) if dry else IMAGES:
            shape = (images, *size)
            for op, make in _steps(shape).items():
                key = noise.key(images, shape[1] * shape[2] * shape[3])
                yield Tuned(op, key, torch.float32, images, list(noise.CUTS), make)
    for channels, size in ((32, 4),) if dry else NORMS:
        for images in (1,) if dry else IMAGES:
            for dtype in (torch.bfloat16, torch.float32):
                for direction in ("forward", "backward"):
                    yield _norm(direction, images, channels, size, dtype)
    for model in ("digits",) if dry else ("digits", "cifar10"):
        for images in (1,) if dry else IMAGES:
            yield _chain(model, images, 4 if dry else CHAIN)


def _chain(model: str, images: int, steps: int) -> Tuned:
    """In bf16, as it is sampled."""
    config = preset(model)

    def make(device: torch.device) -> Callable[[], Any]:
        torch.manual_seed(0)
        diffusion = Diffusion.from_config(config).to(device)
        y = None if config.num_classes is None else torch.zeros(images, dtype=torch.int64, device=device)

        def run() -> Any:
            with torch.autocast(device.type, torch.bfloat16):
                return diffusion.sample(images, device, y, use_ema=False, num_steps=steps, seed=0)

        return run

    with torch.device("meta"):
        parameters = sum(p.numel() for p in config.build_unet().parameters())
    key = key_of(parameters, images * config.img_channels * math.prod(config.img_size))
    return Tuned("engine", key, torch.bfloat16, images, list(WAYS), make, steps=steps)


def _steps(shape: tuple[int, ...]) -> dict[str, Callable[[torch.device], Callable[[], Any]]]:
    """By op: makes tensors of the shape, and returns the call on them."""
    from ddpm_fast.kernels import diffusion_loss, noise, q_sample, sampler_step
    from ddpm_fast.reference.philox import REVERSE, NoiseState

    def inputs(device: torch.device) -> tuple[torch.Tensor, NoiseState]:
        return torch.zeros(shape, device=device), NoiseState.at(1, 2, device=device)

    def draw(device: torch.device) -> Callable[[], Any]:
        return partial(noise.noise, shape, inputs(device)[1], REVERSE, torch.float32)

    def mask(device: torch.device) -> Callable[[], Any]:
        return partial(noise.dropout_mask, shape, 0.1, inputs(device)[1], 33)

    def perturb(device: torch.device) -> Callable[[], Any]:
        x, state = inputs(device)
        table, t = torch.ones(1000, device=device), torch.zeros(shape[0], dtype=torch.int64, device=device)
        return partial(q_sample.q_sample, x, t, table, table, state)

    def step(device: torch.device) -> Callable[[], Any]:
        x, state = inputs(device)
        out, rows = sampler_step.room(x, None, []), torch.zeros(10, 8, device=device)
        return partial(sampler_step.sampler_step, out, None, x, x, rows, state.draw, state, None, None, 1.0)

    def loss(device: torch.device) -> Callable[[], Any]:
        x, state = inputs(device)
        return partial(diffusion_loss.forward, (), x, diffusion_loss.Target(state, None, None, None, "l2"))

    return {"noise": draw, "dropout_mask": mask, "q_sample": perturb, "sampler_step": step, "diffusion_loss": loss}


def _norm(direction: str, images: int, channels: int, size: int, dtype: torch.dtype) -> Tuned:
    """In channels_last, with weight, bias and a bias of each image."""
    from ddpm_fast.kernels import group_norm_silu as norm
    from ddpm_fast.kernels.norm_cut import candidates

    groups = 32
    shape = images, channels, size, size

    def operands(device: torch.device) -> Any:
        x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        row, both = torch.ones(channels, device=device), torch.zeros(images, channels, device=device)
        return norm.Operands(x, None, row, row, both, None, None, groups, "silu", None)

    def make(device: torch.device) -> Callable[[], Any]:
        of = operands(device)
        y, dx = torch.empty_like(of.x), torch.empty_like(of.x)
        statistics = torch.empty((images, groups, 2), dtype=torch.float64, device=of.x.device)
        forward = partial(norm.forward, of, None, y, None, statistics, 1e-5)
        forward()
        return forward if direction == "forward" else partial(norm.backward, of, y, None, dx, None, statistics)

    of = operands(torch.device("meta"))
    names = list(candidates(direction, *of.sizes))
    return Tuned("group_norm_silu", norm.key(direction, of), dtype, images, names, make)


def measure(call: Tuned, device: torch.device, repetitions: int, most: int | None = None) -> list[Row]:
    """Time the first `most` configurations of a call in turn, as CUDA graphs; the fastest row has the note "chosen"."""
    progress(f"tune {call.op} {call.key}")
    names = call.listed[:most]
    runs: dict[str, Callable[[], Any]] = {}
    errors: dict[str, str] = {}  # too much for this GPU, or for the compiler

    def several(run: Callable[[], Any]) -> None:
        for _ in range(call.calls):
            run()

    for name in names:
        try:
            with configured(name):
                run = call.make(device)
                runs[name] = run if call.steps else capture(partial(several, run), device)
        except Exception as error:
            errors[name] = describe(error)

    def timed(name: str) -> None:
        with configured(name):  # without a GPU the run is no graph
            runs[name]()

    repetitions = max(2, repetitions // 10) if call.steps else repetitions
    times = time_interleaved({n: partial(timed, n) for n in runs}, device, repetitions, warmup=2, errors=errors)
    ms = {name: sorted(found)[len(found) // 2] / (call.steps or call.calls) for name, found in times.items()}
    best = min(ms.values(), default=0.0)
    fastest = next((n for n in names if n in ms and ms[n] <= best * EVEN), None)
    rows = []
    for name in names:
        row: Row = {"case": f"{call.op} {call.key}", "precision": NAMES[call.dtype], "batch": call.images, "name": name}
        row |= {"ms": ms[name], "over_fastest": ms[name] / best} if name in ms else {"error": errors[name]}
        notes = [CHOSEN] * (name == fastest) + ["the rule's"] * (name == names[0])
        rows.append(row | ({"note": ", ".join(notes)} if notes else {}))
    return rows


def write_table(path: Path, device: torch.device, rows: list[Row]) -> None:
    """Write the chosen names as kernels/configs.py reads them."""
    found: dict[str, Any] = {"header": {k: v for k, v in header(device).items() if k in ("versions", "commit", "date")}}
    for row in rows:
        if CHOSEN in row.get("note", ""):
            op, key = row["case"].split(" ", 1)
            found.setdefault(op, {})[key] = row["name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
