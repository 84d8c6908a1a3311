"""One network-level problem (weights, inputs, schedule, precision) and how its contenders are checked and timed."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import (
    DTYPES,
    Disagreement,
    Row,
    add_ratios,
    check_agreement,
    check_spread,
    describe,
    progress,
    summarise,
    time_interleaved,
)
from benchmarks.original import UNet
from ddpm_fast.models.presets import ACTIVATIONS, Config

SPREAD_ELEMENTS = 8192
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


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


def flops_per_image(config: Config, training: bool = False) -> int:
    """Count the FLOP (2 per multiply-add) of one image through the plain network, with its backward if training."""
    with torch.device("meta"):
        net = plain_unet(config)
        x = torch.empty(1, config.img_channels, *config.img_size)
        index = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        out = net(x, index, index)
        if training:
            out.sum().backward()
    return counter.get_total_flops()


@dataclass(eq=False)
class Problem:
    """What all contenders of one case share: weights under a seed, inputs, a schedule of ``steps`` rows, precision.

    ``compiler`` is the backend of ``torch.compile``; "eager" only traces, for a dry run.
    """

    config: Config
    device: torch.device
    batch: int
    steps: int
    precision: str
    compiler: str = "inductor"

    def network(self) -> UNet:
        """Return a new plain network with the case's weights, in eval mode."""
        net = plain_unet(self.config).to(self.device)
        net.load_state_dict(self.weights)
        return net.eval()

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The state of a freshly initialised network."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return plain_unet(self.config).to(self.device).state_dict()

    @cached_property
    def betas(self) -> np.ndarray:
        """Linear, scaled for few steps as the original's script does, but at most tenfold so that all stay below 1."""
        scale = min(1000 / self.steps, 10)
        return np.linspace(1e-4 * scale, 0.02 * scale, self.steps)

    @cached_property
    def rows(self) -> Tensor:
        """float32 [steps, 4]: t, noise coefficient, scale and sigma of each reverse step; no noise at t = 0."""
        alphas = 1 - self.betas
        coefficient = self.betas / np.sqrt(1 - np.cumprod(alphas))
        sigma = np.sqrt(self.betas) * (np.arange(self.steps) > 0)
        columns = (np.arange(self.steps), coefficient, 1 / np.sqrt(alphas), sigma)
        return torch.tensor(np.stack(columns, axis=1), dtype=torch.float32, device=self.device)

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Normal x [N, C, H, W] and labels [N], or None for a network without classes."""
        generator = torch.Generator().manual_seed(1)
        classes = self.config.num_classes
        x = torch.randn(self.batch, self.config.img_channels, *self.config.img_size, generator=generator)
        y = None if classes is None else torch.arange(self.batch, device=self.device) % classes
        return x.to(self.device), y

    @cached_property
    def noise(self) -> Tensor:
        """Normal [N, C, H, W] for the loss of the training check."""
        generator = torch.Generator().manual_seed(2)
        return torch.randn(self.inputs[0].shape, generator=generator).to(self.device)

    def plain_run(self) -> Tensor:
        """Samples [N, C, H, W] of a plain loop, float32 on the CPU."""
        net, (x, y) = self.network(), self.inputs
        x = torch.randn_like(x)
        with torch.no_grad():
            for t, coefficient, scale, sigma in self.rows.flip(0):
                x = (x - coefficient * net(x, t.expand(self.batch), y)) * scale + sigma * torch.randn_like(x)
        return x.cpu()

    def autocast(self) -> AbstractContextManager:
        """bf16 autocast, or nothing in float32."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])


@dataclass
class Contender:
    """``run`` is what is timed; ``predict(k)`` is what is compared with float64 before that, on the problem's inputs.

    Sampling: ``run`` returns samples and ``predict`` the mean of reverse step k. Training: ``run`` returns the last
    loss and ``predict`` the gradients of the loss at t = k without dropout, concatenated in the parameters' order.
    """

    run: Callable[[], Tensor]
    predict: Callable[[int], Tensor]


Builder = Callable[[Problem], Contender]
Check = Callable[[Problem, str, Contender], None]


