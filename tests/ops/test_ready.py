"""What the native module takes without Python's checks is what they would have let through, unchanged."""

import itertools
import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.ops import Dropout, NoiseState
from ddpm_fast.ops._dispatch import Op

if find_spec("ddpm_fast._C") is None:
    pytest.skip("the native module is not built here", allow_module_level=True)
from ddpm_fast import _C

STATE = NoiseState.at(5, 3)
N, C, H, W, T = 2, 8, 3, 5, 10


@pytest.fixture(autouse=True, params=["table", "attributes"])
def reading(request: pytest.FixtureRequest) -> Iterator[None]:
    """Through DLPack's table, and as under a torch that has none."""
    _C.read_by_attributes(request.param == "attributes")
    yield
    _C.read_by_attributes(False)


def op(name: str) -> Op:
    found: Op = sys.modules[f"ddpm_fast.ops.{name}"].OP
    return found


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (N, C, H, W))


def good() -> dict[str, list[list[Any]]]:
    """Of each op the values that each argument takes without checks, the first of them together."""
    x, rows, t = image(), torch.rand(4, 9), torch.tensor([0, T - 1])
    one, each = torch.rand(C), torch.rand(N, C)
    images = [x, x.bfloat16(), x.to(memory_format=torch.channels_last), torch.nn.Parameter(x, requires_grad=False)]
    noises = [STATE, x, x.bfloat16(), STATE._replace(first_sample=7)]
    return {
        "group_norm_silu": [
            [x, torch.nn.Parameter(x), image(N, C, 7, W)[:, :, 1:4]],
            [one, one.bfloat16(), torch.nn.Parameter(one), one[::2].repeat(2)],
            [one],
            [2, 8, 1],
            [1e-5, 0.0],
            [None],
            [None, one, each, each.bfloat16()],
            [None, x],
            [None, each],
            [None, each],
            ["silu", "none", "relu", "mish"],
            [None, Dropout(0.5, STATE), Dropout(1.0, STATE, 4)],
        ],
        "sampler_step": [
            [x],
            images,
            [rows, rows.double(), rows.bfloat16(), rows[:, :8]],
            [torch.tensor(2)],
            [*noises, None],
            [None, x],
            [None, *images, image(N, 2 * C, H, W)[:, C:]],
            [None, 1.0],
            [True, False],
            [None, image()],
            [None],
        ],
        "q_sample": [images, [t], [torch.rand(T)], [torch.rand(T)], noises],
        "diffusion_loss": [
            [*images, image().requires_grad_()],
            noises,
            ["l2", "l1", "huber"],
            [None, torch.rand(N)],
            [None],
            [None],
            ["mean", "none"],
        ],
        "noise": [[(2, 3), (0, 4), torch.Size((5,))], [STATE], [0, 255], [torch.float32]],
    }


class Sub(Tensor):
    """A tensor that isn't torch's own."""


def bad() -> list[Any]:
    """What an argument might be and mostly must not."""
    x, row, rows = image(), torch.rand(C), torch.rand(4, 8)
    tensors = [
        *(x[:1], x[0], x[:, :4], x[..., :2], x.double(), x.half(), x.long(), x.to("meta"), x.to_sparse(), x.numpy()),
        *(x.as_subclass(Sub), torch._neg_view(x), x.clone().requires_grad_(), x.expand(3, N, C, H, W), x[:0]),
        *(row[:4], row.double(), row.half(), torch.rand(2 * C)[::2], torch.rand(N, C)[:1], torch.rand(N, C).double()),
        *(rows[:, :7], rows.long(), rows.clone().requires_grad_(), rows[:0], torch.tensor(4), torch.tensor(-1)),
        *(torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), torch.tensor([1]), torch.tensor([0, T])),
        *(torch.tensor([0, -1]), torch.tensor([0, 1, 1]), torch.tensor([0.0, 1.0]), torch.rand(T + 1), torch.rand(())),
        *(torch.rand(T).double(), torch.rand(T).bfloat16(), torch.rand(T).requires_grad_(), torch.rand(2 * T)[::2]),
    ]
    states = [
        *(tuple(STATE), NoiseState(1, 2, 3), STATE._replace(first_sample=-1), STATE._replace(first_sample=2**56)),
        *(STATE._replace(seed=torch.tensor(1.0)), STATE._replace(draw=torch.tensor([1])), Dropout(0.5)),
        *(STATE._replace(first_sample=1.0), STATE._replace(draw=STATE.draw.to("meta")), Dropout(0.5, STATE, 256)),
        *(Dropout(0.5, tuple(STATE)), Dropout(1.5, STATE), Dropout(1, STATE), Dropout(math.nan, STATE)),
    ]
    numbers = [
        None,
        0,
        -1,
        1,
        3,
        2**70,
        True,
        1.0,
        0.0,
        -0.5,
        math.inf,
        math.nan,
        "silu",
        "l2",
        "none",
        "tanh",
        b"silu",
        (),
        (1,),
    ]
    return tensors + states + numbers + [[2, 3], (2, 2**35), (-1, 2), (2, 2.0), (2**40, 2**40), torch.float16, object()]


