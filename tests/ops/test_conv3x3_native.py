"""What the native conv3x3 promises beyond the rule of every op (test_conv3x3.py): Winograd's filtering rounds otherwise
than a direct convolution, and may do so only by as much as docs/convolution.md says."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from filtering import BEST, BOUND, FORCED, hold, image, looked_up_again, told, watched  # noqa: F401
from native_state import restored  # noqa: F401
from oracle import assert_rule, check, error, laid_out
from torch import Tensor

from ddpm_fast import _C, ops
from ddpm_fast.ops import _conv3x3
from ddpm_fast.ops._conv3x3 import DIRECT, KINDS, WEIGHT, Way, convolve, lay_out, room
from ddpm_fast.reference import conv3x3 as reference

pytestmark = FORCED

CHANNELS_LAST = torch.channels_last
FLOAT, HALF = torch.float32, torch.bfloat16
WAYS = [(dtype, Way(tile, made)) for dtype in (FLOAT, HALF) for tile in (2, 4) for made in (False, True)]
Shape = tuple[int, int, int, int, int, int]
Tensors = dict[str, Tensor]

# (N, C1, C2, K, H, W): why
SHAPES = [
    (1, 1, 0, 1, 1, 1),  # a pixel, of which a tile needs only what is outside, too
    (2, 5, 0, 3, 7, 5),  # less than a vector, less than a tile at the edges
    (1, 63, 0, 33, 1, 9),  # one channel less than lie together, one more than a panel
    (2, 65, 0, 70, 6, 3),
    (1, 130, 0, 33, 9, 10),
    (1, 300, 0, 70, 6, 7),  # weights that are transformed in two pieces
    (3, 1, 63, 3, 8, 9),  # the second image's channels lie across vectors, and fill the last one
    (1, 5, 48, 33, 6, 5),  # likewise, and then an odd number of them ends at a vector's end
    (2, 65, 65, 70, 4, 4),
    (1, 70, 300, 1, 5, 8),
    (5, 8, 0, 3, 37, 41),  # several blocks of tiles for each thread
    (1, 64, 6, 130, 26, 22),
]


@functools.cache
def arguments(shape: Shape, dtype: torch.dtype) -> Tensors:
    """Of this dtype; the weight and bias float32."""
    n, c1, c2, k, h, w = shape
    weight = torch.randn(k, c1 + c2, 3, 3).to(dtype).float()
    made = {"x": image(n, c1, h, w, dtype=dtype), "weight": weight}
    if c2:
        made["x2"] = image(n, c2, h, w, dtype=dtype)
    return made | {"bias": torch.randn(k), "residual": image(n, k, h, w, dtype=dtype)}


def bare(tensors: Tensors) -> Tensors:
    """Without bias and residual, whose own size would hide the sums' errors."""
    return {k: v for k, v in tensors.items() if k not in ("bias", "residual")}


