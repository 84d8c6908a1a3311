"""The dispatch point: order, forcing, reasons."""

import subprocess
import sys

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.ops import _native
from ddpm_fast.ops._dispatch import Impl, Op, Unavailable


def missing():
    raise Unavailable("no such machine")


def only_cpu(x: torch.Tensor) -> str | None:
    return None if x.device.type == "cpu" else f"needs the CPU, got {x.device}"


def make_op() -> Op:
    return Op(
        "double",
        Impl("cuda", missing),
        Impl("native", lambda: lambda x: ("native", 2 * x), only_cpu),
        Impl("reference", lambda: lambda x: ("reference", 2 * x)),
        check=lambda *args: args,
        traced=pytest.fail,
    )


def test_the_first_that_can_run_wins() -> None:
    op = make_op()
    assert op(torch.ones(1))[0] == "native"
    assert op(torch.ones(1, device="meta"))[0] == "reference"


def test_forced_runs_or_raises_with_every_reason() -> None:
    op = make_op()
    with ops.use_backend("reference"):
        assert op(torch.ones(1))[0] == "reference"
    with ops.use_backend("native"):
        assert op(torch.ones(1))[0] == "native"
        with pytest.raises(RuntimeError, match="double: the forced backend 'native' can't run") as caught:
            op(torch.ones(1, device="meta"))
    text = str(caught.value)
    for line in (
        "cuda: no such machine",
        "triton: not implemented for this op",
        "native: needs the CPU, got meta",
        "reference: can run",
    ):
        assert line in text
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda: no such machine"):
        op(torch.ones(1))
    assert op(torch.ones(1))[0] == "native", "the force ends with the block"


def test_what_is_ready_is_not_checked() -> None:
    """Once loaded, an implementation that knows its arguments runs at once; others are checked, and asked in order."""
    seen = []

    def check(x: int) -> tuple[int]:
        seen.append(x)
        return (x,)

    native = Impl("native", lambda: lambda x: ("native", x), lambda x: None, lambda x: x > 0)
    op = Op("x", native, Impl("reference", lambda: lambda x: ("reference", x)), check=check, traced=pytest.fail)
    assert op(1) == ("native", 1) and seen == [1], "not loaded yet"
    assert op(1) == ("native", 1) and seen == [1]
    assert op(0) == ("native", 0) and seen == [1, 0]
    assert op.unchecked(0) == ("native", 0) and seen == [1, 0]
    with ops.use_backend("reference"):
        assert op(1) == ("reference", 1) and seen == [1, 0, 1]


def test_load_is_called_once() -> None:
    calls = []
    op = Op(
        "x",
        Impl("native", lambda: calls.append(1) or missing()),
        Impl("reference", lambda: lambda: 1),
        check=lambda *args: args,
        traced=pytest.fail,
    )
    assert op() == op() == 1 and len(calls) == 1


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cpu', expected one of cuda, triton, native, reference"):
        with ops.use_backend("cpu"):
            pass
    code = "from ddpm_fast import ops; print('imported'); ops.noise((1, 4), ops.NoiseState.at(0, 0), 0)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env={"DDPM_FAST_BACKEND": "gpu"}, capture_output=True, text=True)
    assert "imported" in result.stdout
    assert result.returncode and "DDPM_FAST_BACKEND: unknown backend 'gpu'" in result.stderr


def test_the_environment_forces_a_backend() -> None:
    code = "from ddpm_fast import ops; ops.noise((1, 4), ops.NoiseState.at(0, 0, device='meta'), 0)"
    for backend, fails in (("reference", False), ("native", True)):
        env = {"DDPM_FAST_BACKEND": backend}
        result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert bool(result.returncode) == fails, result.stderr


def test_availability_covers_every_op_and_backend() -> None:
    table = ops.availability()
    assert {(op, backend) for op, backend, _ in table} == {(op, b) for op in ops.OPS for b in ops.BACKENDS}
    assert all(reason is None for _, backend, reason in table if backend == "reference")
    assert {"q_sample", "diffusion_loss", "sampler_step", "noise", "group_norm_silu", "conv3x3"} <= set(ops.OPS)


def test_without_the_native_module_its_reason_is_told(monkeypatch) -> None:
    def fail(name: str):
        raise ImportError("no file of that name")

    _native._load.cache_clear()
    monkeypatch.setattr(_native.importlib, "import_module", fail)
    try:
        with pytest.raises(Unavailable):
            _native.load()
    finally:
        monkeypatch.undo()
        _native._load.cache_clear()
