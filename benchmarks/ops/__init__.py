"""Op benchmarks: one file per op lists its cases; here they are built, checked against float64 and timed.

``python -m benchmarks.ops --help``; the same cases run under pytest-benchmark with ``pytest benchmarks``.
"""

import ctypes
import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.ceilings import rotation
from benchmarks.harness import (
    NAMES,
    OURS,
    Row,
    add_ratios,
    check_agreement,
    check_spread,
    compile_options,
    describe,
    progress,
    summarise,
    time_interleaved,
)
from ddpm_fast import ops

OPS = (
    "q_sample",
    "diffusion_loss",
    "sampler_step",
    "noise",
    "timestep_embedding",
    "ema_update",
    "group_norm_silu",
    "residual_sum",
    "attention",
    "conv3x3",
    "overhead",
)
CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
MIN_RUN_MS = 2.0
COPY = "copy of as many bytes"

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One op on one shape and dtype.

    Args:
        op: the op's name.
        label: shape and variant, for the table.
        batch: images.
        nbytes: the fewest bytes to move: each input read once, each output written once.
        make: (seed, device, memory_format) -> inputs.
        ours: the op on these inputs.
        plain: what a PyTorch user writes.
        dtype: of the data.
        flops: 2 per multiply-add; 0 where only bytes matter.
        grads: positions of the inputs to differentiate by; then forward and backward are timed together.
        backward_alone: time the backward alone, on graphs that are kept.
        random: the result is a fresh draw; only its spread is compared.
        layouts: whether PyTorch runs in both memory formats and ours in channels_last; else all run in NCHW.
        beside_copy: time a copy that moves as many bytes, too.
        hot: time calls on two sets of inputs; else on enough of them, in turn, to find each out of the caches.
        backends: whether each of our backends is timed, forced.
        peers: other ways by name, timed in channels_last on `peers_on`.
        peers_on: the kind of device.
        errors: whether the rows tell the errors, too.
        factor: how many of plain PyTorch's errors are allowed; by default 2, of gradients 3.
    """

    op: str
    label: str
    batch: int
    nbytes: int
    make: Callable[[int, torch.device, torch.memory_format], Inputs]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    dtype: torch.dtype = torch.float32
    flops: int = 0
    grads: tuple[int, ...] = ()
    backward_alone: bool = False
    random: bool = False
    layouts: bool = True
    beside_copy: bool = False
    hot: bool = False
    backends: bool = True
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    peers_on: str = "cuda"
    errors: bool = False
    factor: float | None = None

    def __str__(self) -> str:
        return f"{self.op} {self.label} {NAMES[self.dtype]}"


@dataclass(frozen=True)
class Contender:
    """A function in one memory format; ``backend`` forces one of ours."""

    function: Callable[..., Any]
    memory_format: torch.memory_format
    backend: str | None = None


def keep_freed_memory() -> None:
    """Let the process keep memory that is freed, where the C library can be told so.

    Else whoever comes after a large contender pays the page faults of memory that this one gave back.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            trim_threshold, mmap_threshold = -1, -3
            mallopt(trim_threshold, 2**31 - 1)
            mallopt(mmap_threshold, 2**30)


def cases(names: list[str], batch: int, quick: bool) -> list[Case]:
    """Return the cases of the named ops; the first two of each if ``quick``."""
    listed = [importlib.import_module(f"benchmarks.ops.{name}").cases(batch) for name in names]
    return [case for of_op in listed for case in (of_op[:2] if quick else of_op)]


def contenders(case: Case, device: torch.device, compile: bool) -> dict[str, Contender]:
    """Return ours as dispatched, each of our backends forced, plain PyTorch, eager and compiled, and a GPU's peers."""
    backends = [backend for op, backend, reason in ops.availability() if op == case.op and reason is None]
    if device.type == "cpu":  # Triton's interpreter is no contender
        backends = [backend for backend in backends if backend != "triton"]
    layout = CHANNELS_LAST if case.layouts else NCHW
    found = {OURS: Contender(case.ours, layout)}
    if case.backends:
        found |= {f"{OURS} {backend}": Contender(case.ours, layout, backend) for backend in backends}
    formats = {" NCHW": NCHW, " channels_last": CHANNELS_LAST} if case.layouts else {"": NCHW}
    for suffix, memory_format in formats.items():
        found[f"torch eager{suffix}"] = Contender(case.plain, memory_format)
    if compile:
        torch._dynamo.reset()  # drops what earlier cases compiled
        torch._functorch.config.donated_buffer = not case.backward_alone  # a graph that is kept keeps its buffers
        function = torch.compile(case.plain, fullgraph=True, dynamic=False, options=compile_options(device))
        for suffix, memory_format in formats.items():
            found[f"torch.compile{suffix}"] = Contender(function, memory_format)
    if device.type == case.peers_on:
        found |= {name: Contender(peer, CHANNELS_LAST) for name, peer in case.peers.items()}
    return found


def inputs_of(case: Case, device: torch.device, memory_format: torch.memory_format) -> list[Inputs]:
    """Make the inputs that calls are given in turn."""
    return rotation(lambda seed: make(case, seed, device, memory_format), 2**62 if case.hot else case.nbytes, device)


