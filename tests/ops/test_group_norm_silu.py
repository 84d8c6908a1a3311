import math

import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, backends, check, typed_backends
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.ops import DROPOUT, Dropout, NoiseState
from ddpm_fast.reference import group_norm_silu as reference

PARAMETERS = ("weight", "bias", "add", "scale", "shift")

# (N, C1, C2, H, W, groups): why
SHAPES = [
    (2, 8, 0, 4, 4, 2),  # plain
    (1, 12, 0, 5, 3, 1),  # one group, odd size
    (2, 6, 0, 3, 7, 6),  # a group a channel: instance norm
    (2, 20, 0, 4, 5, 4),  # five channels a group: no power of two
    (3, 16, 8, 4, 4, 3),  # two inputs, a group apart
    (2, 8, 4, 3, 3, 3),  # two inputs: the groups of 4 meet the seam
    (2, 8, 4, 3, 3, 2),  # two inputs: a group of 6 straddles the seam
    (1, 36, 0, 1, 2, 12),  # nearly no pixels
]


def arguments(shape: tuple[int, ...]) -> dict[str, Tensor]:
    n, c1, c2, h, w, _ = shape
    c = c1 + c2
    made = {
        "x": (n, c1, h, w),
        "x2": (n, c2, h, w),
        "weight": (c,),
        "bias": (c,),
        "add": (n, c),
        "residual": (n, c1, h, w),
        "scale": (n, c),
        "shift": (n, c),
    }
    tensors = {k: torch.randn(s, dtype=torch.float64) for k, s in made.items()}
    if not c2:
        del tensors["x2"]
    return tensors


@pytest.mark.parametrize(("backend", "dtype"), typed_backends("group_norm_silu"), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, dtype, layout, shape, poison_empty) -> None:
    every = arguments(shape)
    groups = {"groups": shape[-1]}
    state = NoiseState.at(3, 1, 4)
    base = {k: every[k] for k in ("x", "x2", "weight", "bias") if k in every}
    options = {"backend": backend, "dtype": dtype, "layout": layout, "keep": PARAMETERS}
    for tensors, static in (
        (base, groups),
        (base | {"add": every["add"]}, groups | {"activation": "relu", "dropout": Dropout(0.3, state, DROPOUT + 1)}),
        (base | {"add": every["add"][0]}, groups | {"activation": "mish", "eps": 1e-3}),
        (every, groups | {"dropout": Dropout(0.1, state, DROPOUT)}),
    ):
        check(ops.group_norm_silu, reference.group_norm_silu, tensors, static, wrt=list(tensors), **options)
    check(ops.group_norm_silu, reference.group_norm_silu, {"x": every["x"]}, {
        "weight": None, "bias": None, "groups": 1, "activation": "none"
    }, wrt=["x"], **options)  # fmt: skip


