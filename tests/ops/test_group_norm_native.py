"""What the native group_norm_silu promises beyond the rule of every op (test_group_norm_silu.py)."""

import threading
from typing import Any

import pytest
import torch
from native_state import restored  # noqa: F401
from oracle import error
from torch import Tensor

from ddpm_fast import _C, ops
from ddpm_fast.ops import DROPOUT, Dropout, NoiseState
from ddpm_fast.reference import group_norm_silu as reference

CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format
Tensors = dict[str, Tensor]


def arguments(n: int, c1: int, c2: int, size: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensors:
    shapes = {"x": (n, c1, size, size), "x2": (n, c2, size, size), "residual": (n, c1, size, size)}
    images = {k: torch.randn(s).to(dtype).contiguous(memory_format=layout) for k, s in shapes.items()}
    c = c1 + c2
    rows = {"weight": (c,), "bias": (c,), "add": (n, c), "scale": (n, c), "shift": (n, c)}
    return images | {k: torch.randn(s) for k, s in rows.items()}


def run(tensors: Tensors, backend: str = "native", **options: Any) -> list[Tensor]:
    """Outputs, then gradients of all tensors, for cotangents that depend on the shapes alone."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    with ops.use_backend(backend):
        out = ops.group_norm_silu(**leaves, **options)
        outs = list(out) if isinstance(out, tuple) else [out]
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outs]
        return [o.detach() for o in outs] + list(torch.autograd.grad(outs, list(leaves.values()), cotangents))


@pytest.mark.parametrize("layout", [CHANNELS_LAST, NCHW], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# More channels than a tile, an image of more pixels than a block, and ends that fill neither.
@pytest.mark.parametrize(("n", "c1", "c2", "size", "groups"), [(3, 152, 40, 7, 8), (1, 144, 0, 19, 12)])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_every_instruction_set_and_number_of_threads(n, c1, c2, size, groups, dtype, layout, activation) -> None:
    """Each set is within the rule; threads change no bit, because they share out whole channels and images."""
    tensors = arguments(n, c1, c2, size, dtype, layout)
    if not c2:
        del tensors["x2"], tensors["residual"]
    options = {
        "groups": groups,
        "activation": activation,
        "dropout": Dropout(0.2, NoiseState.at(2**40 + 3, 5, 2**33), DROPOUT + 3),
    }
    truth = run({k: v.double() for k, v in tensors.items()}, "reference", **options)
    plain = run(tensors, "reference", **options)
    for isa in _C.isas():
        _C.force_isa(isa)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(tensors, **options))
        for i, (one, two, three) in enumerate(zip(*results, strict=True)):
            assert torch.equal(one, two) and torch.equal(one, three), (isa, i)
            bound = 3 * error(plain[i], truth[i]) + torch.finfo(one.dtype).eps
            assert error(one, truth[i]) <= bound, (isa, i, error(one, truth[i]), bound)


@pytest.mark.parametrize("layout", [CHANNELS_LAST, NCHW], ids=str)
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_an_offset_costs_no_accuracy(offset: float, layout: torch.memory_format) -> None:
    """None beyond the data's own; torch in channels_last loses it even in float64, so the truth is NCHW."""
    x = (torch.randn(2, 32, 16, 16) + offset).contiguous(memory_format=layout)
    truth = reference.group_norm_silu(x.double().contiguous(), None, None, 8)
    with ops.use_backend("native"):
        assert error(ops.group_norm_silu(x, None, None, 8), truth) < 1e-6
    leaf, exact = x.clone().requires_grad_(), x.double().contiguous().requires_grad_()
    cotangent = torch.randn(x.shape)
    with ops.use_backend("native"):
        (got,) = torch.autograd.grad(ops.group_norm_silu(leaf, None, None, 8), leaf, cotangent)
    (expected,) = torch.autograd.grad(reference.group_norm_silu(exact, None, None, 8), exact, cotangent.double())
    assert error(got, expected) < 2e-6


@pytest.mark.parametrize("outlier", [1e5, -3e3])
def test_a_first_pixel_far_off_is_no_bad_pivot(outlier: float) -> None:
    x = torch.randn(2, 16, 24, 24)
    x[..., 0, 0] = outlier
    truth = reference.group_norm_silu(x.double(), None, None, 16, activation="none")
    for layout in (CHANNELS_LAST, NCHW):
        with ops.use_backend("native"):
            y = ops.group_norm_silu(x.contiguous(memory_format=layout), None, None, 16, activation="none")
        assert error(y, truth) < 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_around_a_slice_is_read_or_written(dtype: torch.dtype) -> None:
    """Channels 1 to 9 of 12, at an address that no vector is aligned to, with NaN on both sides."""
    for layout in (CHANNELS_LAST, NCHW):
        larger = torch.full((2, 12, 5, 5), float("nan")).to(dtype).contiguous(memory_format=layout)
        part = larger[:, 1:9]
        part.copy_(torch.randn(2, 8, 5, 5))
        leaf = part.detach().requires_grad_()
        with ops.use_backend("native"):
            y = ops.group_norm_silu(leaf, None, None, 2)
            (gradient,) = torch.autograd.grad(y, leaf, part.expand(2, 8, 5, 5))
            again = ops.group_norm_silu(part.contiguous(), None, None, 2)
        assert y.isfinite().all() and gradient.isfinite().all() and error(y, again.double()) < 2e-2
        assert larger[:, 0].isnan().all() and larger[:, 9:].isnan().all()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("isa", _C.isas())
def test_a_gradient_larger_than_the_caches_is_that_of_its_images(isa: str, aligned: bool, poison_empty: None) -> None:
    """A large dx is written past the caches where its rows are whole vectors; images don't depend on each other."""
    _C.force_isa(isa)
    channels = 64 if aligned else 68
    tensors = arguments(8, channels, 32, 56, torch.float32, CHANNELS_LAST)
    del tensors["residual"]
    one = {k: v if k in ("weight", "bias") else v[3:4] for k, v in tensors.items()}
    names = ["y", *tensors]

    def gradients(of: Tensors, cotangent: Tensor) -> dict[str, Tensor]:
        leaves = {k: v.detach().requires_grad_() for k, v in of.items()}
        with ops.use_backend("native"):
            y = ops.group_norm_silu(**leaves, groups=4)
            return dict(
                zip(names, (y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent)), strict=True)
            )

    cotangent = torch.randn(8, channels + 32, 56, 56).contiguous(memory_format=CHANNELS_LAST)
    all_of_them, alone = gradients(tensors, cotangent), gradients(one, cotangent[3:4])
    for name in ("y", "x", "x2", "add", "scale", "shift"):
        assert torch.equal(all_of_them[name][3:4], alone[name]), name


