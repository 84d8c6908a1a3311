"""Checkpoints kept beside the latest one: the last few, and the best."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..ops import _checks as checks
from .files import link_atomically

BEST = "best.safetensors"
NAME = re.compile(r"model-(\d{7,})\.safetensors")


def kept(folder: str | Path) -> list[Path]:
    """The checkpoints `model-<step>.safetensors` in a folder, by step."""
    found = [(int(match[1]), path) for path in Path(folder).glob("model-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


class Keeper:
    """After each save, gives the latest checkpoint a second name, and a third where it is the best.

    Both are hard links where the file system has them: the latest file is replaced, never written into.

    Args:
        latest: the checkpoint that each save replaces.
        count: how many to keep.
        best: whether to keep the best.
    """

    def __init__(self, latest: Path, count: int, *, best: bool) -> None:
        self.latest, self.count, self.best = latest, count, best
        self.marked = 0  # the step to be kept
        self.record: dict[str, Any] | None = None  # step and loss of the best
        self._before: dict[str, Any] | None = None

    def mark(self, step: int, loss: float) -> None:
        """Before a save that is to be kept (an interrupted run's last isn't): `loss` is what they are compared by."""
        self.marked, self._before = step, self.record
        if self.best and (self.record is None or loss < self.record["loss"]):
            self.record = {"step": step, "loss": loss}

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around a save: keeps what was marked, and forgets the mark where it can't be written."""
        try:
            yield
            self.keep(step)
        except OSError:
            if self.marked == step:
                self.marked, self.record = 0, self._before
            raise

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON."""
        return {"marked": self.marked, "best": self.record}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave."""
        self.marked, best = checks.integer("marked", state["marked"], 0), state["best"]
        if best is not None:
            step, loss = checks.integer("best step", best["step"], 0), checks.number("best loss", best["loss"])
            self.record = {"step": step, "loss": loss}

    def keep(self, step: int) -> None:
        """After a save; and at a resume, for a run that was killed between the two."""
        if self.count and self.marked == step:
            name = self.latest.with_name(f"model-{step:07d}.safetensors")
            if not name.exists() or not name.samefile(self.latest):
                link_atomically(self.latest, name)
            for path in kept(self.latest.parent)[: -self.count]:
                path.unlink()
        if self.best and self.record is not None and self.record["step"] == step:
            link_atomically(self.latest, self.latest.with_name(BEST))

    def clear(self) -> None:
        """Removes what an older run kept."""
        for path in (*kept(self.latest.parent), self.latest.with_name(BEST)):
            path.unlink(missing_ok=True)
