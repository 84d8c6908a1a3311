"""What chains make of weights once, and what they must notice meanwhile."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from networks import DTYPES, PLACES, hooked, inputs, network, replaced, run
from oracle import assert_rule, error
from torch import Tensor, nn
from torch.autograd import forward_ad

from ddpm_fast import Diffusion, Upsample, generate_cosine_schedule
from ddpm_fast.models import weights
from ddpm_fast.models.made import fixed_weights
from ddpm_fast.models.sums import Sum
from ddpm_fast.models.weights import Prepared, convolve


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(3, 16), (16, 16), (40, 24), (160, 160)])
@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (3, 2, 1), (2, 1, 1)])
@pytest.mark.parametrize("images", [1, 4])
@torch.no_grad()
def test_a_convolution_in_chains(
    images: int, size: int, stride: int, padding: int, channels: tuple[int, int], dtype: torch.dtype
) -> None:
    """Small and large ones take other ways. The library's own error is that with several images: a single small one it
    gives to another algorithm."""
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, size, stride, padding).to(dtype)
    x = torch.randn(images, channels[0], 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    truth = nn.Conv2d(*channels, size, stride, padding).double()
    truth.load_state_dict(conv.state_dict())
    with fixed_weights():
        fast, bare = convolve(x, conv), convolve(x, conv, False)
    bias = truth.bias[:, None, None]
    assert fast.is_contiguous(memory_format=torch.channels_last)
    several = torch.cat([x] * 8)
    plain = F.conv2d(several, conv.weight, None, stride, padding)[:images]
    assert_rule("y", fast, conv(several)[:images], truth(x.double()), 2)
    assert_rule("without bias", bare, plain, truth(x.double()) - bias, 2)


@pytest.mark.parametrize(("size", "channels"), [(1, 64), (3, 16), (3, 160)])
@torch.no_grad()
def test_bf16_on_a_cpu_that_has_none(size: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is rounded but the result: products are float32's, which there is far faster than the library's bf16."""
    monkeypatch.setattr(weights, "onednn_takes_bf16", lambda: False)
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, size, padding=size // 2)
    x, residual = torch.randn(2, 2, channels, 16, 16).bfloat16()
    x, residual = (i.contiguous(memory_format=torch.channels_last) for i in (x, residual))
    truth = copy.deepcopy(conv).double()(x.double())
    with fixed_weights(), torch.autocast("cpu", torch.bfloat16):
        y, bare = convolve(x, conv), convolve(x, conv, False)
        more = weights.convolve3x3(x, conv, residual=residual) if size == 3 else None
    half = torch.finfo(torch.bfloat16).eps / 2
    for got, expected in ((y, truth), (bare, truth - conv.bias[:, None, None])):
        assert got.dtype is torch.bfloat16 and got.is_contiguous(memory_format=torch.channels_last)
        assert ((got - expected).abs() <= half * expected.abs() + 1e-5).all()
    assert more is None or torch.equal(more, y + residual)


def test_they_are_made_once_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """And seen to have changed by the next one, also past torch's counters."""
    made, plain = [], Prepared.__init__
    monkeypatch.setattr(Prepared, "__init__", lambda self, *args, **more: made.append(1) or plain(self, *args, **more))
    net = network()
    diffusion = Diffusion(net, (8, 12), 3, None, generate_cosine_schedule(10))

    def draw() -> Tensor:
        return diffusion.sample(2, "cpu", seed=1, use_ema=False)

    first = draw()
    once = len(made)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert 0.5 * convolutions < once <= convolutions
    net.out_conv.weight.data.numpy()[:] *= -1
    assert error(draw(), first) > 0.1 and len(made) == 2 * once
    net.fused = False
    expected = draw()
    assert len(made) == 2 * once
    net.fused = None
    assert error(draw(), expected) < 1e-4


def test_the_plain_path_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prepared, "__init__", lambda *args, **more: pytest.fail("something was prepared"))
    plus = Sum.plus
    monkeypatch.setattr(Sum, "plus", lambda a, b: pytest.fail("left for later") if a.later else plus(a, b))
    net = network().eval()
    with fixed_weights():
        run(net, False)


