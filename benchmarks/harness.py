"""What every benchmark shares: header, agreement check, interleaved timing, rows, table, JSON.

A row is one contender of one case: ``{"case", "precision", "batch", "name", "ms", ...}`` with ``ms`` the median of the
interleaved repetitions; ours is named ``ddpm_fast``; ``ratio`` is its time over ours, so above 1 we are faster.
"""

import datetime
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS = "ddpm_fast"
ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PROGRESS_S = 10.0  # between the lines of a long timing
LEGEND = (
    f"over ours: its time over that of {OURS}, above 1 we are faster; of ceiling: the least time that the measured "
    "matrix product (for ops the copy, too) allows, over its time"
)

PEER_PACKAGES = ("diffusers", "denoising-diffusion-pytorch", "onnxruntime", "openvino")

Row = dict[str, Any]


def progress(text: str) -> None:
    """Say on stderr what is being done."""
    print(text, file=sys.stderr, flush=True)


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; ``"auto"`` is the GPU where torch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def compile_options(device: torch.device) -> dict[str, Any]:
    """Return the inductor's options that every compiled peer gets: its own random numbers are slow on a CPU."""
    return {"fallback_random": device.type == "cpu"}


def header(device: torch.device) -> dict[str, Any]:
    """Describe the machine, the versions, the commit and the command of this run; say so where the machine is busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = round(os.getloadavg()[0], 2)
    if load > 1:
        progress(f"the load is {load} on {cores} cores: times taken beside other work are not worth quoting")
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": cores,
            "isa": torch.backends.cpu.get_cpu_capability(),
            "load": load,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in ("triton", "ddpm_fast", *PEER_PACKAGES)},
        },
        "commit": _commit(),
        "command": shlex.join([Path(sys.executable).name, *_script(), *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _script() -> list[str]:
    """What ran, as typed: with -m the interpreter puts a file's whole path into argv."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the working tree, marked where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        sources = ["--", ".", ":(exclude)benchmarks/results"]  # where a run itself may write
        changed = subprocess.run(
            [*git, "status", "--porcelain", *sources], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} (modified)" if changed else commit


class Disagreement(ValueError):
    """A contender computes something else than the reference; it must not be timed."""


def check_agreement(
    name: str,
    got: Tensor,
    plain: Sequence[Tensor],
    truth: Tensor,
    dtype: torch.dtype,
    factor: float = 2,
    floor: float = 0.0,
) -> float:
    """Return ``got``'s relative error, or raise where it exceeds ``factor`` times plain PyTorch's own and the floor.

    Args:
        name: the contender, for the message.
        got: the contender's result.
        plain: plain PyTorch's results in the tested precision, by memory format; the least exact counts.
        truth: the float64 result on the same inputs and weights.
        dtype: the tested precision; its epsilon is the floor.
        factor: how many of plain's errors are allowed; 2 for values, 3 for gradients.
        floor: what the conditioning of the comparison adds to the floor.

    Raises:
        Disagreement: the shapes differ, or the error is not within the bound (NaN never is).
    """
    if got.shape != truth.shape:
        raise Disagreement(f"{name} returned shape {tuple(got.shape)}, the reference {tuple(truth.shape)}")
    error = relative_error(got, truth)
    bound = factor * max(relative_error(x, truth) for x in plain) + torch.finfo(dtype).eps + floor
    if not error <= bound:
        raise Disagreement(f"{name} is {error:.2e} from the float64 reference, allowed are {bound:.2e}")
    return error


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Return |got - truth| / |truth| in the 2-norm, computed in float64."""
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    return ((got - truth).norm() / truth.norm()).item()


def check_spread(name: str, got: Tensor, expected: Tensor) -> None:
    """Raise Disagreement unless two independent draws of the same law have the same standard deviation."""
    ratio = (got.double().std() / expected.double().std()).item()
    bound = 6 / math.sqrt(got.numel())  # six standard errors of the ratio of two standard deviations of n normals
    if not abs(ratio - 1) <= bound:
        raise Disagreement(
            f"{name} spreads its results {ratio:.3f} times as far as PyTorch, allowed is 1 +- {bound:.3f}"
        )


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repetitions: int,
    warmup: int = 1,
    errors: dict[str, str] | None = None,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Time the contenders in turn, A B C A B C, so that drift of the machine meets all of them alike.

    Args:
        runs: contender name -> its work.
        device: on a GPU the time is between two events, else by the wall clock.
        repetitions: timed runs of each.
        warmup: runs of each before.
        errors: receives the message of a contender that fails, which is then left out; without it the error is raised.
        before: contender name -> what runs untimed before each of its runs: none pays for who came before (threads
            that went to sleep, cold code).

    Returns:
        milliseconds of each repetition, by contender.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = said = time.perf_counter()
    for i in range(warmup + repetitions):
        for name in list(times):
            try:
                if before:
                    before[name]()
                ms = _time_once(runs[name], device)
            except Exception as error:
                if errors is None:
                    raise
                errors[name] = describe(error)
                del times[name]
                continue
            if i >= warmup:
                times[name].append(ms)
        if (now := time.perf_counter()) - said > PROGRESS_S:
            progress(f"  round {i + 1} of {warmup + repetitions}, {now - start:.0f} s")
            said = now
    return times


def describe(error: Exception) -> str:
    """Return the error's kind and first line, and say it on stderr."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    progress(f"  failed: {text}")
    return text


