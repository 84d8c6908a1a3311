"""The checks for GPU machines: they hold here, on sizes for an interpreter, and find what is wrong."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_checks
from benchmarks.gpu_checks import Skipped
from ddpm_fast import ops

CPU = torch.device("cpu")
NAMES = list(gpu_checks.checks(CPU, dry=True))
FOR_GPUS = ("graph", "compute-sanitizer memcheck", "compute-sanitizer racecheck")
LONG = ("parity group_norm_silu", "parity diffusion_loss", "parity sampler_step", "reruns")  # in an interpreter
CUDA_NAMES = [name for name in NAMES if name.endswith(gpu_checks.CUDA)]


@pytest.fixture(autouse=True)
def same_settings() -> Iterator[None]:
    yield
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.minutes) if name in LONG else name for name in NAMES]
)
def test_holds_here(name: str) -> None:
    check = gpu_checks.checks(CPU, dry=True)[name]
    if name in (*FOR_GPUS, *CUDA_NAMES):
        with pytest.raises(Skipped, match="needs a GPU|there is no compute-sanitizer"):
            check()
    else:
        assert 20 < len(check()) < 150


def test_every_op_with_kernels_for_gpus_has_its_check() -> None:
    """The noise has no plain torch version to be as good as: its check is on its bits."""
    without = {op for op, backend, reason in ops.availability() if backend == "triton" and reason == "not implemented"}
    assert {f"parity {op}" for op in ops.OPS if op not in without | {"noise"}} == set(NAMES[: NAMES.index("words")])
    cuda = {op for op, backend, reason in ops.availability() if backend == "cuda" and reason != "not implemented"}
    assert cuda == set(gpu_checks.CUDA_OPS) and {f"parity {op}{gpu_checks.CUDA}" for op in cuda} < set(CUDA_NAMES)


Op = Callable[..., Any]


def scaled(op: Op) -> Op:
    """1 % off."""
    return lambda *args, **kwargs: op(*args, **kwargs) * 1.01


def scaled_gradient(op: Op) -> Op:
    """Right, with gradients 1 % off."""

    def run(*args: Any, **kwargs: Any) -> Any:
        out = op(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        first = first.detach() + (first - first.detach()) * 1.01
        return (first, *out[1:]) if isinstance(out, tuple) else first

    return run


def unwritten(op: Op) -> Op:
    """Where nobody wrote the last number."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = op(*args, **kwargs)
        left = torch.empty_like(out)
        left.view(-1)[:-1] = out.reshape(-1)[:-1]
        return left

    return run


def last_bit(op: Op) -> Op:
    """One number of the first matrix off by its last bit."""
    matrices = count()

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = op(*args, **kwargs)
        if out.ndim == 2 and next(matrices) == 0:
            out[1, 3] = torch.nextafter(out[1, 3], torch.tensor(9.0))
        return out

    return run


def another_each_time(op: Op) -> Op:
    """More from call to call."""
    calls = count()

    def run(*args: Any, **kwargs: Any) -> Any:
        out = op(*args, **kwargs)
        return tuple(v + next(calls) for v in out) if isinstance(out, tuple) else out + next(calls)

    return run


def in_each_batch(op: Op) -> Op:
    """Images counted from 0 in each batch."""
    return lambda shape, state, *rest, **kwargs: op(shape, state._replace(first_sample=0), *rest, **kwargs)


@pytest.mark.parametrize(
    ("name", "op", "sabotage", "found"),
    [
        ("parity q_sample", "q_sample", scaled, "q_sample, drawn noise .*: output 0: error"),
        ("parity q_sample", "q_sample", unwritten, "error inf"),
        ("parity diffusion_loss", "diffusion_loss", scaled_gradient, "gradient of model_out: error"),
        ("parity group_norm_silu", "group_norm_silu", scaled_gradient, "gradient of x: error"),
        ("parity timestep_embedding", "timestep_embedding", scaled, "error"),
        ("words", "noise", last_bit, r"noise \(3, 37\): 1 of 111 numbers differ"),
        ("reruns", "sampler_step", another_each_time, "sampler_step, no noise .*: result 0 differs in a second run"),
        ("batch", "noise", in_each_batch, "noise: images 1 to 2 depend on their batch"),
    ],
)
def test_finds_what_is_wrong(
    name: str, op: str, sabotage: Callable[[Op], Op], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, op, sabotage(getattr(ops, op)))
    with pytest.raises(AssertionError, match=found):
        gpu_checks.checks(CPU, dry=True)[name]()


def test_prints_a_line_for_each_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def skip() -> str:
        raise Skipped("no tool")

    def fail() -> str:
        raise ValueError("too far off")

    some: dict[str, Callable[[], str]] = {"words": lambda: "equal", "reruns": skip, "graph": fail}
    monkeypatch.setattr(gpu_checks, "checks", lambda device, dry: some)
    assert gpu_checks.main(["--short"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["words: equal", "reruns: skipped: no tool"]
    assert gpu_checks.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "graph: failed: too far off"


@pytest.mark.parametrize(
    ("script", "kind", "found"),
    [
        ('test "$2" = memcheck && test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1', None, "no faults"),
        ("echo ========= COMPUTE-SANITIZER; echo ========= Invalid read; exit 1", AssertionError, "^=* Invalid read"),
        ("sleep 100 & sleep 100", Skipped, "not done after 0.5 s"),
    ],
)
def test_what_compute_sanitizer_says(
    script: str, kind: type[Exception] | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu_checks, "SHORT", ())  # they need a GPU
    monkeypatch.setattr(gpu_checks, "SANITIZER_S", 0.5)
    check = gpu_checks.checks(torch.device("cuda"), dry=True)["compute-sanitizer memcheck"]
    if kind is None:
        assert found in check()
    else:
        with pytest.raises(kind, match=found):
            check()
