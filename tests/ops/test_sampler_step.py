import pytest
import torch
from oracle import DTYPES, LAYOUTS, backends, check

from ddpm_fast import ops
from ddpm_fast.ops import REVERSE, NoiseState
from ddpm_fast.reference import sampler_step as reference

STATE = NoiseState.at(1, 2, 3)
# one element; odd sizes; a vector (1-D data); a batch of none
SHAPES = [(1, 1, 1, 1), (3, 3, 7, 5), (4, 6), (0, 3, 4, 4)]
ROWS = torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
K = torch.tensor(2)


def arguments(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    x, model_out = torch.randn(2, *shape, dtype=torch.float64)
    return {"x": x, "model_out": model_out, "rows": ROWS, "k": K}


@pytest.mark.parametrize("backend", backends("sampler_step"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, dtype, layout, shape, poison_empty) -> None:
    """The state is float32; the network's output has the tested dtype."""
    tensors = arguments(shape)
    hist, z = torch.randn(2, *shape, dtype=torch.float64)
    options = {"backend": backend, "dtype": dtype, "layout": layout, "keep": ("x", "rows", "hist", "noise")}
    for more, static in (
        ({}, {}),
        ({"noise": z}, {"clip": 0.5}),
        ({"noise": z, "hist": hist}, {"return_x0": True}),
        ({"hist": hist}, {"noise": STATE, "clip": 1.0, "return_x0": True}),
    ):
        wrt = ["x", "model_out", *more]
        check(ops.sampler_step, reference.sampler_step, tensors | more, static, wrt=wrt, **options)


def test_formula() -> None:
    a = arguments((2, 3, 4, 4))
    hist, z = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    _, _, p_x, p_m, c_x, c_0, c_h, c_z = ROWS[2].tolist()
    x0 = (p_x * a["x"] + p_m * a["model_out"]).clamp(-0.7, 0.7)
    x_next, x0_hat = ops.sampler_step(**a, hist=hist, noise=z, clip=0.7, return_x0=True)
    assert torch.allclose(x0_hat, x0, rtol=1e-14)
    assert torch.allclose(x_next, c_x * a["x"] + c_0 * x0 + c_h * hist + c_z * z, rtol=1e-13)


@pytest.mark.parametrize("backend", backends("sampler_step"))
def test_out_may_alias_the_inputs(backend: str) -> None:
    a = {k: v.float() if v.is_floating_point() else v for k, v in arguments((2, 3, 4, 4)).items()}
    hist = torch.randn(2, 3, 4, 4)
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


X = torch.zeros(2, 3, 4, 4)
R = ROWS.float()


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "text"),
    [
        ((X.long(), X, R, K), {}, TypeError, "x must be a floating"),
        ((X, X[:1], R, K), {}, ValueError, "model_out must have shape"),
        ((X, X, R[:, :7], K), {}, ValueError, "rows must have 8 columns"),
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
