"""The log of one run, or of several for comparison, as a picture."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .extras import require
from .files import write_atomically
from .journal import LOG
from .log import read_log

SHOWN = 50  # points that a smoothed curve has at least
LAST = 0.1  # share of the lines at the end that several runs are compared by


def plot_runs(runs: Sequence[str | Path], out: str | Path) -> None:
    """Writes a PNG with loss, loss by timestep, gradient norm and images/s.

    Args:
        runs: folders that runs wrote into, or their logs.
        out: the file to write.

    Raises:
        ValueError: there is no log, or no line in it; the text names it.
    """
    logs = dict(zip(_names(runs), map(_read, runs), strict=True))
    figure = require("matplotlib.figure").Figure(figsize=(12, 8), layout="constrained")
    (loss, by_t), (norm, speed) = figure.subplots(2, 2)
    _curves(loss, logs, "loss", "loss")
    _curves(norm, logs, "grad_norm", "norm of the gradient")
    _curves(speed, logs, "images_per_s", "images/s")
    loss.set_yscale("log")
    norm.set_yscale("log")
    speed.set_ylim(bottom=0)
    for name, lines in logs.items():
        held = [line for line in lines if line.get("holdout_loss")]
        if held:
            label = "held out" if len(logs) == 1 else f"{name}, held out"
            loss.plot(*_points(held, "holdout_loss"), "--", marker=".", label=label)
    (_by_time if len(logs) == 1 else _by_run)(by_t, logs)
    if len(loss.get_lines()) > 2:  # of one run: its curve, and that smoothed
        loss.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    write_atomically(out, data.getvalue())


def _read(run: str | Path) -> list[dict[str, Any]]:
    path = Path(run) / LOG if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise ValueError(f"{path} doesn't exist: expected a folder that train wrote into, or its {LOG}")
    lines = [line for line in read_log(path) if "loss" in line]
    if not lines:
        raise ValueError(f"{path} has no log lines yet")
    return lines


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The folders' names where they differ, otherwise the paths."""
    paths = [Path(run).parent if Path(run).suffix == ".jsonl" else Path(run) for run in runs]
    short, long = [path.resolve().name for path in paths], [str(run) for run in runs]
    if len(set(long)) < len(long):
        raise ValueError(f"the same run twice: {max(long, key=long.count)}")
    return short if len(set(short)) == len(short) else long


def _points(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, where there are any."""
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return steps, values


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a window centred on each point."""
    width = max(1, len(values) // SHOWN)
    sums = np.convolve(values, np.ones(width), "same")
    return sums / np.convolve(np.ones(len(values)), np.ones(width), "same")


def _curves(axes: Any, logs: dict[str, list[dict[str, Any]]], key: str, title: str) -> None:
    """A curve a run: faint as logged, strong smoothed."""
    for k, (name, lines) in enumerate(logs.items()):
        steps, values = _points(lines, key)
        if len(values):
            axes.plot(steps, values, color=f"C{k}", alpha=0.25, linewidth=1)
            axes.plot(steps, _smoothed(values), color=f"C{k}", label=name)
    axes.set(xlabel="step", title=title)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(alpha=0.3, which="both")
    if len(logs) > 1:
        axes.legend()


def _by_time(axes: Any, logs: dict[str, list[dict[str, Any]]]) -> None:
    """Of one run: a curve for each range of timesteps."""
    ((lines),) = logs.values()
    lines = [line for line in lines if line.get("loss_by_t")]
    count = len(lines[0]["loss_by_t"]) if lines else 0
    colours = require("matplotlib").colormaps["viridis"](np.linspace(0, 0.95, count))
    for k in reversed(range(count)):
        steps, values = _points([{"step": line["step"], "loss": line["loss_by_t"][k]} for line in lines], "loss")
        axes.plot(steps, _smoothed(values), color=colours[k], label=f"{100 * k // count}-{100 * (k + 1) // count} %")
    axes.set(xlabel="step", title="loss by timestep (of T)", yscale="log")
    axes.locator_params(axis="x", nbins=6)
    axes.grid(alpha=0.3, which="both")
    if count:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _by_run(axes: Any, logs: dict[str, list[dict[str, Any]]]) -> None:
    """Of several: the ranges of timesteps along the axis, a curve a run, at the end of each."""
    for k, (name, lines) in enumerate(logs.items()):
        rows = [line["loss_by_t"] for line in lines if line.get("loss_by_t")]
        rows = rows[-max(1, round(LAST * len(rows))) :]
        if rows:
            table = np.array(rows, dtype=float)  # None becomes nan
            known = ~np.isnan(table).all(0)
            middles = (np.arange(table.shape[1]) + 0.5) * 100 / table.shape[1]
            axes.plot(middles[known], np.nanmean(table[:, known], 0), marker="o", color=f"C{k}", label=name)
    axes.set(
        xlabel="timestep, % of T", title=f"loss by timestep, mean of the last {LAST:.0%} of each log", yscale="log"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
