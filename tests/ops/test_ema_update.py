import pytest
import torch
from oracle import assert_rule, backends, laid_out
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.reference import ema_update as reference

BACKENDS = backends("ema_update")
# a scalar; less than a vector; one that ends inside a vector; an empty one; more than one thread's turn
SHAPES = ((), (3,), (5, 7), (0, 4), (3, 16, 3, 3), (40_001,))


def pairs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return tuple([torch.randn(s, generator=generator).to(dtype) for s in SHAPES] for _ in range(2))  # type: ignore[return-value]


def test_formula() -> None:
    average, value = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([3.0, -2.0], dtype=torch.float64)
    assert ops.ema_update([average], [value], 0.75) is None
    assert average.tolist() == [0.75 * 1 + 0.25 * 3, 0.75 * 2 - 0.25 * 2]


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_reference(backend: str, decay: float) -> None:
    averages, values = pairs()
    fast, plain, truth = ([a.clone() for a in averages] for _ in range(3))
    truth = [a.double() for a in truth]
    with ops.use_backend(backend):
        ops.ema_update(fast, values, decay)
    reference.ema_update(plain, values, decay)
    reference.ema_update(truth, [v.double() for v in values], decay)
    for i, (f, p, t) in enumerate(zip(fast, plain, truth, strict=True)):
        assert_rule(str(i), f, p, t, 2)
        end = {0.0: values, 1.0: averages}.get(decay)
        assert end is None or torch.equal(f, end[i])


@pytest.mark.parametrize("layout", ["channels_last", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_any_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    """Dispatched: what the fast path does not take goes to the reference, a pair of different strides among it."""
    for of_values in (dtype, torch.bfloat16):
        (averages, values), expected = pairs(dtype), pairs(dtype)[0]
        averages = [laid_out(a, layout) for a in averages]
        values = [v.to(of_values) for v in values]
        reference.ema_update(expected, values, 0.6)
        ops.ema_update(averages, values, 0.6)
        for got, wanted in zip(averages, expected, strict=True):
            assert got.dtype == dtype and torch.allclose(got, wanted, atol=4 * torch.finfo(dtype).eps)


def test_layouts_that_a_kernel_takes() -> None:
    if "native" not in BACKENDS:
        pytest.skip("needs the native module")
    a, v = (torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last) for _ in range(2))
    transposed, other = torch.randn(7, 9).T, torch.randn(7, 9).T
    expected = [torch.lerp(x, y, 0.25) for x, y in ((a, v), (transposed, other))]
    with ops.use_backend("native"):
        ops.ema_update([a, transposed], [v, other], 0.75)
        with pytest.raises(RuntimeError, match="same strides"):
            ops.ema_update([torch.zeros(9, 7)], [other], 0.5)
    assert torch.allclose(a, expected[0]) and torch.allclose(transposed, expected[1])


@pytest.mark.parametrize(("of_averages", "of_values"), [(torch.float32, torch.bfloat16), (torch.bfloat16,) * 2])
def test_all_tensors_in_one_launch_of_triton(of_averages: torch.dtype, of_values: torch.dtype) -> None:
    """The table of addresses serves as long as they stay: new values in them, and other tensors at other places."""
    if "triton" not in BACKENDS:
        pytest.skip("needs Triton")
    averages, values = pairs(of_averages)[0], pairs(of_values)[1]
    averages.append(torch.randn(9, dtype=of_averages)[1:])  # no address of 16 bytes
    values.append(torch.randn(9).to(of_values)[1:])
    for _ in range(2):
        expected = [torch.lerp(a.double(), v.double(), 0.25) for a, v in zip(averages, values, strict=True)]
        with ops.use_backend("triton"):
            ops.ema_update(averages, values, 0.75)
        for average, wanted in zip(averages, expected, strict=True):
            assert torch.allclose(average.double(), wanted, atol=2 * torch.finfo(of_averages).eps)
        for value in values:
            value.mul_(-2)


def test_what_triton_refuses() -> None:
    if "triton" not in BACKENDS:
        pytest.skip("needs Triton")
    a, b = torch.ones(8), torch.zeros(8)
    for averages, values, text in (
        ([a, a], [b, -b], "share no memory"),
        ([a[:6]], [a[2:]], "share no memory"),
        ([b[2:4]], [b[3:5]], "share no memory"),
        ([a, b.half()], [b.clone(), a.clone()], "one dtype"),
        ([a.view(2, 4)], [b.view(4, 2).T], "same strides"),
    ):
        with ops.use_backend("triton"), pytest.raises(RuntimeError, match=text):
            ops.ema_update(averages, values, 0.5)
    tied = torch.zeros(8)
    with ops.use_backend("triton"):
        ops.ema_update([torch.ones(8), torch.ones(4)], [tied, tied[4:]], 0.5)  # values are only read
    ops.ema_update([a], [b], 0.5)  # not asked for it, dispatch takes another
    assert a.eq(0.5).all()


def test_shared_memory_is_updated_in_order() -> None:
    """An average given twice, and values that are averages: as one pair after the other."""

    def calls() -> list[tuple[list[Tensor], list[Tensor]]]:
        a, b = torch.arange(4.0), torch.arange(4.0) * 3
        return [([a, a], [b, -b]), ([a, b], [b, a]), ([a, b], [a, b])]

    for (averages, values), (wanted, given) in zip(calls(), calls(), strict=True):
        ops.ema_update(averages, values, 0.5)
        for average, value in zip(wanted, given, strict=True):
            average.copy_(torch.lerp(average, value, 0.5))
        assert [x.tolist() for x in averages] == [x.tolist() for x in wanted]


def test_numbers_that_are_none() -> None:
    for backend in BACKENDS:
        average = torch.tensor([float("nan"), 1.0, 1.0, float("inf")] * 5)
        with ops.use_backend(backend):
            ops.ema_update([average], [torch.tensor([1.0, float("nan"), float("inf"), 1.0] * 5)], 0.9)
        assert average.isnan().tolist() == [True, True, False, True] * 5 and average[2::4].isinf().all()


def test_autograd_sees_the_change() -> None:
    average = torch.randn(8)
    weight = torch.randn(8, requires_grad=True)
    loss = (weight * average).sum()
    ops.ema_update([average], [torch.randn(8)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_and_inference_mode() -> None:
    parameter = torch.nn.Parameter(torch.ones(20))
    ops.ema_update([parameter], [torch.zeros(20)], 0.5)
    assert parameter.requires_grad and parameter.eq(0.5).all()
    with torch.inference_mode():
        average = torch.ones(20)
        ops.ema_update([average], [torch.zeros(20)], 0.5)
        assert average.eq(0.5).all()


def test_bad_input() -> None:
    x = torch.ones(3)
    for averages, values, decay, error, text in (
        (x, [x], 0.5, TypeError, "averages must be a list of tensors"),
        ([x], [x, x], 0.5, ValueError, "must be as many, got 1 and 2"),
        ([x], [torch.ones(4)], 0.5, ValueError, r"values\[0\] must have shape \[3\]"),
        ([x.long()], [x], 0.5, TypeError, r"averages\[0\] must be a floating point"),
        ([x], [None], 0.5, TypeError, r"values\[0\] must be a tensor"),
        ([torch.ones(1).expand(3)], [x], 0.5, ValueError, "memory for each element"),
        ([x], [x.clone()], 1.5, ValueError, "decay must be"),
        ([x], [x.to("meta")], 0.5, ValueError, r"values\[0\] must be on cpu"),
    ):
        with pytest.raises(error, match=text):
            ops.ema_update(averages, values, decay)
    ops.ema_update([], [], 0.5)
