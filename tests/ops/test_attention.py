import pytest
import torch
from oracle import assert_rule, check, laid_out, typed_backends

from ddpm_fast import ops
from ddpm_fast.models.attention import AttentionBlock
from ddpm_fast.models.made import fixed_weights
from ddpm_fast.ops import _native
from ddpm_fast.ops.attention import OP
from ddpm_fast.reference.attention import attention as reference

# (N, S, C): why
SHAPES = [
    (1, 1, 1),  # a single number
    (2, 7, 5),  # less than a vector
    (3, 64, 32),  # whole panels
    (5, 65, 33),  # one more than that, and more images than threads
    (1, 100, 70),  # several blocks of queries, in parts
]


TYPED = [each for each in typed_backends("attention") if each != ("native", torch.bfloat16)]  # which it doesn't take


def tokens(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, dtype=dtype) for name in "qkv"}


@pytest.mark.parametrize(("backend", "dtype"), TYPED, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "slice"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, dtype, layout, shape, poison_empty) -> None:
    check(ops.attention, reference, tokens(shape), backend=backend, dtype=dtype, layout=layout)


@pytest.fixture(params=_native.load().isas() if _native.wanted() else [])
def isa(request):
    kernels = _native.load()
    before = kernels.isa()
    kernels.force_isa(request.param)
    yield request.param
    kernels.force_isa(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(isa, shape, poison_empty) -> None:
    check(ops.attention, reference, tokens(shape), backend="native")


def test_nobody(isa) -> None:
    with ops.use_backend("native"):
        assert ops.attention(*(torch.empty(0, 4, 5),) * 3).shape == (0, 4, 5)


def test_by_hand() -> None:
    """Two tokens of one channel: weights e^0 and e^(q k)."""
    q, k, v = (torch.tensor([[[a], [b]]]) for a, b in ((1.0, 2.0), (0.0, 1.0), (3.0, 5.0)))
    e = torch.tensor([1.0, 2.0]).exp()
    assert torch.allclose(ops.attention(q, k, v)[0, :, 0], (3 + 5 * e) / (1 + e))


def test_large_scores(isa) -> None:
    """Beyond float32's exponentials: the largest is taken away before."""
    with ops.use_backend("native"):
        q = torch.tensor([[[1000.0], [-1000.0]]])
        assert ops.attention(q, q, q)[0, :, 0].tolist() == [1000.0, -1000.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_with_its_query(isa, bad) -> None:
    given = tokens((2, 40, 8), torch.float32)
    given["q"][1, 3, 2] = bad
    with ops.use_backend("native"):
        out = ops.attention(**given)
    expected = reference(**given)
    assert torch.equal(out.isnan(), expected.isnan()) and out[1, 3].isnan().all() and out.isnan().sum() == 8


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads) -> None:
    given, before = tokens((2, 70, 40), torch.float32), torch.get_num_threads()
    with ops.use_backend("native"):
        expected = ops.attention(**given)
        try:
            torch.set_num_threads(threads)
            assert torch.equal(ops.attention(**given), expected)
        finally:
            torch.set_num_threads(before)


def test_who_takes_what() -> None:
    """Gradients, other dtypes and autocast are the reference's."""
    native, given = OP.impls[0], tokens((1, 4, 4), torch.float32)
    assert native.rejects(**given) is None
    assert "float32" in native.rejects(*(t.bfloat16() for t in given.values()))
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in native.rejects(**given)
    given["k"].requires_grad_()
    assert "gradient" in native.rejects(**given)
    out = ops.attention(**given)
    out.sum().backward()
    assert given["k"].grad is not None


def test_in_a_block(monkeypatch) -> None:
    """Where no gradient is wanted a block attends natively, and as exactly."""
    calls = []
    plain = OP.impls[0].run
    monkeypatch.setattr(OP.impls[0], "run", lambda *a: calls.append(a[0].shape) or plain(*a))
    block, x = AttentionBlock(64), torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        alone = block(x)
        with fixed_weights():
            in_chain = block(x)
        with ops.use_backend("reference"):
            expected = block(x)
        truth = block.double()(x.double())
    assert len(calls) == 2
    assert_rule("alone", alone, expected, truth, 2)
    assert_rule("in a chain", in_chain, expected, truth, 2)


X = torch.randn(2, 4, 5)


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        ((X[0], X, X), ValueError, "q must have 3 dim"),
        ((X.long(), X, X), TypeError, "q must be a floating"),
        ((X, X[:1], X), ValueError, r"k must have shape \[2, 4, 5\]"),
        ((X, X, X.double()), TypeError, "v must have dtype"),
        ((X[:, :0], X[:, :0], X[:, :0]), ValueError, "q must have tokens and channels"),
    ],
)
def test_bad_input(args, kind, text) -> None:
    with pytest.raises(kind, match=text):
        ops.attention(*args)


def test_strides(isa) -> None:
    """Parts of one projection, as a block without fixed weights makes them."""
    qkv = torch.randn(2, 20, 24)
    q, k, v = qkv.chunk(3, dim=-1)
    with ops.use_backend("native"):
        out = ops.attention(q, k, v)
        assert torch.equal(out, ops.attention(*(laid_out(t, "contiguous") for t in (q, k, v))))
