"""The network whose sums are left to their readers, and what is prepared for chains, against the plain one."""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations

from ddpm_fast import Diffusion, ResidualBlock, UNet, Upsample, generate_cosine_schedule, ops
from ddpm_fast.models import attention, layers
from ddpm_fast.models.sums import Sum
from ddpm_fast.models.weights import Prepared, convolve, fixed_weights

sys.path.append(str(Path(__file__).parent / "ops"))
from oracle import assert_rule, error  # noqa: E402

N = 3
NETWORKS = {
    "plain": {},
    "classes": {"num_classes": 5},
    "no time": {"time_emb_dim": None},
    "padded": {"initial_pad": 2},
    "attention at every level": {"attention_resolutions": (0, 1)},
    "instance norm": {"norm": "in"},
    "batch norm": {"norm": "bn"},
    "no norm": {"norm": None},
    "another activation": {"activation": F.gelu},
    "groups that straddle the skip": {"channel_mults": (2, 1), "num_groups": 4},
    "a skip beside as many channels": {"channel_mults": (1, 2), "base_channels": 8, "num_res_blocks": 2},
    "no blocks before the next level": {"num_res_blocks": 0, "channel_mults": (1, 2, 1)},
    "one channel": {"img_channels": 1},
}


def network(**options) -> UNet:
    torch.manual_seed(0)
    arguments = {"img_channels": 3, "base_channels": 16, "channel_mults": (1, 2), "num_res_blocks": 1}
    arguments |= {"time_emb_dim": 8, "activation": F.silu, "dropout": 0.0, "num_groups": 8}
    net = UNet(**arguments | options)
    with torch.no_grad():
        for p in net.parameters():  # biases and scales, too
            p += 0.1 * torch.randn_like(p)
    return net


def inputs(net: UNet) -> tuple[Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(1)
    x = torch.randn(N, net.img_channels, 8, 12)
    t = None if net.time_mlp is None else torch.tensor([1, 50, 900])
    return x, t, None if net.num_classes is None else torch.tensor([0, 3, 4])


def run(net: UNet, fused: bool | None, dtype: torch.dtype = torch.float32, gradients: bool = False) -> list[Tensor]:
    """The result, and the gradients of its inputs and weights."""
    net.fused = fused
    x, t, y = inputs(net)
    exact = next(net.parameters()).dtype == torch.float64
    x = x.to(torch.float64 if exact else torch.float32).requires_grad_(gradients)
    half = dtype is not torch.float32 and not exact
    with torch.autocast("cpu", dtype) if half else nullcontext(), nullcontext() if gradients else torch.no_grad():
        out = net(x, t, y)
    if not gradients:
        return [out]
    torch.manual_seed(2)
    wrt = [x, *(p for p in net.parameters())]
    grads = torch.autograd.grad(out, wrt, torch.randn(out.shape, dtype=torch.float64).to(out.dtype), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(wrt, grads, strict=True))]


