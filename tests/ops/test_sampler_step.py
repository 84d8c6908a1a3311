from itertools import product
from typing import Any

import pytest
import torch
from oracle import LAYOUTS, backends, check, laid_out, typed_backends

from ddpm_fast import ops
from ddpm_fast.ops import REVERSE, NoiseState
from ddpm_fast.ops.sampler_step import OP
from ddpm_fast.reference import sampler_step as reference

STATE = NoiseState.at(1, 2, 3)
# one element; odd sizes; a vector (1-D data); a batch of none
SHAPES = [(1, 1, 1, 1), (3, 3, 7, 5), (4, 6), (0, 3, 4, 4)]
ROWS = torch.rand(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
K = torch.tensor(2)


def arguments(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    x, model_out = torch.randn(2, *shape, dtype=torch.float64)
    return {"x": x, "model_out": model_out, "rows": ROWS, "k": K}


@pytest.mark.parametrize(("backend", "dtype"), typed_backends("sampler_step"), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, dtype, layout, shape, poison_empty) -> None:
    """The state is float32; the network's output has the tested dtype."""
    tensors = arguments(shape)
    hist, z, v = torch.randn(3, *shape, dtype=torch.float64)
    options = {"backend": backend, "dtype": dtype, "layout": layout, "keep": ("x", "rows", "hist", "noise")}
    for more, static in (
        ({}, {}),
        ({"noise": z}, {"clip": 0.5}),
        ({"noise": z, "hist": hist}, {"return_x0": True}),
        ({"hist": hist}, {"noise": STATE, "clip": 1.0, "return_x0": True}),
        ({"noise": z, "variance": v}, {}),
        ({"hist": hist, "variance": v}, {"noise": STATE, "clip": 1.0, "return_x0": True}),
    ):
        wrt = ["x", "model_out", *more] if backend == "reference" else []  # kernels have no gradient
        check(ops.sampler_step, reference.sampler_step, tensors | more, static, wrt=wrt, **options)


def test_formula() -> None:
    a = arguments((2, 3, 4, 4))
    hist, z = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    _, _, p_x, p_m, c_x, c_0, c_h, c_z, _ = ROWS[2].tolist()
    x0 = (p_x * a["x"] + p_m * a["model_out"]).clamp(-0.7, 0.7)
    x_next, x0_hat = ops.sampler_step(**a, hist=hist, noise=z, clip=0.7, return_x0=True)
    assert torch.allclose(x0_hat, x0, rtol=1e-14)
    assert torch.allclose(x_next, c_x * a["x"] + c_0 * x0 + c_h * hist + c_z * z, rtol=1e-13)


def float32(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in arguments(shape).items()}


def same(got: Any, expected: Any) -> bool:
    """Equal, NaN for NaN."""
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("more", [{}, {"clip": 0.5}, {"noise": STATE}, {"noise": STATE, "clip": 0.5, "hist": True}])
@pytest.mark.parametrize(
    "rows",
    [ROWS, ROWS.float(), ROWS.t().contiguous().t(), ROWS[:, :8]],
    ids=["float64", "float32", "columns", "without c_v"],
)
def test_float32_has_the_bits_of_the_reference(rows, more) -> None:
    """Also across pieces of a sample, for what is not finite, and with each operand in a layout of its own."""
    shape = (3, 3, 29, 23)
    a = float32(shape) | {"rows": rows}
    a["x"].view(-1)[:3] = a["model_out"][1].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    if "hist" in more:
        more = more | {"hist": laid_out(torch.randn(shape), "slice")}
    z = {"noise": ops.noise(shape, STATE, REVERSE)} if "noise" in more else {}
    expected = reference.sampler_step(**a, **more | z, return_x0=True)
    for x, model_out in product(LAYOUTS, LAYOUTS):
        of = a | {"x": laid_out(a["x"], x), "model_out": laid_out(a["model_out"], model_out)}
        for noise in (more, more | z):
            assert same(ops.sampler_step(**of, **noise, return_x0=True), expected)
            assert same([ops.sampler_step(**of, **noise)], expected[:1])


@pytest.mark.skipif("native" not in backends("sampler_step"), reason="the reference rounds each operation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_low_precision_state(dtype: torch.dtype, layout: str) -> None:
    """The coefficients stay float32, and each result is rounded once."""
    shape = (2, 3, 29, 23)
    a = float32(shape) | {"rows": ROWS.float()}
    a["x"] = laid_out(a["x"].bfloat16(), layout)
    a["model_out"] = a["model_out"].to(dtype)
    hist, variance, out, x0_out = (laid_out(torch.randn(shape).bfloat16(), layout) for _ in range(4))
    options = {"hist": hist, "variance": variance, "noise": STATE, "clip": 1.0, "return_x0": True}
    wide = a | {"hist": hist, "variance": variance}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in wide.items()}
    expected = [v.bfloat16() for v in ops.sampler_step(**options | wide)]
    with ops.use_backend("native"):
        got = ops.sampler_step(**a, **options, out=out, x0_out=x0_out)
    assert same(got, expected) and got[0] is out and got[1] is x0_out


@pytest.mark.parametrize("backend", backends("sampler_step"))
@pytest.mark.parametrize("noise", [None, STATE])
def test_results_stay_inside_their_memory(backend: str, noise: NoiseState | None) -> None:
    """Written between elements that belong to others, whose values stay."""
    shape = (2, 3, 7, 33)
    a = float32(shape)
    larger = torch.full((4, 5, 9, 70), 5.0)
    out = larger[1:3, 1:4, 1:8, 2:68:2]
    untouched = larger.clone()
    with ops.use_backend(backend):
        expected = ops.sampler_step(**a, noise=noise)
        assert ops.sampler_step(**a, noise=noise, out=out) is out
    untouched[1:3, 1:4, 1:8, 2:68:2] = expected
    assert torch.equal(larger, untouched)


@pytest.mark.parametrize("backend", backends("sampler_step"))
def test_results_may_overlap_what_is_read(backend: str) -> None:
    """Shifted by some elements, in another order, or each other's neighbours: as if written afterwards."""
    memory = torch.randn(5000)
    x, late = memory[:1536].view(2, 3, 16, 16), memory[100:1636].view(2, 3, 16, 16)
    across = x.transpose(2, 3)
    a = float32((2, 3, 16, 16)) | {"x": x}
    before = memory.clone()
    for given in (
        {"out": late},
        {"out": across},
        {"out": x, "x0_out": late, "return_x0": True},
        {"out": a["model_out"], "hist": late, "x0_out": across, "return_x0": True},
        {"out": late, "variance": x, "x": a["model_out"], "noise": a["model_out"]},
        {"out": late[:, 1:2], "model_out": late[:, :1], "x": x[:, :1], "noise": late[:, 1:2]},
    ):
        with ops.use_backend(backend):
            results = {"out", "x0_out", "return_x0"}
            options = a | {k: v for k, v in given.items() if k not in results}
            expected = ops.sampler_step(**{k: v.clone() for k, v in options.items()}, return_x0=True)
            got = ops.sampler_step(**a | given)
        if "x0_out" in given:
            assert torch.equal(got[1], expected[1])  # the last one written
        else:
            assert torch.equal(got, expected[0])
        memory.copy_(before)


@pytest.mark.parametrize("backend", backends("sampler_step"))
def test_a_result_in_the_memory_of_x_in_another_order(backend: str) -> None:
    """The same sizes with other steps, and more elements than are read before some are written."""
    memory = torch.randn(2, 16, 16, 16)
    a = float32(memory.shape) | {"x": memory.permute(0, 1, 3, 2), "noise": STATE}
    with ops.use_backend(backend):
        expected = ops.sampler_step(**a)
        assert torch.equal(ops.sampler_step(**a, out=memory.permute(0, 2, 1, 3)), expected)


@pytest.mark.parametrize("backend", backends("sampler_step"))
def test_autograd_sees_that_a_result_was_written(backend: str) -> None:
    a, out, x0_out = float32((2, 3, 4, 4)), *torch.ones(2, 2, 3, 4, 4)
    w = torch.ones((), requires_grad=True)
    lost = [w * out, w * x0_out]
    with ops.use_backend(backend):
        ops.sampler_step(**a, out=out, x0_out=x0_out, return_x0=True)
    for late in lost:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(2, 3, 4, 4).half()},
        {"x": torch.randn(2, 3, 4, 4).double()},
        {"model_out": torch.randn(2, 3, 4, 4).half()},
        {"noise": torch.randn(2, 3, 4, 4).double()},
        {"hist": torch.randn(2, 3, 4, 4).double()},
        {"variance": torch.randn(2, 3, 4, 4).double(), "noise": torch.randn(2, 3, 4, 4)},
        {"rows": ROWS.half()},
        {"x": torch.randn(2, 3, 4, 4).requires_grad_()},
        {"model_out": torch.randn(2, 3, 4, 4).requires_grad_()},
        {"noise": torch.randn(2, 3, 4, 4).requires_grad_()},
        {"hist": torch.randn(2, 3, 4, 4).requires_grad_()},
        {"variance": torch.randn(2, 3, 4, 4).requires_grad_(), "noise": torch.randn(2, 3, 4, 4)},
        {"rows": ROWS.float().requires_grad_()},
        {"model_out": torch.complex(*torch.randn(2, 2, 3, 4, 4)).conj().imag},
    ],
    ids=str,
)
def test_what_no_kernel_takes_goes_to_the_reference(change: dict[str, torch.Tensor]) -> None:
    a = float32((2, 3, 4, 4)) | change
    wrt = [v for v in a.values() if v.requires_grad]
    got, expected = ops.sampler_step(**a), reference.sampler_step(**a)
    assert torch.equal(got, expected) and got.dtype == expected.dtype
    if wrt:
        cotangent = torch.randn(got.shape)
        assert torch.equal(*(torch.autograd.grad(out, wrt, cotangent)[0] for out in (got, expected)))


