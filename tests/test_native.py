"""The native module: every instruction set gives the same bits, on any number of threads, and in a forked child."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.ops import DROPOUT, PERTURB, NoiseState
from ddpm_fast.ops.q_sample import OP as Q_SAMPLE
from ddpm_fast.ops.sampler_step import OP as SAMPLER_STEP
from ddpm_fast.reference import noise as reference

if find_spec("ddpm_fast._C") is None:
    pytest.skip("the native module is not built here", allow_module_level=True)
from ddpm_fast import _C

SETS = _C.isas()
STATE = NoiseState.at(2**63 - 25, 3, 2**33 + 1)
BUILD = Path(__file__).resolve().parents[1] / "build"


@pytest.fixture
def isa() -> Iterator[None]:
    """Whatever a test forces, the set before it is back after it."""
    before = _C.isa()
    yield
    _C.force_isa(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", SETS)
def test_bits_of_every_instruction_set(name: str, threads: int, isa: None) -> None:
    _C.force_isa(name)
    assert _C.isa() == name
    torch.set_num_threads(threads)
    with ops.use_backend("native"):
        # many small samples; one in several pieces, with an end that fills no vector
        for shape in ((4000, 3, 5), (3, 40_003)):
            got, expected = ops.noise(shape, STATE, PERTURB), reference.noise(shape, STATE, PERTURB)
            assert torch.equal(got.view(torch.int32), expected.view(torch.int32))
        mask = ops.dropout_mask((3, 24, 41, 19), 0.3, STATE, DROPOUT)
        assert torch.equal(mask, reference.dropout_mask((3, 24, 41, 19), 0.3, STATE, DROPOUT))
        assert torch.equal(ops.timesteps(50, 1000, STATE), reference.timesteps(50, 1000, STATE))


def steps(x: torch.Tensor, model_out: torch.Tensor) -> list[torch.Tensor]:
    """Every result of the ops on images."""
    tables, t = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)), torch.arange(x.shape[0]) % 9
    rows, k = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)), torch.tensor(1)
    results = [*ops.sampler_step(x, model_out, rows, k, noise=STATE, hist=x, clip=1.5, return_x0=True)]
    results += [ops.sampler_step(x, model_out, rows, k, noise=STATE, variance=model_out)]
    results += [ops.sampler_step(x, model_out, rows, k), ops.q_sample(x, t, *tables, STATE)]
    target = {"noise_coef": tables[0, t], "x_coef": tables[1, t], "x_start": x}
    for loss_type, reduction in (("l1", "mean"), ("l2", "mean"), ("huber", "none")):
        leaf = model_out.detach().requires_grad_()
        loss = ops.diffusion_loss(leaf, STATE, loss_type=loss_type, reduction=reduction, **target)
        results += [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]
    return [*results, ops.timestep_embedding(torch.arange(x.shape[0]) * 7, 150, 0.3)]


# one in several pieces, with an end that fills no vector; many small samples
@pytest.mark.parametrize("shape", [(3, 3, 91, 67), (5000, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_have_the_same_bits_on_every_instruction_set(shape, dtype, isa: None) -> None:
    x, model_out = torch.randn(2, *shape).to(dtype)
    x.view(-1)[:3] = torch.tensor([float("inf"), -0.0, 1e-39])
    model_out.view(-1)[2] = 0.0  # so that the result is subnormal, too
    if len(shape) == 4:
        model_out = model_out.contiguous(memory_format=torch.channels_last)
    found = []
    with ops.use_backend("native"):
        for name in SETS:
            _C.force_isa(name)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(steps(x, model_out))
    for results in found[1:]:
        for got, expected in zip(results, found[0], strict=True):
            assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("name", SETS)
def test_sixteen_sums_whatever_the_vectors(name: str, isa: None) -> None:
    """A tie between two float32 numbers, and more that sums of eight or four would lose beside the one."""
    model_out = torch.zeros(1, 1024)
    model_out[0, 8::16] = 2.0**-54
    model_out[0, [0, 16]] = torch.tensor([1.0, 2.0**-24])
    _C.force_isa(name)
    with ops.use_backend("native"):
        loss = ops.diffusion_loss(model_out, torch.zeros(1, 1024), loss_type="l1")
    assert loss * 1024 == 1 + 2.0**-23


@pytest.mark.parametrize("name", SETS)
def test_the_exponential_of_a_variance(name: str, isa: None) -> None:
    """The rule of every op for each number by itself, up to the ends of float32: the largest would hide the rest."""
    v, rows = torch.linspace(-87, 88.7, 100_003)[None], torch.zeros(1, 9)
    rows[0, 7:] = 1.0
    _C.force_isa(name)
    error = {}
    for backend in ("native", "reference"):
        with ops.use_backend(backend):
            got = ops.sampler_step(v, v, rows, torch.tensor(0), noise=torch.ones_like(v), variance=v)
        error[backend] = float((got / v.double().exp() - 1).abs().max())
    assert error["native"] <= 2 * error["reference"] + torch.finfo(torch.float32).eps


def test_two_threads_may_call_at_once() -> None:
    torch.set_num_threads(2)
    inputs = [(torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64)) for _ in range(4)]
    expected = [steps(*each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for results, truth in zip(pool.map(lambda i: steps(*inputs[i % 4]), range(24)), expected * 6, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(results, truth, strict=True))


def test_what_the_module_itself_refuses() -> None:
    """The public functions look first; these guard memory where someone calls past them."""
    x, rows = torch.zeros(2, 3, 4, 4), torch.zeros(4, 8)
    t, table = torch.zeros(2, dtype=torch.int64), torch.zeros(5)
    with ops.use_backend("native"):
        for k in (-1, 4):
            with pytest.raises(ValueError, match=r"k must lie in \[0, 4\)"):
                SAMPLER_STEP.unchecked(x, x, rows, torch.tensor(k), None, None, None, None, False, None, None)
            with pytest.raises(ValueError, match=rf"t must lie in \[0, 5\), got {k + 1 if k > 0 else k}"):
                Q_SAMPLE.unchecked(x, t + (k + 1 if k > 0 else k), table, table, x)
        for hist in (x[0], x[:1], x[:, :, 1:]):
            with pytest.raises(ValueError, match="hist: another shape than the batch"):
                SAMPLER_STEP.unchecked(x, x, rows, torch.tensor(0), None, hist, None, None, False, None, None)
        with pytest.raises(ValueError, match="rows: too few columns"):
            SAMPLER_STEP.unchecked(x, x, rows, torch.tensor(0), x, None, x, None, False, None, None)
    for loss in (table, torch.zeros(2, 1), torch.zeros(2).double()):
        for run_on, name in ((_C.diffusion_loss, "loss"), (partial(_C.diffusion_loss_backward, x), "grad_loss")):
            with pytest.raises(ValueError, match=rf"^{name}: not float32, \[\] or \[N\]"):
                run_on(loss, x, x, None, None, None, 0, 1)
    with pytest.raises(ValueError, match=r"loss_type must be in \[0, 2\]"):
        _C.diffusion_loss(torch.zeros(()), x, x, None, None, None, 3, 1)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


def test_the_environment_forces_an_instruction_set() -> None:
    code = "import torch; from ddpm_fast import _C; print(_C.isa())"
    assert run(code, DDPM_FAST_ISA="baseline").stdout == "baseline\n"
    wrong = run(code, DDPM_FAST_ISA="avx9")
    assert wrong.returncode and f"DDPM_FAST_ISA=avx9: this build and processor have {', '.join(SETS)}" in wrong.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc, and takes one elsewhere")
def test_as_many_threads_as_torch_has() -> None:
    code = """
