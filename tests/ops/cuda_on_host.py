"""Tests of the CUDA kernels on a CPU; test_cuda.py builds the module and runs them where the sanitizers are loaded."""

import importlib.util
import os
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from oracle import assert_rule, check, laid_out
from torch import Tensor

from benchmarks import gpu_checks
from ddpm_fast import ops
from ddpm_fast.ops import DROPOUT, REVERSE, Dropout, NoiseState
from ddpm_fast.ops.group_norm_silu import OP
from ddpm_fast.reference import group_norm_silu as norm_reference
from ddpm_fast.reference import sampler_step as step_reference

spec = importlib.util.spec_from_file_location("ddpm_fast._cuda", os.environ["DDPM_TEST_CUDA_HOST"])
assert spec is not None and spec.loader is not None
sys.modules["ddpm_fast._cuda"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

from ddpm_fast.kernels import layouts  # noqa: E402
from ddpm_fast.kernels.cuda import group_norm_silu as kernels  # noqa: E402
from ddpm_fast.kernels.cuda import sampler_step as steps  # noqa: E402

STATE = NoiseState.at(-5, 7, 2**33 + 1)
PARAMETERS = ("weight", "bias", "add", "scale", "shift")
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16

# (N, C1, C2, H, W, groups): why
NORMS = [
    (2, 16, 0, 4, 4, 4),  # plain
    (1, 24, 0, 5, 3, 2),  # groups of 12, and 15 pixels: clusters of other sizes than were asked for
    (2, 16, 8, 3, 3, 2),  # a group of 12 straddles the two inputs
    (1, 264, 64, 2, 3, 41),  # slabs of 64 channels, of 32 in float32, of which the last has 8; x2 begins within one
    (1, 320, 0, 2, 3, 2),  # groups of 160: a slab has many vectors, and a warp more than one round of channels
    (1, 20, 0, 3, 5, 4),  # five channels a group; vectors in float32 alone
    (1, 6, 3, 2, 3, 9),  # a group a channel, no vectors
    (3, 16, 0, 1, 1, 4),  # one pixel
    (2, 8, 0, 9, 9, 1),  # one vector a pixel: shuffles add all of a warp's rows
]
CUTS = {"rule": 0, "1 block": 1, "2 blocks": 2, "4 blocks": 4, "8 blocks": 8, "two launches": -3}


def cut_as(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces a cluster of some size or, below 0, chunks for two launches; what lies in no vectors has these."""
    rule = kernels.rule

    def chosen(direction: str, of: Any, vectors: bool, device: int) -> Any:
        found, pixels = rule(direction, of, vectors, device), of.x.shape[2] * of.x.shape[3]
        some = -(-pixels // abs(parts or 1))
        threads = min(found.threads, -(-found.slab * some // 32) * 32)
        cut = found._replace(pixels=some, chunks=-(-pixels // some), threads=threads, one_pass=vectors and parts > 0)
        return cut if parts else found

    monkeypatch.setattr(kernels, "rule", chosen)


def made(shape: tuple[int, ...], add_of_all: bool = False) -> dict[str, Tensor]:
    n, c1, c2, height, width, _ = shape
    c = c1 + c2
    sizes = {"x": (n, c1, height, width), "x2": (n, c2, height, width), "residual": (n, c1, height, width)}
    sizes |= {"weight": (c,), "bias": (c,), "add": (c,) if add_of_all else (n, c), "scale": (n, c), "shift": (n, c)}
    return {k: torch.randn(s, dtype=torch.float64) for k, s in sizes.items() if k != "x2" or c2}


@pytest.mark.parametrize(
    ("dtype", "cut"),
    [*((BF16, cut) for cut in CUTS), (FLOAT, "rule"), (FLOAT, "4 blocks"), (FLOAT, "two launches"), (HALF, "2 blocks")],
    ids=str,
)
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_norm(
    shape: tuple[int, ...], dtype: torch.dtype, cut: str, monkeypatch: pytest.MonkeyPatch, poison_empty: None
) -> None:
    """Every argument at once, then without a sum; the second of the rule's two runs has another order of threads."""
    cut_as(CUTS[cut], monkeypatch)
    options: dict[str, Any] = {"backend": "cuda", "dtype": dtype, "layout": "channels_last", "keep": PARAMETERS}
    dropout = Dropout(0.2, STATE, DROPOUT)
    every, some = made(shape), made(shape, add_of_all=True)
    some = {k: v for k, v in some.items() if k not in ("residual", "scale", "shift")}
    for tensors, static in (
        (every, {"groups": shape[-1], "dropout": dropout}),
        (some, {"groups": shape[-1], "dropout": dropout, "activation": "mish"}),
    ):
        check(ops.group_norm_silu, norm_reference.group_norm_silu, tensors, static, wrt=list(tensors), **options)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_the_other_activations_and_parameters_of_the_images_dtype(activation: str, poison_empty: None) -> None:
    shape = (2, 16, 0, 3, 5, 4)
    tensors = {k: v for k, v in made(shape).items() if k != "residual"}
    for names in (("x",), ("x", "weight", "bias", "shift"), ("x", "add", "scale")):
        some = {k: tensors[k] for k in names}
        static = {"groups": 4, "activation": activation} | ({} if "weight" in some else {"weight": None, "bias": None})
        for dtype in (BF16, FLOAT):
            options: dict[str, Any] = {"backend": "cuda", "dtype": dtype, "layout": "channels_last"}
            check(ops.group_norm_silu, norm_reference.group_norm_silu, some, static, wrt=names, **options)


@pytest.mark.parametrize(("first", "vectors"), [(8, True), (3, False)])
def test_slices_of_larger_images(first: int, vectors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pixels are further apart than their channels are many; at an odd offset they lie in no vectors."""
    seen, rule = [], kernels.rule
    monkeypatch.setattr(kernels, "rule", lambda *args: seen.append(args[2]) or rule(*args))
    larger = torch.randn(2, 32, 6, 5).contiguous(memory_format=torch.channels_last)
    results = []
    for dtype in (torch.float64, FLOAT, FLOAT):
        x = larger.to(dtype)[:, first : first + 16, 1:].detach().requires_grad_()
        weight, bias = torch.arange(16.0), torch.ones(16)
        with ops.use_backend("cuda" if len(results) == 2 else "reference"):
            y = ops.group_norm_silu(x, weight.to(dtype), bias.to(dtype), 4)
        dy = torch.cos(torch.arange(y.numel())).view(y.shape).to(dtype)
        results.append((y.detach(), *torch.autograd.grad(y, x, dy)))
    for name, fast, plain, truth in zip(("y", "x"), results[2], results[1], results[0], strict=True):
        assert_rule(name, fast, plain, truth, 3)
    assert seen == [vectors, vectors]


def test_many_chunks_whose_means_differ(monkeypatch: pytest.MonkeyPatch, poison_empty: None) -> None:
    cut_as(-45, monkeypatch)
    x = torch.randn(2, 8, 89, 1, dtype=torch.float64) + torch.linspace(-50, 50, 89, dtype=torch.float64)[:, None]
    tensors = {"x": x, "add": torch.randn(2, 8, dtype=torch.float64)}
    tensors |= {k: torch.randn(8, dtype=torch.float64) for k in ("weight", "bias")}
    options: dict[str, Any] = {"backend": "cuda", "layout": "channels_last"}
    check(ops.group_norm_silu, norm_reference.group_norm_silu, tensors, {"groups": 2}, wrt=list(tensors), **options)


@pytest.mark.parametrize("cut", ["1 block", "4 blocks", "two launches"])
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_an_offset_costs_no_accuracy(cut: str, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_as(CUTS[cut], monkeypatch)
    x = (torch.randn(2, 16, 6, 6) + offset).contiguous(memory_format=torch.channels_last)
    x[:, :8] -= offset  # of some groups alone: the others' takes no accuracy from them
    weight, bias = torch.randn(2, 16)
    results = []
    for backend, leaf in (("reference", x.double()), ("cuda", x)):
        leaf.requires_grad_()
        with ops.use_backend(backend):
            y = ops.group_norm_silu(leaf, weight.to(leaf.dtype), bias.to(leaf.dtype), 4)
        results.append((y.detach(), *torch.autograd.grad((y * y.detach().cos()).sum(), leaf)))
    for expected, got in zip(*results, strict=True):
        assert float((got - expected).abs().max()) < 4e-6


@pytest.mark.parametrize("cut", ["2 blocks", "two launches"])
def test_what_is_no_number_stays_in_its_group(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_as(CUTS[cut], monkeypatch)
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = float("inf")
    with ops.use_backend("cuda"):
        y = ops.group_norm_silu(x, None, None, 2, activation="none")
    assert y[:, :8].isnan().any() and y[:, 8:].isfinite().all()


def test_an_element_that_is_its_mean_has_no_gradient() -> None:
    x = torch.randn(2, 8, 1, 1).requires_grad_()
    weight = torch.randn(8).requires_grad_()
    with ops.use_backend("cuda"):
        y = ops.group_norm_silu(x, weight, torch.ones(8), 8)
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert not dx.any() and not dweight.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (3, 4, 20, 16), (5, 37), (2,)], ids=str)
def test_sampler_step_has_the_bits_of_the_reference(shape: tuple[int, ...], layout: str, poison_empty: None) -> None:
    """Where four elements lie together and where not, over more than one block, with an end that fills no four."""
    rows, k = torch.rand(4, 8, dtype=torch.float64), torch.tensor(2)
    x, m, hist, given = torch.randn(4, *shape)
    x.view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
    with ops.use_backend("reference"):
        drawn = ops.noise(shape, STATE, REVERSE)
    here = [laid_out(v, layout) for v in (x, m, hist, given)]
    for noise, z, clip in ((None, None, None), (here[3], given, 0.5), (STATE, drawn, 0.5)):
        expected = step_reference.sampler_step(x, m, rows.float(), k, noise=z, hist=hist, clip=clip, return_x0=True)
        with ops.use_backend("cuda"):
            got = ops.sampler_step(*here[:2], rows, k, noise=noise, hist=here[2], clip=clip, return_x0=True)
            state, kept = laid_out(x.clone(), layout), laid_out(hist.clone(), layout)
            options: dict[str, Any] = {"noise": noise, "hist": kept, "clip": clip, "return_x0": True}
            same = ops.sampler_step(state, here[1], rows, k, **options, out=state, x0_out=kept)
        for a, b, c in zip(got, same, expected, strict=True):
            assert torch.equal(a.nan_to_num(7.0), c.nan_to_num(7.0))
            assert torch.equal(b.nan_to_num(7.0), c.nan_to_num(7.0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_sampler_step_with_a_variance(dtype: torch.dtype, layout: str, poison_empty: None) -> None:
    """Four elements together, or one by one at an end that fills no four, of all there is to read."""
    for shape in ((2, 3, 16, 20), (2, 3, 9, 7)):
        x, model_out, hist, z, v = torch.randn(5, *shape, dtype=torch.float64)
        tensors = {"x": x, "model_out": model_out, "hist": hist, "variance": v, "k": torch.tensor(2)}
        tensors["rows"] = torch.rand(4, 9, dtype=torch.float64)
        for more, static in (({"noise": z}, {}), ({}, {"noise": STATE, "clip": 1.0, "return_x0": True})):
            options: dict[str, Any] = {"backend": "cuda", "dtype": dtype, "layout": layout}
            options["keep"] = ("rows", "x", "noise")
            check(ops.sampler_step, step_reference.sampler_step, tensors | more, static, **options)


def test_sampler_step_reads_halves_of_one_tensor_where_they_lie() -> None:
    both, rows, k = torch.randn(2, 6, 8, 8), torch.rand(4, 9), torch.tensor(2)
    x, (m, v) = torch.randn(2, 3, 8, 8), both.chunk(2, dim=1)
    assert all(layouts.array(half).data is half for half in (m, v))
    with ops.use_backend("cuda"):
        expected = ops.sampler_step(x, m.clone(), rows, k, noise=STATE, variance=v.clone())
        assert torch.equal(ops.sampler_step(x, m, rows, k, noise=STATE, variance=v), expected)  # type: ignore[arg-type]
        assert torch.equal(ops.sampler_step(x, m, rows, k, noise=STATE, variance=v, out=x), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
def test_sampler_step_in_low_precision_rounds_once(dtype: torch.dtype) -> None:
    rows, k = torch.rand(4, 8), torch.tensor(1)
    x, m, hist = (v.to(dtype) for v in torch.randn(3, 2, 3, 4, 4))
    with ops.use_backend("reference"):
        z = ops.noise(x.shape, STATE, REVERSE)
    wide = [v.float() for v in (x, m, hist)]
    expected = step_reference.sampler_step(*wide[:2], rows, k, noise=z, hist=wide[2], clip=1.0, return_x0=True)
    with ops.use_backend("cuda"):
        got = ops.sampler_step(x, m, rows, k, noise=STATE, hist=hist, clip=1.0, return_x0=True)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b.to(dtype))


def test_the_first_sample_may_lie_on_the_device() -> None:
    x, m, rows, k = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(4, 8), torch.tensor(0)
    found = []
    for first in (STATE.first_sample, torch.tensor(STATE.first_sample)):
        out = steps.room(x, None, [])
        state = STATE._replace(first_sample=first)  # type: ignore[arg-type]
        steps.sampler_step(out, None, x, m, rows, k, state, None, None, None)
        found.append(out.data)
    assert torch.equal(*found)


def test_a_batch_of_none_is_no_launch() -> None:
    x, rows, k = torch.randn(0, 3, 4, 4), torch.rand(4, 8), torch.tensor(0)
    with ops.use_backend("cuda"):
        assert ops.sampler_step(x, x, rows, k).shape == x.shape  # type: ignore[union-attr]
    image = x.contiguous(memory_format=torch.channels_last)
    assert "x is empty" in reasons(image, None, None, 1)


def reasons(*arguments: Any, **options: Any) -> str:
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="forced backend 'cuda'") as caught:
        ops.group_norm_silu(*arguments, **options)
    return next(line for line in str(caught.value).splitlines() if "cuda:" in line)


def test_reasons() -> None:
    x = torch.randn(2, 16, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert "takes images in channels_last" in reasons(x, None, None, 4)
    assert "float64" in reasons(last.double(), None, None, 4)
    assert "torch's generator" in reasons(last, None, None, 4, dropout=Dropout(0.5))
    wide = torch.randn(1, 600, 1, 1)
    assert "groups of at most 256 channels" in reasons(wide, None, None, 2)
    assert next(i for i in OP.impls if i.backend == "cuda").rejects is not None
    assert ops.group_norm_silu(last, None, None, 4).device.type == "cpu", "not forced: never here"


def test_what_the_module_itself_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """These guard memory where someone calls past the rule."""
    row, rows, k = torch.randn(2, 16), torch.rand(4, 8), torch.tensor(0)
    with pytest.raises(ValueError, match="rows with too few columns"):
        steps.sampler_step(steps.room(row, None, []), None, row, row, rows, k, row, None, row, None)
    x, rule = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last), kernels.rule
    for change, text in (
        ({"slab": 6}, "images that don't lie in vectors"),
        ({"slab": 24}, "a slab must be whole groups"),
        ({"chunks": 1, "pixels": 15}, "chunks miss pixels"),
        ({"chunks": 9, "pixels": 2}, "one pass is for vectors and 8 blocks"),
        ({"threads": 48}, "a block has 32 to 256 threads"),
    ):
        monkeypatch.setattr(kernels, "rule", lambda *args, change=change: rule(*args)._replace(**change))
        with ops.use_backend("cuda"), pytest.raises(ValueError, match=text):
            ops.group_norm_silu(x, None, None, 1)
    monkeypatch.setattr(kernels, "rule", lambda *args: rule(*args)._replace(pixels=10**6, chunks=1))
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="more shared memory than a block may have"):
        ops.group_norm_silu(x, None, None, 1)
    given = kernels._given

    def of_too_many(*args: Any) -> Any:
        told, table = given(*args)
        return told | {"sizes": (2**31, *told["sizes"][1:])}, table

    monkeypatch.setattr(kernels, "rule", rule)
    monkeypatch.setattr(kernels, "_given", of_too_many)
    with ops.use_backend("cuda"), pytest.raises(ValueError, match="more blocks than a grid has"):
        ops.group_norm_silu(x, None, None, 1)


# images, pixels, channels, groups, bytes: whole images of the CIFAR-10 network, and what no cluster holds
@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        ((64, 1024, 128, 32, BF16), (64, 2), (64, 4)),
        ((64, 1024, 384, 32, BF16), (96, 4), (96, 8)),
        ((64, 256, 256, 32, BF16), (64, 1), (64, 1)),
        ((64, 1024, 128, 32, FLOAT), (32, 2), (32, 4)),
        ((64, 16384, 64, 32, BF16), None, None),
    ],
    ids=str,
)
def test_the_rule(sizes: tuple[Any, ...], forward: Any, backward: Any) -> None:
    """Slabs of whole lines of the cache, by as few blocks as leave room for three of a processor, or two."""
    n, pixels, channels, groups, dtype = sizes
    x = torch.empty(n, channels, pixels, 1, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    of = kernels.Operands(x, *[None] * 6, groups, "silu", None)
    for direction, expected in (("forward", forward), ("backward", backward)):
        cut = kernels.rule(direction, of, True, 0)
        assert cut.one_pass == (expected is not None)
        if expected is not None:
            assert (cut.slab, cut.chunks) == expected


@pytest.mark.parametrize("name", [f"parity {op}" for op in gpu_checks.CUDA_OPS] + ["words", "reruns", "batch"])
def test_the_checks_for_gpus_hold_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forced(device: torch.device, kernels: str = "triton") -> Any:
        return ops.use_backend("cuda") if kernels == "cuda" else nullcontext()

    monkeypatch.setattr(gpu_checks, "_forced", forced)
    assert gpu_checks.checks(torch.device("cpu"), dry=True)[f"{name}{gpu_checks.CUDA}"]()
