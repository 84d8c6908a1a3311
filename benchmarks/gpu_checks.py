"""Check the kernels on this machine's GPU, without pytest: against float64, bit for bit, twice, in graphs.

python -m benchmarks.gpu_checks

On a CPU they run in Triton's interpreter where TRITON_INTERPRET=1 asks for it, else as dispatched.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.gpu_cases import ALL, CASES, ROW, ROWS, STATE, TABLES, Case, normals
from benchmarks.gpu_fused import FUSED
from benchmarks.gpu_graphs import GRAPHS
from benchmarks.harness import ROOT, pick_device
from benchmarks.options import Parser

# The rule of the tests is that of this machine, too.
sys.path.insert(0, str(ROOT / "tests" / "ops"))
from oracle import assert_rule, error, laid_out  # type: ignore[import-not-found]

from ddpm_fast import ops
from ddpm_fast.ops import DROPOUT, REVERSE, NoiseState, _triton

CUDA = " on cuda"  # the same checks of the kernels of csrc/cuda, where they are: of these ops
CUDA_OPS = ("group_norm_silu", "sampler_step")
SHORT = tuple(f"{name}{kernels}" for kernels in ("", CUDA) for name in ("words", "reruns", "batch"))
SANITIZER_S = 120
Check = Callable[[], str]


class Skipped(Exception):
    """A check that this machine has no tool for; the message says which."""


def checks(device: torch.device, dry: bool) -> dict[str, Check]:
    """Return the checks by name: each returns a note for a table, and raises where it fails.

    Args:
        device: where the kernels run.
        dry: sizes for an interpreter.

    Raises (each check):
        AssertionError: a result is wrong.
        Skipped: a tool is missing.
    """
    found: dict[str, Check] = {}
    for kernels, suffix, listed in (("triton", "", tuple(CASES)), ("cuda", CUDA, CUDA_OPS)):
        found |= {f"parity {op}{suffix}": partial(_parity, op, device, kernels, dry) for op in listed}
        found[f"words{suffix}"] = partial(_words, device, kernels, dry)
        found[f"reruns{suffix}"] = partial(_reruns, listed, device, kernels, dry)
        found |= {
            f"{n}{suffix}": partial(check, device, kernels) for n, check in (("batch", _batch), ("graph", _graph))
        }
    found |= {name: partial(check, device, dry) for name, check in (FUSED | GRAPHS).items()}
    for tool in ("memcheck", "racecheck"):
        found[f"compute-sanitizer {tool}"] = partial(_sanitizer, tool, device)
    return found


def _forced(device: torch.device, kernels: str = "triton") -> AbstractContextManager[None]:
    """Force some kernels wherever they run: nothing may fall back."""
    if kernels == "cuda":
        missing = {reason for op, backend, reason in ops.availability() if (op, backend) == (CUDA_OPS[0], kernels)}
        if device.type != "cuda" or missing != {None}:
            raise Skipped(f"needs a GPU and ddpm_fast._cuda: {missing.pop()}")
        return ops.use_backend(kernels)
    here = device.type == "cuda" or _triton.interpreting() and ("noise", "triton", None) in ops.availability()
    return ops.use_backend(kernels) if here else nullcontext()


def _step(device: torch.device, kernels: str) -> Callable[..., Any]:
    """Return the op with its kernels forced; those of other ops around it may be others."""

    def step(*args: Any, **options: Any) -> Any:
        with _forced(device, kernels):
            return ops.sampler_step(*args, **options)

    return step


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda v: v.to(device), values)


def _cast(case: Case, dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
    """Return a case's tensors as the tested precision has them."""

    def cast(name: str, v: Tensor) -> Tensor:
        return v.to(torch.float32 if name in case.keep else dtype) if v.is_floating_point() else v

    return {name: laid_out(cast(name, v), layout) for name, v in case.tensors.items()}


def _results(
    function: Callable[..., Any], case: Case, tensors: dict[str, Tensor], device: torch.device
) -> list[Tensor]:
    """Return a case's outputs, then its gradients for the case's cotangents, on the CPU."""
    tensors, static = _moved((tensors, case.static), device)
    leaves = {name: v.detach().requires_grad_(name in case.wrt) for name, v in tensors.items()}
    out = function(**leaves, **static)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads: Sequence[Tensor] = ()
    if case.wrt:
        cotangents = [normals(o.shape, 1 + i).bfloat16().to(o) for i, o in enumerate(outs)]  # the same in each dtype
        grads = torch.autograd.grad(outs, [leaves[name] for name in case.wrt], cotangents)
    return [v.detach().cpu() for v in (*outs, *grads)]


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill new memory with NaN, so that an element that nobody writes shows, and not what a run before left there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _fast(case: Case, tensors: dict[str, Tensor], device: torch.device, kernels: str) -> list[Tensor]:
    with _forced(device, kernels), _poisoned():
        return _results(case.op, case, tensors, device)