def test_a_gradient_that_is_expanded_or_in_another_layout() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=CHANNELS_LAST)
    for cotangent in (torch.ones(()).expand(2, 8, 4, 4), torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 1).expand_as(x)):
        grads = []
        for backend in ("native", "reference"):
            leaf = x.detach().requires_grad_()
            with ops.use_backend(backend):
                grads += torch.autograd.grad(ops.group_norm_silu(leaf, None, None, 2), leaf, cotangent)
        assert torch.allclose(*grads, atol=1e-6)


def test_dropout_is_drawn_again_from_where_it_was() -> None:
    """The owner of the state counts on between forward and backward."""
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    grads = []
    for counted in (0, 1):
        state = NoiseState.at(3, 1)
        with ops.use_backend("native"):
            y = ops.group_norm_silu(x, None, None, 2, dropout=Dropout(0.5, state))
        state.draw.add_(counted)
        grads += torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(*grads)


def test_second_derivatives_raise_and_the_reference_has_them() -> None:
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    with ops.use_backend("native"):
        y = ops.group_norm_silu(x, None, None, 2)
        with pytest.raises(RuntimeError, match="this backend has no second derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
    with ops.use_backend("reference"):
        (gradient,) = torch.autograd.grad(ops.group_norm_silu(x, None, None, 2).sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].isfinite().all()


def test_what_native_rejects_goes_to_the_reference() -> None:
    x = torch.randn(2, 8, 4, 4)
    assert ops.group_norm_silu(x.double(), None, None, 2).dtype == torch.float64
    assert ops.group_norm_silu(x[:0], None, None, 2).shape == (0, 8, 4, 4)
    assert torch.func.jvp(lambda v: ops.group_norm_silu(v, None, None, 2), (x,), (x,))[1].isfinite().all()
    assert torch.func.vmap(lambda v: ops.group_norm_silu(v[None], None, None, 2))(x).shape == (2, 1, 8, 4, 4)
    for wrong, reason in (
        (x.double(), "takes float32 and bfloat16, x is torch.float64"),
        (x[:0], "x is empty"),
    ):
        with ops.use_backend("native"), pytest.raises(RuntimeError, match=reason):
            ops.group_norm_silu(wrong, None, None, 2)


# Expanded over pixels, over channels and over images; overlapping; dense, but with no dimension where torch has it.
STRIDES = [(8, 1, 0, 0), (20, 0, 5, 1), (0, 20, 5, 1), (1, 10, 5, 1), (100, 1, 5, 1), (1, 1, 40, 8), (20, 40, 1, 4)]


@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_memory_that_is_laid_out_otherwise(strides: tuple[int, ...], compiled: bool, poison_empty: None) -> None:
    x = torch.as_strided(torch.randn(2000), (2, 8, 4, 5), strides)
    results = []
    for backend in ("native", "reference"):
        leaf, x2 = x.detach().requires_grad_(), x.flip(0).requires_grad_()
        with ops.use_backend(backend):
            run = (
                torch.compile(ops.group_norm_silu, backend="aot_eager", fullgraph=True)
                if compiled
                else ops.group_norm_silu
            )
            y = run(leaf, None, None, 2), run(leaf, None, None, 4, x2=x2)
            results.append([*y, *torch.autograd.grad((y[0] * 2).sin().sum() + y[1].sin().sum(), (leaf, x2))])
        torch._dynamo.reset()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


class Cut(torch.autograd.Function):
    """Has no gradient to give: what comes before gets none, not even zeros."""

    forward = staticmethod(lambda ctx, y: y * 2)
    backward = staticmethod(lambda ctx, dy: None)


def test_no_gradient_at_all() -> None:
    x, x2 = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4, requires_grad=True)
    Cut.apply(ops.group_norm_silu(x, None, None, 8, x2=x2)).sum().backward()
    assert x.grad is None and x2.grad is None


