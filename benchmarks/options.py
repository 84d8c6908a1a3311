"""Command lines that refuse a bad option before anything is measured: one line on stderr, exit status 2."""

import argparse
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.harness import pick_device


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default, unless there is none: the help then says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser with the defaults in its help and without the usage in its errors."""

    def __init__(self, description: str, prog: str | None = None) -> None:
        super().__init__(prog, description=description, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def count(text: str) -> int:
    """Return an integer of at least 1."""
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """Return the device called ``text``, which this machine has."""
    try:
        found = pick_device(text)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda, cuda:1..., got {text!r}")
    gpus = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= gpus:
        raise argparse.ArgumentTypeError(f"{text!r}: torch sees {gpus or 'no'} GPU here; --device cpu works anywhere")
    return found


def _made(folder: Path, text: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't write to {text!r}: {error.strerror}") from error


def output_file(text: str) -> Path:
    """Return the path of a file that can be written; its folder is made."""
    path = Path(text)
    _made(path.parent, text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, expected a file")
    return path


def output_folder(text: str) -> Path:
    """Return the path of a folder, which is made."""
    path = Path(text)
    _made(path, text)
    return path
