"""The options of each command, with their help: a function a command, which adds them to its parser."""

import argparse
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .models.presets import SCHEDULES
from .models.recomputing import RECOMPUTE
from .objectives import LOSS_WEIGHTINGS, TIMESTEP_SAMPLINGS
from .ops.diffusion_loss import LOSSES
from .options import assignment, integers, png, real, size, whole
from .predictions import PREDICTIONS
from .training.recipe import RECIPES, SEEDS

MAX_PAD = 1024  # pixels around an image


def train(parser: ArgumentParser) -> None:
    _train_data(parser.add_argument_group("data"))
    _train_model(parser.add_argument_group("model").add_argument)
    _train_recipe(parser.add_argument_group("training (with --resume, what isn't given stays as it was)").add_argument)
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--out", type=Path, metavar="DIR", help="folder to write into (default runs/ and the name of the data)")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    start.add_argument("--overwrite", action="store_true", help="start anew although --out holds a checkpoint")
    add(
        "--workers",
        type=whole(0, 256),
        default=0,
        metavar="N",
        help="processes that put batches together ahead of time, the same ones; seldom faster (%(default)s: none)",
    )
    add("--log-every", type=whole(0), default=50, metavar="N", help="steps between log lines, 0: none (%(default)s)")
    add("--save-every", type=whole(0), default=1000, metavar="N", help="steps between checkpoints (%(default)s)")
    add("--keep", type=whole(0), default=0, metavar="K", help="keep the last K checkpoints, and the best (%(default)s)")
    add("--tensorboard", action="store_true", help="write TensorBoard events too, into tensorboard/ in --out")
    add(
        "--sample-every",
        type=whole(0),
        default=5000,
        metavar="N",
        help="steps between sample grids, each with a checkpoint before it; 0: none (%(default)s)",
    )
    add(
        "--sample-steps",
        type=whole(1),
        metavar="N",
        help="denoising steps of these grids (as many as in training, on a CPU at most 100)",
    )
    _device(add)


def _train_data(group: Any) -> None:
    add = group.add_argument
    add(
        "--data",
        default="digits",
        metavar="SOURCE",
        help="'digits' (default), an idx[.gz] image file, a folder with MNIST's files, a folder, zip or tar.gz with "
        "CIFAR's, or a folder or zip of images with one sub-folder per class; a.zip/b is the folder b in a.zip; "
        "transparent parts become white",
    )
    add("--size", type=size, metavar="N|HxW", help="scale and crop the images to this size")
    add("--pad", type=whole(0, MAX_PAD), default=0, metavar="N", help="black pixels to add on each side (%(default)s)")
    add("--skip-bad", action="store_true", help="leave out images that can't be read, and list them in skipped.txt")
    add("--decode-workers", type=whole(0, 256), default=0, metavar="N", help="processes that decode images (0: none)")
    cache = group.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep decoded images here, verified by content ($DDPM_FAST_CACHE, else ~/.cache/ddpm_fast)",
    )
    cache.add_argument("--no-cache", action="store_true", help="decode anew, and keep nothing")
    add("--unconditional", action="store_true", help="don't use the classes")


def _train_model(add: Callable[..., object]) -> None:
    add("--preset", help="what the other options start from: digits or cifar10 (digits for the digits, else cifar10)")
    add("--base-channels", type=whole(1), metavar="N", help="width of the network: channels at full resolution")
    add("--channel-mults", type=integers, metavar="A,B,..", help="times base channels, per level of half the size")
    add("--num-res-blocks", type=whole(0), metavar="N", help="residual blocks per level")
    add("--attention-resolutions", type=integers, metavar="I,J,..", help="levels with attention, 0 = full resolution")
    add("--dropout", type=real(0, 1), metavar="P", help="probability in the residual blocks")
    add("--num-timesteps", type=whole(1), metavar="T", help="noise levels, and steps of the slowest sampling")
    add("--schedule", choices=tuple(SCHEDULES), help="how noise grows over the timesteps (the preset's)")
    stretched = "stretch the schedule to pure noise at its end; with --prediction x0 or v (no)"
    add("--zero-terminal-snr", action=BooleanOptionalAction, help=stretched)
    add("--prediction", choices=PREDICTIONS, help="what the network learns to predict (the preset's)")
    add("--loss", dest="loss_type", choices=tuple(LOSSES), help="what a wrong prediction costs (l2)")
    weighed = "what the loss of each timestep counts: alike, or less where there is little noise (none)"
    add("--loss-weighting", choices=LOSS_WEIGHTINGS, help=weighed)
    drawn = "which timesteps are drawn more often: none, those of middling noise, or of large losses (uniform)"
    add("--timestep-sampling", choices=TIMESTEP_SAMPLINGS, help=drawn)
    learned = "learn the variance of the reverse step, too (no)"
    add("--learned-variance", action=BooleanOptionalAction, help=learned)
    dropped = "share of images trained without their class, so that sample --guidance works; 0.1 is usual (0)"
    add("--label-dropout", type=real(0, 1), metavar="P", help=dropped)
    add(
        "--ema-decay",
        type=real(0, 1),
        metavar="D",
        help="of the averaged weights that samples are drawn from (the preset's; in a run shorter than 5 times the "
        "preset's --ema-start, 1 - 10/steps)",
    )
    add(
        "--ema-start",
        type=whole(0),
        metavar="N",
        help="step from which they are averaged and no longer copied (2000, digits 200; at most a fifth of the steps)",
    )


