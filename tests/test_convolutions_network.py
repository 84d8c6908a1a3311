"""What becomes of whole networks whose convolutions are computed by Winograd's filtering."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filtering import BEST, FORCED, looked_up_again, told, watched  # noqa: F401
from native_state import restored  # noqa: F401
from networks import NETWORKS, inputs, network, run
from oracle import assert_rule, error
from torch import Tensor, nn

from ddpm_fast import _C, Diffusion, UNet, generate_cosine_schedule
from ddpm_fast.models.made import fixed_weights
from ddpm_fast.ops import _conv1x1, _conv3x3, exact_convolutions
from ddpm_fast.ops._conv3x3 import KINDS, Way

pytestmark = FORCED
SETS = [name for name in ("avx2", BEST) if name in _C.isas()]
ROW = [1, 64, 64, 8]
FLOAT = torch.float32


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A set, on which the ways are those of the committed table's first."""
    ways = next(iter(_conv3x3._table().values()))
    monkeypatch.setattr(_conv3x3, "_table", lambda: {request.param: ways})
    _conv3x3._nearest.cache_clear()
    _C.force_isa(request.param)
    return request.param


# Image size, and channels of the first level: whole tiles and vectors at every level, and edge tiles and remainders.
SIZES = [((16, 16), 64), ((12, 20), 72)]


def diffusion(dtype: torch.dtype = torch.float32, size=SIZES[0], **options) -> Diffusion:
    net = network(base_channels=size[1]).to(dtype)
    seed = {} if options.get("rng") == "torch" else {"seed": 3}
    return Diffusion(net, size[0], 3, None, generate_cosine_schedule(10), **seed | options)


def chain(d: Diffusion, steps: int) -> Tensor:
    return d.sample(2, "cpu", sampler="ddim", num_steps=steps)


def gradients(d: Diffusion) -> list[Tensor]:
    """The loss, and the gradients of all weights in one."""
    x = torch.randn(4, 3, *d.img_size, generator=torch.Generator().manual_seed(1))
    loss = d.train()(x.to(next(d.parameters())))
    grads = torch.autograd.grad(loss, list(d.model.parameters()))
    return [loss.detach(), torch.cat([g.flatten() for g in grads])]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chains(size, steps: int, dtype: torch.dtype, isa: str, calls: list[Way]) -> None:
    """Short ones, which transform weights in each call, and those for which they are transformed once. Their error is
    within that of a single convolution, relative to the direct one's."""
    half = torch.autocast("cpu", torch.bfloat16) if dtype is torch.bfloat16 else nullcontext()
    with half:
        exact = chain(diffusion(size=size, exact=True), steps)
        assert not calls
        fast, again = chain(diffusion(size=size), steps), chain(diffusion(size=size), steps)
    assert len(calls) >= 4 * steps and any(way.transformed for way in calls) == (steps == 10)
    truth = chain(diffusion(torch.float64, size), steps).double()
    assert torch.equal(fast, again) and not torch.equal(fast, exact)
    assert error(exact, truth) < torch.finfo(dtype).eps ** 0.5
    bound = 5 * error(exact, truth) + torch.finfo(dtype).eps
    assert error(fast, truth) <= bound


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_training_step(size, dtype: torch.dtype, isa: str, calls: list[Way]) -> None:
    half = dtype is torch.bfloat16

    def step(d: Diffusion) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return gradients(d)

    exact = step(diffusion(size=size, exact=True))
    assert not calls
    fast, truth = step(diffusion(size=size)), gradients(diffusion(torch.float64, size))
    assert len(calls) >= 8 and not any(way.transformed for way in calls)
    for name, f, e, t in zip(("loss", "gradients"), fast, exact, truth, strict=True):
        if half:
            f, e = f.bfloat16(), e.bfloat16()
        assert_rule(name, f, e, t.double(), 5)
    assert not torch.equal(fast[1], exact[1])


@pytest.mark.parametrize("options", [{"exact": True}, {"rng": "torch"}], ids=str)
def test_diffusions_that_are_exact(options: dict, calls: list[Way]) -> None:
    """As the network is inside exact convolutions, and so as the library alone."""
    d, plain = diffusion(**options), diffusion(**options)
    plain.exact = False
    assert not diffusion().exact
    torch.manual_seed(4)
    images, results = chain(d, 10), gradients(d)
    assert not calls
    torch.manual_seed(4)
    with exact_convolutions():
        assert torch.equal(chain(plain, 10), images)
        assert all(torch.equal(a, b) for a, b in zip(gradients(plain), results, strict=True))
    assert not calls


