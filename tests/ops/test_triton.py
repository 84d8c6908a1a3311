"""What the Triton kernels promise beyond the rule of every op: under the interpreter, and compiled for GPUs."""

import json
import mmap
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import backends, check, laid_out
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import aot
from ddpm_fast import ops
from ddpm_fast.ops import DROPOUT, REVERSE, Dropout, NoiseState, _group_norm_gpu
from ddpm_fast.ops.noise import OP as noise_op
from ddpm_fast.ops.sampler_step import OP as step_op
from ddpm_fast.reference import group_norm_silu as norm_reference
from ddpm_fast.reference import residual_sum as sum_reference
from ddpm_fast.reference import sampler_step as step_reference
from ddpm_fast.reference.noise import box_muller

if "triton" not in backends("noise"):
    pytest.skip("Triton is not installed, or finds nothing to run on", allow_module_level=True)
import triton
import triton.language as tl

from ddpm_fast.kernels import group_norm_silu as kernels
from ddpm_fast.kernels import residual_sum as sums
from ddpm_fast.kernels.noise import _cos_sin, _radius

ROOT = Path(__file__).parents[2]
STATE = NoiseState.at(-5, 7, 2**33 + 1)
PARAMETERS = ("weight", "bias", "add", "scale", "shift")


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 37), (1, 2, 1031), (2,), (0, 3, 4, 4), (2, 0)], ids=str)
def test_noise_has_the_bits_of_the_reference(shape: tuple[int, ...], poison_empty: None) -> None:
    with ops.use_backend("reference"):
        expected = ops.noise(shape, STATE, REVERSE)
    with ops.use_backend("triton"):
        assert torch.equal(ops.noise(shape, STATE, REVERSE), expected)


def test_noise_alone_takes_a_first_sample_that_the_host_knows() -> None:
    """On the device it is for a recorded step; one in float64, which no step's kernel takes, draws on the reference."""
    state = STATE._replace(first_sample=torch.tensor(2**33 + 1))
    step = step_op.unchecked
    a = (torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3), torch.rand(4, 8), torch.tensor(1))
    rest = (None, None, None, False, None, None)
    assert torch.equal(step(*a, state, *rest), step(*a, STATE, *rest))
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="takes a first sample that the host knows"):
        noise_op.unchecked((2, 3), state, REVERSE, torch.float32)


@triton.jit
def box_muller_kernel(k, j, out, N: tl.constexpr):
    at = tl.arange(0, N)
    r = _radius(tl.load(k + at).to(tl.uint32))
    c, s = _cos_sin(tl.load(j + at).to(tl.uint32))
    tl.store(out + at, r * c)
    tl.store(out + N + at, r * s)


def test_noise_has_them_for_the_extremes_of_the_words() -> None:
    """Where exponents and quarter turns meet, and at the ends of the interval."""
    edges = [0, 1, 2**29, 2**30, 2**31, 3 * 2**30, 0xAAAAAAAA, 0x55555555, 2**32 - 1]
    words = sorted({(e + d) % 2**32 for e in edges for d in (-2, -1, 0, 1, 2)})
    k, j = (v.flatten() for v in torch.meshgrid(torch.tensor(words), torch.tensor(words), indexing="ij"))
    count = triton.next_power_of_2(len(k))
    k, j = (torch.cat([v, v[: count - len(v)]]) for v in (k, j))
    out = torch.empty(2, count)
    box_muller_kernel[(1,)](k, j, out, N=count, enable_fp_fusion=False)
    assert torch.equal(out, torch.stack(box_muller(k, j)))


def test_timesteps_and_masks_are_the_references() -> None:
    found = {}
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            found[backend] = (
                ops.timesteps(300, 1000, STATE),
                ops.dropout_mask((2, 24, 3, 5), 0.3, STATE, DROPOUT + 2),
                ops.dropout_mask((2, 5, 3, 3), 0.9, STATE, DROPOUT),
            )
    assert all(map(torch.equal, found["reference"], found["triton"]))


