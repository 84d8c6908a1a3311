"""What the commands of `cli.py` do: each takes the parsed arguments and returns the exit code."""

from argparse import Namespace
from collections.abc import Callable

from ..demo import run as run_demo
from ..info import show
from ..training.files import check_writable
from ..training.plot import plot_runs
from .sample import sample
from .shared import chosen_device
from .train import train


def plot(args: Namespace) -> int:
    """Draws the logs of runs."""
    check_writable(args.out.parent)
    plot_runs(args.runs, args.out)
    print(args.out)
    return 0


def demo(args: Namespace) -> int:
    """Trains on the digits, draws and judges."""
    run_demo(args.out, steps=args.steps, seed=args.seed, device=chosen_device(args.device))
    return 0


def info(args: Namespace) -> int:
    """Prints versions, devices and op x backend."""
    show()
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "train": train,
    "sample": sample,
    "plot": plot,
    "demo": demo,
    "info": info,
}