def test_gradients_share_no_memory() -> None:
    """Where they are kept and added to, one would change the other."""
    leaves = [torch.randn(1, c, 4, 4, requires_grad=True) for c in (8, 4, 8)]
    after = []
    for _ in range(2):
        y, h = ops.group_norm_silu(leaves[0], None, None, 4, x2=leaves[1], residual=leaves[2])
        ((y * y).sum() + h.sum()).backward()
        after.append([leaf.grad.clone() for leaf in leaves])
    assert all(torch.allclose(twice, 2 * once) for once, twice in zip(*after, strict=True))


def test_a_negated_view() -> None:
    x = torch.complex(torch.randn(2, 8, 1, 1), torch.randn(2, 8, 1, 1)).conj().imag
    expected = reference.group_norm_silu(x, None, None, 1)
    assert torch.allclose(ops.group_norm_silu(x, None, None, 1), expected, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: ops.group_norm_silu(v, None, None, 1), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-6)


def test_batched_gradients_raise() -> None:
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    y, batch = ops.group_norm_silu(x, None, None, 2), torch.randn(3, 2, 8, 4, 4)
    with pytest.raises(RuntimeError, match="takes no batched gradients"):
        torch.autograd.grad(y, x, batch, is_grads_batched=True)


def test_a_default_device_is_not_where_the_data_is() -> None:
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    with torch.device("meta"):
        ops.group_norm_silu(x, None, None, 2).sum().backward()
    assert x.grad is not None and x.grad.is_cpu


