"""The command line: `ddpm-fast` = `python -m ddpm_fast`, with train, sample, demo and info.

What the commands do is in `commands.py`, imported once the arguments are clear, so that `--help` answers at once.
"""

import argparse
import sys
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Sequence
from pathlib import Path

EPILOG = """\
a first round, in a few minutes on a laptop:
  ddpm-fast demo                                     train on handwritten digits, draw, judge: see demo/
  ddpm-fast sample demo/model.safetensors --class 7  draw more

your own images, one sub-folder per class:
  ddpm-fast train --data photos/ --size 32 --flip --out runs/photos
  ddpm-fast sample runs/photos/model.safetensors --out runs/photos/grid.png
"""

TRAIN_EPILOG = """\
examples:
  ddpm-fast train                                               digits that come with scikit-learn, into runs/digits
  ddpm-fast train --data mnist/ --pad 2 --base-channels 32      a folder with MNIST's files; 28 + 2*2 = 32 pixels
  ddpm-fast train --data mnist/ --pad 2 --resume --steps 50000  go on after Ctrl-C, or for longer
  ddpm-fast train --data cifar10.zip/train --flip --steps 200000 --out runs/cifar10

written into --out: model.safetensors (checkpoint), log.jsonl (loss), samples-*.png
"""

SAMPLE_EPILOG = """\
examples:
  ddpm-fast sample runs/mnist/model.safetensors                          all classes as a grid, samples.png
  ddpm-fast sample runs/mnist/model.safetensors --class 3 --num 16 --seed 5
  ddpm-fast sample runs/mnist/model.safetensors --classes 0-4,7 --out denoising.gif
  ddpm-fast sample runs/mnist/model.safetensors --num 10000 --out images.npz
  ddpm-fast sample runs/mnist/model.safetensors --out pictures/          single PNGs

An image depends on its seed and its place among the images, not on --batch.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 after an error of the user's, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        from . import commands

        return commands.COMMANDS[args.command](args)
    except KeyboardInterrupt:
        print("ddpm-fast: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"ddpm-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> ArgumentParser:
    text = "Train denoising diffusion models and draw from them."
    form = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("ddpm-fast", description=text, epilog=EPILOG, formatter_class=form)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, text, add_options, epilog in (
        ("train", "train a model on images", _train, TRAIN_EPILOG),
        ("sample", "draw images from a trained model", _sample, SAMPLE_EPILOG),
        ("demo", "train on real digits, draw some, and judge them, in minutes", _demo, None),
        ("info", "versions, devices, and which fast paths work here", _info, None),
    ):
        add_options(commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=form))
    return parser


def _train(parser: ArgumentParser) -> None:
    _train_data(parser.add_argument_group("data").add_argument)
    _train_model(parser.add_argument_group("model").add_argument)
    _train_recipe(parser.add_argument_group("training (with --resume, what isn't given stays as it was)").add_argument)
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, metavar="DIR", help="folder to write into (default runs/ and the name of the data)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--overwrite", action="store_true", help="start anew although --out holds a checkpoint")
    add("--log-every", type=int, default=50, metavar="N", help="steps between log lines (%(default)s)")
    add("--save-every", type=int, default=1000, metavar="N", help="steps between checkpoints (%(default)s)")
    add("--sample-every", type=int, default=5000, metavar="N", help="steps between sample grids, 0: none (%(default)s)")
    add("--sample-steps", type=int, metavar="N", help="denoising steps of these grids (as many as in training)")
    _device(add)


def _train_data(add: Callable[..., object]) -> None:
    add(
        "--data",
        default="digits",
        metavar="SOURCE",
        help="'digits' (default), an idx[.gz] image file, a folder with MNIST's files, or a folder or zip of images "
        "with one sub-folder per class; a.zip/b is the folder b in a.zip",
    )
    add("--size", type=size, metavar="N|HxW", help="scale and crop the images to this size")
    add("--pad", type=int, default=0, metavar="N", help="black pixels to add on each side")
    add("--unconditional", action="store_true", help="don't use the classes")


def _train_model(add: Callable[..., object]) -> None:
    add("--preset", help="what the other options start from: digits or cifar10 (digits for the digits, else cifar10)")
    add("--base-channels", type=int, metavar="N", help="width of the network: channels at full resolution")
    add("--channel-mults", type=integers, metavar="A,B,..", help="times base channels, per level of half the size")
    add("--num-res-blocks", type=int, metavar="N", help="residual blocks per level")
    add("--attention-resolutions", type=integers, metavar="I,J,..", help="levels with attention, 0 = full resolution")
    add("--dropout", type=float, metavar="P", help="probability in the residual blocks")
    add("--num-timesteps", type=int, metavar="T", help="noise levels, and steps of the slowest sampling")
    add("--schedule", choices=("linear", "cosine"), help="how noise grows over the timesteps")
    add("--ema-decay", type=float, metavar="D", help="of the averaged weights that samples are drawn from")


def _train_recipe(add: Callable[..., object]) -> None:
    add("--steps", type=int, metavar="N", help="optimizer steps in all (1800 for the digits, else 20000)")
    add("--batch", dest="batch_size", type=int, metavar="N", help="images per step")
    add("--lr", type=float, help="learning rate of Adam")
    add("--warmup", type=int, metavar="N", help="steps over which the learning rate rises")
    add("--clip", type=float, metavar="X", help="largest norm of the gradient, 0: none")
    add("--flip", action=BooleanOptionalAction, help="mirror images at random")
    add("--bf16", action=BooleanOptionalAction, help="bfloat16 autocast: faster where the hardware has it")
    add("--seed", type=int, metavar="N", help="of initial weights, data order and noise")


def _sample(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, help="model.safetensors written by train")
    add(
        "--out",
        type=Path,
        default="samples.png",
        help="x.png: a grid; x.gif: the denoising; x.npz: arrays; a folder: single PNGs (%(default)s)",
    )
    add("--num", type=int, metavar="N", help="how many images (8 per class; 64 without classes)")
    add("--classes", "--class", type=integers, metavar="A,B-C", help="which to draw, in equal parts (all)")
    add("--seed", type=int, default=0, help="another seed, other images (%(default)s)")
    add("--steps", type=int, metavar="N", help="denoising steps (as many as in training)")
    add("--sampler", default="ddpm", help="(%(default)s)")
    add("--batch", type=int, default=256, metavar="N", help="images at a time (%(default)s)")
    add("--no-ema", action="store_true", help="use the raw weights instead of the averaged ones")
    add("--columns", type=int, metavar="N", help="images per row of a grid (a class per row)")
    add("--upscale", type=int, metavar="N", help="side of a pixel in a grid (small images are enlarged)")
    _device(add)


def _demo(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default="demo", help="folder to write into (%(default)s)")
    add("--steps", type=int, metavar="N", help="training steps; fewer are faster and worse")
    add("--seed", type=int, default=0, help="(%(default)s)")
    _device(add)


def _info(parser: ArgumentParser) -> None:
    """No options."""


def _device(add: Callable[..., object]) -> None:
    add("--device", default="auto", help="cpu, cuda, cuda:1... (a GPU if there is one)")


def integers(text: str) -> tuple[int, ...]:
    """'3', '0,1,4' or '0-4,7'; '' is none."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def size(text: str) -> tuple[int, int]:
    """'32' or '32x48', height first."""
    height, _, width = text.lower().partition("x")
    return int(height), int(width or height)
