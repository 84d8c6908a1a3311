"""Which convolutions are computed by Winograd's filtering: what the table says, what the module refuses, what chains
keep."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filtering import BEST, BOUND, FORCED, hold, image, looked_up_again, told, watched  # noqa: F401
from native_state import restored  # noqa: F401
from oracle import error
from torch import Tensor, nn

from ddpm_fast import _C, ops
from ddpm_fast.models import weights
from ddpm_fast.models.made import Table, fixed_weights
from ddpm_fast.models.weights import Prepared, convolve
from ddpm_fast.ops import _conv3x3, exact_convolutions
from ddpm_fast.ops._conv3x3 import CHANGING, DIRECT, FIXED, KINDS, WEIGHT, Way, choose, lay_out

pytestmark = FORCED
ROW = [1, 64, 64, 8]


# The table.


def test_every_committed_row() -> None:
    """Is of a shape that was measured once, and names a way that there is."""
    for kinds in _conv3x3._table().values():
        assert set(kinds) <= set(KINDS.values())
        for kind, by_use in kinds.items():
            assert set(by_use) == {FIXED, CHANGING} | ({WEIGHT} if kind == "float32" else set())
            for use, rows in by_use.items():
                assert rows and len({tuple(row[:4]) for row in rows}) == len(rows)
                for *shape, tile, transformed in rows:
                    assert len(shape) == 4 and all(type(size) is int and size > 0 for size in shape)
                    assert tile in (0, 2, 4) and type(transformed) is bool
                    assert not transformed or (tile and use == FIXED)


def test_a_measured_shape_has_its_own_row() -> None:
    for isa, kinds in _conv3x3._table().items():
        for kind, by_use in kinds.items():
            for use, rows in by_use.items():
                for n, c, k, side, *way in rows:
                    assert _conv3x3._nearest(isa, kind, use, n, c, side, side, k) == Way(*way)


def test_the_nearest_row(table: Callable[..., None]) -> None:
    table([1, 64, 64, 8, 2, False], [1, 256, 64, 8, 4, False], [1, 64, 256, 8, 0, False], [1, 64, 64, 32, 4, False])

    def chosen(n: int, c: int, h: int, w: int, k: int) -> int:
        return choose(torch.float32, (n, c, h, w), k, CHANGING).tile

    assert chosen(1, 64, 8, 8, 64) == chosen(1, 100, 8, 8, 70) == chosen(1, 64, 4, 16, 64) == chosen(1, 3, 1, 1, 3) == 2
    assert chosen(1, 200, 8, 8, 64) == chosen(2, 1024, 9, 7, 64) == 4
    assert chosen(1, 64, 8, 8, 200) == 0
    assert chosen(1, 64, 30, 33, 64) == chosen(1, 64, 128, 8, 64) == 4
    assert chosen(4, 64, 8, 8, 64) == 2, "the size of an image counts beside the batch's"


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_that_are_as_near_the_first_is_taken(order: int, table: Callable[..., None]) -> None:
    rows = [[1, 32, 64, 8, 2, False], [1, 128, 64, 8, 4, False]][::order]
    table(*rows)
    for _ in range(2):
        assert choose(torch.float32, (1, 64, 8, 8), 64, CHANGING).tile == rows[0][4]
        _conv3x3._nearest.cache_clear()


def test_what_is_direct_whatever_the_shape(table: Callable[..., None]) -> None:
    table([*ROW, 2, False], fixed=([*ROW, 2, True],))
    shape = (1, 64, 8, 8)
    for dtype in KINDS:
        assert choose(dtype, shape, 64, CHANGING) == Way(2) and choose(dtype, shape, 64, FIXED) == Way(2, True)
        assert choose(dtype, (0, 64, 8, 8), 64, CHANGING) == DIRECT
        with pytest.raises(KeyError), exact_convolutions():
            with exact_convolutions():
                assert choose(dtype, shape, 64, FIXED) == DIRECT
            assert choose(dtype, shape, 64, FIXED) == DIRECT
            raise KeyError
        assert choose(dtype, shape, 64, CHANGING) == Way(2)
    for dtype in (torch.float64, torch.float16):
        assert choose(dtype, shape, 64, CHANGING) == DIRECT
    _C.force_isa(next(name for name in _C.isas() if name != _C.isa()))
    assert choose(torch.float32, shape, 64, CHANGING) == DIRECT, "nothing was measured on this set"


def test_who_convolves(table: Callable[..., None], calls: list[Way]) -> None:
    """The kernel where the table says so; else the library: elsewhere, in another layout, and inside exact ones."""
    table([*ROW, 4, False], [1, 3, 64, 8, 0, False])
    x, weight = image(1, 64, 8, 8), torch.randn(64, 64, 3, 3)
    plain = F.conv2d(x, weight, padding=1)
    y = ops.conv3x3(x, weight)
    assert calls == [Way(4)] and not torch.equal(y, plain) and error(y, plain.double()) < 1e-4
    calls.clear()
    ops.conv3x3(image(1, 3, 8, 8), torch.randn(64, 3, 3, 3))
    assert torch.equal(ops.conv3x3(x.contiguous(), weight), F.conv2d(x.contiguous(), weight, padding=1))
    ops.conv3x3(x[:, :32], weight, x2=x[:, 32:].contiguous())
    ops.conv3x3(x.double(), weight.double())
    ops.conv3x3(x[:0], weight)
    with exact_convolutions():
        assert torch.equal(ops.conv3x3(x, weight), plain)
        reason = "native: rounds otherwise than the direct convolution that was asked for"
        with ops.use_backend("native"), pytest.raises(RuntimeError, match=reason):
            ops.conv3x3(x, weight)
    assert not calls
    with ops.use_backend("native"):
        ops.conv3x3(x.contiguous(), weight)
        ops.conv3x3(x[:0], weight)
        assert calls == [Way(2)] * 2, "forced, in the tiles that round least"
        with pytest.raises(RuntimeError, match="native: takes float32 and bfloat16, got torch.float64"):
            ops.conv3x3(x.double(), weight.double())


# What the module itself refuses: these guard memory where someone calls past the public function.


def refused(text: str, call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(ValueError, match=text):
        call(*args)


@pytest.mark.parametrize("isa", _C.isas())
def test_the_kernel_takes_only_what_it_can_address(isa: str) -> None:
    _C.force_isa(isa)
    weight = torch.randn(33, 12, 3, 3)
    good = {"x": image(2, 5, 6, 4), "x2": image(2, 7, 6, 4), "weights": lay_out(weight, Way(2), torch.float32)}
    good |= {"bias": torch.randn(33), "residual": image(2, 33, 6, 4), "y": image(2, 33, 6, 4), "tile": 2}
    good |= {"transformed": False, "threads": 1, "norm": (), "moments": None}
    _C.conv3x3(**good)

    def no(text: str, **other: Any) -> None:
        refused(text, lambda: _C.conv3x3(**good | other))

    laid = good["weights"]
    for wrong in (laid[:-1], torch.cat([laid, laid[:1]]), torch.stack([laid, laid], 1)[:, 0], laid.bfloat16()):
        no("weights: not laid out for these channels and tiles", weights=wrong)
    no("weights: not laid out", transformed=True)
    no("weights: not laid out", x2=None)
    no("weights: not laid out", weights=lay_out(weight, Way(4, True), torch.float32), transformed=True)
    no("weights: neither float32 nor bfloat16", weights=laid.double())
    for tile in (-2, 0, 1, 3, 6):
        no(f"tile: {tile}, where 2 and 4 are possible", tile=tile)
    for name, channels in (("x2", 7), ("residual", 33), ("y", 33)):
        plain = torch.randn(2, channels, 6, 4)
        no(f"{name}: not in channels_last", **{name: plain})
        no(f"{name}: not in channels_last", **{name: image(2, channels, 6, 8)[..., :4]})
        for wrong in (plain[:1], plain[:, :, :5], plain[..., :3], plain.bfloat16(), plain.double()):
            no(f"{name}: another dtype or shape than x asks for", **{name: wrong})
    no("residual: another dtype or shape", residual=image(2, 32, 6, 4))
    no("x: not in channels_last", x=torch.randn(2, 5, 6, 4))
    no("x: neither float32 nor bfloat16", x=image(2, 5, 6, 4, dtype=torch.float64))
    no("x, y: not of four dimensions", x=good["x"][0])
    no("x, y: not of four dimensions", y=None)
    no("x2: not of four dimensions", x2=good["x2"][0])
    for bias in (torch.randn(32), torch.randn(33, 2)[:, 0], torch.randn(33).double()):
        no(r"bias: not float32 \[K\]", bias=bias)
    no("not a plain tensor", x=good["x"].to("meta"))


def test_weights_are_laid_out_only_where_there_is_room() -> None:
    weight = torch.randn(33, 12, 3, 3)
    for way in (DIRECT, Way(2, True), Way(4, True)):
        right = lay_out(weight, way, torch.float32)
        for to in (right[:-1], torch.cat([right, right]), torch.stack([right, right], 1)[:, 0]):
            refused("to: of another size, or not contiguous", _C.convolution_weights, weight, to, way.tile, False, 1)
    right = lay_out(weight, DIRECT, torch.float32)
    for wrong in (weight[0], weight[..., :2], weight[:, :, :2], None):
        refused(r"weight: not \[K, C, 3, 3\]", _C.convolution_weights, wrong, right, 0, False, 1)
        refused(r"weight: not \[K, C, 3, 3\]", _C.convolution_room, wrong, 0, False, False)
    refused("weight: neither float32", _C.convolution_weights, weight.double(), right, 0, False, 1)
    refused("to: neither float32", _C.convolution_weights, weight, right.double(), 0, False, 1)
    refused("tile: 1, where", _C.convolution_room, weight, 1, True, False)
    refused("tile: 3, where", _C.convolution_weights, weight, right, 3, False, 1)


# What chains keep.

OF_CHAINS = ([*ROW, 2, False],), {"fixed": ([*ROW, 4, True],)}


def layer(c: int = 128, k: int = 128) -> nn.Conv2d:
    return nn.Conv2d(c, k, 3, 1, 1)


def filtered(made: Table) -> int:
    """The bytes of the transformed weights that are there."""
    kept = [entry.value for entry in made.values() if isinstance(entry.value, Prepared)]
    return sum(laid.nbytes for one in kept for way, laid in one._laid_out.items() if way.transformed)


def against_the_library(y: Tensor, x: Tensor, conv: nn.Conv2d) -> None:
    with torch.no_grad():
        half = x.dtype is torch.bfloat16
        exact = F.conv2d(x.double(), conv.weight.to(x.dtype).double(), conv.bias.to(x.dtype).double(), padding=1)
        plain = F.conv2d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=1)
        hold(y, plain, exact, (2, 2) if half else BOUND)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@torch.no_grad()
def test_weights_are_transformed_once(dtype: torch.dtype, table: Callable[..., None], calls, monkeypatch) -> None:
    """For all shapes of images that take the same tiles; and anew where they were changed in place."""
    made, plain = [], _C.convolution_weights
    monkeypatch.setattr(_C, "convolution_weights", lambda *args: made.append(1) or plain(*args))
    tile = 4 if dtype is torch.float32 else 2
    table([*ROW, 2, False], fixed=([*ROW, tile, True],))
    conv, images = layer(), [image(n, 128, 16, 16, dtype=dtype) for n in (1, 2, 1)]
    with fixed_weights(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        for x in images:
            against_the_library(convolve(x, conv), x, conv)
        assert len(made) == 1 and calls == [Way(tile, True)] * 3
        for change in (lambda: conv.weight.mul_(1.5), lambda: conv.bias.add_(1)):
            before = convolve(images[0], conv)
            change()
            after = convolve(images[0], conv)
            assert error(after, before.double()) > 0.1
            against_the_library(after, images[0], conv)


@torch.no_grad()
def test_the_bytes_of_transformed_weights_are_counted(table: Callable[..., None], calls) -> None:
    table(*OF_CHAINS[0], **OF_CHAINS[1])
    layers = [layer(), layer(128, 70), layer(128, 3)]
    with fixed_weights() as made:
        for conv in layers * 2:
            convolve(image(2, 128, 16, 16), conv)
        assert made.transformed() == filtered(made) > 0
        with torch.autocast("cpu", torch.bfloat16):
            table([*ROW, 2, True])
            convolve(image(1, 128, 16, 16), layers[0])
        assert made.transformed() == filtered(made)
    assert calls == [Way(4, True)] * 6 + [Way(2, True)]


@pytest.mark.parametrize("later", [2, 0])
@torch.no_grad()
def test_weights_beyond_the_limit_are_transformed_in_each_call(later: int, table, calls, monkeypatch) -> None:
    """Or not at all, where that isn't faster than the library."""
    table([*ROW, later, False], fixed=([*ROW, 4, True],))
    layers = [layer(), layer(), layer(128, 70)]
    monkeypatch.setattr(weights, "MOST_TRANSFORMED", 36 * 128 * 128 * 4)
    with fixed_weights() as made:
        for conv in layers * 2:
            x = image(2, 128, 16, 16)
            against_the_library(convolve(x, conv), x, conv)
        assert filtered(made) == weights.MOST_TRANSFORMED
    assert calls == ([Way(4, True)] + 2 * [Way(later)] * bool(later)) * 2