@pytest.mark.parametrize("backend", backends("sampler_step"))
def test_out_may_alias_the_inputs(backend: str) -> None:
    a = {k: v.float() if v.is_floating_point() else v for k, v in arguments((2, 3, 4, 4)).items()}
    hist = torch.randn(2, 3, 4, 4)
    a |= {"variance": torch.randn(2, 3, 4, 4)}
    with ops.use_backend(backend):
        expected = ops.sampler_step(**a, hist=hist, noise=STATE, return_x0=True)
        again = ops.sampler_step(**a, hist=hist, noise=STATE, return_x0=True)
        assert torch.equal(expected[0], again[0]), "without out= nothing may be overwritten"
        got = ops.sampler_step(**a, hist=hist, noise=STATE, return_x0=True, out=a["x"], x0_out=hist)
    assert got[0] is a["x"] and got[1] is hist
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_noise_is_drawn_at_the_row() -> None:
    """The engine gives the row as the draw, so a step's noise depends on its row and not on how often it ran."""
    a = arguments((2, 3, 4, 4))
    z = ops.noise((2, 3, 4, 4), STATE._replace(draw=K), REVERSE, dtype=torch.float64)
    drawn = ops.sampler_step(**a, noise=STATE._replace(draw=K))
    assert torch.equal(drawn, ops.sampler_step(**a, noise=z))


