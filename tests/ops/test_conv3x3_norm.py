"""The native conv3x3 with a norm of what goes in, and statistics of what comes out."""

from typing import Any

import pytest
import torch
from filtering import FORCED, image
from native_state import restored  # noqa: F401
from oracle import assert_rule
from torch import Tensor

from ddpm_fast import _C, ops
from ddpm_fast.ops import Norm
from ddpm_fast.ops._conv3x3 import CODES, Way, convolve, lay_out
from ddpm_fast.reference import conv3x3 as reference

pytestmark = FORCED

FLOAT, HALF = torch.float32, torch.bfloat16
WAYS = [(FLOAT, Way(2)), (FLOAT, Way(4)), (FLOAT, Way(4, True)), (HALF, Way(2)), (HALF, Way(4, True))]
# (N, C1, C2, K, H, W): why
SHAPES = [
    (1, 1, 0, 1, 1, 1),  # a pixel
    (2, 5, 0, 3, 7, 5),  # less than a vector, less than a tile at the edges
    (1, 63, 0, 33, 1, 9),  # one channel less than lie together
    (3, 1, 63, 3, 8, 9),  # the second image's channels lie across vectors
    (1, 70, 59, 70, 12, 13),  # and across those that lie together, an odd number in all
    (5, 8, 0, 3, 37, 41),  # several blocks for each thread, which begin and end within rows of tiles
    (1, 64, 6, 130, 26, 22),  # few tiles of four columns: threads share them
]


def given(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> tuple[dict[str, Any], Norm]:
    torch.manual_seed(0)
    n, c1, c2, k, h, w = shape
    tensors = {"x": image(n, c1, h, w, dtype=dtype), "weight": torch.randn(k, c1 + c2, 3, 3).to(dtype).float()}
    if c2:
        tensors["x2"] = image(n, c2, h, w, dtype=dtype)
    tensors |= {"bias": torch.randn(k), "residual": image(n, k, h, w, dtype=dtype)}
    return tensors, Norm(torch.rand(n, c1 + c2) + 0.5, torch.randn(n, c1 + c2), activation)


def run(way: Way, norm: Norm | None, stats: bool, x: Tensor, weight: Tensor, **rest: Any) -> list[Tensor]:
    room = torch.full((2, x.shape[0], weight.shape[0]), float("nan")) if stats else None
    rows = () if norm is None else (torch.stack(norm[:2]), CODES[norm.activation])
    y = convolve(x, lay_out(weight, way, x.dtype), way, weight.shape[0], norm=rows, moments=room, **rest)
    return [y] if room is None else [y, *room]


def told_by(y: Tensor, mean: Tensor, squares: Tensor) -> None:
    """They are those of y, as it was rounded."""
    z = y.double()
    exact = (z - z.mean((2, 3), keepdim=True)).square().sum((2, 3))
    assert ((mean - z.mean((2, 3))).abs() <= 1e-6 * z.abs().mean((2, 3)) + 1e-12).all()
    assert ((squares - exact).abs() <= 1e-5 * exact + 1e-12).all()


@pytest.mark.parametrize("activation", ["silu", "none", "relu", "mish"])
@pytest.mark.parametrize(("dtype", "way"), WAYS, ids=str)
@pytest.mark.parametrize("isa", _C.isas())
def test_by_the_rule(isa: str, dtype: torch.dtype, way: Way, activation: str) -> None:
    """The factor of float32 is that of Winograd's filtering; and the same bits on any number of threads."""
    _C.force_isa(isa)
    for shape in SHAPES if activation == "silu" else SHAPES[4:5]:
        tensors, norm = given(shape, dtype, activation)
        doubles, narrow = ({k: v.to(kind) for k, v in tensors.items()} for kind in (torch.float64, dtype))
        wide = Norm(norm.scale.double(), norm.shift.double(), activation)
        exact, plain = reference.conv3x3(**doubles, norm=wide), reference.conv3x3(**narrow, norm=norm)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(way, norm, True, **tensors))
            assert torch.equal(run(way, norm, False, **tensors)[0], found[-1][0])
            told_by(*found[-1])
        assert_rule(f"y of {shape}", found[0][0], plain, exact, 5 if dtype is FLOAT else 2)
        assert all(torch.equal(one[0], found[0][0]) for one in found)


@pytest.mark.parametrize(("dtype", "way"), WAYS, ids=str)
def test_statistics_alone(dtype: torch.dtype, way: Way) -> None:
    """An offset costs no accuracy; y is what it is without them."""
    for shape in SHAPES:
        tensors, _ = given(shape, dtype, "none")
        y, mean, squares = run(way, None, True, **tensors)
        assert torch.equal(y, run(way, None, False, **tensors)[0])
        told_by(y, mean, squares)
        tensors["bias"] = torch.full_like(tensors["bias"], 1e4)
        told_by(*run(way, None, True, **tensors))