@torch.no_grad()
def check_sampling(problem: Problem, name: str, contender: Contender) -> None:
    """Raise Disagreement unless the noise predicted inside a reverse step, and the spread of samples, are right."""
    k = problem.steps // 2
    plain, truth = _sampling_reference(problem, k)
    got = _noise_in(contender.predict(k), problem, k)
    check_agreement(name, got, plain, truth, DTYPES[problem.precision])
    check_spread(name, _enough(contender.run), _plain_samples(problem))


def _enough(run: Callable[[], Tensor]) -> Tensor:
    """Return several runs' samples, where one has too few elements to tell a spread by."""
    samples = [run()]
    more = min(31, SPREAD_ELEMENTS // samples[0].numel())
    return torch.cat(samples + [run() for _ in range(more)])


@lru_cache(maxsize=1)
def _plain_samples(problem: Problem) -> Tensor:
    return _enough(problem.plain_run)


def _noise_in(mean: Tensor, problem: Problem, k: int) -> Tensor:
    """Return the network's prediction that reverse step k's mean was made with, in float64."""
    _, coefficient, scale, _ = problem.rows[k].double()
    return (problem.inputs[0].double() - mean.double() / scale) / coefficient


@lru_cache(maxsize=1)
def _sampling_reference(problem: Problem, k: int) -> tuple[list[Tensor], Tensor]:
    """Return plain PyTorch's predictions in reverse step k, in both memory formats, and the float64 one."""
    x, y = problem.inputs
    t, coefficient, scale, _ = problem.rows[k]
    t, net = t.expand(problem.batch), problem.network()
    plain = []
    for memory_format in MEMORY_FORMATS:
        with problem.autocast():
            mean = (x - coefficient * net.to(memory_format=memory_format)(x, t, y)) * scale
        plain.append(_noise_in(mean, problem, k))
    return plain, net.double()(x.double(), t.double(), y)


def check_training(problem: Problem, name: str, contender: Contender) -> None:
    """Raise Disagreement unless the gradients of every parameter are right and training gives a finite loss."""
    k = problem.steps // 2
    plain, truth = _training_reference(problem, k)
    check_agreement(name, contender.predict(k), plain, truth, DTYPES[problem.precision], factor=3)
    if not contender.run().isfinite().all():
        raise Disagreement(f"training of {name} gave a loss that is not finite")


@lru_cache(maxsize=1)
def _training_reference(problem: Problem, k: int) -> tuple[list[Tensor], Tensor]:
    """Return plain PyTorch's gradients of the loss at t = k, in both memory formats, and the float64 ones."""
    (x, y), noise = problem.inputs, problem.noise
    t = torch.full((problem.batch,), k, device=problem.device)
    alphas_cumprod = float(np.prod(1 - problem.betas[: k + 1]))
    x_t = alphas_cumprod**0.5 * x.double() + (1 - alphas_cumprod) ** 0.5 * noise.double()
    net = problem.network()
    plain = []
    for memory_format in MEMORY_FORMATS:
        with problem.autocast():
            loss = F.mse_loss(net.to(memory_format=memory_format)(x_t.float(), t, y).float(), noise)
        plain.append(gradients(loss, net.parameters()))
    net = net.double()
    return plain, gradients(F.mse_loss(net(x_t, t.double(), y), noise.double()), net.parameters())


def gradients(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the gradients of ``loss``, concatenated in the order of ``parameters``."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters))])


def measure(
    case: str,
    problem: Problem,
    builders: Mapping[str, Builder],
    check: Check,
    repetitions: int,
    flops: int,
    ceiling: float,
    around: AbstractContextManager | None = None,
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
        around: a context for all timed runs; an outer autocast keeps the cast weights, as one long loop would.
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
    with around or nullcontext():
        times = time_interleaved(runs, problem.device, repetitions, errors=errors)
    rows = []
    for name in builders:
        row: Row = {"case": case, "precision": problem.precision, "batch": problem.batch, "name": name}
        if name in errors:
            row["error"] = errors[name]
        else:
            row |= summarise(times[name], per=problem.steps)
            rate = problem.batch / (row["ms"] * 1e-3)
            row |= {"steps": problem.steps, "images_per_s": rate, "tflops": rate * flops * 1e-12}
            row["share"] = rate * flops / ceiling
        rows.append(row)
    add_ratios(rows)
    return rows
