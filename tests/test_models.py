"""The UNet and its layers: what the contract's tests leave open."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from ddpm_fast import (
    EMA,
    AttentionBlock,
    Config,
    Downsample,
    PositionalEmbedding,
    ResidualBlock,
    UNet,
    Upsample,
    get_norm,
    ops,
    preset,
)


def unet(**options) -> UNet:
    torch.manual_seed(0)
    arguments = {"channel_mults": (1, 2), "num_res_blocks": 1, "time_emb_dim": 8, "num_groups": 4, "dropout": 0.0}
    return UNet(1, 8, **arguments | options)


X, T = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])


# A module that was hooked, parametrized, replaced or wrapped is called, not stood in for.


def plain_equals_fused(change) -> None:
    """`change` alters a block's submodules so that its result stays the same: the module path must give it."""
    block = ResidualBlock(
        8, 12, 0.0, time_emb_dim=8, num_classes=3, activation=F.silu, num_groups=4, use_attention=True
    )
    x, emb, y = torch.randn(2, 8, 6, 6), torch.randn(2, 8), torch.tensor([0, 2])
    expected = block(x, emb, y)
    change(block)
    assert torch.allclose(block(x, emb, y), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["norm_1", "conv_1", "norm_2", "conv_2", "conv_2.0", "conv_2.1", "time_bias"])
@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_run(name: str, kind: str) -> None:
    calls = []

    def hook(block: nn.Module) -> None:
        module = block.get_submodule(name)
        register = module.register_forward_hook if kind == "forward" else module.register_forward_pre_hook
        register(lambda *args: calls.append(name))

    plain_equals_fused(hook)
    assert calls


def test_backward_hooks_run() -> None:
    calls = []
    block = ResidualBlock(8, 8, 0.0, num_groups=4)
    block.norm_2.register_full_backward_hook(lambda *args: calls.append(1))
    block(torch.randn(1, 8, 4, 4, requires_grad=True)).sum().backward()
    assert calls


def test_global_hooks_run() -> None:
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.add(type(module)))
    try:
        unet()(X, T)
    finally:
        handle.remove()
    assert {nn.GroupNorm, nn.Conv2d, nn.Dropout} <= seen


def test_parametrizations_and_replacements_are_used() -> None:
    plain_equals_fused(lambda block: parametrizations.weight_norm(block.conv_1))
    plain_equals_fused(
        lambda block: setattr(block, "conv_2", nn.Sequential(block.conv_2[0], nn.Identity(), block.conv_2[1]))
    )
    block = ResidualBlock(8, 8, 0.0, num_groups=4)
    x = torch.randn(1, 8, 4, 4)
    before = block(x)
    block.conv_1 = nn.Conv2d(8, 8, 5, padding=2)  # a plain class, another convolution
    assert block(x).shape == before.shape and not torch.allclose(block(x), before)
    block.norm_1 = nn.GroupNorm(8, 8)
    parametrizations.spectral_norm(block.conv_2[1])
    assert block(x).isfinite().all()


def test_wrapped_layers_of_the_network_are_called() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner
            self.calls = 0

        def forward(self, *args):
            self.calls += 1
            return self.inner(*args)

    net = unet()
    expected = net(X, T)
    for part in (net.downs, net.mid, net.ups):
        for i in range(len(part)):
            part[i] = Wrapper(part[i])
    state = ops.NoiseState.at(0, 0)
    assert torch.allclose(net(X, T, noise_state=state), expected, atol=1e-6)
    assert all(layer.calls == 1 for part in (net.downs, net.mid, net.ups) for layer in part)


# Dropout from counters


