"""What the peers share: the import that may fail, the best of several settings, a problem with a network of its own."""

import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from benchmarks.harness import describe, progress
from benchmarks.problem import Builder, Check, Contender, Problem, flops_per_image

P = TypeVar("P", bound=Problem)


class NotInstalled(ImportError):
    """A peer's package is missing."""


def require(module: str) -> Any:
    """Import a peer's package, or raise NotInstalled with what installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise NotInstalled(f'{error.name} is not installed: pip install -e ".[bench]"') from error


def cpu_only(problem: Problem) -> None:
    """Raise ValueError unless the problem is on the CPU."""
    if problem.device.type != "cpu":
        raise ValueError(f"timed on CPUs only, not on {problem.device}")


def own(kind: type[P], problem: Problem, **changes: Any) -> P:
    """Return the problem as one of ``kind``, with its own network, and with ``changes``."""
    return kind(**{field.name: getattr(problem, field.name) for field in fields(problem)} | changes)


def flop_ratio(solved: Problem, problem: Problem, training: bool) -> float:
    """Return the FLOP of the network in ``solved`` over those of the plain one in ``problem``."""
    return flops_per_image(solved.config, training, solved.build) / flops_per_image(problem.config, training)


@dataclass(frozen=True)
class Fastest:
    """A builder that tries all ``settings`` and keeps the fastest of those that agree; its name goes on the row.

    Raises the last setting's error where none agrees.
    """

    settings: Mapping[str, Builder]
    check: Check
    rounds: int = 2

    def __call__(self, problem: Problem) -> Contender:
        agreeing: dict[str, Contender] = {}
        for name, build in self.settings.items():
            try:
                contender = build(problem)
                self.check(problem, name, contender)
                agreeing[name] = contender
            except NotInstalled:
                raise
            except Exception as error:  # one setting's failure is not the peer's
                describe(error)
                failure = error
        if not agreeing:
            raise failure
        name = min(agreeing, key=lambda name: self._seconds(agreeing[name]) if len(agreeing) > 1 else 0)
        progress(f"  fastest: {name}")
        agreeing[name].row["setting"] = name
        return agreeing[name]

    def _seconds(self, contender: Contender) -> float:
        """The least time of a few runs; the check was the warm-up."""
        times = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            contender.run().cpu()
            times.append(time.perf_counter() - start)
        return min(times)