def prepare(case: Case, contender: Contender, inputs: Sequence[Inputs]) -> Callable[[int], None]:
    """Return a function that runs the contender so many times."""

    def graph(inputs: Inputs) -> Inputs:
        return contender.function(*inputs[:-1]), [inputs[i] for i in case.grads], inputs[-1]

    with forced(contender):
        turns = cycle([graph(i) for i in inputs] if case.backward_alone else inputs)

    def run(calls: int) -> None:
        function = contender.function  # nothing but the call stands in the loop
        with forced(contender), torch.set_grad_enabled(bool(case.grads)):
            if case.backward_alone:
                for out, by, cotangent in islice(turns, calls):
                    torch.autograd.grad(out, by, cotangent, retain_graph=True)
            elif case.grads:
                for inputs in islice(turns, calls):
                    torch.autograd.grad(*graph(inputs))
            else:
                for inputs in islice(turns, calls):
                    function(*inputs)

    return run


def copying(nbytes: int, device: torch.device) -> Callable[[int], None]:
    """Return a function that runs so many copies, each of ``nbytes`` read and written in all, on rotated buffers."""
    pairs = cycle(rotation(lambda _: tuple(torch.zeros(nbytes // 8, device=device) for _ in range(2)), nbytes, device))

    def run(calls: int) -> None:
        for target, source in islice(pairs, calls):
            target.copy_(source)

    return run


def forced(contender: Contender) -> AbstractContextManager[None]:
    """Return the context in which a contender runs."""
    return ops.use_backend(contender.backend) if contender.backend else nullcontext()


def make(case: Case, seed: int, device: torch.device, memory_format: torch.memory_format) -> Inputs:
    """Make the inputs, with gradients required where the case differentiates, and then a cotangent at the end."""
    inputs = case.make(seed, device, memory_format)
    if not case.grads:
        return inputs
    for i in case.grads:
        inputs[i].requires_grad_()
    like = case.plain(*inputs).detach()
    generator = torch.Generator(device).manual_seed(seed + 1)
    cotangent = torch.randn(like.shape, device=device, generator=generator).to(like.dtype)
    return *inputs, cotangent.contiguous(memory_format=memory_format) if like.ndim == 4 else cotangent


def call(case: Case, contender: Contender, inputs: Inputs) -> Any:
    """Run the contender once: its value, or its gradients."""
    with forced(contender):
        if not case.grads:
            with torch.no_grad():
                return contender.function(*inputs)
        out = contender.function(*inputs[:-1])
        return torch.autograd.grad(out, [inputs[i] for i in case.grads], inputs[-1])


def check(case: Case, name: str, contender: Contender, device: torch.device) -> Row:
    """Return the contender's errors, or raise Disagreement unless it computes the same as plain PyTorch in float64."""
    got = _flat(call(case, contender, make(case, 0, device, contender.memory_format)))
    plain = Contender(case.plain, NCHW)
    formats = (NCHW, CHANNELS_LAST) if case.layouts else (NCHW,)
    expected = [_flat(call(case, plain, make(case, 0, device, f))) for f in formats]
    if case.random:
        check_spread(name, got, expected[0])
        return {}

    def double(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x

    exact = tree_map_only(Tensor, double, make(case, 0, device, NCHW))
    truth = _flat(call(case, plain, exact))
    factor = case.factor or (3 if case.grads else 2)
    rms = check_agreement(name, got, expected, truth, case.dtype, factor=factor)
    return {"rms": rms, "largest": float((got.double() - truth).abs().max() / truth.abs().max())}


def _flat(result: Any) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.flatten() for part in parts])


def measure(
    case: Case, device: torch.device, compile: bool, repetitions: int, copy_rate: float, matmul_rate: float
) -> list[Row]:
    """Check and time the contenders of one case; one that fails becomes a row with its error.

    Args:
        case: what to run.
        device: where.
        compile: time torch.compile too.
        repetitions: timed runs of each, of about ``MIN_RUN_MS`` or more.
        copy_rate: bytes/s of a copy; with ``matmul_rate``, FLOP/s in the case's dtype, the bound behind ``share``.
    """
    progress(str(case))
    runs: dict[str, Callable[[int], None]] = {}
    errors: dict[str, str] = {}
    off: dict[str, Row] = {}
    listed = contenders(case, device, compile)
    inputs = functools.cache(partial(inputs_of, case, device))  # shared, so that the caches hold as much for each
    for name, contender in listed.items():
        try:
            off[name] = check(case, name, contender, device)
            runs[name] = prepare(case, contender, inputs(contender.memory_format))
        except Exception as error:  # a failure is a result, whatever it is
            errors[name] = describe(error)
    names = [*listed]
    if case.beside_copy:
        names.append(COPY)
        runs[COPY] = copying(case.nbytes, device)

    def repeated(calls: int) -> dict[str, Callable[[], None]]:
        return {name: partial(run, calls) for name, run in runs.items() if name not in errors}

    single = time_interleaved(repeated(1), device, 3, errors=errors)
    calls = max(1, round(MIN_RUN_MS / max(min(map(min, single.values()), default=MIN_RUN_MS), 1e-3)))
    runs_of = repeated(calls)
    times = time_interleaved(runs_of, device, repetitions, errors=errors, before=runs_of)
    bound_ms = max(case.nbytes / copy_rate, case.flops / matmul_rate) * 1e3
    rows = []
    for name in names:
        row: Row = {
            "case": f"{case.op} {case.label}",
            "precision": NAMES[case.dtype],
            "batch": case.batch,
            "name": name,
        }
        if name in errors:
            row["error"] = errors[name]
        else:
            row |= summarise(times[name], per=calls) | (off.get(name, {}) if case.errors else {})
            row |= {"gbytes_per_s": case.nbytes / row["ms"] * 1e-6, "share": bound_ms / row["ms"]}
            if case.flops:
                row["tflops"] = case.flops / row["ms"] * 1e-9
        rows.append(row)
    add_ratios(rows)
    return rows