def test_dropout_layers_draw_from_streams_of_their_own() -> None:
    net = unet(dropout=0.5, num_res_blocks=2).train()
    streams = [m.dropout_stream for m in net.modules() if isinstance(m, ResidualBlock)]
    assert sorted(streams) == list(range(32, 32 + len(streams)))
    state = ops.NoiseState.at(1, 2)
    a, b = net(X, T, noise_state=state), net(X, T, noise_state=state)
    assert torch.equal(a, b) and not torch.equal(a, net(X, T, noise_state=ops.NoiseState.at(1, 3)))
    # Image 1 of the batch is image 0 of a batch that starts there.
    alone = net(X[1:], T[1:], noise_state=state._replace(first_sample=1))
    assert torch.allclose(alone, a[1:], atol=1e-5)
    assert not torch.equal(net(X, T), net(X, T)), "without a state: torch's generator"


@pytest.mark.parametrize("norm", ["gn", "in", "bn", None])
@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_every_norm_draws_the_same_mask(norm, activation) -> None:
    """What is dropped depends on state and layer; a second convolution of ones counts it."""
    block = ResidualBlock(8, 8, 0.5, activation=activation, norm=norm, num_groups=4).train()
    kept = []
    ones = torch.ones_like(block.conv_2[1].weight)
    with torch.no_grad():
        block.conv_2[1].weight.copy_(ones * 0)
        block.conv_2[1].weight[:, :, 1, 1] = torch.eye(8)  # passes its input on
        block.conv_2[1].bias.zero_()
    x = torch.randn(2, 8, 4, 4)
    state = ops.NoiseState.at(1, 2)
    kept = block(x, noise_state=state) - x
    mask = ops.dropout_mask((2, 8, 4, 4), 0.5, state, block.dropout_stream)
    assert torch.all(kept[mask == 0] == 0) and float((kept[mask > 0].abs() > 1e-6).float().mean()) > 0.9


# Formats