@pytest.mark.parametrize("backend", backends("sampler_step"))
def test_the_first_sample_may_lie_on_the_device(backend: str) -> None:
    """As in a recorded step, which serves any part of a batch; beyond 32 bits, too."""
    a = float32((2, 3, 4, 4))
    rest = (None, None, None, False, None, None)
    with ops.use_backend(backend):
        for first in (0, 1, 2**33 + 5):
            state = STATE._replace(first_sample=first)
            on_device = STATE._replace(first_sample=torch.tensor(first))
            got, expected = (OP.unchecked(*a.values(), noise, *rest) for noise in (on_device, state))
            assert torch.equal(got, expected)
        assert not torch.equal(
            expected, OP.unchecked(*a.values(), STATE._replace(first_sample=torch.tensor(2**33 + 6)), *rest)
        )


X = torch.zeros(2, 3, 4, 4)
R = ROWS.float()


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "text"),
    [
        ((X.long(), X, R, K), {}, TypeError, "x must be a floating"),
        ((X, X[:1], R, K), {}, ValueError, "model_out must have shape"),
        ((X, X, R[:, :7], K), {}, ValueError, "rows must have 8 or 9 columns"),
        ((X, X, R[:, :8], K), {"variance": X}, ValueError, "rows must have 9 columns for variance"),
        ((X, X, R, K), {"variance": X[:1]}, ValueError, "variance must have shape"),
        ((X, X, R, K), {"variance": X.long()}, TypeError, "variance must be a floating"),
        ((X, X, R, K), {"out": X, "x0_out": X, "return_x0": True}, ValueError, "x0_out must be another tensor"),
        ((X, X, R[0], K), {}, ValueError, "rows must have 2 dim"),
        ((X, X, R, K[None]), {}, ValueError, "k must have shape"),
        ((X, X, R, K.float()), {}, TypeError, "k must have dtype"),
        ((X, X, R, K + 2), {}, ValueError, r"k must lie in \[0, 4\)"),
        ((X, X, R, K), {"hist": X[:1]}, ValueError, "hist must have shape"),
        ((X, X, R, K), {"out": X[:1]}, ValueError, "out must have shape"),
        ((X, X, R, K), {"noise": X[:1]}, ValueError, "noise must have shape"),
        ((X, X, R, K), {"clip": 0.0}, ValueError, "clip must be positive"),
        ((X, X, R, K), {"x0_out": X}, ValueError, "return_x0"),
        ((X, X, R, K), {"return_x0": X}, TypeError, "return_x0 must be True or False"),
        ((X, X, R, K), {"out": X.double()}, TypeError, "out must have dtype"),
        ((X, X, R, K), {"out": X[:1].expand(X.shape)}, ValueError, "out must have memory for each element"),
        ((X, X, R, K), {"out": X.as_strided(X.shape, (24, 8, 2, 1))}, ValueError, "out must have memory for each"),
        ((X, X, R, K), {"clip": 10**400}, ValueError, "clip must be a finite number, got an integer of 1329 bits"),
        ((X, X, R, K), {"noise": STATE._replace(draw=K[None])}, ValueError, "noise.draw must have shape"),
    ],
)
def test_bad_input(args, kwargs, kind, text) -> None:
    with pytest.raises(kind, match=text):
        ops.sampler_step(*args, **kwargs)


def test_half_precision_keeps_its_dtype_and_takes_any_bound() -> None:
    """Noise and history are wider than x; a bound beyond its range bounds nothing."""
    x = torch.randn(2, 3, 4, 4).half()
    wide = {"noise": STATE, "hist": x.double()}
    bounded = ops.sampler_step(x, x, R, K, clip=1e6, **wide)
    assert bounded.dtype == torch.float16 and torch.equal(bounded, ops.sampler_step(x, x, R, K, **wide))
