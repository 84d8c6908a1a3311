"""One network-level problem (weights, inputs, schedule, precision) and how its contenders are timed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import (
    DTYPES,
    Row,
    add_ratios,
    describe,
    progress,
    summarise,
    time_interleaved,
)
from benchmarks.original import UNet
from ddpm_fast.models.presets import ACTIVATIONS, Config
from ddpm_fast.ops import use_backend

X_SEED, DRAWS_SEED = 1, 2


def plain_unet(config: Config) -> UNet:
    """Return the original formulation's network of ``config``."""
    return UNet(
        config.img_channels,
        config.base_channels,
        config.channel_mults,
        config.num_res_blocks,
        config.time_emb_dim,
        config.time_emb_scale,
        config.num_classes,
        ACTIVATIONS[config.activation],
        config.dropout,
        config.attention_resolutions,
        config.norm,
        config.num_groups,
        config.initial_pad,
    )


def flops_per_image(config: Config, training: bool = False, build: Callable[[Config], nn.Module] = plain_unet) -> int:
    """Count the FLOP (2 per multiply-add) of one image through a network, with its backward if training."""
    with torch.device("meta"):
        net = build(config)
        x = torch.empty(1, config.img_channels, *config.img_size)
        index = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        out = net(x, index, index)
        if training:
            out.sum().backward()
    return counter.get_total_flops()