def _parity(op: str, device: torch.device, kernels: str, dry: bool) -> str:
    """Hold an op to err(fast) <= 2 err(plain) + eps, 3x for gradients; truth and plain are the reference on the CPU."""
    cpu = torch.device("cpu")
    layouts = ("contiguous", "channels_last")[
        kernels == "cuda" and op == "group_norm_silu" :
    ]  # its kernels take the last
    worst: dict[torch.dtype, tuple[float, float]] = {}
    for case in CASES[op](dry):
        for dtype in case.dtypes:
            for layout in layouts:
                given = _cast(case, dtype, layout)
                exact = {name: v.double() if v.is_floating_point() else v for name, v in given.items()}
                found = [_results(case.reference, case, tensors, cpu) for tensors in (exact, given)]
                names = [f"output {i}" for i in range(len(found[0]) - len(case.wrt))]
                names += [f"gradient of {name}" for name in case.wrt]
                for name, fast, truth, plain in zip(names, _fast(case, given, device, kernels), *found, strict=True):
                    label = f"{op}, {case.name}, {dtype}, {layout}: {name}"
                    assert_rule(label, fast, plain, truth, 3 if name.startswith("gradient") else 2)
                    worst[dtype] = max(worst.get(dtype, (0.0, 0.0)), (error(fast, truth), error(plain, truth)))
    notes = [f"{str(d).removeprefix('torch.')} {fast:.1e} (plain {plain:.1e})" for d, (fast, plain) in worst.items()]
    return "largest error " + ", ".join(notes)


def _words(device: torch.device, kernels: str, dry: bool) -> str:
    """Compare all that is drawn with what the CPU draws, and the steps that draw, bit for bit."""
    shape, odd = ((2, 3, 21, 19), (3, 37)) if dry else ((36, 3, 320, 320), (1000, 3, 35, 37))
    images = (2, 24, 3, 5) if dry else (16, 128, 64, 64)
    many, (n, c, *size) = 300 if dry else 10**6, images
    signal, sigma, rows = (v.float() for v in (*TABLES.values(), ROWS))

    def draw(state: NoiseState, sampler_step: Callable[..., Any]) -> Iterator[tuple[str, Tensor]]:
        to = state.seed.device
        for each in (shape, odd):
            yield f"noise {each}", ops.noise(each, state, REVERSE)
            x, m, hist = (normals(each, i).float().to(to) for i in range(3))
            t = torch.arange(each[0], device=to) % 9
            yield f"q_sample {each}", ops.q_sample(x, t, signal.to(to), sigma.to(to), state)
            stepped = sampler_step(x, m, rows.to(to), ROW.to(to), noise=state, hist=hist, clip=1.0, return_x0=True)
            yield from ((f"sampler_step {each}", v) for v in stepped)
        for dtype in ALL[1:2] if device.type == "cpu" else ALL[1:]:  # the interpreter truncates to bfloat16
            yield f"noise in {dtype}", ops.noise(odd, state, REVERSE, dtype=dtype)
        yield "timesteps", ops.timesteps(many, 1000, state)
        for channels in (c, c + 1):  # that share counters, and that don't
            of_images = n, channels, *size
            yield f"dropout mask {of_images}", ops.dropout_mask(of_images, 0.3, state, DROPOUT + 2)

    with _forced(device), _poisoned():
        found = [(name, v.cpu()) for name, v in draw(_moved(STATE, device), _step(device, kernels))]
    for (name, got), (_, expected) in zip(found, draw(STATE, ops.sampler_step), strict=True):
        different = int((got != expected).sum())
        assert got.dtype == expected.dtype and not different, f"{name}: {different} of {got.numel()} numbers differ"
    return f"{sum(v.numel() for _, v in found):.1e} numbers are the CPU's"


def _reruns(listed: Sequence[str], device: torch.device, kernels: str, dry: bool) -> str:
    """Run every op that is listed, forward and backward, twice."""
    count = 0
    for op in listed:
        for case in CASES[op](dry):
            for dtype in case.dtypes[-1:] if dry else case.dtypes:
                given = _cast(case, dtype, "channels_last")
                runs = zip(*(_fast(case, given, device, kernels) for _ in range(2)), strict=True)
                for i, (first, second) in enumerate(runs):
                    assert torch.equal(first, second), f"{op}, {case.name}, {dtype}: result {i} differs in a second run"
                    count += 1
    return f"{count} results have the same bits twice"