def hold(fast: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """The rule; gradients of one kind, as a vector: a bias before a norm has none but rounding."""
    assert_rule("the result", fast[0], plain[0], truth[0].detach(), 2)
    if len(truth) > 1:
        assert_rule(
            "the gradients", *(torch.cat([g.flatten() for g in grads[1:]]) for grads in (fast, plain, truth)), 3
        )


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_sums_made_later(options: dict, gradients: bool, dtype: torch.dtype) -> None:
    net = network(**options)
    net.train(gradients)
    fast, plain = (run(net, fused, dtype, gradients) for fused in (True, False))
    hold(fast, plain, run(net.double(), False, dtype, gradients))


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_with_weights_that_are_fixed(options: dict, dtype: torch.dtype, fused: bool | None) -> None:
    """The second call uses what the first one made."""
    net = network(**options).eval()
    plain = run(net, False, dtype)
    with fixed_weights():
        first, second = run(net, fused, dtype), run(net, fused, dtype)
    assert torch.equal(first[0], second[0])
    hold(second, plain, run(net.double(), False))


def test_in_float64_they_agree_to_the_last_digits() -> None:
    """No tolerance of a dtype hides a term that is left out, or added twice."""
    net = network(num_classes=5, attention_resolutions=(0,)).double().eval()
    plain = run(net, False)[0]
    assert error(run(net, True)[0], plain) < 1e-13
    with fixed_weights():
        assert error(run(net, True)[0], plain) < 1e-13
        assert error(run(net, None)[0], plain) < 1e-13


def trained(net: UNet, dtype: torch.dtype, state: ops.NoiseState | None = None) -> list[Tensor]:
    """The result, and the weights' gradients, which the owner of the noise goes on before."""
    x, t, y = inputs(net)
    exact = next(net.parameters()).dtype is torch.float64
    x = x.double() if exact else x
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32 and not exact):
        out = net(x, t, y, noise_state=state)
    if state is not None:
        state.draw.add_(1)
    torch.manual_seed(4)
    grads = torch.autograd.grad(out, list(net.parameters()), torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    return [out.detach(), *grads]


OPTIONS = {"dropout": 0.3, "num_classes": 5, "attention_resolutions": (1,)}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("recompute", ["norm", "block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputing_changes_no_bit(recompute: str, fused: bool, dtype: torch.dtype) -> None:
    """Also with dropout, whose masks are drawn again. But where sums are made later a whole block in half precision
    rounds its input's gradient once more."""
    net, results = network(**OPTIONS, fused=fused), []
    for net.recompute in ("none", recompute):
        results.append(trained(net, dtype, ops.NoiseState.at(5, 0)))
    if (recompute, fused, dtype) == ("block", True, torch.bfloat16):
        net.fused = False
        plain = trained(net, dtype, ops.NoiseState.at(5, 0))
        hold(results[1], plain, trained(net.double(), dtype, ops.NoiseState.at(5, 0)))
    else:
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "options",
    [dict, lambda: {"activation": F.rrelu}, lambda: {"norm": "bn"}, lambda: {"activation": nn.PReLU(), "dropout": 0.0}],
    ids=["dropout", "random activation", "batch norm", "activation that autocast changes"],
)
def test_what_another_run_would_change_is_kept(options: Callable[[], dict]) -> None:
    """Dropout of torch's generator is drawn again from its state; whatever is not known to repeat isn't repeated."""
    results = []
    for recompute in ("none", "norm", "block"):
        net = network(recompute=recompute, **{"dropout": 0.3} | options())
        torch.manual_seed(3)
        results.append([*trained(net, torch.bfloat16), *(b.clone() for b in net.buffers())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_replaced_attention_with_dropout_of_its_own() -> None:
    results = []
    for recompute in ("none", "norm", "block"):
        net = network(recompute=recompute)
        net.mid[0].attention = nn.Sequential(net.mid[0].attention, nn.Dropout(0.5))
        torch.manual_seed(3)
        results.append(trained(net, torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """Of what goes into convolutions, and what comes out of them, the tensors that are alive before the backward."""
    went_in, came_out, plain = [], [], layers.convolve3x3

    def watched(x: Tensor, *rest: object) -> Tensor:
        went_in.append(weakref.ref(x))
        came_out.append(weakref.ref(y := plain(x, *rest)))
        return y

    monkeypatch.setattr(layers, "convolve3x3", watched)
    alive = {}
    for recompute in ("none", "norm", "block"):
        net = network(num_res_blocks=2, attention_resolutions=(), fused=fused, recompute=recompute)
        went_in.clear(), came_out.clear()
        x, t, _ = inputs(net)
        out = net(x, t, noise_state=ops.NoiseState.at(5, 0))
        alive[recompute] = [sum(r() is not None for r in refs) for refs in (went_in, came_out)]
        out.sum().backward()
        del out
        assert not any(r() is not None for r in came_out), "something is left after the backward"
    blocks = sum(isinstance(m, ResidualBlock) for m in net.modules())
    assert alive["none"][0] == 2 * blocks
    assert alive["norm"][0] == 0 and alive["norm"][1] >= blocks
    assert alive["block"] == [0, alive["block"][1]] and alive["block"][1] <= (blocks if fused else 0)


@pytest.mark.parametrize("later", [False, True])
def test_recomputation_goes_on_in_double_backward(later: bool) -> None:
    """Under backends whose backward can be differentiated."""
    block, results = ResidualBlock(8, 12, 0.0, activation=F.silu, num_groups=4).double(), []
    x = torch.randn(2, 8, 6, 6).double()
    for keep in (True, False):
        leaf = x.clone().requires_grad_()
        out = block.summed(Sum(leaf, later=later), block.bias(2, None), None, keep=keep).tensor()
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("recompute", ["norm", "block"])
def test_a_recomputation_takes_the_backend_of_its_forward(recompute: str) -> None:
    results = []
    for net in (network(), network(recompute=recompute)):
        with ops.use_backend("reference"):
            out = net(*inputs(net))
        results.append(torch.autograd.grad(out.sum(), list(net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("recompute", ["none", "norm", "block"])
@pytest.mark.parametrize("name", ["conv_1", "conv_2.1", "norm_1", "norm_2"])
def test_weights_that_change_before_the_backward_are_refused(name: str, recompute: str) -> None:
    net = network(recompute=recompute)
    out = net(*inputs(net))
    with torch.no_grad():
        net.downs[0].get_submodule(name).weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


@pytest.mark.parametrize("recompute", ["norm", "block"])
def test_the_mode_of_the_forward_counts(recompute: str) -> None:
    results = []
    for what in ("none", recompute):
        net = network(recompute=what, dropout=0.3)
        torch.manual_seed(3)
        out = net(*inputs(net))
        net.eval()
        results.append(torch.autograd.grad(out.square().sum(), list(net.parameters())))
        assert not net.downs[0].conv_2[0].training
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# A module that was hooked, parametrized, replaced or wrapped is called, not stood in for.


class Twice(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *args: Tensor, **more: Tensor) -> Tensor:
        return 2 * self.module(x, *args, **more)


def hooked(owner: nn.Module, name: str) -> None:
    getattr(owner, name).register_forward_hook(lambda module, args, out: 2 * out)


def replaced(owner: nn.Module, name: str) -> None:
    setattr(owner, name, Twice(getattr(owner, name)))


def parametrized(owner: nn.Module, name: str) -> None:
    if isinstance(getattr(owner, name), nn.Conv2d):
        parametrizations.weight_norm(getattr(owner, name))
        getattr(owner, name).parametrizations.weight.original0.data *= 2
    else:
        replaced(owner, name)


PLACES = [("", "init_conv"), ("", "out_conv"), ("", "out_norm"), ("downs.1", "downsample"), ("ups.1", "norm_1")]
PLACES += [("mid.0", "attention"), ("mid.0.attention", "to_qkv"), ("mid.0.attention", "to_out")]
PLACES += [("mid.0.attention", "norm"), ("ups.0", "residual_connection"), ("mid.1", "residual_connection")]
PLACES += [("downs.0", "conv_1"), ("", "time_mlp"), ("downs", "0"), ("ups", "2"), ("downs", "1"), ("mid", "0")]


@pytest.mark.parametrize("change", [hooked, replaced, parametrized])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[f"{owner} {name}" for owner, name in PLACES])
def test_modules_that_were_changed_are_called(owner: str, name: str, change: Callable) -> None:
    net = network().double().eval()
    before = run(net, False)[0]
    change(net.get_submodule(owner), name)
    plain = run(net, False)[0]
    assert error(plain, before) > 1e-6
    with fixed_weights():
        for fused in (True, None):
            assert error(run(net, fused)[0], plain) < 1e-12


# What is made of weights.


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


def test_switches_that_are_none() -> None:
    with pytest.raises(ValueError, match="recompute must be one of none, norm, block; got 'all'"):
        network(recompute="all")
    with pytest.raises(ValueError, match="fused must be one of None, True, False; got 1"):
        network(fused=1)
    net = network()
    for name, value in (("recompute", True), ("recompute", None), ("fused", 0), ("fused", "yes")):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            setattr(net, name, value)


@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_by_products_or_in_one(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, tokens, 24, dtype=torch.float64).to(dtype).double() for _ in "qkv"]
    q, k, v = (e.to(dtype) for e in exact)
    truth = torch.softmax(exact[0] @ exact[1].mT / 24**0.5, -1) @ exact[2]
    plain = torch.softmax(q @ k.mT / 24**0.5, -1) @ v
    assert_rule("attention", attention.attend(q, k, v), plain, truth, 2)


def test_a_block_alone() -> None:
    """Called as a module it takes and returns tensors, whole ones."""
    torch.manual_seed(0)
    block = ResidualBlock(8, 12, 0.0, time_emb_dim=8, activation=F.silu, num_groups=4, use_attention=True).double()
    x, emb = torch.randn(2, 8, 6, 6).double(), torch.randn(2, 8).double()
    expected = block(x, emb)
    later = block.summed(Sum(x, later=True), block.bias(2, emb), None)
    assert later.residual is not None and later.bias is not None
    assert error(later.tensor().detach(), expected.detach()) < 1e-14 and later.residual is None and later.bias is None


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


def test_networks_of_older_pickles() -> None:
    net = network()
    del net.__dict__["_fused"], net.__dict__["_recompute"]
    assert net(*inputs(net)).shape == (N, 3, 8, 12)
