"""The native conv1x1, and who takes it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filtering import FORCED, image
from native_state import restored  # noqa: F401
from oracle import assert_rule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import _C, AttentionBlock
from ddpm_fast.info import pointwise
from ddpm_fast.models.made import fixed_weights
from ddpm_fast.models.weights import Own, convolve, prepared
from ddpm_fast.ops import _conv1x1, exact_convolutions
from ddpm_fast.ops._conv1x1 import most_pixels, pays
from ddpm_fast.ops._conv3x3 import DIRECT, is_exact, lay_out

pytestmark = FORCED

FLOAT, HALF = torch.float32, torch.bfloat16
# (N, C1, C2, K, H, W): why
SHAPES = [
    (1, 1, 0, 1, 1, 1),  # a pixel
    (2, 5, 3, 7, 3, 5),  # less than a vector; the second image tensor's channels lie across vectors
    (1, 63, 70, 33, 9, 8),  # one channel less than lie together, and an odd number in all
    (1, 256, 0, 250, 4, 4),  # few pixels: threads share the output channels
    (5, 8, 0, 260, 4, 4),  # which with 8 threads are two blocks
    (5, 64, 65, 70, 13, 11),  # blocks that begin and end within images
    (70, 6, 0, 40, 1, 1),  # and that consist of many
]


def given(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    n, c1, c2, k, h, w = shape
    return {
        "x": image(n, c1, h, w, dtype=dtype),
        "weight": torch.randn(k, c1 + c2, 1, 1).to(dtype).float(),
        "bias": torch.randn(k),
        "x2": image(n, c2, h, w, dtype=dtype) if c2 else None,
        "residual": image(n, k, h, w, dtype=dtype),
    }


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None, residual: Tensor | None) -> Tensor:
    y = F.conv2d(x if x2 is None else torch.cat([x, x2], dim=1), weight, bias)
    return y if residual is None else y + residual


def run(x: Tensor, weight: Tensor, moments: Tensor | None = None, **rest: Tensor | None) -> Tensor:
    return _conv1x1.convolve(x, lay_out(weight, DIRECT, x.dtype), weight.shape[0], moments=moments, **rest)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("isa", _C.isas())
def test_by_the_rule(isa: str, dtype: torch.dtype) -> None:
    """With all that is added and without; the moments are those of the result as it was rounded. The same bits on any
    number of threads."""
    _C.force_isa(isa)
    for shape in SHAPES:
        tensors = given(shape, dtype)
        bare = tensors | {"bias": None, "residual": None}
        for what in (tensors, bare):
            wide, narrow = (
                {k: None if v is None else v.to(kind) for k, v in what.items()} for kind in (torch.float64, dtype)
            )
            y = run(**what)
            assert y.dtype is dtype and y.is_contiguous(memory_format=torch.channels_last)
            assert_rule(f"y of {shape}", y, plain(**narrow), plain(**wide), 2)
            z = y.double()
            mean = z.mean((2, 3))
            exact = (z - mean[..., None, None]).square().sum((2, 3))
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                moments = torch.full((2, shape[0], shape[3]), float("nan"))
                assert torch.equal(run(**what, moments=moments), y) and torch.equal(run(**what), y)
                assert ((moments[0] - mean).abs() <= 1e-6 * z.abs().mean((2, 3)) + 1e-12).all()
                assert ((moments[1] - exact).abs() <= 1e-5 * exact + 1e-12).all()


def test_an_offset_costs_its_moments_little() -> None:
    """A mean of 1e4, which float32 rounds by 5e-4, hides no more than that."""
    moments, bias = torch.empty(2, 2, 32), torch.full((32,), 1e4)
    z = run(image(2, 64, 9, 9), torch.randn(32, 64, 1, 1), moments, bias=bias).double()
    exact = (z - z.mean((2, 3), keepdim=True)).square().sum((2, 3))
    assert ((moments[1] - exact).abs() <= 1e-4 * exact).all()


def test_rows_that_lie_apart_and_what_is_not_finite() -> None:
    """Images within wider ones; an infinity reaches its own pixel alone."""
    wide, weight = image(3, 24, 6, 6), torch.randn(8, 16, 1, 1)
    x = wide[:, 4:20]
    assert torch.equal(run(x, weight), run(x.contiguous(memory_format=torch.channels_last), weight))
    x[1, 3, 2, 5] = float("inf")
    bad = ~run(x, weight).isfinite()
    assert bad[1, :, 2, 5].all() and bad.sum() == 8


def test_the_kernel_takes_only_what_it_can_address() -> None:
    x, weight, y = image(2, 6, 4, 4), torch.randn(5, 6, 1, 1), image(2, 5, 4, 4)
    laid_out, moments = lay_out(weight, DIRECT, FLOAT), torch.empty(2, 2, 5)
    wrong = {
        "x: neither float32": (x.double(), None, laid_out, None, None, y, None),
        "x: not in channels_last": (x.contiguous(), None, laid_out, None, None, y, None),
        "x2: another dtype or shape": (x[:, :3], x[:1, 3:], laid_out, None, None, y, None),
        "y: another dtype or shape": (x, None, laid_out, None, None, y[:1], None),
        "residual: another dtype or shape": (x, None, laid_out, None, y[:, :4], y, None),
        "weights: not laid out": (x, None, laid_out[1:], None, None, y, None),
        "bias: not float32": (x, None, laid_out, torch.randn(6), None, y, None),
        "moments: not float32": (x, None, laid_out, None, None, y, moments[:, :1]),
        "x: without channels": (x[:, :0], None, laid_out[:0], None, None, y, None),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            _C.conv1x1(*arguments, 1)
    with pytest.raises(ValueError, match="weight: not"):
        _C.convolution_weights(weight, torch.empty(1), 2, False, 1)
    assert run(x[:0], weight).shape == (0, 5, 4, 4)


def test_who_takes_it() -> None:
    """What the table says for this set, in chains; not where exact convolutions are asked for."""
    most, two = most_pixels(FLOAT)
    assert pays(FLOAT, most, False) == (most > 0) and not pays(FLOAT, most + 1, False) and two >= most
    assert not pays(FLOAT, 0, False) and not pays(torch.float64, 1, False)
    with exact_convolutions():
        assert not pays(FLOAT, 1, False)
    assert len(pointwise()) == sum(most_pixels(dtype)[1] > 0 for dtype in (FLOAT, HALF))
    _C.force_isa("baseline")
    assert not pays(FLOAT, 1, False) and not pointwise()


@torch.no_grad()
def test_in_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two image tensors are read as they are, and concatenated where that isn't taken."""
    conv, (x, x2) = nn.Conv2d(96, 64, 1), (image(4, c, 8, 8) for c in (64, 32))
    joined = torch.cat([x, x2], dim=1)
    truth = F.conv2d(joined.double(), conv.weight.double(), conv.bias.double())
    for takes in (True, False):
        monkeypatch.setattr(_conv1x1, "pays", lambda *args, takes=takes: takes)
        with fixed_weights():
            y = convolve(x, conv, x2=x2)
            assert isinstance(prepared(conv, x).own(x, x2), Own) == takes
            assert_rule("y", y, conv(joined), truth, 2)
            assert_rule("y of one", convolve(joined, conv), conv(joined), truth, 2)
        assert torch.equal(convolve(x, conv, x2=x2), conv(joined))


@torch.no_grad()
def test_exactness_and_dtypes_that_change_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_conv1x1, "pays", lambda *args: not is_exact())
    calls, run_it = [], _conv1x1.convolve
    monkeypatch.setattr(_conv1x1, "convolve", lambda *args, **rest: calls.append(1) or run_it(*args, **rest))
    block, x = AttentionBlock(64, num_groups=8), image(2, 64, 8, 8)
    with fixed_weights():
        for exact in (False, True, False):
            calls.clear()
            with exact_convolutions(exact):
                block(x)
            assert len(calls) == (0 if exact else 2)
        with torch.autocast("cpu", HALF):
            conv = nn.Conv2d(64, 64, 1).half()  # neither float32 nor bfloat16
            assert_rule("y", convolve(x.to(HALF), conv), conv(x.to(HALF)), conv.double()(x.to(HALF).double()), 2)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_a_dispatch_mode_sees_the_librarys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_conv1x1, "pays", lambda *args: True)
    block, x = AttentionBlock(64, num_groups=8), image(2, 64, 8, 8)
    with fixed_weights():
        block(x)  # its weights are there now
        with Seen() as seen:
            block(x)
    assert seen.names.count("aten::convolution") == 2
