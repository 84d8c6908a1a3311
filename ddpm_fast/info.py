"""What works here: versions, devices, which backends each op has; and which samplers there are."""

import importlib.util
import platform
from itertools import product
from pathlib import Path

import numpy as np
import torch

from . import __version__, ops
from .adaptive import adaptive
from .ops._conv1x1 import ANY, most_pixels
from .ops._conv3x3 import CHANGING, FIXED, KINDS, WEIGHT, choose
from .ops._native import wanted
from .samplers import ADAPTIVE, SAMPLERS, option_defaults
from .samplers.steps import SPACINGS


def show() -> None:
    """Prints versions, devices and op x backend."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for name, value in (
        ("ddpm_fast", f"{__version__} in {Path(__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, numpy {np.__version__}"),
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
        ("native", _native()),
        ("cuda", f"{torch.version.cuda}, {', '.join(names)}" if names else "no device"),
    ):
        print(f"{name:<10} {value}")
    print()
    for op, backend, reason in ops.availability():
        print(f"{op:<20} {backend:<10} {reason or 'available'}")
    lines = convolutions()
    if lines:
        print("\n3x3 convolutions of the CIFAR-10 network in chains and in training, by batch size; and 1x1")
        print("\n".join([*lines, *pointwise()]))


def pointwise() -> list[str]:
    """Which 1x1 convolutions of chains are native on this CPU, a line for each precision that has any."""
    lines = []
    for dtype, name in KINDS.items():
        one, two = (f"up to {most} pixels" if most < ANY else "any number" for most in most_pixels(dtype))
        if most_pixels(dtype)[1]:
            lines.append(f"{name:<9} chain            1x1: native of {one} of a batch, with a skip of {two}")
    return lines


def convolutions() -> list[str]:
    """How the 3x3 convolutions of the CIFAR-10 network run on this CPU, a line for each precision, use and image size;
    none where all are the library's."""
    if not wanted():
        return []
    lines, found = [], False
    for dtype, (what, use) in product(KINDS, ((FIXED, "chain"), (CHANGING, "training"), (WEIGHT, "weight gradient"))):
        for channels, side in ((128, 32), (256, 16), (256, 8), (256, 4)):
            ways = {n: choose(dtype, (n, channels, side, side), channels, what) for n in (1, 4, 16, 64)}
            found |= any(way.tile for way in ways.values())
            text = ", ".join(f"{n}: {way.text(dtype)}" for n, way in ways.items())
            lines.append(f"{KINDS[dtype]:<9} {use:<16} {channels:>4} channels {side:>3}x{side:<3} {text}")
    return lines if found else []


def list_samplers() -> str:
    """Each sampler's name, what it is, and its options with their defaults."""
    lines = []
    for name, build in (SAMPLERS | {ADAPTIVE: adaptive}).items():
        lines += [
            f"{name}: {(build.__doc__ or '').strip().splitlines()[0]}",
            "    " + " ".join(f"{option}={str(default).lower()}" for option, default in option_defaults(build).items()),
        ]
    return "\n".join(
        [
            *lines,
            f"spacing: {', '.join(SPACINGS)}, or numbers of steps such as 10,15,20",
            "final: clean, first",
            "variance: beta, posterior, a number from 0 (posterior) to 1 (beta), or learned where it was",
        ]
    )


def native_isa() -> str | None:
    """The instruction set that the native module runs; None without one."""
    try:
        return str(importlib.import_module("ddpm_fast._C").isa())
    except (ImportError, ValueError, AttributeError):
        return None


def _native() -> str:
    """Where the native module lies and which instruction set it runs, or how to learn why there is none."""
    if importlib.util.find_spec("ddpm_fast._C") is None:
        return "not built: the table below says why"
    try:
        module = importlib.import_module("ddpm_fast._C")
        return f"{module.isa()} (of {', '.join(module.isas())}) in {module.__file__}"
    except (ImportError, ValueError, AttributeError) as error:
        return str(error)