@dataclass(eq=False)
class Problem:
    """What all contenders of one case share: weights under a seed, inputs, a schedule, precision.

    Args:
        config: of the network.
        device: where.
        batch: images.
        steps: reverse steps or training iterations in a timed run.
        precision: a name in ``DTYPES``.
        compiler: the backend of ``torch.compile``; "eager" only traces, for a dry run.
        num_timesteps: rows of the schedule, T; ``steps`` if 0, as sampling takes all of them.
        checked: how many of the last reverse steps the check of sampling compares.
    """

    config: Config
    device: torch.device
    batch: int
    steps: int
    precision: str
    compiler: str = "inductor"
    num_timesteps: int = 0
    checked: int = 2

    def __post_init__(self) -> None:
        self.num_timesteps = self.num_timesteps or self.steps
        self.checked = min(self.checked, self.steps)

    def build(self, config: Config) -> Any:
        """Return a new network; a peer that brings its own overrides this."""
        return plain_unet(config)

    def network(self) -> Any:
        """Return a new network with the case's weights, in eval mode: the plain one, unless a peer brings its own."""
        net = self.build(self.config).to(self.device)
        net.load_state_dict(self.weights)
        return net.eval()

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The state of a freshly initialised network."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build(self.config).to(self.device).state_dict()

    @cached_property
    def betas(self) -> np.ndarray:
        """Linear, scaled for few steps as the original's script does, but at most tenfold so that all stay below 1."""
        scale = min(1000 / self.num_timesteps, 10)
        return np.linspace(1e-4 * scale, 0.02 * scale, self.num_timesteps)

    @cached_property
    def exact_rows(self) -> Tensor:
        """float64 [T, 4]: t, noise coefficient, scale and sigma of each reverse step; no noise at t = 0."""
        alphas, t = 1 - self.betas, np.arange(self.num_timesteps)
        coefficient = self.betas / np.sqrt(1 - np.cumprod(alphas))
        columns = (t, coefficient, 1 / np.sqrt(alphas), np.sqrt(self.betas) * (t > 0))
        return torch.tensor(np.stack(columns, axis=1), device=self.device)

    @cached_property
    def rows(self) -> Tensor:
        """The rows in float32."""
        return self.exact_rows.float()

    @cached_property
    def quiet_rows(self) -> Tensor:
        """The rows with sigma = 0."""
        return self.rows * torch.tensor([1.0, 1.0, 1.0, 0.0], device=self.device)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """[N, C, H, W]."""
        return (self.batch, self.config.img_channels, *self.config.img_size)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Torch's generators under a seed, and as they were afterwards."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """x: the first draw under ``X_SEED``, [N, C, H, W]; labels [N], or None for a network without classes."""
        classes = self.config.num_classes
        with self.seeded(X_SEED):
            x = torch.randn(self.shape, device=self.device)
        return x, None if classes is None else torch.arange(self.batch, device=self.device) % classes

    @cached_property
    def draws(self) -> "Draws":
        """What an iteration of training draws under ``DRAWS_SEED``."""
        with self.seeded(DRAWS_SEED):
            t = torch.randint(0, self.num_timesteps, (self.batch,), device=self.device)
            return Draws(t, torch.randn(self.shape, device=self.device))

    @torch.no_grad()
    def chain(self, net: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        """Run the plain loop over ``rows``, the last one first."""
        for t, coefficient, scale, sigma in rows.flip(0):
            eps = net(x, t.expand(self.batch), self.inputs[1])
            x = (x - coefficient * eps) * scale + sigma * torch.randn_like(x)
        return x

    def plain_run(self) -> Tensor:
        """Samples [N, C, H, W] of a plain loop, float32 on the CPU."""
        return self.chain(self.network(), torch.randn_like(self.inputs[0]), self.rows).cpu()

    def autocast(self) -> AbstractContextManager:
        """bf16 autocast, or nothing in float32."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of a training iteration: timesteps [N] and noise [N, C, H, W]."""

    t: Tensor
    noise: Tensor


@dataclass
class Contender:
    """``run`` is what is timed; ``predict``, by the same code, is what is compared with float64 before that.

    Sampling: ``run`` returns samples, and ``predict`` what the problem's x becomes in the last ``checked`` reverse
    steps without their noise. Training: ``run`` returns the last loss, and ``predict`` the gradients that one iteration
    without dropout leaves, concatenated in the parameters' order; ``draws`` are its random numbers, the problem's if
    None. ``problem`` is what a peer with a network of its own solves instead of the case's, and is checked against;
    ``row`` is what stands on its row beside the times.
    """

    run: Callable[[], Tensor]
    predict: Callable[[], Tensor]
    draws: Draws | None = None
    problem: Problem | None = None
    row: Row = field(default_factory=dict)


Builder = Callable[[Problem], Contender]
Check = Callable[[Problem, str, Contender], None]


def on_reference(build: Builder) -> Builder:
    """Return the builder of the same contender with every op on its reference: what the fast ones are held against."""

    def forced(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def inside() -> Tensor:
            with use_backend("reference"):
                return run()

        return inside

    def built(problem: Problem) -> Contender:
        contender = build(problem)
        return replace(contender, run=forced(contender.run), predict=forced(contender.predict))

    return built


def measure(
    case: str,
    problem: Problem,
    builders: Mapping[str, Builder],
    check: Check,
    repetitions: int,
    flops: int,
    ceiling: float,
) -> list[Row]:
    """Build, check and time the contenders in turn; one that fails becomes a row with its error.

    Args:
        case: the name of the case in the rows.
        problem: what they solve; times are per one of its ``steps``.
        builders: contender name -> function building it.
        check: raises Disagreement where a contender is wrong.
        repetitions: timed runs of each, after one warm-up.
        flops: of one image and step.
        ceiling: FLOP/s of a matrix product in this precision.
    """
    torch._dynamo.reset()  # drops what earlier cases compiled
    built: dict[str, Contender] = {}
    errors: dict[str, str] = {}
    for name, build in builders.items():
        progress(f"{case} {problem.precision} batch {problem.batch}: {name}")
        try:
            contender = build(problem)
            check(problem, name, contender)
            built[name] = contender
        except Exception as error:  # a peer's failure is a result, whatever it is
            errors[name] = describe(error)
    progress(f"{case} {problem.precision} batch {problem.batch}: timing")
    runs = {name: contender.run for name, contender in built.items()}
    times = time_interleaved(runs, problem.device, repetitions, errors=errors)
    rows = []
    for name in builders:
        row: Row = {"case": case, "precision": problem.precision, "batch": problem.batch, "name": name}
        if name in errors:
            row["error"] = errors[name]
        else:
            row |= summarise(times[name], per=problem.steps) | built[name].row
            rate = problem.batch / (row["ms"] * 1e-3)
            done = rate * flops * row.get("flop_ratio", 1.0)
            row |= {"steps": problem.steps, "images_per_s": rate, "tflops": done * 1e-12, "share": done / ceiling}
        rows.append(row)
    add_ratios(rows)
    return rows