def test_sampler_step_has_the_bits_of_the_reference_in_every_layout() -> None:
    shape, rows, k = (2, 3, 9, 7), torch.rand(4, 8), torch.tensor(2)
    x, m, hist = torch.randn(3, *shape)
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    with ops.use_backend("reference"):
        z = ops.noise(shape, STATE, REVERSE)
    expected = step_reference.sampler_step(x, m, rows, k, noise=z, hist=hist, clip=0.5, return_x0=True)
    for layout in ("contiguous", "channels_last", "slice"):
        of = laid_out(m, layout)
        with ops.use_backend("triton"):
            got = ops.sampler_step(x, of, rows, k, noise=STATE, hist=hist, clip=0.5, return_x0=True)
            here, kept = laid_out(x.clone(), layout), hist.clone()
            same = ops.sampler_step(
                here, of, rows, k, noise=STATE, hist=kept, clip=0.5, return_x0=True, out=here, x0_out=kept
            )
        for a, b, c in zip(got, same, expected, strict=True):
            assert torch.equal(a.nan_to_num(7.0), c.nan_to_num(7.0))
            assert torch.equal(b.nan_to_num(7.0), c.nan_to_num(7.0))
        assert same[0] is here and same[1] is kept


def test_a_result_over_what_is_still_read_is_computed_aside() -> None:
    rows, k = torch.rand(4, 8), torch.tensor(1)
    memory = torch.randn(60)
    x, m, out = memory[:24].view(2, 12), torch.randn(2, 12), memory[6:30].view(2, 12)
    expected = step_reference.sampler_step(x.clone(), m, rows, k)
    with ops.use_backend("triton"):
        assert torch.equal(ops.sampler_step(x, m, rows, k, out=out), expected)
    assert torch.equal(out, expected)


# (N, C1, C2, H, W, groups): why
NORMS = [
    (2, 8, 0, 4, 4, 2),  # plain
    (1, 12, 0, 5, 3, 1),  # one group of 12, odd size
    (2, 20, 0, 3, 5, 4),  # five channels a group: no power of two
    (2, 8, 4, 3, 3, 2),  # a group of 6 straddles the two inputs
    (1, 96, 48, 2, 3, 12),  # three slabs of 48 channels in 64 lanes
    (1, 160, 0, 2, 2, 32),  # slabs that end before the last lane
    (1, 72, 0, 2, 2, 1),  # one group wider than a slab would be
]


