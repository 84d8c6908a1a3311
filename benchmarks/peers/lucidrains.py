"""lucidrains' denoising-diffusion-pytorch: its ``Unet`` and ``GaussianDiffusion``.

Its blocks differ (RMS norm after the convolution, linear attention at every level, 7x7 first convolution), so it solves
a case of its own: the same width and levels, its own float64 run as truth, its FLOP over ours on the row.
"""

import sys
from dataclasses import replace
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import sampling, training
from benchmarks.checks import check_sampling, check_training
from benchmarks.peers.common import Fastest, flop_ratio, own, require
from benchmarks.problem import Builder, Contender, Problem
from benchmarks.sampling import CHANNELS_LAST, NCHW
from ddpm_fast.models.presets import Config

NAME = "denoising-diffusion-pytorch"


def package() -> Any:
    """Return its main module, with its progress bar off.

    It imports torchvision, for the transforms of its data loader, which are not used here: where torchvision is
    missing (there may be none for this build of torch), an empty module stands in for it while the import lasts.
    """
    missing = ["torchvision", "torchvision.transforms", "torchvision.utils"]
    try:
        require("torchvision")
        missing = []
    except ImportError:
        stand_ins = {name: ModuleType(name) for name in missing}
        stand_ins["torchvision"].transforms = stand_ins["torchvision.transforms"]  # type: ignore[attr-defined]
        stand_ins["torchvision"].utils = stand_ins["torchvision.utils"]  # type: ignore[attr-defined]
        sys.modules.update(stand_ins)
    try:
        found = require("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    finally:
        for name in missing:
            del sys.modules[name]
    found.tqdm = lambda iterable, **_: iterable
    return found


def unet(config: Config) -> nn.Module:
    """Return its ``Unet`` of the configuration's width and levels, with the same positions of full attention."""
    levels = range(len(config.channel_mults))
    return package().Unet(
        dim=config.base_channels,
        dim_mults=config.channel_mults,
        channels=config.img_channels,
        dropout=config.dropout,
        full_attn=tuple(level in config.attention_resolutions for level in levels),
    )


class UnetProblem(Problem):
    """Ancestral sampling by the clipped posterior mean and variance, under the cosine schedule, with its ``Unet``."""

    def build(self, config: Config) -> nn.Module:
        """Return its ``Unet``."""
        return unet(config)

    @cached_property
    def betas(self) -> np.ndarray:
        """Its cosine schedule: the linear one exceeds 1 on few steps."""
        return package().cosine_beta_schedule(self.num_timesteps).numpy()

    @cached_property
    def tables(self) -> Tensor:
        """float64 [T, 5]: (a, b) of x0_hat = a x - b eps, the factors of x0_hat and x in the mean, sigma."""
        alphas_cumprod = np.cumprod(1 - self.betas)
        before, rest = np.append(1.0, alphas_cumprod[:-1]), 1 - alphas_cumprod
        columns = (
            1 / np.sqrt(alphas_cumprod),
            np.sqrt(1 / alphas_cumprod - 1),
            self.betas * np.sqrt(before) / rest,
            (1 - before) * np.sqrt(1 - self.betas) / rest,
            np.sqrt(self.betas * (1 - before) / rest),
        )
        return torch.tensor(np.stack(columns, axis=1), device=self.device)

    @cached_property
    def exact_rows(self) -> Tensor:
        """As the plain rows, for an x0_hat that is not clipped."""
        a, b, c_0, c_x, sigma = self.tables.unbind(1)
        scale = c_0 * a + c_x
        return torch.stack((torch.arange(len(a), device=self.device), c_0 * b / scale, scale, sigma), dim=1)

    @cached_property
    def inputs(self) -> tuple[Tensor, None]:
        """A quarter of the plain x: clipping must not hide the network from the check."""
        return own(Problem, self).inputs[0] / 4, None

    @torch.no_grad()
    def chain(self, net: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        """Run the loop over ``rows``, the last one first."""
        for t, _, _, sigma in rows.flip(0):
            a, b, c_0, c_x, _ = self.tables[t.long()].to(x.dtype)
            x0_hat = (a * x - b * net(x, t.expand(self.batch))).clamp(-1, 1)
            x = c_0 * x0_hat + c_x * x + sigma * torch.randn_like(x)
        return x


@lru_cache(maxsize=1)  # so that its settings share one reference
def _solved(problem: Problem) -> UnetProblem:
    return own(UnetProblem, problem, config=replace(problem.config, num_classes=None))


def diffusion_of(net: nn.Module, problem: Problem) -> Any:
    """Return its ``GaussianDiffusion`` around a network, for images in [-1, 1]."""
    made = package().GaussianDiffusion(
        net,
        image_size=problem.config.img_size,
        timesteps=problem.num_timesteps,
        objective="pred_noise",
        beta_schedule="cosine",
        auto_normalize=False,
    )
    return made.to(problem.device).eval()


def _network(problem: Problem, memory_format: torch.memory_format, flash: bool) -> nn.Module:
    net = problem.network().to(memory_format=memory_format)
    for module in net.modules():
        if hasattr(module, "flash"):
            module.flash = flash
    return net


def sampler(memory_format: torch.memory_format, flash: bool, **options: Any) -> Builder:
    """Its ``sample``; with ``options`` of the inductor the network is compiled, its weights as constants."""

    def build(problem: Problem) -> Contender:
        solved = _solved(problem)
        net = _network(solved, memory_format, flash)
        diffusion, quiet = diffusion_of(net, solved), diffusion_of(net, solved)
        quiet.posterior_log_variance_clipped.fill_(-torch.inf)
        if options:
            compiled = sampling.compile_module(net, solved, options | {"freezing": True})
            diffusion.model = quiet.model = compiled

        def run() -> Tensor:
            with solved.autocast():
                return diffusion.sample(solved.batch).cpu()

        def predict() -> Tensor:
            x = solved.inputs[0]
            with solved.autocast():
                for t in reversed(range(solved.checked)):
                    x, _ = quiet.p_sample(x, t)
            return x.cpu()

        row = {"flop_ratio": flop_ratio(solved, problem, training=False)}
        contender = Contender(run, predict, problem=solved, row=row)
        return sampling.compile_now(contender, freezing=True) if options else contender

    return build


class Loss(nn.Module):
    """Its loss of the noise."""

    def __init__(self, net: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.diffusion = diffusion_of(net, problem)

    def forward(self, x: Tensor, t: Tensor, noise: Tensor, y: Tensor | None) -> Tensor:
        return self.diffusion.p_losses(x, t, noise=noise)


def trainer(memory_format: torch.memory_format, compile_options: dict[str, Any] | None = None) -> Builder:
    """Its loss, with the fused optimizer and EMA of the plain loops."""

    def build(problem: Problem) -> Contender:
        solved = _solved(problem)
        made = training.PlainTrainer(solved, memory_format, compile_options, loss=Loss)
        row = {"flop_ratio": flop_ratio(solved, problem, training=True)}
        return Contender(made.run, made.predict, problem=solved, row=row)

    return build


def sampling_contenders(compile: bool) -> dict[str, Builder]:
    """Eager in the best layout and attention, and compiled."""
    settings = {
        f"{layout}{', flash_attn' if flash else ''}": sampler(memory_format, flash)
        for layout, memory_format in (("NCHW", NCHW), ("channels_last", CHANNELS_LAST))
        for flash in (False, True)
    }
    found: dict[str, Builder] = {NAME: Fastest(settings, check_sampling)}
    if compile:
        found[f"{NAME} torch.compile"] = sampler(CHANNELS_LAST, False, max_autotune=True)
    return found


def training_contenders(compile: bool) -> dict[str, Builder]:
    """Eager in the best layout, and compiled."""
    settings = {"NCHW": trainer(NCHW), "channels_last": trainer(CHANNELS_LAST)}
    found: dict[str, Builder] = {NAME: Fastest(settings, check_training)}
    if compile:
        found[f"{NAME} torch.compile"] = trainer(CHANNELS_LAST, {})
    return found