def test_where_it_runs() -> None:
    """Where nothing needs a gradient."""
    tensors, norm = given(SHAPES[4], FLOAT, "silu")
    with ops.use_backend("native"):
        y, mean, squares = ops.conv3x3(**tensors, norm=norm, stats=True)
        assert torch.equal(ops.conv3x3(**tensors, norm=norm), y) and mean.shape == squares.shape == y.shape[:2]
        wide = Norm(norm.scale.double(), norm.shift.double(), "silu")
        assert torch.equal(ops.conv3x3(**tensors, norm=wide), y)
        for name in ("x", "weight", "bias"):
            leaf = tensors[name].clone().requires_grad_()
            with pytest.raises(RuntimeError, match="native: has no gradient with a norm or statistics"):
                ops.conv3x3(**tensors | {name: leaf}, norm=norm)
            with torch.no_grad():
                assert torch.equal(ops.conv3x3(**tensors | {name: leaf}, norm=norm), y)
    x = tensors["x"].requires_grad_()
    assert torch.autograd.grad(ops.conv3x3(**tensors, norm=norm).sum(), x)[0].shape == x.shape


def test_what_is_left_to_the_reference() -> None:
    """Images that autocast would round before they are normalised."""
    tensors, norm = given(SHAPES[4], FLOAT, "silu")
    with torch.autocast("cpu", torch.bfloat16), ops.use_backend("native"):
        with pytest.raises(RuntimeError, match="native: takes a norm of images in torch.bfloat16"):
            ops.conv3x3(**tensors, norm=norm)
    try:
        torch.set_default_dtype(torch.float64)
        with ops.use_backend("native"):
            assert all(t.dtype is FLOAT for t in ops.conv3x3(**tensors, norm=norm, stats=True))
    finally:
        torch.set_default_dtype(FLOAT)


def test_what_the_kernel_refuses() -> None:
    tensors, norm = given(SHAPES[1], FLOAT, "silu")
    way, k, n, c = Way(2), 3, 2, 5
    weights = lay_out(tensors["weight"], way, FLOAT)
    rows, room = torch.stack(norm[:2]), torch.empty(2, n, k)
    convolve(tensors["x"], weights, way, k, norm=(rows, 1), moments=room)
    for wrong in (rows[:1], rows[0], rows.double(), torch.rand(2, n, 2 * c)[..., ::2], None):
        with pytest.raises(ValueError, match="norm: not float32 of the shape that x asks for, or not contiguous"):
            convolve(tensors["x"], weights, way, k, norm=(wrong, 1))
    for activation in (-1, 4):
        with pytest.raises(ValueError, match=r"activation must be in \[0, 3\]"):
            convolve(tensors["x"], weights, way, k, norm=(rows, activation))
    for wrong in (room[:, :1], room.double(), torch.empty(2, n, k + 1)):
        with pytest.raises(ValueError, match="moments: not float32"):
            convolve(tensors["x"], weights, way, k, norm=(rows, 1), moments=wrong)
    with pytest.raises(IndexError):
        convolve(tensors["x"], weights, way, k, norm=(rows,))


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (12, 4), (32, 32), (70, 7), (2048, 32)])
@pytest.mark.parametrize("isa", _C.isas())
def test_a_norm_of_moments(isa: str, channels: int, groups: int, dtype: torch.dtype) -> None:
    """The one over groups; parameters of any kind that there are."""
    _C.force_isa(isa)
    n, pixels = 3, 20
    x = 100 + torch.randn(n, channels, pixels, dtype=torch.float64) * torch.rand(n, channels, 1)
    mean = x.mean(2, keepdim=True)
    moments = torch.stack([mean[..., 0], (x - mean).square().sum(2)]).float()
    weight, bias, add, wide = (torch.randn(*size).to(dtype) for size in [(channels,)] * 3 + [(n, channels)])
    for given in ((weight, bias, wide), (weight, bias, add), (weight, bias, None), (None, None, wide), (None,) * 3):
        z = x if given[2] is None else x + given[2].double()[..., None]
        expected = torch.nn.functional.group_norm(z, groups, *(p if p is None else p.double() for p in given[:2]), 1e-5)
        found = []
        for threads in (1, 3):
            rows = torch.full((2, n, channels), float("nan"))
            _C.norm_of_moments(rows, moments, given, groups, pixels, 1e-5, threads)
            found.append(rows)
        got = x * rows[0].double()[..., None] + rows[1].double()[..., None]
        assert torch.equal(*found) and (got - expected).abs().max() < 1e-3, "x lies 100 from 0"
    room = torch.empty(2, n, channels)
    for wrong in (room[0], room[:1], room.double(), None):
        with pytest.raises(ValueError, match="rows: "):
            _C.norm_of_moments(wrong, moments, (None,) * 3, 1, pixels, 1e-5, 1)
    for wrong in (moments[:, :1], moments.double(), None):
        with pytest.raises(ValueError, match="moments: "):
            _C.norm_of_moments(room, wrong, (None,) * 3, 1, pixels, 1e-5, 1)
    for wrong in (torch.ones(channels + 1), torch.ones(channels).double(), torch.ones(channels, 2)[:, :1].T):
        if wrong.is_contiguous() and wrong.dtype is FLOAT and wrong.numel() == channels:
            continue
        with pytest.raises(ValueError, match="parameters: "):
            _C.norm_of_moments(room, moments, (wrong, None, None), 1, pixels, 1e-5, 1)
    with pytest.raises(ValueError, match="groups must divide"):
        _C.norm_of_moments(room, moments, (None,) * 3, channels + 1, pixels, 1e-5, 1)