KINDS = [
    (torch.float32, "channels_last"),
    (torch.float32, "slice"),
    (torch.bfloat16, "contiguous"),
    (torch.float16, "slice"),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "chunks"),
    # Half of them in CI alone, as a case takes seconds.
    [
        pytest.param(shape, *kind, chunks, marks=[pytest.mark.minutes] * ((i + j + (chunks == 3)) % 2))
        for chunks in (1, 3)
        for i, shape in enumerate(NORMS)
        for j, kind in enumerate(KINDS)
    ],
    ids=str,
)
def test_norm_in_one_pass_and_in_chunks(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    chunks: int,
    monkeypatch: pytest.MonkeyPatch,
    poison_empty: None,
) -> None:
    """Every argument at once; with three chunks two kernels share an image's pixels."""
    n, c1, c2, height, width, groups = shape
    c, rule = c1 + c2, kernels.config

    def config(*args: Any) -> kernels.Config:
        cut, pixels = rule(*args), height * width
        some = 1 << max(0, (-(-pixels // 3) - 1).bit_length())
        return cut if chunks == 1 else cut._replace(pixels=some, chunks=-(-pixels // some))

    monkeypatch.setattr(kernels, "config", config)
    made = {"x": (n, c1, height, width), "x2": (n, c2, height, width), "residual": (n, c1, height, width)}
    made |= {"weight": (c,), "bias": (c,), "add": (n, c), "scale": (n, c), "shift": (n, c)}
    tensors = {k: torch.randn(s, dtype=torch.float64) for k, s in made.items() if k != "x2" or c2}
    some = {k: v for k, v in tensors.items() if k not in ("residual", "scale", "shift")}
    options = {"backend": "triton", "dtype": dtype, "layout": layout, "keep": PARAMETERS}
    for given, static in (
        (tensors, {"groups": groups, "dropout": Dropout(0.2, STATE, DROPOUT)}),
        (some, {"groups": groups, "activation": "mish"}),
    ):
        check(ops.group_norm_silu, norm_reference.group_norm_silu, given, static, wrt=list(given), **options)


def test_many_chunks_are_merged_in_between(monkeypatch: pytest.MonkeyPatch, poison_empty: None) -> None:
    """More than one program reads at once: 45 chunks, the last one short, become two entries; means differ by chunk."""
    rule = kernels.config
    monkeypatch.setattr(kernels, "config", lambda *args: rule(*args)._replace(pixels=2, chunks=45))
    x = torch.randn(2, 8, 89, 1, dtype=torch.float64) + torch.linspace(-50, 50, 89, dtype=torch.float64)[:, None]
    tensors = {"x": x, **{k: torch.randn(8, dtype=torch.float64) for k in ("weight", "bias")}}
    options = {"backend": "triton", "dtype": torch.float32, "layout": "channels_last", "keep": PARAMETERS}
    tensors["add"] = torch.randn(2, 8, dtype=torch.float64)
    check(ops.group_norm_silu, norm_reference.group_norm_silu, tensors, {"groups": 2}, wrt=list(tensors), **options)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_an_offset_costs_no_accuracy(offset: float) -> None:
    x = (torch.randn(2, 16, 6, 6) + offset).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 16)
    expected = norm_reference.group_norm_silu(x.double(), weight.double(), bias.double(), 4)
    with ops.use_backend("triton"):
        got = ops.group_norm_silu(x, weight, bias, 4)
    assert float((got - expected).abs().max()) < 2e-6


def norm_and_gradients(x: Tensor, backend: str, groups: int = 2, **options: Any) -> list[Tensor]:
    c = x.shape[1]
    generator = torch.Generator().manual_seed(1)
    weight, bias, add = (torch.randn(c, generator=generator).to(x.dtype).requires_grad_() for _ in range(3))
    x = x.detach().requires_grad_()
    with ops.use_backend(backend):
        y = ops.group_norm_silu(x, weight, bias, groups, add=add, **options)
        cotangent = torch.randn(y.shape, generator=generator).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, (x, weight, bias, add), cotangent)]


@pytest.mark.parametrize(("offset", "scale"), [(1e2, 0.1), (1e4, 0.01)])
def test_a_group_takes_no_error_from_its_neighbours(offset: float, scale: float) -> None:
    x = torch.randn(1, 8, 4, 4)
    x[:, :4] += offset
    x[:, 4:] *= scale
    expected = norm_and_gradients(x.double(), "reference")
    got = norm_and_gradients(x, "triton")
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert float((a[:, 4:] - b[:, 4:]).abs().max() / b[:, 4:].abs().max()) < 2e-6


def test_what_is_no_number_stays_in_its_group() -> None:
    x = torch.randn(1, 8, 4, 4)
    x[0, 0, 0, 0] = float("inf")
    with ops.use_backend("triton"):
        y = ops.group_norm_silu(x, None, None, 2, activation="none")
    assert y[:, :4].isnan().any() and y[:, 4:].isfinite().all()


@pytest.mark.parametrize("groups", [2, 8])
def test_images_of_one_pixel(groups: int) -> None:
    """With as many groups as channels an element is its mean: x, weight and bias as in the native kernels."""
    x = torch.randn(2, 8, 1, 1)
    expected, got = norm_and_gradients(x.double(), "reference", groups), norm_and_gradients(x, "triton", groups)
    for name, a, b in zip(("y", "x", "weight", "bias", "add"), got, expected, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5), name
    if groups == 8:
        assert not got[1].any() and not got[2].any()


def test_checkpointing_and_a_gradient_of_the_sum_alone() -> None:
    x, residual, x2 = torch.randn(3, 2, 4, 3, 3)
    with ops.use_backend("triton"):
        leaf = x.clone().requires_grad_()
        out = checkpoint(lambda v: ops.group_norm_silu(v, None, None, 2), leaf, use_reentrant=False)
        out.sum().backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        leaf = x.clone().requires_grad_()
        leaves = [leaf, x2.requires_grad_(), residual.requires_grad_()]
        _, h = ops.group_norm_silu(leaf, None, None, 1, x2=x2, residual=residual)
        dx, dx2, dresidual = torch.autograd.grad(h.sum(), leaves)
        assert torch.equal(dx, torch.ones_like(x)) and torch.equal(dresidual, dx) and not dx2.any()


def test_images_that_reach_too_far_are_refused() -> None:
    """Within an image kernels count in 32 bits; what lies between its elements counts, too."""
    for stride, taken in ((2**29, True), (2**30, False)):
        x = torch.empty_strided((1, 4, 1, 1), (4, stride, 1, 1), device="meta")
        near = torch.empty(1, 4, 1, 1, device="meta")
        assert (_group_norm_gpu.rejects(x, None, None, 4, 2) is None) == taken
        assert (_group_norm_gpu.rejects(near, x, None, 8, 2) is None) == taken


def test_the_loss_draws_its_noise_again_though_the_state_moved_on() -> None:
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    state = NoiseState.at(1, 2)
    with ops.use_backend("reference"):
        expected = torch.autograd.grad(ops.diffusion_loss(x, state), x)[0]
    with ops.use_backend("triton"):
        loss = ops.diffusion_loss(x, state)
        state.draw.add_(1)
        got = torch.autograd.grad(loss, x)[0]
    assert torch.allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("of_residual", ["contiguous", "channels_last", "slice"])
def test_residual_sum_has_the_bits_of_the_reference_and_the_layout_of_x(layout: str, of_residual: str) -> None:
    x, residual, bias = torch.randn(2, 12, 9, 7), torch.randn(2, 12, 9, 7), torch.randn(24)[::2]
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    expected = sum_reference.residual_sum(x, residual, bias)
    with ops.use_backend("triton"):
        got = ops.residual_sum(laid_out(x, layout), laid_out(residual, of_residual), bias)
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert got.is_contiguous(memory_format=form)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not there until it is touched")
def test_residual_sum_counts_in_64_bits() -> None:
    """Five rows of 2^30 + 16 elements, of which the first 16 count; in 32 bits the last one begins at 64."""
    columns, each, before = 2**30 + 16, 16, 2**31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, (before + 5 * columns) * 2, flags=flags)
    except OSError as error:
        pytest.skip(f"13 GiB of address space: {error}")

    def rows(operand: int) -> list[Tensor]:
        starts = [before + row * columns + operand * each for row in range(5)]
        return [torch.frombuffer(memory, dtype=torch.float16, count=each, offset=2 * start) for start in starts]

    y, x, residual = map(rows, range(3))
    bias = torch.randn(5).half()
    for row in (*x, *residual):
        row.copy_(torch.randn(each))
    sums.residual_sum_kernel[(1,)](
        y[0], x[0], residual[0], bias, 5, columns, 1, 5, RESIDUAL=True, BIAS=True, LAST=False, HEIGHT=8, WIDTH=each
    )
    for got, a, b, c in zip(y, x, residual, bias, strict=True):
        assert torch.allclose(got.float(), a.float() + b.float() + c.float(), rtol=1e-3)


def compiled(*options: str, folder: Path) -> list[dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    out = folder / "aot.json"
    command = [sys.executable, "-m", "benchmarks.aot", "--quick", "--json", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


@pytest.mark.minutes
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """No forward kernel spills, and what should have accesses of 16 bytes has them: benchmarks/aot.py says which."""
    rows = compiled("--targets", "sm_80", "sm_90", folder=tmp_path)
    assert {(row["op"], row["target"]) for row in rows} == set(product(aot.KERNELS, ("sm_80", "sm_90")))
    assert all(not row["fault"] and 0 < row["registers"] <= 255 for row in rows)


def test_the_report_finds_faults() -> None:
    row = {"spills": 2, "wide": 4, "target": "sm_90", "function": "foo_fwd_kernel"}
    case = aot.Case("foo", "", lambda: None)
    assert aot._fault(row, case) == "spills"
    assert aot._fault(row | {"spills": 0}, case) == ""
    assert aot._fault(row | {"spills": 0, "wide": 0}, case) == "no accesses of 16 bytes"
    assert aot._fault(row | {"function": "foo_bwd_kernel"}, case) == ""


def test_without_a_gpu_the_reason_is_given() -> None:
    code = "from ddpm_fast import ops; print({b: r for o, b, r in ops.availability() if o == 'noise'}['triton'])"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert torch.cuda.is_available() or "no GPU" in done.stdout


def test_tensors_of_the_cpu_are_native_ones_unless_triton_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("ddpm_fast._C") is None:
        pytest.skip("the native module is not built here")
    called: list[Tensor] = []
    monkeypatch.setattr(kernels, "forward", lambda *args: called.append(args))
    x, row = torch.randn(1, 8, 2, 2), torch.randn(8)
    ops.group_norm_silu(x, row, row, 2)
    ops.group_norm_silu(x.half(), row, row, 2)  # not native's dtype: the reference's
    assert not called