def agreed(name: str, arguments: list[Any]) -> bool:
    """Whether they are ready; then they also pass the checks as they are, and native rejects nothing."""
    of = op(name)
    native = of.impls[0]
    assert native.ready and native.rejects
    if not native.ready(*arguments):
        return False
    checked = of.check(*arguments)
    pairs = zip(arguments, checked, strict=True)
    same = all(a is b or (isinstance(a, type(b)) and not isinstance(a, bool) and a == b) for a, b in pairs)
    assert same and native.rejects(*checked) is None, arguments
    return True


@pytest.mark.parametrize("name", good())
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_ready_passes_the_checks(name: str, grad: bool) -> None:
    values = good()[name]
    usual = [of[0] for of in values]
    with torch.set_grad_enabled(grad):
        for place, choices in enumerate(values):
            for value in choices:
                arguments = usual[:place] + [value] + usual[place + 1 :]
                assert agreed(name, arguments), (place, value)
            for value in bad():
                agreed(name, usual[:place] + [value] + usual[place + 1 :])
        for (first, one), (second, two) in itertools.product(enumerate(usual), repeat=2):
            swapped = list(usual)
            swapped[first], swapped[second] = two, one
            agreed(name, swapped)


def test_gradients_are_ready_only_where_native_has_them() -> None:
    x, model_out, rows, k = image().requires_grad_(), image(), torch.rand(4, 8), torch.tensor(1)
    step = op("sampler_step").impls[0].ready
    assert step and not step(x, model_out, rows, k, None, None, None, None, False, None, None)
    with torch.no_grad():
        assert step(x, model_out, rows, k, None, None, None, None, False, None, None)
        assert not step(x, model_out, rows, k, STATE, None, model_out, None, False, None, None), "no column for it"
    loss = op("diffusion_loss").impls[0].ready
    assert loss and loss(x, STATE, "l2", None, None, None, "mean")
    assert not loss(model_out, x, "l2", None, None, None, "mean"), "no gradient for noise"


def test_both_ways_of_reading_see_the_same() -> None:
    """Each result, on tensors whose strides and offsets matter, equals the reference's."""
    whole = torch.randn(3, 12, 7, 9)
    for x in (whole, whole[1:, 2:10, 1:4, 2:7], whole.to(memory_format=torch.channels_last)[:, :8], whole[:, :, :, :1]):
        w = torch.randn(2 * x.shape[1])[::2]
        with ops.use_backend("reference"):
            y = ops.group_norm_silu(x, w, w, 2)
            noisy = ops.q_sample(x, torch.arange(len(x)), torch.rand(4), torch.ones(4), STATE)
        torch.manual_seed(0)
        with ops.use_backend("native"):
            torch.testing.assert_close(ops.group_norm_silu(x, w, w, 2), y)
            assert ops.q_sample(x, torch.arange(len(x)), torch.ones(4), torch.ones(4), STATE).shape == noisy.shape


def test_a_residual_has_the_channels_of_x_alone() -> None:
    x, x2, both = image(), image(N, 4, H, W), image(N, C + 4, H, W)
    for residual, fits in ((x, True), (both, False), (x2, False)):
        arguments = [x, None, None, 2, 1e-5, x2, None, residual, None, None, "silu", None]
        assert agreed("group_norm_silu", arguments) == fits


@pytest.mark.parametrize("mode", ["dispatch", "functorch", "forward_ad"])
def test_nothing_is_ready_where_torch_wants_to_see_its_operators(mode: str) -> None:
    x, row = image(), torch.rand(C)
    ready = op("group_norm_silu").impls[0].ready
    arguments = (x, row, row, 2, 1e-5, None, None, None, None, None, "silu", None)
    assert ready and ready(*arguments)
    if mode == "dispatch":
        from torch.utils._python_dispatch import TorchDispatchMode

        with TorchDispatchMode():
            assert not ready(*arguments)
    elif mode == "functorch":
        seen = []
        torch.func.vmap(lambda x: seen.append(ready(*arguments)) or x)(x)
        assert seen == [False]
    else:
        with torch.autograd.forward_ad.dual_level():
            assert not ready(*arguments)