import os, torch
from ddpm_fast import ops
torch.set_num_threads(3)
ops.noise((1, 5), ops.NoiseState.at(1, 1), ops.PERTURB)
before = len(os.listdir("/proc/self/task"))
ops.noise((4, 100_000), ops.NoiseState.at(1, 1), ops.PERTURB)
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert run(code).stdout == "2\n"


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_wait_for_its_parents_threads(loaded: bool) -> None:
    """Two threads have run, and are not there in the child; torch's own operations would wait for them."""
    code = """
import os, numpy, torch
from ddpm_fast import ops
torch.set_num_threads(2)
draw = lambda: ops.noise((4, 100_000), ops.NoiseState.at(1, 1), ops.PERTURB).numpy()
if LOADED:
    draw()
torch.rand(1_000_000).sin_()
child = os.fork()
if not child:
    os._exit(0 if numpy.isfinite(draw()).all() else 3)
print(os.waitpid(child, 0)[1])
"""
    assert run(code.replace("LOADED", str(loaded))).stdout == "0\n"


@pytest.mark.skipif(os.environ.get("DDPM_FAST_SANITIZE") != "1", reason="only in `make sanitize`")
def test_the_sanitizers_watch() -> None:
    """They are in the module that the other tests call, and end the process."""
    code = """
import torch
from ddpm_fast import _C
out = torch.empty(1, 100)
out.untyped_storage().resize_(99 * 4)
_C.noise(out, (1, 2, 0), 1, 1)
"""
    result = run(code)
    assert result.returncode and "heap-buffer-overflow" in result.stderr