def test_exact_is_a_switch() -> None:
    with pytest.raises(TypeError, match="exact must be True or False"):
        diffusion(exact=1)


@pytest.mark.parametrize("half", [False, True])
def test_what_is_computed_again_is_as_exact(half: bool, table: Callable[..., None], calls: list[Way]) -> None:
    """The backward of recompute="block" runs outside of what the forward was in, and the other way round."""
    table([*ROW, 2, False])
    net = network(recompute="block")
    x, t, y = inputs(net)

    def gradients(inside: bool) -> list[Tensor]:
        with exact_convolutions(inside), torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = net(x, t, y).square().mean()
        with exact_convolutions(not inside):
            return list(torch.autograd.grad(loss, list(net.parameters())))

    gradients(True)
    assert not calls
    gradients(False)
    assert calls


# Of 17 norms, with the library's 1x1 convolutions and with our own, which tell moments of attention's result; else the
# second ones of all 8 blocks, and the first ones of mid.0, ups.0 and ups.3; and of mid.1.
INSIDE = {"batch norm": (0, 0), "no norm": (0, 0), "another activation": (0, 0), "attention at every level": (8, 12)}
INSIDE |= {"a skip beside as many channels": (19, 20), "no blocks before the next level": (5, 6)}


@pytest.mark.parametrize("own", [False, True], ids=["library's 1x1", "own 1x1"])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_norms_inside_of_convolutions(name: str, tile: int, own: bool, table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that reads nothing but what our own convolutions wrote, and what time and classes add: the second of a block
    always, the first behind blocks and upsampling, where the skip is of a block, too."""
    table([*ROW, tile, False])
    monkeypatch.setattr(_conv3x3, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(_conv1x1, "pays", lambda *args: own)
    inside, plain = [], _C.norm_of_moments
    monkeypatch.setattr(_C, "norm_of_moments", lambda *args: inside.append(1) or plain(*args))
    net = network(**NETWORKS[name])
    with fixed_weights():
        (fast,) = run(net.eval(), None)
    assert len(inside) == INSIDE.get(name, (11, 12))[own]
    slow, truth = run(net, False), run(net.double(), False)
    assert_rule(name, fast, slow[0], truth[0], 5)


def strange_activation(net: UNet) -> UNet:
    return network(channel_mults=(1, 1), num_res_blocks=2, activation=lambda x: F.silu(x).contiguous())


def strange_norm(net: UNet) -> UNet:
    net.downs[0].norm_2.weight = nn.Parameter(torch.rand(32)[::2])
    net.downs[1].norm_2.double().register_forward_pre_hook(lambda module, args: (args[0].double(),))
    net.downs[1].norm_2.register_forward_hook(lambda module, args, out: out.float())
    return net


def writing_block(net: UNet) -> UNet:
    net.downs[1] = InPlace(net.downs[1])
    return net


class InPlace(nn.Module):
    """Writes into what it is given, which is a skip, too."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.block(x.relu_(), *rest)


def writing_downsampling(net: UNet) -> UNet:
    net.downs[2].downsample = InPlace(net.downs[2].downsample)
    return net


def writing_connection(net: UNet) -> UNet:
    net.downs[1].residual_connection = InPlace(nn.Conv2d(16, 16, 1))
    return net


CHANGES = [strange_activation, strange_norm, writing_block, writing_downsampling, writing_connection]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_not_folded(change: Callable[[UNet], UNet], table, monkeypatch: pytest.MonkeyPatch) -> None:
    table([*ROW, 2, False])
    monkeypatch.setattr(_conv1x1, "pays", lambda *args: True)
    net = change(network(channel_mults=(1, 1), num_res_blocks=2)).eval()
    x, t, _ = inputs(net)
    for kind in (FLOAT, torch.float64):
        torch.set_default_dtype(kind)
        try:
            with fixed_weights():
                fast = net(x, t)
        finally:
            torch.set_default_dtype(FLOAT)
        net.fused = False
        assert error(fast, net(x, t).double()) < 1e-5
        net.fused = None
