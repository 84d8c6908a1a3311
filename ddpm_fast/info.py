"""What works here: versions, devices, and which backends each op has."""

import importlib.util
import platform
from pathlib import Path

import numpy as np
import torch

from . import __version__, ops


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
