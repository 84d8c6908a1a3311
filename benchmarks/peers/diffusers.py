"""Diffusers: ``UNet2DModel`` in the case's architecture, sampled by ``DDPMScheduler`` as its users write the loop.

The network is the case's own, weight by weight, but for classes: they enter it otherwise, at no FLOP, and are left out.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import sampling, training
from benchmarks.checks import check_sampling, check_training
from benchmarks.harness import DTYPES, check_agreement
from benchmarks.peers.common import Fastest, flop_ratio, own, require
from benchmarks.problem import Builder, Contender, Problem
from benchmarks.sampling import CHANNELS_LAST, NCHW
from ddpm_fast.models.presets import Config


class Unet2D(nn.Module):
    """``UNet2DModel`` of a configuration, called as the plain network is; the prediction is float32 or float64."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        levels = range(len(config.channel_mults))
        attention = [level in config.attention_resolutions for level in levels]
        self.unet = require("diffusers").UNet2DModel(
            sample_size=config.img_size,
            in_channels=config.img_channels,
            out_channels=config.img_channels,
            time_embedding_dim=config.time_emb_dim,
            flip_sin_to_cos=False,
            down_block_types=tuple("AttnDownBlock2D" if found else "DownBlock2D" for found in attention),
            up_block_types=tuple("AttnUpBlock2D" if found else "UpBlock2D" for found in reversed(attention)),
            block_out_channels=tuple(config.base_channels * mult for mult in config.channel_mults),
            layers_per_block=config.num_res_blocks,
            dropout=config.dropout,
            act_fn=config.activation,
            attention_head_dim=None,  # one head
            norm_num_groups=config.num_groups,
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        eps = self.unet(x.to(self.unet.dtype), t, return_dict=False)[0]
        return eps.to(x.dtype)


def _pairs(plain: Any, unet: Any) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Each layer of a plain network, and those of ``UNet2DModel`` that hold its weights, in parts."""
    yield plain.init_conv, [unet.conv_in]
    for k, layer in ((1, unet.time_embedding.linear_1), (3, unet.time_embedding.linear_2)):
        yield plain.time_mlp[k], [layer]
    for layers, blocks in ((plain.downs, unet.down_blocks), (plain.mid, [unet.mid_block]), (plain.ups, unet.up_blocks)):
        layer = iter(layers)
        for block in blocks:
            attentions = list(getattr(block, "attentions", []))
            for k, resnet in enumerate(block.resnets):
                yield from _block_pairs(next(layer), resnet, attentions[k] if k < len(attentions) else None)
            for scaling in getattr(block, "downsamplers", None) or ():
                yield next(layer).downsample, [scaling.conv]
            for scaling in getattr(block, "upsamplers", None) or ():
                yield next(layer).upsample[1], [scaling.conv]
    yield plain.out_norm, [unet.conv_norm_out]
    yield plain.out_conv, [unet.conv_out]


def _block_pairs(block: Any, resnet: Any, attention: Any) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    yield block.norm_1, [resnet.norm1]
    yield block.conv_1, [resnet.conv1]
    yield block.time_bias, [resnet.time_emb_proj]
    yield block.norm_2, [resnet.norm2]
    yield block.conv_2[1], [resnet.conv2]
    if resnet.conv_shortcut is not None:
        yield block.residual_connection, [resnet.conv_shortcut]
    if attention is not None:
        yield block.attention.norm, [attention.group_norm]
        yield block.attention.to_qkv, [attention.to_q, attention.to_k, attention.to_v]
        yield block.attention.to_out, [attention.to_out[0]]


class Unet2DProblem(Problem):
    """The case without classes, solved by ``Unet2D`` with the plain network's weights."""

    def build(self, config: Config) -> Unet2D:
        """Return a ``Unet2D`` with weights of its own."""
        return Unet2D(config)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The plain network's weights under the names of ``Unet2D``."""
        plain = own(Problem, self).network()
        net = Unet2D(self.config).to(self.device).eval()
        left = set(net.parameters())
        with torch.no_grad():
            for layer, parts in _pairs(plain, net.unet):
                for name in ("weight", "bias"):
                    for part, value in zip(parts, getattr(layer, name).chunk(len(parts)), strict=True):
                        target = getattr(part, name)
                        target.copy_(value.view_as(target))
                        left.discard(target)
            if left:
                raise ValueError(f"{len(left)} parameters of UNet2DModel have no counterpart in the plain network")
            self._check_same(plain, net)
        return net.state_dict()

    def _check_same(self, plain: nn.Module, net: nn.Module) -> None:
        """Raise Disagreement unless both networks are the same function."""
        x, t = self.inputs[0], torch.arange(self.batch, device=self.device)
        expected = plain(x, t)
        truth = plain.double()(x.double(), t.double())
        check_agreement("UNet2DModel", net(x, t), [expected], truth, torch.float32)


@lru_cache(maxsize=1)  # so that its settings share one reference
def _solved(problem: Problem) -> Unet2DProblem:
    return own(Unet2DProblem, problem, config=replace(problem.config, num_classes=None))


def _row(solved: Problem, problem: Problem, training: bool) -> dict[str, Any]:
    note = {"note": "without classes"} if problem.config.num_classes else {}
    return {"flop_ratio": flop_ratio(solved, problem, training)} | note


def scheduler(problem: Problem) -> Any:
    """Return a ``DDPMScheduler`` of the problem's law; it takes every timestep."""
    made = require("diffusers").DDPMScheduler(
        num_train_timesteps=problem.num_timesteps,
        trained_betas=problem.betas.tolist(),
        variance_type="fixed_large",
        clip_sample=False,
    )
    # Its float32 table loses half its digits in 1 - alpha_t / alpha_(t-1), where beta is small.
    made.alphas_cumprod = torch.from_numpy(np.cumprod(1 - problem.betas))
    made.set_timesteps(problem.num_timesteps)
    return made


def pipeline(memory_format: torch.memory_format, low: bool = False, **options: Any) -> Builder:
    """The loop of diffusers' users; weights in the case's precision if ``low``, else autocast.

    With ``options`` of the inductor the network is compiled, its weights as constants.
    """

    def build(problem: Problem) -> Contender:
        solved = _solved(problem)
        net: Any = solved.network().to(memory_format=memory_format)
        if low:
            net = net.to(DTYPES[problem.precision])
        if options:
            net = sampling.compile_module(net, solved, options | {"freezing": True})
        context = nullcontext if low else solved.autocast
        schedule, quiet = scheduler(solved), scheduler(solved)
        quiet._get_variance = lambda *args, **kwargs: torch.zeros(())

        @torch.no_grad()
        def chain(x: Tensor, schedule: Any, steps: int) -> Tensor:
            with context():
                for t in schedule.timesteps[-steps:]:
                    x = schedule.step(net(x, t), t, x).prev_sample
            return x.cpu()

        def run() -> Tensor:
            return chain(torch.randn(solved.shape, device=solved.device), schedule, solved.steps)

        predict = partial(chain, solved.inputs[0], quiet, solved.checked)
        contender = Contender(run, predict, problem=solved, row=_row(solved, problem, training=False))
        return sampling.compile_now(contender, freezing=True) if options else contender

    return build


class Loss(nn.Module):
    """The loss of diffusers' training example."""

    def __init__(self, net: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.net, self.scheduler = net, scheduler(problem)

    def forward(self, x: Tensor, t: Tensor, noise: Tensor, y: Tensor | None) -> Tensor:
        return F.mse_loss(self.net(self.scheduler.add_noise(x, noise, t), t), noise)


class Upsample(nn.Module):
    """``Upsample2D`` for a compiler: see ``training.ExpandUpsample``."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.upsample, self.conv = training.ExpandUpsample(), conv

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return self.conv(self.upsample(x))


class CompiledLoss(Loss):
    """The loss for a compiler."""

    def __init__(self, net: nn.Module, problem: Problem) -> None:
        for block in net.unet.up_blocks:
            for k, scaling in enumerate(block.upsamplers or ()):
                block.upsamplers[k] = Upsample(scaling.conv)
        super().__init__(net, problem)


def trainer(memory_format: torch.memory_format, compile_options: dict[str, Any] | None = None) -> Builder:
    """Its loss, with the fused optimizer and EMA of the plain loops."""

    def build(problem: Problem) -> Contender:
        solved = _solved(problem)
        loss = Loss if compile_options is None else CompiledLoss
        made = training.PlainTrainer(solved, memory_format, compile_options, loss=loss)
        return Contender(made.run, made.predict, problem=solved, row=_row(solved, problem, training=True))

    return build


def sampling_contenders(compile: bool) -> dict[str, Builder]:
    """Eager in the best layout, and compiled in channels_last, which the inductor gives convolutions on CPUs anyway."""
    layouts = {"NCHW": NCHW, "channels_last": CHANNELS_LAST}
    settings = {name: pipeline(layout) for name, layout in layouts.items()}
    low = {f"{name}, weights as activations": pipeline(layout, low=True) for name, layout in layouts.items()}
    found: dict[str, Builder] = {"diffusers": _by_precision(settings, settings | low)}
    if compile:
        found["diffusers torch.compile"] = pipeline(CHANNELS_LAST, max_autotune=True)
    return found


def _by_precision(float32: dict[str, Builder], bf16: dict[str, Builder]) -> Builder:
    return lambda problem: Fastest(float32 if problem.precision == "float32" else bf16, check_sampling)(problem)


def training_contenders(compile: bool) -> dict[str, Builder]:
    """Eager in the best layout, and compiled."""
    settings = {"NCHW": trainer(NCHW), "channels_last": trainer(CHANNELS_LAST)}
    found: dict[str, Builder] = {"diffusers": Fastest(settings, check_training)}
    if compile:
        found["diffusers torch.compile"] = trainer(CHANNELS_LAST, {})
    return found