def dirty(dtype: torch.dtype) -> None:
    """Leaves NaN in the memory that the kernel keeps for its next call, so that what is read unwritten shows."""
    weight, threads = torch.zeros(8, 1024, 3, 3), torch.get_num_threads()
    torch.set_num_threads(1)
    for tile in (2, 4):
        nan = torch.full((4, 1024, 16, 16), float("nan"), dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
        convolve(nan, lay_out(weight, Way(tile), dtype), Way(tile), 8)
    torch.set_num_threads(threads)


def run(way: Way, x: Tensor, weight: Tensor, **rest: Tensor) -> Tensor:
    return convolve(x, lay_out(weight, way, x.dtype), way, weight.shape[0], **rest)


def expected(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """In float64, and direct in the dtype of x."""
    kinds = {k: v.to(tensors["x"].dtype) for k, v in tensors.items()}
    return reference.conv3x3(**{k: v.double() for k, v in tensors.items()}), reference.conv3x3(**kinds)


def matrices(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Those of inputs, weights and outputs for these points, by Lagrange's formulas, in float64."""
    points, side = ((0, 1, -1) if tile == 2 else (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)), tile + 2
    exact = functools.partial(torch.zeros, dtype=torch.float64)
    inputs, weights, outputs = exact(side, side), exact(side, 3), exact(tile, side)
    for i, p in enumerate(points):
        others = [q for q in points if q != p]
        scale = torch.tensor([p - q for q in others], dtype=torch.float64).prod()
        weights[i] = torch.tensor([1, p, p * p], dtype=torch.float64) / scale
        outputs[:, i] = torch.tensor([p**j for j in range(tile)], dtype=torch.float64)
        inputs[i, : side - 1] = polynomial(others)
    weights[-1, -1] = outputs[-1, -1] = 1
    inputs[-1] = polynomial(list(points))
    return inputs, weights, outputs


def in_torch(x: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    """Winograd's filtering in x's dtype; in bf16 transforms and sums are float32's."""
    kind = FLOAT if x.dtype is HALF else x.dtype
    (b, g, a), (b_2, g_2, a_2) = ([m.to(kind) for m in matrices(tile)] for tile in (rows, columns))
    n, _, h, w = x.shape
    down, across = -(-h // rows), -(-w // columns)
    padded = F.pad(x.to(kind), (1, across * columns + 1 - w, 1, down * rows + 1 - h))
    d = padded.unfold(2, rows + 2, rows).unfold(3, columns + 2, columns)
    v, u = (t.to(x.dtype).to(kind) for t in (b @ d @ b_2.mT, g @ weight.to(kind) @ g_2.mT))
    m = torch.einsum("nchwij,kcij->nkhwij", v, u)
    y = a @ m @ a_2.mT
    y = y.permute(0, 1, 2, 4, 3, 5).reshape(n, -1, down * rows, across * columns)
    return y[..., :h, :w].to(x.dtype)


def polynomial(roots: list[float]) -> Tensor:
    """The coefficients of the product of all x - root, that of 1 first."""
    found = torch.ones(1, dtype=torch.float64)
    for r in roots:
        found = F.pad(found, (1, 0)) - r * F.pad(found, (0, 1))
    return found


def test_the_filtering_in_torch_is_a_convolution() -> None:
    x, weight = torch.randn(2, 5, 7, 9).double(), torch.randn(4, 5, 3, 3).double()
    for rows, columns in ((2, 2), (2, 4), (4, 4)):
        assert error(in_torch(x, weight, rows, columns), F.conv2d(x, weight, padding=1)) < 1e-14


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize(("dtype", "way"), WAYS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_on_every_set(shape: Shape, dtype: torch.dtype, way: Way, isa: str, poison_empty: None) -> None:
    """Any number of threads gives the same bits: they share out tiles and output channels, never a sum. Tiles of 4 of
    few channels may round more than BOUND, and no convolution chosen by the table does: what its matrices cost in any
    order of the sums is what they cost in torch, within a factor of 2."""
    _C.force_isa(isa)
    tensors = arguments(shape, dtype)
    truth, plain = expected(tensors)
    if way.tile == 4:
        whole = torch.cat([tensors[k] for k in ("x", "x2") if k in tensors], 1)
        plain = in_torch(whole, tensors["weight"], 4 if dtype is FLOAT else 2, 4)
        plain = (plain + tensors["bias"][:, None, None] + tensors["residual"]).to(dtype)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        dirty(dtype)
        results.append(run(way, **tensors))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert results[0].is_contiguous(memory_format=CHANNELS_LAST)
    hold(results[0], plain, truth, BOUND if (dtype, way.tile) == (FLOAT, 2) else (2, 2))
    other = run(Way(way.tile, not way.transformed), **tensors)
    assert torch.equal(results[0], other), "when weights are transformed changes no bit"


LARGE = [(2, 128, 0, 128, 16, 16), (1, 96, 160, 33, 17, 22), (1, 128, 0, 3, 32, 32)]


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("way", [Way(2), Way(4)], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_many_channels_are_within_the_bound(shape: Shape, way: Way, isa: str) -> None:
    _C.force_isa(isa)
    tensors = bare(arguments(shape, FLOAT))
    truth, plain = expected(tensors)
    hold(run(way, **tensors), plain, truth, BOUND)


def committed(kind: str) -> set[tuple[int, int, int, int]]:
    rows = _conv3x3._table().get(BEST, {}).get(kind, {})
    every = [row for what, of in rows.items() if what != WEIGHT for row in of]
    return {(c, k, side, tile) for n, c, k, side, tile, _ in every if tile and side <= 16}


@pytest.mark.parametrize("kind", KINDS.values())
def test_what_the_table_chooses_is_within_the_bound(kind: str) -> None:
    """Every pair of channels that it has, of up to 16 x 16 pixels; of two images: PyTorch convolves one otherwise."""
    dtype = {name: kind for kind, name in KINDS.items()}[kind]
    outside = []
    for c, k, side, tile in sorted(committed(kind)):
        if c * k * side * side > 1 << 23:
            continue
        tensors = bare(arguments((2, c, 0, k, side, side), dtype))
        truth, plain = expected(tensors)
        try:
            hold(run(Way(tile), **tensors), plain, truth, BOUND if dtype is FLOAT else (2, 2))
        except AssertionError as reason:
            outside.append((c, k, side, tile, reason.args[0]))
    assert not outside


@pytest.mark.parametrize(("dtype", "way"), WAYS, ids=str)
@pytest.mark.parametrize("isa", _C.isas())
def test_nothing_around_a_slice_is_read_or_written(isa: str, dtype: torch.dtype, way: Way) -> None:
    """Of larger tensors in channels_last, with NaN on both sides, at addresses that no vector is aligned to."""
    _C.force_isa(isa)
    tensors = arguments((2, 65, 5, 33, 5, 6), dtype)

    def part(of: Tensor) -> Tensor:
        n, c, h, w = of.shape
        larger = torch.full((n, c + 9, h, w), float("nan"), dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
        return larger[:, 3 : 3 + c].copy_(of)

    parts = {k: part(v) if v.ndim == 4 and k != "weight" else v for k, v in tensors.items()}
    alone = run(way, **tensors)
    assert torch.equal(run(way, **parts), alone)
    y = part(alone).zero_()
    weights = lay_out(tensors["weight"], way, dtype)
    _C.conv3x3(parts["x"], parts["x2"], (), weights, tensors["bias"], parts["residual"], y, None, *way, 1)
    assert torch.equal(y, alone)
    assert y._base is not None and y._base[:, :3].isnan().all() and y._base[:, 36:].isnan().all()


@pytest.mark.parametrize(("dtype", "way"), [*WAYS, (FLOAT, DIRECT), (HALF, DIRECT)], ids=str)
@pytest.mark.parametrize("isa", _C.isas())
def test_weights_wherever_they_lie(isa: str, dtype: torch.dtype, way: Way, poison_empty: None) -> None:
    """The same numbers in other memory, or rounded before, are laid out alike, on any number of threads; `gradient`
    stands for the weight turned round."""
    _C.force_isa(isa)
    weight = torch.randn(70, 37, 3, 3).bfloat16().float()
    turned = weight.flip(2, 3).transpose(0, 1)
    given = [laid_out(weight, "channels_last"), laid_out(weight, "slice"), weight.bfloat16(), turned]
    given += [weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1), torch.randn(70, 37, 1, 1).expand_as(weight)]
    for value in given:
        for gradient in (False, True):
            found = lay_out(value, way, dtype, gradient)
            other = (value.flip(2, 3).transpose(0, 1) if gradient else value).contiguous().float()
            torch.set_num_threads(3)
            assert found.isfinite().all() and torch.equal(found, lay_out(other, way, dtype))
            torch.set_num_threads(1)
    assert room(weight, way, dtype) == lay_out(weight, way, dtype).nbytes


@pytest.mark.parametrize(("dtype", "way"), WAYS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_who_sees_it(value: float, dtype: torch.dtype, way: Way) -> None:
    """And no other image, nor pixels that no tile shares with it."""
    tensors = dict(arguments((3, 20, 0, 9, 16, 16), dtype))
    before = run(way, **tensors)
    for place in ((4, 5), (0, 15), (15, 0)):
        tensors["x"] = arguments((3, 20, 0, 9, 16, 16), dtype)["x"].clone()
        tensors["x"][1, 7, place[0], place[1]] = value
        y = run(way, **tensors)
        away = [torch.arange(16).sub(p).abs() for p in place]
        seen, unseen = ([d.le(r) for d in away] for r in (1, 2 * way.tile))
        assert not y[1][:, seen[0][:, None] & seen[1]].isfinite().any()
        assert torch.equal(y[::2], before[::2])
        apart = ~(unseen[0][:, None] & unseen[1])
        assert torch.equal(y[1][:, apart], before[1][:, apart])


@pytest.mark.parametrize(("dtype", "way"), WAYS, ids=str)
def test_no_images(dtype: torch.dtype, way: Way) -> None:
    tensors = arguments((2, 5, 4, 3, 6, 5), dtype)
    none = {k: v[:0] if k in ("x", "x2", "residual") else v for k, v in tensors.items()}
    assert run(way, **none).shape == (0, 3, 6, 5)


def test_two_threads_at_once() -> None:
    shapes = [(1, 300, 0, 70, 6, 7), (2, 64, 6, 33, 20, 22), (1, 5, 0, 3, 3, 3), (3, 130, 0, 64, 9, 9)]
    alone = [run(Way(4), **arguments(s, FLOAT)) for s in shapes]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        for i, y in enumerate(pool.map(lambda i: run(Way(4), **arguments(shapes[i % 4], FLOAT)), range(40))):
            assert torch.equal(y, alone[i % 4])


# Gradients.

# Tiles of 4 where theirs is the same bound: of many channels, both ways.
TAKEN = [
    (4, (2, 64, 64, 128, 16, 16)),
    (2, (2, 64, 64, 128, 16, 16)),
    (2, (1, 130, 0, 70, 9, 11)),
    (2, (2, 3, 0, 64, 8, 8)),
]


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("tile", "shape"), TAKEN, ids=str)
def test_gradients(tile: int, shape: Shape, dtype: torch.dtype, isa: str, table, calls) -> None:
    """Two runs of a forward and a gradient of x by the kernel, in the tiles that the table says."""
    _C.force_isa(isa)
    tile = tile if dtype is FLOAT else 2
    table([1, 1, 1, 1, tile, False])
    tensors = {k: laid_out(v.double(), "channels_last") for k, v in arguments(shape, dtype).items()}
    factors = (5, 5) if dtype is FLOAT else (2, 3)
    options = {"backend": "native", "dtype": dtype, "layout": "channels_last", "factors": factors}
    check(ops.conv3x3, reference.conv3x3, tensors, wrt=list(tensors), **options)
    assert calls == [Way(tile)] * 4


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("given", KINDS, ids=str)
def test_gradients_under_autocast(given: torch.dtype, isa: str, table, calls) -> None:
    """Each has the dtype of its argument, as the library's have."""
    _C.force_isa(isa)
    table([1, 1, 1, 1, 2, False])
    tensors = dict(arguments((2, 70, 10, 33, 9, 8), HALF))
    tensors["x"], names = tensors["x"].to(given), list(tensors)
    cotangent = image(2, 33, 9, 8, dtype=HALF)

    def results(backend: str, to: torch.dtype | None) -> list[Tensor]:
        leaves = {k: v.detach().to(to or v.dtype).requires_grad_() for k, v in tensors.items()}
        with ops.use_backend(backend), torch.autocast("cpu", HALF, enabled=to is None):
            y = ops.conv3x3(**leaves)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.dtype))]

    truth, plain, fast = results("reference", torch.float64), results("reference", None), results("native", None)
    assert calls == [Way(2)] * 2 and [g.dtype for g in fast[1:]] == [tensors[k].dtype for k in names]
    for name, f, p, t in zip(["y", *names], fast, plain, truth, strict=True):
        assert_rule(name, f.to(HALF), p.to(HALF), t, 2 if name == "y" else 3)


@pytest.mark.parametrize("given", KINDS, ids=str)
@pytest.mark.parametrize("other", KINDS, ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_the_dtype_of_a_sum_with_a_residual(given: torch.dtype, other: torch.dtype, gradients: bool, table) -> None:
    """Is that of the reference, whatever the table says."""
    table([1, 1, 1, 1, 2, False])
    x, residual = image(1, 16, 8, 8, dtype=given), image(1, 16, 8, 8, dtype=other)
    for autocast in (False, True):
        weight = torch.randn(16, 16, 3, 3, dtype=given).requires_grad_(gradients)
        with torch.autocast("cpu", HALF, enabled=autocast):
            with ops.use_backend("reference"):
                plain = ops.conv3x3(x, weight, residual=residual).dtype
            assert ops.conv3x3(x, weight, residual=residual).dtype == plain, f"autocast {autocast}"


@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("x2",), ("bias",), ("residual",), ("weight", "bias"), ("x", "x2")]
)
def test_only_the_gradients_that_are_wanted(wanted: tuple[str, ...], table, calls) -> None:
    """Are those of all of them; without x's the kernel runs once."""
    table([1, 1, 1, 1, 2, False])
    tensors, cotangent = arguments((2, 9, 5, 7, 6, 6), FLOAT), image(2, 7, 6, 6)

    def gradients(of: tuple[str, ...]) -> Tensors:
        leaves = {k: v.detach().requires_grad_(k in of) for k, v in tensors.items()}
        ops.conv3x3(**leaves).backward(cotangent)
        assert all(v.grad is None for k, v in leaves.items() if k not in of)
        return {k: leaves[k].grad for k in of}

    every = gradients(tuple(tensors))
    calls.clear()
    for name, gradient in gradients(wanted).items():
        assert torch.equal(gradient, every[name]), name
    assert len(calls) == 1 + bool({"x", "x2"} & set(wanted))


def test_cotangents_of_any_kind(table) -> None:
    """Not in channels_last, expanded, negated: the same numbers have the same gradients."""
    table([1, 1, 1, 1, 2, False])
    tensors = arguments((2, 9, 5, 7, 6, 6), FLOAT)

    def gradients(cotangent: Tensor) -> tuple[Tensor, ...]:
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        return torch.autograd.grad(ops.conv3x3(**leaves), list(leaves.values()), cotangent)

    negated = torch._neg_view(image(2, 7, 6, 6))  # in channels_last, so that nothing copies it
    for cotangent in (torch.randn(2, 7, 6, 6), torch.ones(()).expand(2, 7, 6, 6), image(2, 9, 6, 6)[:, 1:8], negated):
        plain = cotangent.resolve_neg().contiguous(memory_format=CHANNELS_LAST)
        for got, expected_one in zip(gradients(cotangent), gradients(plain), strict=True):
            assert torch.equal(got, expected_one)
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    ops.conv3x3(**leaves).sum().backward()
    for leaf, gradient in zip(leaves.values(), gradients(torch.ones(2, 7, 6, 6)), strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_second_derivatives_and_batches_of_gradients_raise() -> None:
    x, weight = image(1, 4, 4, 4).requires_grad_(), torch.randn(4, 4, 3, 3)
    with ops.use_backend("native"):
        y = ops.conv3x3(x, weight)
    with pytest.raises(RuntimeError, match="conv3x3: this backend has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="takes no batched gradients"):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)
