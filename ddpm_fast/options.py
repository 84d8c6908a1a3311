"""The types of the command line's options: each turns a word into a value, or says what it should have been."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_SIDE = 8192  # pixels of an image


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes an integer in [least, most]."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            range_ = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise ArgumentTypeError(f"{text!r} is no integer {range_}")
        return number

    return parse


def real(low: float, high: float = float("inf")) -> Callable[[str], float]:
    """The type of an option that takes a finite number in [low, high]."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not low <= number <= high or number == float("inf"):
            range_ = f"of at least {low}" if high == float("inf") else f"between {low} and {high}"
            raise ArgumentTypeError(f"{text!r} is no number {range_}")
        return number

    return parse


def assignment(text: str) -> tuple[str, Any]:
    """'name=value': a number, 'true' or 'false', whole numbers with commas between, or else a word."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier() and value):
        raise ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    if "=" in value:
        raise ArgumentTypeError(f"{text!r} holds several: one --option each")
    if "," in value:
        return name, integers(value.strip("[]()").replace(" ", ""))
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, value


def png(text: str) -> Path:
    """A file whose name ends in .png."""
    if not text.lower().endswith(".png"):
        raise ArgumentTypeError(f"{text!r} doesn't end in .png")
    return Path(text)


def integers(text: str) -> tuple[int, ...]:
    """'3' or '0,1,4'; '' is none."""
    return tuple(whole(0, 10**4)(part) for part in text.split(",")) if text else ()


def size(text: str) -> tuple[int, int]:
    """'32' or '32x48', height first."""
    height, cross, width = text.lower().partition("x")
    side = whole(1, MAX_SIDE)
    try:
        return side(height), side(width if cross else height)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{text!r} is no size: expected N or HxW, each from 1 to {MAX_SIDE}") from error