def _train_recipe(add: Callable[..., object]) -> None:
    add("--steps", type=whole(1), metavar="N", help=f"optimizer steps in all {_default('steps')}")
    add("--batch", dest="batch_size", type=whole(1), metavar="N", help=f"images per step {_default('batch_size')}")
    add("--accumulate", type=whole(1), metavar="N", help=f"parts to do a step in: less memory {_default('accumulate')}")
    add(
        "--recompute",
        choices=RECOMPUTE,
        help="what the backward computes again instead of keeping it, for less memory: norm, what goes into residual "
        "blocks' convolutions; block, all inside of residual blocks, at a quarter more time (none)",
    )
    add("--lr", type=real(0, 1), help=f"learning rate of Adam {_default('lr')}")
    add("--warmup", type=whole(0), metavar="N", help=f"steps over which the learning rate rises {_default('warmup')}")
    add("--clip", type=real(0), metavar="X", help=f"largest norm of the gradient, 0: none {_default('clip')}")
    add("--flip", action=BooleanOptionalAction, help="mirror images at random (no)")
    add("--bf16", action=BooleanOptionalAction, help="bfloat16 autocast: faster where the hardware has it (no)")
    add("--holdout", type=real(0, 1), metavar="P", help="share of the images not to train on but to measure with (0)")
    add("--seed", type=whole(0, SEEDS - 1), metavar="N", help=f"of weights, data order and noise {_default('seed')}")


def _default(field: str) -> str:
    """What the recipes say, for the help."""
    usual, digits = (f"{getattr(RECIPES[name], field):g}" for name in ("cifar10", "digits"))
    return f"({usual})" if usual == digits else f"({usual}; preset digits {digits})"


class ListSamplers(argparse.Action):
    """Prints what there is, and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: ArgumentParser, *_: object) -> None:
        from .info import list_samplers

        print(list_samplers())
        parser.exit()


def sample(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, help="model.safetensors written by train, or its folder")
    add(
        "--out",
        type=Path,
        default="samples.png",
        help="x.png: a grid; x.gif: the denoising; x.npz: arrays; a folder: single PNGs (%(default)s)",
    )
    add("--overwrite", action="store_true", help="replace what an earlier call wrote to --out")
    add("--num", type=whole(1, 10**7), metavar="N", help="how many images (8 per class; 64 without classes)")
    add("--classes", "--class", metavar="A,B-C", help="which to draw, names or numbers, in equal parts (all)")
    add("--seed", type=whole(0, SEEDS - 1), default=0, metavar="N", help="another seed, other images (%(default)s)")
    add(
        "--steps",
        type=whole(1),
        metavar="N",
        help="denoising steps (as many as in training; with other samplers than ddpm 10 to 50 are enough)",
    )
    add("--sampler", default="ddpm", metavar="NAME", help="see --list-samplers (%(default)s)")
    add("--list-samplers", action=ListSamplers, help="show the samplers and their options, and end")
    listed = "of the sampler, such as spacing=karras, spacing=10,15,20 or clip=true; may be given several times"
    add("--option", type=assignment, action="append", default=[], metavar="NAME=VALUE", help=listed)
    guided = "follow the classes more closely, at the price of variety: 1 is plain, 2 to 5 usual; twice the work"
    add("--guidance", type=real(0), metavar="W", help=f"{guided} (for a model trained with --label-dropout)")
    thresholded = "dynamic thresholding at this quantile, such as 0.995; for large images under strong guidance"
    add("--dynamic-threshold", type=real(0, 1), metavar="P", help=thresholded)
    add("--batch", type=whole(1), default=256, metavar="N", help="images at a time (%(default)s)")
    add("--no-ema", action="store_true", help="use the raw weights instead of the averaged ones")
    add("--columns", type=whole(1, 10**4), metavar="N", help="images per row of a grid (a class per row)")
    add("--upscale", type=whole(1, 100), metavar="N", help="side of a pixel in a grid (small images are enlarged)")
    _device(add)


def plot(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder that train wrote into, or its log.jsonl")
    add("--out", type=png, default="plot.png", metavar="FILE.png", help="(%(default)s)")


def demo(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default="demo", help="folder to write into (%(default)s)")
    steps = RECIPES["digits"].steps
    add("--steps", type=whole(1), metavar="N", help=f"training steps; fewer are faster and worse ({steps})")
    add("--seed", type=whole(0, SEEDS - 2), default=0, metavar="N", help="(%(default)s)")
    _device(add)


def info(parser: ArgumentParser) -> None:
    """No options."""


def _device(add: Callable[..., object]) -> None:
    add("--device", default="auto", help="cpu, cuda, cuda:1... (a GPU if there is one)")