def _time_once(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def summarise(times: Sequence[float], per: int = 1) -> Row:
    """Return the median and the interquartile range of ``times`` in ms, each divided by ``per`` units of work."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {"ms": middle / per, "iqr_ms": (high - low) / per, "repetitions": len(times)}


def add_ratios(rows: list[Row]) -> None:
    """Give each row of one case ``ratio``: its time over ours; per FLOP too where its network has more or fewer."""
    ours = next((row["ms"] for row in rows if row["name"] == OURS and "ms" in row), None)
    for row in rows:
        if ours is not None and "ms" in row:
            row["ratio"] = row["ms"] / ours
            if "flop_ratio" in row:
                row["ratio_per_flop"] = row["ratio"] / row["flop_ratio"]


COLUMNS = {
    "case": "case",
    "precision": "precision",
    "batch": "batch",
    "name": "contender",
    "kernels": "kernels",
    "num_steps": "steps",
    "launches": "launches",
    "ms": "ms",
    "share_of_run": "of the run",
    "iqr_ms": "IQR",
    "ratio": "over ours",
    "over_fastest": "over the fastest",
    "flop_ratio": "FLOP over ours",
    "ratio_per_flop": "over ours, per FLOP",
    "images_per_s": "images/s",
    "gbytes_per_s": "GB/s",
    "tflops": "TFLOP/s",
    "share": "of ceiling",
    "rms": "rms error",
    "largest": "largest error",
    "peak_mib": "peak MiB",
    "saved_mib": "kept for backward MiB",
    "seconds": "seconds",
    "frechet": "Frechet distance",
    "agreement": "class agreement",
    "features": "in the features",
    "setting": "fastest setting",
    "note": "note",
    "error": "error",
}


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table with the columns that any of them fills."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [[COLUMNS[key] for key in keys], ["---"] * len(keys)]
    lines += [[_cell(key, row.get(key)) for key in keys] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key in ("share", "share_of_run", "agreement"):
        return f"{value:.0%}"
    if key in ("ratio", "over_fastest", "flop_ratio", "ratio_per_flop"):
        return f"{value:.2f}"
    if key in ("peak_mib", "saved_mib"):
        return f"{value:.1f}"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_header(head: Mapping[str, Any]) -> str:
    """Return the header as a Markdown list, and what the columns of the tables mean."""
    lines = []
    for key, value in head.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {entry}" for name, entry in value.items() if entry not in (None, []))
        if value in (None, ""):
            continue
        lines.append(f"- {key}: {value}")
    lines.append(f"- {LEGEND}")
    return "\n".join(lines)


def write_json(path: str | Path, head: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write ``{"header": ..., "rows": [...]}``, a row on each line."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    Path(path).write_text(f'{{\n "header": {json.dumps(head, indent=1)},\n "rows": [\n{lines}\n ]\n}}\n')
