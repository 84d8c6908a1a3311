"""What a run writes of its numbers: log lines, TensorBoard events, and how fast it is."""

import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .extras import require
from .log import Log, read_log, write_log

LOG, EVENTS = "log.jsonl", "tensorboard"


class Journal:
    """Writes `out/log.jsonl` and, where asked for, events into `out/tensorboard`.

    Args:
        tensorboard: write events too.

    Raises:
        ImportError: TensorBoard was asked for and isn't installed.
    """

    def __init__(self, out: Path, *, tensorboard: bool = False) -> None:
        self.path, self.events = out / LOG, out / EVENTS
        self._log, self._tensorboard = Log(self.path), tensorboard
        self._writer: Any = None
        self._first = 1  # step of the events to come
        self._clock, self._images = 0.0, 0
        if tensorboard:
            require("tensorboard")

    def start(self) -> None:
        """Training begins, or goes on after a line."""
        self._clock, self._images = time.perf_counter(), 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training time."""
        pause = time.perf_counter()
        yield
        self._clock += time.perf_counter() - pause

    def count(self, images: int) -> None:
        """A step was made with so many images."""
        self._images += images

    def write(self, line: dict[str, Any], device: torch.device) -> str:
        """Adds a line with speed and memory to it; returns what a progress bar shows."""
        speed = self._images / (time.perf_counter() - self._clock)
        line = line | {"images_per_s": round(speed, 1), "peak_memory_mb": peak_memory_mb(device)}
        self._log.append(line)
        if self._tensorboard:
            self._add_events(line)
        self.start()
        return f"loss {line['loss']:.4f}, {speed:.0f} images/s"

    def cut(self, step: int) -> None:
        """Drops the lines after `step`, and hides the events."""
        self._first = step + 1
        lines = read_log(self.path) if self.path.exists() else []
        write_log(self.path, [line for line in lines if line["step"] <= step])

    def clear(self) -> None:
        """Removes what an older run wrote; starts the log."""
        for path in self.events.glob("events.out.tfevents.*"):
            path.unlink(missing_ok=True)
        write_log(self.path, [])

    def _add_events(self, line: Mapping[str, Any]) -> None:
        step = line["step"]
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.events), purge_step=self._first)
            for tag, number in _scalars(line):
                self._writer.add_scalar(tag, number, step)
            self._writer.flush()
        except OSError as error:
            warnings.warn(f"no TensorBoard events at step {step}: {error}", stacklevel=4)


def _scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line; a list's with their place in it."""
    for name, value in line.items():
        parts = [(f"{name}/{k}", x) for k, x in enumerate(value)] if isinstance(value, list) else [(name, value)]
        yield from ((tag, number) for tag, number in parts if name != "step" and number is not None)


def peak_memory_mb(device: torch.device) -> float | None:
    """The most memory used so far, in MiB: of a CUDA device, otherwise of the process; None where no one knows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