@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="reads ELF objects with nm")
def test_no_set_lends_its_code_to_another() -> None:
    """A function that the linker may share would run one set's instructions on a processor that has another."""
    objects = [p for name in SETS for p in BUILD.glob(f"native-*/**/cpu_{name}.dir/**/*.o")]
    if not objects:
        pytest.skip("the build folder is gone")
    listing = subprocess.run(["nm", "-C", "--defined-only", *objects], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    shared = [parts[2] for parts in lines if len(parts) == 3 and parts[1] in "WVuw"]
    outside = [
        p[2] for p in lines if len(p) == 3 and p[1] == "T" and not any(f"cpu::{name}::" in p[2] for name in SETS)
    ]
    assert lines and not shared and not outside


@pytest.mark.parametrize("name", SETS)
def test_digests_tell_every_change(name: str, isa: None) -> None:
    """Of a bit, of all signs, of the order; at every place in memory that fills no vector, and in several pieces."""
    _C.force_isa(name)
    for size in (*range(1, 40), 129, 1000, 40_003):
        numbers = torch.randn(size)
        (before,) = _C.digests([numbers], 1)
        assert _C.digests([numbers.clone(), numbers], 3) == [before, before]
        changed = [-numbers, numbers * 1.5]
        changed += [numbers.roll(shift) for shift in {1, size // 2} if 0 < shift < size]
        for place in {0, size // 2, size - 1}:
            changed.append(numbers.clone())
            changed[-1].view(torch.int32)[place] ^= 1 << place % 31
        digests = _C.digests(changed, 2)
        assert len({before, *digests}) == 1 + len(changed)


def test_what_digests_are_taken_of() -> None:
    """Whatever lies without gaps, in any order of dimensions; a bit alike in two numbers does not cancel out."""
    image = torch.randn(4, 3, 5, 5)
    last = image.contiguous(memory_format=torch.channels_last)
    kinds = [image, last, image.bfloat16(), image.double(), torch.arange(6), torch.tensor(1.0), torch.zeros(0)]
    digests = _C.digests([*kinds, torch.nn.Parameter(image)], 2)
    assert len(set(digests)) == len(kinds) and digests[-1] == digests[0]
    for other in (
        image[:, :2],
        image.half(),
        torch.empty(2, device="meta"),
        image.to_sparse(),
        image.expand(2, *image.shape),
    ):
        assert _C.digests([other], 1) == [None]
    assert _C.digests([], 1) == []
    with pytest.raises(TypeError):
        _C.digests(image, 1)
    zeros = torch.zeros(512)
    seen = set()
    for k in range(256):
        pair = zeros.clone()
        pair[k] = pair[k + 256] = -0.0
        seen |= set(_C.digests([pair], 1))
    assert len(seen) == 256 and _C.digests([zeros], 1)[0] not in seen