# What lives in a chain longer than a step.


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad(), fixed_weights():
        yield


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[f"{owner} {name}" for owner, name in PLACES])
def test_modules_that_are_changed_in_between_are_called(without_gradients, owner: str, name: str, fused) -> None:
    """As guidance by hooks does, in every step."""
    net = network(fused=fused).double().eval()
    before = net(inputs(net)[0].double(), *inputs(net)[1:])
    for change in (hooked, replaced):
        change(net.get_submodule(owner), name)
        out = net(inputs(net)[0].double(), *inputs(net)[1:])
        assert error(out, before) > 1e-6
        assert error(out, run(net, False)[0]) < 1e-12
        net.fused, before = fused, out


@pytest.mark.parametrize("fused", [True, None])
def test_weights_that_change_in_between_are_seen(without_gradients, fused) -> None:
    """In place, and put in the place of others."""
    net = network(fused=fused, attention_resolutions=(0, 1)).double().eval()
    x, t, _ = inputs(net)
    others = {name: 1.5 * p for name, p in network(attention_resolutions=(0, 1)).double().state_dict().items()}
    net(x.double(), t)
    swapped = torch.func.functional_call(net, others, (x.double(), t))
    for p in net.parameters():
        p.mul_(1.5)
    got = net(x.double(), t)
    assert error(swapped, run(net, False)[0]) < 1e-12 and error(got, swapped) < 1e-12


def test_modules_that_come_and_go(without_gradients) -> None:
    """An identity may be that of a module that is no more."""
    x, t, _ = inputs(network())
    for width in (16, 24, 16, 24):
        net = network(base_channels=width).eval()
        out = net(x, t)
        net.fused = False
        assert error(out, net(x, t)) < 1e-4
        del net


@pytest.mark.parametrize("fused", [True, None])
def test_a_block_in_two_places(without_gradients, fused) -> None:
    net = network(num_res_blocks=3, fused=fused).double().eval()
    net.downs[1] = net.downs[2] = net.downs[0]
    net.ups[2] = net.ups[1]
    first, second = run(net, fused)[0], run(net, fused)[0]
    plain = run(net, False)[0]
    assert error(first, plain) < 1e-12 and error(second, plain) < 1e-12


@pytest.mark.parametrize("fused", [True, None])
def test_nothing_that_someone_else_holds_is_overwritten(without_gradients, fused) -> None:
    held: list[Tensor] = []
    net = network(fused=fused).eval()
    net.mid[0].attention.to_out.register_forward_hook(lambda module, args, out: held.extend([out, out.clone()]))
    run(net, fused)
    assert torch.equal(*held)


@pytest.mark.parametrize("fused", [True, None])
def test_no_images(without_gradients, fused) -> None:
    net = network(fused=fused).eval()
    x, t, _ = inputs(net)
    assert net(x[:0], t[:0]).shape == (0, 3, 8, 12)


def test_float64_under_autocast(without_gradients) -> None:
    """Which autocast leaves alone."""
    net = network().double().eval()
    x, t, _ = inputs(net)
    with torch.autocast("cpu", torch.bfloat16):
        for net.fused in (True, None):
            out = net(x.double(), t)
            assert out.dtype is torch.float64 and error(out, run(net, False)[0]) < 1e-12


def test_forward_mode_gradients() -> None:
    """Of phases, and of what is prepared, neither of which knows them."""
    layer = Upsample(128)
    x = torch.randn(4, 128, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), fixed_weights(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    conv = layer.upsample[1]
    assert torch.allclose(tangent, F.conv2d(torch.ones(4, 128, 32, 32), conv.weight, None, padding=1), atol=1e-4)


def test_one_weight_under_vmap() -> None:
    net = network().eval()
    x, t, _ = inputs(net)
    name = next(n for n, _ in net.named_parameters() if "residual_connection.weight" in n)
    weights = torch.stack([net.get_parameter(name), 2 * net.get_parameter(name)]).detach()
    with torch.no_grad():
        call = lambda w: torch.func.functional_call(net, {name: w}, (x, t))  # noqa: E731
        both = torch.func.vmap(call)(weights)
        assert torch.allclose(both[1], call(weights[1]), atol=1e-4)