@pytest.mark.parametrize("activation", ["silu", "relu", "mish"])
def test_the_ends_of_float32(activation: str) -> None:
    """Through `shift`: values whose exponentials float32 doesn't hold, and what isn't finite."""
    x, w = torch.randn(1, 8, 2, 2, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    shift = torch.tensor([[3e38, -3e38, 1e3, -1e3, 90.0, -90.0, float("inf"), float("-inf")]], dtype=torch.float64)
    truth = run({"x": x, "weight": w, "bias": w, "shift": shift}, "reference", groups=1, activation=activation)
    for isa in _C.isas():
        _C.force_isa(isa)
        got = run({k: v.float() for k, v in {"x": x, "weight": w, "bias": w, "shift": shift}.items()}, "native",
                  groups=1, activation=activation)  # fmt: skip
        for mine, theirs in ((got[0], truth[0]), (got[4], truth[4])):  # y, and the gradient of shift
            finite = theirs.isfinite()
            assert torch.allclose(mine[finite].double(), theirs[finite], rtol=1e-5, atol=1e-6)
            assert not mine[theirs.isnan()].isfinite().any()


def test_a_tiny_eps() -> None:
    assert ops.group_norm_silu(torch.zeros(1, 4, 2, 2), None, None, 2, eps=1e-50).abs().max() == 0


def test_two_threads_at_once() -> None:
    x = torch.randn(4, 64, 16, 16).contiguous(memory_format=CHANNELS_LAST)
    alone = ops.group_norm_silu(x, None, None, 8)
    wrong = []

    def work() -> None:
        wrong.extend(i for i in range(50) if not torch.equal(ops.group_norm_silu(x, None, None, 8), alone))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autocast_keeps_bf16() -> None:
    x, w = torch.randn(2, 8, 4, 4).bfloat16(), torch.ones(8)
    with torch.autocast("cpu", torch.bfloat16), ops.use_backend("native"):
        assert ops.group_norm_silu(x, w, w, 2).dtype == torch.bfloat16


def test_the_native_boundary_refuses_what_it_can_not_address() -> None:
    x, y = torch.randn(2, 8, 4, 4), torch.empty(2, 8, 4, 4)

    def call(
        x: Tensor = x, y: Tensor = y, groups: int = 2, weight: Tensor | None = None, x2: Tensor | None = None,
        residual: Tensor | None = None, h: Tensor | None = None,
    ) -> bool:  # fmt: skip
        rows = (weight, weight, None, None, None)
        return _C.group_norm_silu(x, x2, residual, rows, None, y, h, groups, 1e-5, 1, None, 1)

    assert call()
    apart = torch.randn(2, 8, 4, 5)[..., :4]  # rows that aren't adjacent
    assert not call(x=apart) and not call(y=apart), "memory that needs a copy"
    assert not call(weight=torch.ones(8, 2)[:, 0]) and not call(weight=torch.ones(8, dtype=torch.float64))
    with pytest.raises(ValueError, match="groups must divide the channels"):
        call(groups=3)
    with pytest.raises(ValueError, match="y: another shape"):
        call(y=y[:1])
    with pytest.raises(ValueError, match="y: another dtype"):
        call(y=y.bfloat16())
    with pytest.raises(ValueError, match="y: not a plain tensor"):
        call(y=y.to("meta"))
    both = torch.empty(2, 16, 4, 4)
    assert call(x2=x, y=both, residual=x, h=y)
    with pytest.raises(ValueError, match="residual: another shape"):
        call(x2=x, y=both, residual=both, h=y)
    with pytest.raises(ValueError, match="h: another shape"):
        call(x2=x, y=both, residual=x, h=both)
    rows = (None,) * 5
    statistics = torch.zeros(2, 2, 2, dtype=torch.float64)

    def back(dh: Tensor) -> bool:
        return _C.group_norm_silu_backward(x, x, both, dh, rows, statistics, y, y, rows, 2, 1e-5, 1, None, 1)

    assert back(x)
    with pytest.raises(ValueError, match="dh: another shape"):
        back(both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flat_image_is_its_bias(dtype: torch.dtype) -> None:
    """Nothing of its offset is left, though eps magnifies what rounding leaves 316 times."""
    bias = torch.randn(8)
    y = ops.group_norm_silu(torch.full((2, 8, 5, 7), 1000.0, dtype=dtype), torch.ones(8), bias, 4)
    expected = torch.nn.functional.silu(bias)[:, None, None].expand(2, 8, 5, 7)
    assert torch.allclose(y.float(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_scale_keeps_signs(dtype: torch.dtype) -> None:
    x = torch.tensor([2.0, 4.0], dtype=dtype).reshape(1, 1, 1, 2)
    y = ops.group_norm_silu(x, None, None, 1, scale=torch.full((1, 1), float("inf")), activation="none")
    assert y.flatten().tolist() == [-float("inf"), float("inf")]


def test_a_graph_may_meet_no_images() -> None:
    """What eager calls give to the reference, a compiled graph of a dynamic batch hands to its node."""
    x, weight, bias = (
        torch.empty(0, 8, 3, 5, requires_grad=True),
        *(torch.ones(8, requires_grad=True) for _ in range(2)),
    )
    rest = (4, 1e-5, "silu", 0.0, 0, 0, None, None)
    y, *_ = torch.ops.ddpm_fast.group_norm_silu_native(x, None, None, weight, bias, None, None, None, *rest)
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == x.shape and not dweight.any() and not dbias.any()


def test_groups_of_one_element_without_eps_are_no_numbers() -> None:
    x = torch.randn(2, 4, 1, 1, requires_grad=True)
    y = ops.group_norm_silu(x, None, None, 4, eps=0)
    assert y.isnan().all() and torch.autograd.grad(y.sum(), x)[0].isnan().all()