def test_formula() -> None:
    """Mean and variance over each group, written out."""
    a = arguments((2, 8, 4, 3, 3, 2))
    y, h = ops.group_norm_silu(groups=2, eps=1e-3, **a)
    assert torch.equal(h, a["x"] + a["residual"])
    full = torch.cat([h, a["x2"]], dim=1) + a["add"][:, :, None, None]
    for n in range(2):
        for c in range(12):
            group = full[n, c // 6 * 6 : c // 6 * 6 + 6]
            mean, var = group.mean(), ((group - group.mean()) ** 2).mean()
            z = (full[n, c] - mean) / math.sqrt(var + 1e-3) * a["weight"][c] + a["bias"][c]
            z = z * (1 + a["scale"][n, c]) + a["shift"][n, c]
            assert torch.allclose(y[n, c], z / (1 + torch.exp(-z)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["none", "silu", "relu", "mish"])
def test_activations(name: str) -> None:
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    z = F.group_norm(x, 2)
    expected = {"none": z, "silu": z * torch.sigmoid(z), "relu": z.clamp_min(0), "mish": z * torch.tanh(F.softplus(z))}
    got = ops.group_norm_silu(x, None, None, 2, activation=name)
    assert torch.allclose(got, expected[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("backend", backends("group_norm_silu"))
def test_dropout_draws_its_stream_in_any_layout(backend: str, layout: str) -> None:
    state = NoiseState.at(3, 1, 4)
    x = torch.randn(2, 8, 4, 4)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    with ops.use_backend(backend):
        dropped = ops.group_norm_silu(x, None, None, 2, dropout=Dropout(0.5, state, DROPOUT + 7))
        whole = ops.group_norm_silu(x, None, None, 2)
    mask = ops.dropout_mask((2, 8, 4, 4), 0.5, state, DROPOUT + 7)
    assert torch.allclose(dropped, whole * mask) and 0.2 < float((mask == 0).float().mean()) < 0.8


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_torch_dropout_draws_in_the_order_of_contiguous_memory(layout: str) -> None:
    x = torch.randn(2, 8, 4, 4)
    torch.manual_seed(5)
    expected = F.dropout(F.silu(F.group_norm(x, 2)), 0.3)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    torch.manual_seed(5)
    assert torch.allclose(ops.group_norm_silu(x, None, None, 2, dropout=Dropout(0.3)), expected, atol=1e-6)


def test_nan_and_infinity_stay_in_their_group() -> None:
    x = torch.randn(2, 4, 3, 3)
    x[0, 0, 0, 0], x[1, 3, 0, 0] = float("nan"), float("inf")
    finite = ops.group_norm_silu(x, None, None, 2).isfinite().flatten(2).all(2)
    assert finite.tolist() == [[False, False, True, True], [True, True, False, False]]


X = torch.randn(2, 8, 4, 4)
W = torch.ones(8)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "text"),
    [
        ((X.long(), W, W, 2), {}, TypeError, "x must be a floating"),
        ((X[0], W, W, 2), {}, ValueError, "x must have 4 dim"),
        ((X, W, W, 3), {}, ValueError, "groups must divide the 8 channels, got 3"),
        ((X, W, W, 0), {}, ValueError, "groups must be an integer of at least 1"),
        ((X, W[:4], W, 2), {}, ValueError, r"weight must have shape \[8\]"),
        ((X, W, None, 2), {}, ValueError, "weight and bias go together"),
        ((X, W, W, 2), {"x2": X[:1]}, ValueError, "x2 must have the batch and size"),
        ((X, W, W, 2), {"x2": X[:, :, :2]}, ValueError, "x2 must have the batch and size"),
        ((X, W, W, 2), {"add": W[:3]}, ValueError, r"add must have shape \[8\] or \[2, 8\]"),
        ((X, W, W, 2), {"residual": X[:1]}, ValueError, "residual must have shape"),
        ((X, None, None, 2), {"x2": X, "residual": X.repeat(1, 2, 1, 1)}, ValueError, r"shape \[2, 8, 4, 4\]"),
        ((X, W, W, 2), {"scale": W}, ValueError, r"scale must have shape \[2, 8\]"),
        ((X, W, W, 2), {"shift": W}, ValueError, r"shift must have shape \[2, 8\]"),
        ((X, W, W, 2), {"activation": "gelu"}, ValueError, "activation must be one of none, silu, relu, mish"),
        ((X, W, W, 2), {"dropout": Dropout(-0.1)}, ValueError, r"dropout.p must be a finite number in \[0, 1\]"),
        ((X, W.to("meta"), W, 2), {}, ValueError, "weight must be on cpu"),
        ((X, W, W, 2), {"dropout": Dropout(0.1, 0)}, TypeError, "dropout.state must be a NoiseState, got 0"),
        ((X, W, W, 2), {"dropout": Dropout(0.1, None, 256)}, ValueError, r"dropout.stream must be an integer in"),
    ],
)
def test_bad_input(args, kwargs, kind, text) -> None:
    with pytest.raises(kind, match=text):
        ops.group_norm_silu(*args, **kwargs)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float16, torch.bfloat16)])
def test_weight_and_bias_of_other_dtypes(dtypes) -> None:
    """torch.group_norm takes float32 beside half precision and no other mixture."""
    wide, narrow = dtypes
    result = ops.group_norm_silu(X.to(wide), W.to(narrow), W.float(), 2)
    expected = ops.group_norm_silu(X.double(), W.double(), W.double(), 2)
    assert result.dtype == wide and torch.allclose(result.double(), expected, atol=4 * torch.finfo(wide).eps * 4)