def test_channels_last_and_bfloat16() -> None:
    net = unet(attention_resolutions=(0,))
    expected = net(X, T)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    got = last(X.contiguous(memory_format=torch.channels_last), T)
    assert torch.allclose(got, expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(X, T)
    assert half.dtype == torch.bfloat16 and float((half - expected).abs().max()) < 0.1
    low = copy.deepcopy(net).bfloat16()(X.bfloat16(), T)
    assert low.dtype == torch.bfloat16 and float((low - expected).abs().max()) < 0.1
    exact = copy.deepcopy(net).double()(X.double(), T)
    assert exact.dtype == torch.float64 and float((exact - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layers_compute_in_channels_last_on_a_cpu_and_the_result_is_laid_out_as_x(layout: torch.memory_format) -> None:
    net = UNet(3, 8, (1, 2), num_res_blocks=1, num_groups=4)
    seen: list[torch.Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in (*net.downs, *net.ups)]
    out = net(torch.randn(2, 3, 8, 8).contiguous(memory_format=layout))
    assert len(seen) == len(hooks) and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert out.is_contiguous(memory_format=layout)


def test_a_network_under_vmap() -> None:
    net = UNet(3, 8, (1, 2), num_res_blocks=1, num_groups=4).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(torch.vmap(lambda v: net(v[None])[0])(x), net(x), atol=1e-5)


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("norm", ["gn", "in", None])
@pytest.mark.parametrize("times", [torch.arange(5) * 199, torch.rand(5) * 1000], ids=["int", "float"])
def test_timesteps_embedded_at_once(num_classes: int | None, norm: str | None, times: torch.Tensor) -> None:
    """A row of `embed_steps` stands for the timestep, as near as the order of a product's sums lets it."""
    net = unet(num_classes=num_classes, norm=norm, attention_resolutions=(1,), initial_pad=4).eval().double()
    y = None if num_classes is None else torch.tensor([2, 0])
    rows = net.embed_steps(times)
    assert rows.shape == (5, 8 + 16 + 16 + 16 + 16 + 16 + 8 + 8) and rows.dtype == torch.float64
    for k in (0, 3):
        expected = net(X.double(), times[k : k + 1].expand(2), y)
        torch.testing.assert_close(net(X.double(), rows[k : k + 1], y), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"time must have shape \[2\]"):
        net(X.double(), rows[:1, 1:], y)


EMBEDDED = {
    "as it is": (lambda net: None, True),
    "no time": (lambda net: setattr(net, "time_mlp", None), False),
    "hook": (lambda net: net.ups[0].register_forward_hook(lambda *_: None), False),
    "hook inside": (lambda net: net.mid[1].time_bias.register_forward_pre_hook(lambda *_: None), False),
    "compiled": (lambda net: net.mid[0].compile(backend="eager"), False),
    "replaced convolution": (lambda net: setattr(net.mid[0], "conv_1", nn.Sequential(net.mid[0].conv_1)), False),
    "patched": (lambda net: setattr(net.mid[0], "forward", net.mid[0].forward), False),
    "wrapped": (lambda net: net.mid.__setitem__(0, nn.Sequential(net.mid[0])), False),
    "another embedding": (lambda net: net.time_mlp.__setitem__(2, nn.ReLU()), False),
    "parametrized": (lambda net: parametrizations.weight_norm(net.mid[0].time_bias), False),
    "another norm": (lambda net: setattr(net.mid[0], "norm_1", nn.LayerNorm((16, 4, 4))), False),
}


@pytest.mark.parametrize("change", EMBEDDED)
def test_only_an_untouched_network_embeds_its_timesteps(change: str) -> None:
    net = unet().eval()
    alter, possible = EMBEDDED[change]
    alter(net)
    assert (net.embed_steps(T) is not None) == possible
    if change not in ("wrapped", "no time"):  # whose other modules need it
        assert net(X, T).isfinite().all()  # none of them is in the way of a forward

    class Own(UNet):
        def forward(self, x, time=None, y=None, noise_state=None):
            return super().forward(x, time, y, noise_state) + time.view(-1, 1, 1, 1)

    assert Own(1, 8, (1, 2), 1, time_emb_dim=8, num_groups=4).embed_steps(T) is None


def test_every_time_matters() -> None:
    """A timestep of 900 must not be rounded on its way into a half-precision network."""
    embedding = PositionalEmbedding(8, 1.0).bfloat16()
    a, b = embedding(torch.tensor([900])), embedding(torch.tensor([901]))
    assert a.dtype == torch.bfloat16 and not torch.equal(a, b)


def test_repr_and_presets() -> None:
    assert "PositionalEmbedding(8, scale=1.0)" in repr(unet())
    digits = preset("digits").build_unet()
    assert digits(torch.zeros(1, 1, 8, 8), torch.tensor([0]), torch.tensor([9])).shape == (1, 1, 8, 8)
    assert preset("cifar10") == Config()
    betas = Config(num_timesteps=100).betas()
    assert len(betas) == 100 and betas[0] == pytest.approx(1e-3) and betas[-1] == pytest.approx(0.2)


# Errors

BAD = [
    (lambda: unet()(torch.zeros(2, 1, 7, 8), T), ValueError, "height 7 is not divisible by 2: resize or pad to 8"),
    (
        lambda: UNet(1, 8, (1, 2, 2, 2), 1, num_groups=4)(torch.zeros(1, 1, 30, 30)),
        ValueError,
        "height 30 is not divisible by 8: resize or pad to 32 or build the network with initial_pad=1",
    ),
    (
        lambda: UNet(1, 8, (1, 2, 2), 1, num_groups=4, initial_pad=1)(torch.zeros(1, 1, 8, 6)),
        ValueError,
        r"height 8 \+ 2 \* initial_pad = 10 is not divisible by 4: resize or pad to 10",
    ),
    (lambda: unet()(torch.zeros(2, 3, 8, 8), T), ValueError, "x must have 1 channels"),
    (lambda: unet()(torch.zeros(2, 8, 8), T), ValueError, "x must have 4 dim"),
    (lambda: unet()(X.double(), T), TypeError, "x must have the dtype of the network, torch.float32; got float64"),
    (lambda: unet()(torch.zeros(2, 1, 0, 8), T), ValueError, "height must be at least 1, got 0"),
    (lambda: unet()(X.byte(), T), TypeError, "x must be a floating"),
    (lambda: unet()(X), ValueError, "time is required"),
    (lambda: unet()(X, T[:1]), ValueError, r"time must have shape \[2\]"),
    (lambda: unet()(X, 5), ValueError, r"time must have shape \[2\], got 5 \(int\)"),
    (lambda: unet()(X, T * 1j), TypeError, "time must hold real numbers"),
    (lambda: unet(num_classes=3)(X, T), ValueError, "y is required"),
    (lambda: unet(num_classes=3)(X, T, T), ValueError, r"y must lie in \[0, 3\)"),
    (lambda: unet(num_classes=3)(X, T, T.float()), TypeError, "y must have dtype"),
    (lambda: unet(channel_mults=()), ValueError, "channel_mults must hold"),
    (lambda: unet(channel_mults=(1, 0)), ValueError, r"channel_mults\[1\] must be an integer of at least 1"),
    (lambda: unet(num_groups=3), ValueError, "num_groups must divide the number of channels, 8; got 3"),
    (lambda: unet(norm="ln"), ValueError, "norm must be 'gn', 'in', 'bn' or None"),
    (lambda: unet(activation="silu"), TypeError, "activation must be a function such as F.silu"),
    (lambda: unet(initial_pad=-1), ValueError, "initial_pad must be an integer of at least 0"),
    (lambda: unet(num_res_blocks=1.5), TypeError, "num_res_blocks must be an integer"),
    (lambda: unet(num_res_blocks=80, dropout=0.1), ValueError, "at most 224 residual blocks"),
    (lambda: UNet(0, 8), ValueError, "img_channels must be an integer of at least 1"),
    (lambda: get_norm("gn", 8, 0), ValueError, "num_groups must be an integer of at least 1, got 0"),
    (lambda: Downsample(4)(torch.zeros(1, 4, 5, 4)), ValueError, "even height and width"),
    (lambda: Upsample(4)(torch.zeros(1, 3, 4, 4)), ValueError, "x must have 4 channels"),
    (lambda: AttentionBlock(8, num_groups=4)(torch.zeros(8, 4, 4)), ValueError, "x must have 4 dim"),
    (lambda: PositionalEmbedding(7), ValueError, "dim must be even, got 7: 8 would work"),
    (lambda: ResidualBlock(8, 8, 0.0, num_groups=4)(X), ValueError, "x must have 8 channels"),
    (lambda: ResidualBlock(1, 4, 0.0, 8, num_groups=1)(X), ValueError, "time_emb is required"),
    (lambda: ResidualBlock(1, 4, 0.0, 8, num_groups=1)(X, X[:, 0]), ValueError, r"time_emb must have shape"),
    (lambda: ResidualBlock(1, 4, 0.0, None, 3, num_groups=1)(X), ValueError, "y is required"),
    (lambda: ResidualBlock(1, 4, 0.0, None, 3, num_groups=1)(X, None, T), ValueError, r"y must lie in \[0, 3\)"),
    (lambda: Upsample(4)(torch.zeros(1, 4, 4, 0)), ValueError, "x: width must be at least 1, got 0"),
    (lambda: Upsample(4)(torch.ones(1, 4, 4, 4).half()), TypeError, "x must have the dtype of the layer"),
    (lambda: AttentionBlock(4, None)(torch.ones(1, 4, 4, 4).double()), TypeError, "x must have the dtype of the layer"),
    (lambda: ResidualBlock(4, 4, 0, num_groups=4)(torch.ones(1, 4, 4, 4).half()), TypeError, "x must have the dtype"),
    (lambda: get_norm(np.array(["gn", "in"]), 8, 2), ValueError, "norm must be 'gn', 'in', 'bn' or None"),
    (lambda: EMA(0.5).update_model_average(None, nn.Identity()), TypeError, "ema_model must be a torch.nn.Module"),
    (lambda: EMA(0.5).update_average("a", X), TypeError, "old must be a tensor"),
    (lambda: EMA(0.5).update_average(X, 3), TypeError, "new must be a tensor"),
    (lambda: preset(np.zeros(2)), ValueError, "preset must be one of"),
    (lambda: Config.from_dict(3), TypeError, "values must be a dictionary, got 3"),
    (lambda: Config.from_dict({"x": 1, 3: 2}), ValueError, "unknown configuration key 'x'"),
    (lambda: EMA(1.5), ValueError, r"decay must be a finite number in \[0, 1\], got 1.5"),
    (lambda: unet(activation=nn.SiLU), TypeError, "activation must be a function such as F.silu"),
    (lambda: unet(channel_mults=2), TypeError, "channel_mults must be a tuple of integers, got 2"),
    (lambda: unet(channel_mults="12"), TypeError, "channel_mults must be a tuple of integers"),
    (lambda: unet(channel_mults=(1.0, 2.0)), TypeError, r"channel_mults\[0\] must be an integer"),
    (lambda: unet(attention_resolutions=1), TypeError, "attention_resolutions must be a tuple of integers, got 1"),
    (lambda: unet(time_emb_dim=0), ValueError, "time_emb_dim must be an integer of at least 1"),
    (lambda: unet(time_emb_dim="8"), TypeError, "time_emb_dim must be an integer"),
    (lambda: unet(time_emb_scale=float("nan")), ValueError, "scale must be a finite number"),
    (lambda: unet(num_classes=0), ValueError, "num_classes must be an integer of at least 1"),
    (lambda: unet(num_classes=True), TypeError, "num_classes must be an integer of at least 1, got True"),
    (lambda: unet(dropout=1.5), ValueError, r"dropout must be a finite number in \[0, 1\]"),
    (lambda: unet(dropout="0.1"), TypeError, "dropout must be a finite number"),
    (lambda: unet(num_groups=4.0), TypeError, "num_groups must be an integer"),
    (lambda: UNet(1, 7, time_emb_dim=8, num_groups=1), ValueError, "base_channels must be even"),
    (lambda: ResidualBlock(8, 8, 0.0, num_groups=4, use_attention="no"), TypeError, "use_attention must be True or"),
    (lambda: ResidualBlock(1, 4, 0.0, 8, num_groups=1)(X, torch.zeros(3, 8)), ValueError, "time_emb must have shape"),
    (lambda: ResidualBlock(1, 4, 0.0, None, 3, num_groups=1)(X, None, T[:1]), ValueError, "y must have shape"),
    (lambda: Downsample("8"), TypeError, "in_channels must be an integer"),
    (lambda: Upsample(0), ValueError, "in_channels must be an integer of at least 1"),
    (lambda: AttentionBlock(None), TypeError, "in_channels must be an integer of at least 1, got None"),
    (lambda: EMA("0.9"), TypeError, "decay must be a finite number"),
    (lambda: EMA(0.9).update_model_average(nn.Linear(1, 1), nn.Linear(2, 1)), ValueError, "their number or shapes"),
    (lambda: preset("imagenet"), ValueError, "preset must be one of cifar10, digits"),
    (lambda: Config(activation="gelu"), ValueError, "activation must be one of relu, mish, silu"),
    (lambda: Config(schedule="sqrt"), ValueError, "schedule must be one of linear, cosine"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind, text) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_ema_formula() -> None:
    ema = EMA(0.75)
    old, new = torch.tensor([4.0]), torch.tensor([8.0])
    assert ema.update_average(None, new) is new and float(ema.update_average(old, new)) == 5.0
    a, b = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    with torch.no_grad():
        b.weight.fill_(5)
        b.running_mean.fill_(7)
        b.num_batches_tracked.fill_(3)
    ema.update_model_average(a, b)
    assert float(a.weight) == 2.0 and float(a.running_mean) == 7.0 and int(a.num_batches_tracked) == 3
