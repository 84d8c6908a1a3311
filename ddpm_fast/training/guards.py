"""What stops a run: images that don't fit, weights that aren't finite, Ctrl-C, SIGTERM. What slows it: other work."""

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ..diffusion import Diffusion
from ..engine import eval_mode
from ..models.presets import Config
from ..ops import _checks as checks
from .checkpoint import Checkpoint, named
from .data import Images


class Stoppable(Protocol):
    """What runs until its flag is set."""

    interrupted: int  # the number of the signal; 0: none


def check_weights(diffusion: Diffusion, step: int) -> None:
    """Raise FloatingPointError unless every weight, raw and averaged, is finite."""
    tensors = [*diffusion.model.state_dict().values(), *diffusion.ema_model.state_dict().values()]
    if not torch.stack([t.isfinite().all() for t in tensors]).all():  # one wait for the device, not one a tensor
        raise FloatingPointError(f"a weight is not finite after step {step}: try a lower lr, or without bf16")


def try_network(diffusion: Diffusion, device: torch.device) -> None:
    """One image through the network: what doesn't fit shows before anything is written."""
    x = torch.zeros(1, diffusion.img_channels, *diffusion.img_size, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    with eval_mode(diffusion.model) as model:
        model(x, index, index if diffusion.num_classes else None)


def check_fit(config: Config, images: Images) -> None:
    """Raise ValueError or TypeError unless a model of this configuration can be trained on these images."""
    checks.tensor("images.pixels", images.pixels, ndim=4, dtype=torch.uint8)
    expected = (config.img_channels, *config.img_size)
    if tuple(images.pixels.shape[1:]) != expected:
        raise ValueError(f"images are {tuple(images.pixels.shape[1:])} (C, H, W), the model expects {expected}")
    if config.cond_channels:
        raise ValueError("the trainer has no image conditions: train a model with cond_channels by TrainStep")
    if len(images.pixels) == 0:
        raise ValueError("images.pixels holds no images")
    if config.num_classes is None:
        return
    if images.labels is None:
        raise ValueError(f"the model has {config.num_classes} classes, but the images have no labels")
    checks.tensor("images.labels", images.labels, shape=(len(images.pixels),), dtype=torch.int64)
    low, high = (int(label) for label in images.labels.aminmax())
    if low < 0 or high >= config.num_classes:
        wrong = f"{low} is negative" if low < 0 else f"{high} is too large"
        raise ValueError(f"label {wrong} for num_classes = {config.num_classes}")


def check_same(checkpoint: Checkpoint, images: Images) -> None:
    """Raise ValueError unless a run can go on from this checkpoint on these images."""
    try:
        check_fit(checkpoint.config, images)
    except ValueError as error:
        raise ValueError(f"{error}: give the --data, --size and --pad of the first run") from error
    with named(checkpoint.path):
        data = checkpoint.training["data"]
        count = checks.integer("images", data["images"], 1)
    if images.fingerprint() != data:
        raise ValueError(
            f"{checkpoint.path} was trained on other images, {count} then and {len(images.pixels)} now: "
            "--data, --size and --pad must be the same as in the first run"
        )


@contextmanager
def interruptible(run: Stoppable) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets the step finish; the second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: Any) -> None:
        run.interrupted = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def warn_where_busy(device: torch.device) -> None:
    """A warning where other work holds the cores: the threads that share an operation then wait for each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    spins = os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive"
    if device.type == "cpu" and torch.get_num_threads() > 1 and load > 1.5 * cores and spins:
        advice = "OMP_WAIT_POLICY=passive or OMP_NUM_THREADS=1 may be many times faster"
        warnings.warn(f"the load is {load:.1f} on {cores} cores: {advice}", stacklevel=2)
