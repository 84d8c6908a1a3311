"""The command line: `ddpm-fast` = `python -m ddpm_fast`, with train, sample, plot, demo and info.

What the commands do is in `commands.py`, imported once the arguments are clear.
"""

import argparse
import os
import sys
import warnings
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .models.presets import SCHEDULES
from .options import assignment, integers, png, real, size, whole
from .predictions import PREDICTIONS
from .training.recipe import RECIPES, SEEDS

MAX_PAD = 1024  # pixels around an image
DEBUG = "DDPM_FAST_DEBUG"  # set it, and an error shows its traceback

EPILOG = """\
a first round, in a few minutes on a laptop:
  ddpm-fast demo                                     train on handwritten digits, draw, judge: see demo/
  ddpm-fast sample demo/model.safetensors --class 7  draw more

your own images, one sub-folder per class:
  ddpm-fast train --data photos/ --size 32 --flip --out runs/photos
  ddpm-fast sample runs/photos --out runs/photos/grid.png

DDPM_FAST_DEBUG=1 in the environment shows the traceback of an error.
"""

TRAIN_EPILOG = """\
examples:
  ddpm-fast train                                               digits that come with scikit-learn, into runs/digits
  ddpm-fast train --data mnist/ --pad 2 --base-channels 32      a folder with MNIST's files; 28 + 2*2 = 32 pixels
  ddpm-fast train --data mnist/ --pad 2 --resume --steps 50000  go on after Ctrl-C, or for longer
  ddpm-fast train --data cifar-10-python.tar.gz --flip --steps 200000 --out runs/cifar10

written into --out: model.safetensors (checkpoint), log.jsonl (losses, speed), samples-*.png
"""

SAMPLE_EPILOG = """\
examples:
  ddpm-fast sample runs/mnist                                     all classes as a grid, samples.png
  ddpm-fast sample runs/mnist --class 3 --num 16 --seed 5 --out threes.png
  ddpm-fast sample runs/mnist --classes 0-4,7 --out denoising.gif
  ddpm-fast sample runs/photos --class cat,dog --out pets.png     classes by their names
  ddpm-fast sample runs/mnist --sampler dpmpp_2m --steps 20       fewer steps; see --list-samplers
  ddpm-fast sample runs/mnist --num 10000 --out images.npz
  ddpm-fast sample runs/mnist --out pictures/                     single PNGs

An image depends on its seed and its place among the images, not on --batch.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 after an error, 130 after Ctrl-C, 143 after SIGTERM.

    An error is one line; with DDPM_FAST_DEBUG=1 it shows its traceback.
    """
    try:
        args = _parsed(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            from . import commands

            return commands.COMMANDS[args.command](args)
    except KeyboardInterrupt:
        print("ddpm-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        print(f"ddpm-fast: error: {_in_one_line(error)}", file=sys.stderr)
        return 2


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        hint = f"; for the images, --data {rest[0]}" if args.command == "train" and rest[0][0] != "-" else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return args


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"ddpm-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in text:
        return f"out of memory: smaller values of --batch, --size or the model need less ({text[:200]})"
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return text
    return f"{type(error).__name__}: {text[:300]} ({DEBUG}=1 shows where)"


def _parser() -> ArgumentParser:
    text = "Train denoising diffusion models and draw from them."
    form = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("ddpm-fast", description=text, epilog=EPILOG, formatter_class=form)
    parser.add_argument("--version", action="version", version=f"ddpm-fast {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, text, add_options, epilog in (
        ("train", "train a model on images", _train, TRAIN_EPILOG),
        ("sample", "draw images from a trained model", _sample, SAMPLE_EPILOG),
        ("plot", "draw loss, gradient norm and speed of runs from their logs", _plot, None),
        ("demo", "train on real digits, draw some, and judge them, in minutes", _demo, None),
        ("info", "versions, devices, and which fast paths work here", _info, None),
    ):
        add_options(commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=form))
    return parser


def _train(parser: ArgumentParser) -> None:
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


def _sample(parser: ArgumentParser) -> None:
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
    add("--batch", type=whole(1), default=256, metavar="N", help="images at a time (%(default)s)")
    add("--no-ema", action="store_true", help="use the raw weights instead of the averaged ones")
    add("--columns", type=whole(1, 10**4), metavar="N", help="images per row of a grid (a class per row)")
    add("--upscale", type=whole(1, 100), metavar="N", help="side of a pixel in a grid (small images are enlarged)")
    _device(add)


def _plot(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder that train wrote into, or its log.jsonl")
    add("--out", type=png, default="plot.png", metavar="FILE.png", help="(%(default)s)")


def _demo(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default="demo", help="folder to write into (%(default)s)")
    steps = RECIPES["digits"].steps
    add("--steps", type=whole(1), metavar="N", help=f"training steps; fewer are faster and worse ({steps})")
    add("--seed", type=whole(0, SEEDS - 2), default=0, metavar="N", help="(%(default)s)")
    _device(add)


def _info(parser: ArgumentParser) -> None:
    """No options."""


def _device(add: Callable[..., object]) -> None:
    add("--device", default="auto", help="cpu, cuda, cuda:1... (a GPU if there is one)")