def _batch(device: torch.device, kernels: str) -> str:
    """Draw and step images in one batch, one by one, and with 2^32 among their indices."""
    rows, k, shape = ROWS.float().to(device), ROW.to(device), (5, 3, 9, 7)
    x, m = (normals(shape, i).float().to(device) for i in range(2))
    step = _step(device, kernels)

    def draw(first: int, last: int) -> Iterator[Tensor]:
        state = NoiseState.at(-5, 7, 2**32 - 2 + first, device)
        yield ops.noise((last - first, *shape[1:]), state, REVERSE)
        yield step(x[first:last], m[first:last], rows, k, noise=state, clip=1.0)

    with _forced(device):
        whole = list(draw(0, 5))
        for first, last in ((0, 1), (1, 2), (2, 3), (1, 5)):
            for name, got, expected in zip(("noise", "sampler_step"), draw(first, last), whole, strict=True):
                assert torch.equal(got, expected[first:last]), f"{name}: images {first} to {last} depend on their batch"
    assert not torch.equal(whole[0][0], whole[0][1]), "noise: two images are equal"
    return "images are the same in any batch"


def _graph(device: torch.device, kernels: str) -> str:
    """Capture the ops that draw, and replay them while the row and the draw advance on the device."""
    if device.type != "cuda":
        raise Skipped("needs a GPU")
    signal, sigma, rows = (v.float().to(device) for v in (*TABLES.values(), ROWS))
    x, m = (normals((8, 3, 32, 32), i).float().to(device) for i in range(2))
    k, t, state = torch.tensor(0, device=device), torch.arange(8, device=device), NoiseState.at(1, 0, 5, device)

    step = _step(device, kernels)

    def work() -> list[Tensor]:
        stepped = step(x, m, rows, k, noise=state, clip=1.0)
        return [stepped, ops.q_sample(x, t, signal, sigma, state), ops.noise(x.shape, state, REVERSE)]

    def place(row: int) -> None:
        k.fill_(row)
        state.draw.fill_(row)

    with _forced(device):
        eager = []
        for row in range(len(rows)):
            place(row)
            eager.append(work())
        place(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
            k.add_(1)
            state.draw.add_(1)
    for row, expected in enumerate(eager):
        graph.replay()
        for name, got, wanted in zip(("sampler_step", "q_sample", "noise"), captured, expected, strict=True):
            assert torch.equal(got, wanted), f"{name}: row {row} of the graph is not that of an eager call"
    return f"{len(rows)} replays have the eager calls' bits"


def _sanitizer(tool: str, device: torch.device) -> str:
    """Run the short checks under a tool of compute-sanitizer, each allocation its own, so that bounds are seen."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None or device.type != "cuda":
        raise Skipped("needs a GPU" if found else "there is no compute-sanitizer")
    for name in SHORT:  # compiles the kernels, which under the tool would take its time
        with suppress(Skipped):
            checks(device, dry=True)[name]()
    options = ["--tool", tool, "--error-exitcode", "1"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # libraries probe with calls that may fail
    command = [found, *options, sys.executable, "-m", "benchmarks.gpu_checks", "--short"]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
    try:
        text, _ = process.communicate(timeout=SANITIZER_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the tool and what it watches
        process.communicate()
        raise Skipped(f"not done after {SANITIZER_S} s") from None
    lines = [line for line in text.splitlines() if line.strip()]
    faults = [line for line in lines if line.startswith("=========") and "COMPUTE-SANITIZER" not in line]
    assert process.returncode == 0, " ".join((faults or lines)[:3])
    return "no faults in " + ", ".join(SHORT)


def main(argv: list[str] | None = None) -> int:
    """Run the checks and return the exit status: 1 where one failed."""
    p = Parser(__doc__.splitlines()[0], prog="python -m benchmarks.gpu_checks")
    p.add_argument("--short", action="store_true", help=f"small sizes, and only {', '.join(SHORT)}")
    args = p.parse_args(argv)
    device, failed = pick_device("auto"), False
    print(f"on {device}, ops {'forced to triton, then to cuda' if device.type == 'cuda' else 'as dispatched there'}")
    for name, check in checks(device, dry=args.short or device.type == "cpu").items():
        if args.short and name not in SHORT:
            continue
        try:
            note = check()
        except Skipped as reason:
            note = f"skipped: {reason}"
        except Exception as reason:
            note, failed = f"failed: {reason}", True
        print(f"{name}: {note}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
