"""The gradient of a convolution's weight by Winograd's filtering."""

import pytest
import torch
from filtering import BOUND, FORCED, hold, image, looked_up_again, told, watched  # noqa: F401
from native_state import restored  # noqa: F401
from torch import Tensor

from ddpm_fast import _C, ops
from ddpm_fast.ops._conv3x3 import DIRECT, WEIGHT, Way, choose, weight_gradient

pytestmark = FORCED

# (N, C, K, H, W): why
SHAPES = [
    (2, 5, 7, 5, 6),  # edge tiles, less than a vector
    (1, 2, 3, 4, 3),  # a single tile
    (1, 70, 33, 9, 4),  # more than a block of channels, and more than a panel
    (3, 64, 100, 7, 7),  # several images
    (5, 16, 64, 16, 16),  # more tiles than one chain of sums
    (9, 3, 5, 16, 16),  # and than are transformed at once
]


def library(x: Tensor, dy: Tensor) -> Tensor:
    weight = x.new_empty(dy.shape[1], x.shape[1], 3, 3)
    rest = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, x, weight, [dy.shape[1]], *rest)[1]


def images(n: int, c: int, k: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    return image(n, c, h, w), image(n, k, h, w)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_library(isa: str, shape: tuple[int, ...], poison_empty) -> None:
    """Tiles of 2 within the bound of results. Tiles of 4 round 2.9 times as much as these (docs/convolution.md: their K
    is 4.76 instead of 1.67), and are held to twice that."""
    _C.force_isa(isa)
    x, dy = images(*shape)
    truth, plain = library(x.double(), dy.double()), library(x, dy)
    small, large = weight_gradient(x, dy, Way(2)), weight_gradient(x, dy, Way(4))
    hold(small, plain, truth, BOUND)
    hold(large, small, truth, (6, 6))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(weight_gradient(x, dy, Way(4)), large)


def test_many_channels_and_tiles_are_within_the_bound() -> None:
    """Sums in short chains: the direct gradient's are long."""
    x, dy = images(8, 128, 128, 16, 16)
    hold(weight_gradient(x, dy, Way(4)), library(x, dy), library(x.double(), dy.double()), BOUND)


def test_slices() -> None:
    """Of larger tensors in channels_last, NaN around them."""
    x, dy = images(2, 9, 17, 6, 6)

    def part(of: Tensor) -> Tensor:
        n, c, h, w = of.shape
        larger = torch.full((n, c + 9, h, w), float("nan")).contiguous(memory_format=torch.channels_last)
        return larger[:, 3 : 3 + c].copy_(of)

    assert torch.equal(weight_gradient(part(x), part(dy), Way(4)), weight_gradient(x, dy, Way(4)))


def test_where_the_table_says_so(table, monkeypatch) -> None:
    calls, plain = [], _C.conv3x3_gradient
    monkeypatch.setattr(_C, "conv3x3_gradient", lambda *args: calls.append(args[3]) or plain(*args))
    table([4, 64, 64, 8, 2, False], weight=([4, 64, 64, 8, 4, False], [4, 64, 512, 8, 0, False]))
    for channels, expected in ((64, [4]), (512, [])):
        calls.clear()
        x, weight = image(4, 64, 8, 8), torch.randn(channels, 64, 3, 3, requires_grad=True)
        bias, dy = torch.randn(channels, requires_grad=True), image(4, channels, 8, 8)
        ops.conv3x3(x, weight, bias).backward(dy)
        assert calls == expected
        hold(weight.grad, library(x, dy), library(x.double(), dy.double()), BOUND)
        torch.testing.assert_close(bias.grad, dy.sum((0, 2, 3)))
    with ops.exact_convolutions():
        assert choose(torch.float32, (4, 64, 8, 8), 64, WEIGHT) == DIRECT


def test_what_the_module_refuses() -> None:
    x, dy = images(2, 5, 7, 4, 4)
    to = torch.empty(7, 5, 3, 3)
    for text, args in (
        ("to: not ", (x, dy, torch.empty(5, 7, 3, 3), 2)),
        ("to: of another dtype", (x, dy, to.double(), 2)),
        ("x: not float32", (x.bfloat16(), dy.bfloat16(), to, 2)),
        ("dy: another dtype or shape", (x, dy[:1], to, 2)),
        ("dy: not in channels_last", (x, dy.contiguous(), to, 2)),
        ("tile: 3", (x, dy, to, 3)),
        ("x, dy: empty", (x[:0], dy[:0], to, 2)),
    ):
        with pytest.raises(ValueError, match=text):
            _C.conv3x3_gradient(*args, 1)
