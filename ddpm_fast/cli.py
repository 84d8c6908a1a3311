"""The command line: `ddpm-fast` = `python -m ddpm_fast`, with train, sample, plot, demo and info.

Their options are in `arguments.py`; what they do in `commands/`, imported once the arguments are clear.
"""

import argparse
import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from . import __version__, arguments

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
        ("train", "train a model on images", arguments.train, TRAIN_EPILOG),
        ("sample", "draw images from a trained model", arguments.sample, SAMPLE_EPILOG),
        ("plot", "draw loss, gradient norm and speed of runs from their logs", arguments.plot, None),
        ("demo", "train on real digits, draw some, and judge them, in minutes", arguments.demo, None),
        ("info", "versions, devices, and which fast paths work here", arguments.info, None),
    ):
        add_options(commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=form))
    return parser
