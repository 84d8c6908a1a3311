import pytest
import torch
from oracle import LAYOUTS, backends, check, typed_backends
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ddpm_fast import ops
from ddpm_fast.reference import residual_sum as reference

BACKENDS = backends("residual_sum")

# (N, C, H, W): why
SHAPES = [
    (1, 1, 1, 1),  # a single element
    (2, 8, 1, 1),  # one pixel: both layouts at once
    (3, 5, 7, 5),  # odd everything: rows that fill no vector
    (2, 48, 2, 3),  # 16 channels in 2 bytes each are less than a line of the cache
    (2, 160, 3, 3),  # several tiles of channels
    (9, 12, 16, 8),  # programs that begin inside an image
    (1, 3, 53, 47),  # several tiles of a channel's pixels, the last one short
]


def arguments(shape: tuple[int, ...]) -> dict[str, Tensor]:
    made = {"x": shape, "residual": shape, "bias": shape[1:2]}
    return {key: torch.randn(s, dtype=torch.float64) for key, s in made.items()}


@pytest.mark.parametrize(("backend", "dtype"), typed_backends("residual_sum"), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, dtype, layout, shape, poison_empty) -> None:
    every = arguments(shape)
    images = {k: v for k, v in every.items() if k != "bias"}
    options = {"backend": backend, "dtype": dtype, "layout": layout}
    alone = {k: v for k, v in every.items() if k != "residual"}
    for tensors, keep in ((images, ()), (every, ()), (every, ("bias",)), (alone, ("bias",))):
        given = {"residual": None} if "residual" not in tensors else {}
        check(ops.residual_sum, reference.residual_sum, tensors, given, wrt=list(tensors), keep=keep, **options)


def test_formula() -> None:
    """Number by number."""
    a = arguments((2, 3, 2, 4))
    y = ops.residual_sum(**a)
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, y.shape)).tolist():
        assert float(y[n, c, i, j]) == float(a["x"][n, c, i, j] + a["residual"][n, c, i, j] + a["bias"][c])
    assert torch.equal(ops.residual_sum(a["x"], a["residual"]), a["x"] + a["residual"])
    assert torch.equal(ops.residual_sum(a["x"], None, a["bias"]), a["x"] + a["bias"][:, None, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str) -> None:
    """Both images share the result's and nothing is kept for it; it has a derivative itself."""
    x, residual, bias, dy = (
        v.float().requires_grad_() for v in (*arguments((2, 3, 4, 5)).values(), torch.randn(2, 3, 4, 5))
    )
    kept: list[Tensor] = []
    with ops.use_backend(backend), saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        y = ops.residual_sum(x, residual, bias)
    dx, dresidual, dbias = torch.autograd.grad(y, (x, residual, bias), dy, create_graph=True)
    assert torch.equal(dx, dy) and dx.data_ptr() == dresidual.data_ptr() == dy.data_ptr()
    assert torch.allclose(dbias, dy.sum((0, 2, 3)), rtol=1e-6)
    again = torch.autograd.grad((dbias * torch.arange(3)).sum(), dy)[0]
    assert torch.equal(again, torch.arange(3.0)[:, None, None].expand_as(dy))
    assert not kept
    with ops.use_backend(backend), torch.no_grad():
        assert not ops.residual_sum(x, residual, bias).requires_grad


@pytest.mark.parametrize("wanted", ["x", "residual", "bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_alone(backend: str, wanted: str) -> None:
    a = {k: v.float().requires_grad_(k == wanted) for k, v in arguments((2, 3, 4, 5)).items()}
    with ops.use_backend(backend):
        grad = torch.autograd.grad(ops.residual_sum(**a).sum(), a[wanted])[0]
    assert torch.equal(grad, torch.full_like(a[wanted], 40 if wanted == "bias" else 1))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 3, 3), (2, 3, 0, 4)], ids=str)
def test_no_images_channels_or_pixels(shape: tuple[int, ...]) -> None:
    for backend in BACKENDS:
        a = {k: v.float().requires_grad_() for k, v in arguments(shape).items()}
        with ops.use_backend(backend):
            y = ops.residual_sum(**a)
        grads = torch.autograd.grad(y.sum(), list(a.values()))
        assert [g.shape for g in (y, *grads)] == [shape, shape, shape, shape[1:2]] and not grads[2].any()


def test_the_gradient_of_a_float32_bias_is_not_rounded_to_the_images_precision() -> None:
    for backend in BACKENDS:
        bias, x = torch.zeros(2, requires_grad=True), torch.zeros(1, 2, 25, 41, dtype=torch.bfloat16)
        with ops.use_backend(backend):
            grad = torch.autograd.grad(ops.residual_sum(x, x, bias).sum(), bias)[0]
        assert grad.dtype == torch.float32 and grad.tolist() == [1025, 1025]  # in bfloat16 1024


X, B = torch.randn(2, 3, 4, 4), torch.randn(3)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((X.double(), X.double(), B.double()), "takes float32 and float16 and bfloat16, got torch.float64"),
        ((X, X, B.double()), "got torch.float64"),
        ((X, X.half(), B), "takes images of one dtype, got torch.float32 and torch.float16"),
        ((X, torch.complex(X, X).conj().imag, B), "got a negated view"),
    ],
)
def test_what_no_kernel_takes_goes_to_the_reference(args: tuple[Tensor, ...], text: str) -> None:
    got, expected = ops.residual_sum(*args), reference.residual_sum(*args)
    assert torch.equal(got, expected) and got.dtype == expected.dtype == torch.promote_types(
        *(v.dtype for v in args[:2])
    )
    if "triton" in BACKENDS:
        with ops.use_backend("triton"), pytest.raises(RuntimeError, match=text):
            ops.residual_sum(*args)


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        ((X.long(), X), TypeError, "x must be a floating"),
        ((X[0], X[0]), ValueError, "x must have 4 dim"),
        ((X, X[:1]), ValueError, r"residual must have shape \[2, 3, 4, 4\]"),
        ((X, None), TypeError, "residual must be a tensor, or bias"),
        ((X, 1.0), TypeError, "residual must be a tensor, got"),
        ((X, X.to("meta")), ValueError, "residual must be on cpu"),
        ((X, X, B[:2]), ValueError, r"bias must have shape \[3\]"),
        ((X, X, 1.0), TypeError, "bias must be a tensor"),
        ((X, X, B.long()), TypeError, "bias must be a floating"),
        ((X, X, B.to("meta")), ValueError, "bias must be on cpu"),
    ],
)
def test_bad_input(args, kind, text) -> None:
    with pytest.raises(kind, match=text):
        ops.residual_sum(*args)
