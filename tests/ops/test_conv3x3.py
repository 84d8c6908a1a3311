import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, check, typed_backends
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.ops import Norm
from ddpm_fast.reference import conv3x3 as reference

# (N, C1, C2, K, H, W): why
SHAPES = [
    (2, 4, 0, 8, 4, 4),  # plain
    (1, 3, 0, 5, 7, 5),  # odd everything: edge tiles and remainders
    (2, 8, 4, 6, 5, 6),  # two inputs
    (1, 1, 0, 1, 1, 1),  # a single pixel: only the centre of the kernel counts
]


def arguments(shape: tuple[int, ...]) -> dict[str, Tensor]:
    n, c1, c2, k, h, w = shape
    made = {"x": (n, c1, h, w), "weight": (k, c1 + c2, 3, 3), "x2": (n, c2, h, w)}
    made |= {"bias": (k,), "residual": (n, k, h, w)}
    return {key: torch.randn(s, dtype=torch.float64) for key, s in made.items() if c2 or key != "x2"}


@pytest.mark.parametrize(("backend", "dtype"), typed_backends("conv3x3"), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, dtype, layout, shape, poison_empty) -> None:
    every = arguments(shape)
    n, c = shape[0], shape[1] + shape[2]
    norm = Norm(torch.randn(n, c), torch.randn(n, c), "silu")
    base = {k: v for k, v in every.items() if k in ("x", "x2", "weight")}
    options = {"backend": backend, "dtype": dtype, "layout": layout}
    if backend == "native" and dtype == torch.float32:
        options["factors"] = (5, 5)  # of Winograd's filtering, docs/convolution.md
    for tensors, static in [(base, {}), (every, {}), (every, {"norm": norm}), (every, {"stats": True})]:
        if backend == "native" and static:
            continue  # it has no gradient of these: test_conv3x3_norm.py
        check(ops.conv3x3, reference.conv3x3, tensors, static, wrt=list(tensors), **options)


def test_formula() -> None:
    """The sum over the 3x3 window, written out, with everything folded in."""
    a = arguments((2, 3, 2, 4, 5, 6))
    scale, shift = torch.randn(2, 2, 5, dtype=torch.float64)
    y, mean, m2 = ops.conv3x3(**a, norm=Norm(scale, shift, "relu"), stats=True)
    h = torch.cat([a["x"], a["x2"]], dim=1) * scale[..., None, None] + shift[..., None, None]
    h = F.pad(h.clamp_min(0), (1, 1, 1, 1))
    expected = a["bias"][None, :, None, None] + a["residual"]
    for i in range(3):
        for j in range(3):
            expected = expected + torch.einsum("nchw,kc->nkhw", h[:, :, i : i + 5, j : j + 6], a["weight"][:, :, i, j])
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(mean, y.mean((2, 3))) and torch.allclose(m2, y.var((2, 3), correction=0) * 30)


X = torch.randn(2, 4, 5, 5)
W = torch.randn(6, 4, 3, 3)
N24 = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "text"),
    [
        ((X.long(), W), {}, TypeError, "x must be a floating"),
        ((X[0], W), {}, ValueError, "x must have 4 dim"),
        ((X, W[:, :3]), {}, ValueError, r"weight must have shape \[6, 4, 3, 3\]"),
        ((X, W[..., :1]), {}, ValueError, "weight must have shape"),
        ((X, W, W[0, 0, 0]), {}, ValueError, r"bias must have shape \[6\]"),
        ((X, W), {"x2": X[:1]}, ValueError, "x2 must have the batch and size"),
        ((X, W), {"x2": X}, ValueError, r"weight must have shape \[6, 8, 3, 3\]"),
        ((X, W), {"residual": X}, ValueError, r"residual must have shape \[2, 6, 5, 5\]"),
        ((X, W), {"norm": Norm(N24[:1], N24)}, ValueError, "norm.scale must have shape"),
        ((X, W), {"norm": Norm(N24, N24, "gelu")}, ValueError, "norm.activation must be one of"),
        ((X, W, W[:, 0, 0, 0].double()), {}, TypeError, "bias must have the dtype of x"),
        ((X, W[:0]), {}, ValueError, "x and weight must have channels and pixels"),
        ((X[:, :0], W[:, :0]), {}, ValueError, "x and weight must have channels and pixels"),
        ((X[:, :, :0], W), {}, ValueError, "x and weight must have channels and pixels"),
        ((X, W), {"stats": 1}, TypeError, "stats must be True or False"),
    ],
)
def test_bad_input(args, kwargs, kind, text) -> None:
    with pytest.raises(kind, match=text):
        ops.conv3x3(*args, **kwargs)