@torch.no_grad()
def test_what_is_not_kept_is_not_counted(table: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer beyond the limit takes nothing from one that fits."""
    table(*OF_CHAINS[0], **OF_CHAINS[1])
    monkeypatch.setattr(weights, "MOST_TRANSFORMED", 36 * 128 * 128 * 4)
    with fixed_weights() as made:
        convolve(image(1, 128, 16, 16), layer(128, 256))
        assert made.transformed() == filtered(made) == 0


@torch.no_grad()
def test_weights_that_change_are_counted_once(table: Callable[..., None]) -> None:
    """What was made of them before is gone."""
    table(*OF_CHAINS[0], **OF_CHAINS[1])
    conv, x = layer(), image(1, 128, 16, 16)
    with fixed_weights() as made:
        for _ in range(3):
            convolve(x, conv)
            conv.weight.mul_(1.5)
        assert made.transformed() == filtered(made)


@torch.no_grad()
def test_exact_ones_where_others_were_before(table: Callable[..., None], calls: list[Way]) -> None:
    """With the same weights and shapes, in the same chain."""
    table(*OF_CHAINS[0], **OF_CHAINS[1])
    conv, x = layer(), image(1, 128, 16, 16)
    with fixed_weights():
        convolve(x, conv)
        with exact_convolutions():
            convolve(x, conv)
        assert len(calls) == 1
        convolve(x, conv)
    assert len(calls) == 2
