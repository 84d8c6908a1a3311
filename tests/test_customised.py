"""What users do to networks and to Diffusion: subclasses, patches, wrappers, replaced parts. Nothing is skipped."""

import threading
import warnings
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import BETAS, Pixelwise, pixelwise, small

import benchmarks.original as original
from ddpm_fast import Diffusion, ResidualBlock, UNet
from ddpm_fast.models.attention import AttentionBlock
from ddpm_fast.models.layers import Downsample, PositionalEmbedding
from ddpm_fast.models.upsampling import NearestUpsample, Upsample

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([3, 5])


def unet(cls: type = UNet, base_channels: int = 8, **options) -> UNet:
    torch.manual_seed(0)
    return cls(1, base_channels, (1, 2), 1, **{"time_emb_dim": 8, "num_groups": 4, "dropout": 0.2} | options)


class Plain(UNet):
    def forward(self, x, time=None, y=None):
        return super().forward(x, time, y)


class PlainBlock(ResidualBlock):
    def forward(self, x, time_emb=None, y=None):
        return super().forward(x, time_emb, y)


class AnyBlock(ResidualBlock):
    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs)


def test_a_subclass_need_not_know_of_noise_states() -> None:
    Diffusion(unet(Plain), (8, 8), 1, None, BETAS).train()(X)
    for block in (PlainBlock, AnyBlock):
        net = unet()
        net.downs[0] = block(8, 8, 0.2, 8, num_groups=4)
        Diffusion(net, (8, 8), 1, None, BETAS).train()(X)
    assert AnyBlock.takes_noise_state and not PlainBlock.takes_noise_state and not Plain.takes_noise_state


def test_a_replaced_forward_is_called() -> None:
    net = unet()
    calls = []
    block = net.downs[0]
    old = block.forward
    block.forward = lambda x, time_emb=None, y=None: calls.append(1) or old(x, time_emb, y)
    Diffusion(net, (8, 8), 1, None, BETAS).train()(X)
    assert calls


@pytest.mark.parametrize("name", ["conv_1", "norm_1", "norm_2", "conv_2", "conv_2.0", "conv_2.1"])
def test_a_replaced_forward_of_a_layer_is_called(name: str) -> None:
    block = ResidualBlock(8, 8, 0.0, num_groups=4)
    x = torch.randn(2, 8, 4, 4)
    layer = block.get_submodule(name)
    old, before = layer.forward, block(x)
    layer.forward = lambda x: old(x).square()
    assert not torch.allclose(block(x), before, atol=1e-3)


OURS = [UNet, ResidualBlock, AttentionBlock, Downsample, Upsample, NearestUpsample, PositionalEmbedding]
STOCK = [nn.GroupNorm, nn.Conv2d, nn.Linear, nn.Dropout, nn.Sequential, nn.Identity, nn.SiLU]


@pytest.mark.parametrize("cls", OURS + STOCK)
def test_a_replaced_forward_of_a_class_is_called(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each of its modules and each call of the network; also after chains that could skip it."""
    net = unet(attention_resolutions=(1,))
    diffusion, number, calls = Diffusion(net, (8, 8), 1, None, BETAS), sum(type(m) is cls for m in net.modules()), []
    before, plain = diffusion.sample(2, "cpu", seed=1, use_ema=False), cls.forward

    def forward(self, *args):
        calls.append(type(self) is cls)
        y = plain(self, *args)
        return y if isinstance(self, nn.Sequential) else 0.5 * y

    monkeypatch.setattr(cls, "forward", forward)
    net(X, T)
    assert sum(calls) == number > 0
    diffusion.train()(X)
    assert sum(calls) == 2 * number
    for chain in (1, 2):
        images = diffusion.sample(2, "cpu", seed=1, use_ema=False)
        assert sum(calls) == (2 + chain * len(BETAS)) * number
    assert torch.allclose(images, before, atol=1e-4) == (cls is nn.Sequential)
    monkeypatch.undo()
    assert torch.equal(diffusion.sample(2, "cpu", seed=1, use_ema=False), before)


@pytest.mark.parametrize("whole", [False, True], ids=["modules", "class"])
def test_a_replaced_part_of_convolutions_is_called(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is patched to make images that tile."""

    def tiled(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        p = conv.padding[0]
        return F.conv2d(F.pad(x, (p, p, p, p), mode="circular"), weight, bias, conv.stride)

    def losses_and_images(diffusion: Diffusion) -> list[Tensor]:
        diffusion.seed = diffusion.calls = 0
        return [diffusion.train()(X).detach(), *(diffusion.sample(2, "cpu", seed=1, use_ema=False) for _ in range(2))]

    truth, patched = (Diffusion(unet(base_channels=32, dropout=0.0), (8, 8), 1, None, BETAS) for _ in range(2))
    before = losses_and_images(patched)
    for conv in truth.modules():
        if type(conv) is nn.Conv2d and conv.padding != (0, 0):
            conv.padding_mode = "circular"
    for conv in patched.modules():
        if type(conv) is nn.Conv2d and not whole:
            conv._conv_forward = partial(tiled, conv)
    if whole:
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", tiled)
    for was, is_now, expected in zip(before, losses_and_images(patched), losses_and_images(truth), strict=True):
        assert torch.allclose(is_now, expected, atol=1e-4) and not torch.allclose(was, expected, atol=1e-3)


def test_weights_of_a_subclass_of_tensor_compute_as_it_does() -> None:
    class Halved(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            halved = func is F.conv2d or func is F.linear or func is F.group_norm
            result = super().__torch_function__(func, types, args, kwargs or {})
            return 0.5 * result.as_subclass(Tensor) if halved else result

    inside = "conv_1", "norm_2", "time_bias", "attention.norm", "attention.to_qkv", "attention.to_out"
    for name in ("time_mlp.1", "init_conv", "ups.0.residual_connection", *(f"mid.0.{name}" for name in inside)):
        net = unet(attention_resolutions=(1,))
        diffusion, layer = Diffusion(net, (8, 8), 1, None, BETAS[:8]), net.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Halved))
        images = diffusion.sample(2, "cpu", seed=1, use_ema=False)
        layer.weight = nn.Parameter(0.5 * layer.weight.detach().as_subclass(Tensor))
        layer.bias = None if layer.bias is None else nn.Parameter(0.5 * layer.bias.detach())
        assert torch.allclose(images, diffusion.sample(2, "cpu", seed=1, use_ema=False), atol=1e-4), name


def test_wrapped_biases_work() -> None:
    block = ResidualBlock(8, 8, 0.0, 6, 3, num_groups=4)
    x, emb, y = torch.randn(2, 8, 4, 4), torch.randn(2, 6), torch.tensor([0, 2])
    before = block(x, emb, y)
    block.time_bias = nn.Sequential(block.time_bias, nn.Identity())
    block.class_bias = nn.Sequential(block.class_bias, nn.Identity())
    assert torch.equal(block(x, emb, y), before)
    with pytest.raises(ValueError, match=r"y must lie in \[0, 3\)"):
        block(x, emb, y + 1)


def test_conv_2_may_be_any_module() -> None:
    block = ResidualBlock(8, 8, 0.0, num_groups=4)
    x = torch.randn(2, 8, 4, 4)
    before = block(x)
    block.conv_2 = block.conv_2[1]
    assert torch.allclose(block(x), before, atol=1e-5)
    for empty in (nn.Sequential(), nn.Identity()):
        block.conv_2 = empty
        assert block(x).shape == x.shape


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 1),
    ],
    ids=["padding mode", "groups", "no bias", "dilation", "1x1"],
)
def test_another_convolution_is_used_as_it_is(conv: nn.Module) -> None:
    block = ResidualBlock(8, 8, 0.0, num_groups=4)
    block.conv_1 = conv
    x = torch.randn(2, 8, 4, 4)
    h = block.conv_2(F.relu(block.norm_2(conv(F.relu(block.norm_1(x))))))
    assert torch.allclose(block(x), h + x, atol=1e-5)


def test_instance_norm_with_statistics_keeps_them() -> None:
    block = ResidualBlock(8, 8, 0.0, norm="in")
    block.norm_1 = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    block.train()(torch.randn(2, 8, 4, 4) + 3)
    assert float(block.norm_1.running_mean.mean()) > 0.1


def test_an_activation_need_not_be_hashable() -> None:
    @dataclass
    class Scaled:
        factor: float

        def __call__(self, x: Tensor) -> Tensor:
            return self.factor * F.silu(x)

    a, b = unet(activation=Scaled(1.0)).eval(), unet(activation=F.silu).eval()
    assert torch.allclose(a(X, T), b(X, T), atol=1e-5)


@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize(
    ("network", "kind", "text"),
    [
        (lambda x, t, y: torch.cat([x, x], 1), ValueError, r"model must return a tensor like x, \[2, 1, 8, 8\]; got"),
        (lambda x, t, y: x[:, :, :1], ValueError, "model must return a tensor like x"),
        (lambda x, t, y: {"x": x}, TypeError, "model must return a tensor like x.*got a dict"),
    ],
    ids=["two outputs a pixel", "broadcastable", "dictionary"],
)
def test_a_network_that_returns_something_else_is_told(rng, network, kind, text) -> None:
    model = nn.Identity()
    model.forward = network
    diffusion = Diffusion(model, (8, 8), 1, None, BETAS, rng=rng)
    for call in (
        lambda: diffusion(X),
        lambda: diffusion.sample(2, "cpu", use_ema=False),
        lambda: diffusion.remove_noise(X, T, None),
    ):
        with pytest.raises(kind, match=text):
            call()


def test_data_parallel_replicas_draw_afresh() -> None:
    """nn.DataParallel makes shallow copies for each call: the count must go on in all of them."""
    diffusion = small(seed=7).train()
    replicas = [diffusion._replicate_for_data_parallel() for _ in range(3)]
    for replica in replicas:  # what the real thing does to each, on its own device
        replica._modules = diffusion._modules
        replica._buffers = diffusion._buffers
    losses = [float(replica(X).detach()) for replica in replicas]
    assert len(set(losses)) == 3 and diffusion.calls == 3


def test_an_overridden_remove_noise_is_followed() -> None:
    def clamped(base):
        class Clamped(base):
            def remove_noise(self, x, t, y, use_ema=True):
                return super().remove_noise(x, t, y, use_ema).clamp(-1, 1)

        return Clamped

    samples = []
    for base, options in ((original.Diffusion, {}), (Diffusion, {"rng": "torch"})):
        diffusion = clamped(base)(Pixelwise(), (5, 7), 2, None, BETAS, **options)
        torch.manual_seed(3)
        samples.append(diffusion.sample(4, "cpu"))
        torch.manual_seed(3)
        assert torch.equal(diffusion.sample_diffusion_sequence(4, "cpu")[-1], samples[-1])
    assert torch.allclose(samples[0], samples[1], atol=1e-5) and float(samples[1].abs().max()) <= 1
    with pytest.warns(UserWarning, match="remove_noise was overridden"):
        diffusion.sample(2, "cpu", num_steps=3)


def test_a_network_with_a_condition_of_its_own() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x, t, y):
            return self.gain * x + y.view(len(x), -1).float().mean(1).view(-1, 1, 1, 1)

    diffusion = Diffusion(Conditioned(), (8, 8), 1, None, BETAS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion(X, torch.randn(2, 3))
        diffusion(X, torch.tensor([0, 7], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"y must have shape \[2\]"):
        diffusion(X, torch.randn(3, 3))


def test_int32_labels_work() -> None:
    diffusion = small(num_classes=3, seed=1).eval()
    y = torch.tensor([0, 2])
    assert torch.equal(
        diffusion.sample(2, "cpu", y=y, seed=0, use_ema=False),
        diffusion.sample(2, "cpu", y=y.int(), seed=0, use_ema=False),
    )


def test_attention_resolutions_that_are_no_levels_warn() -> None:
    with pytest.warns(UserWarning, match="indices of levels, 0 to 1 here, and not sizes"):
        unet(attention_resolutions=(16, 8))


def test_many_blocks_without_dropout() -> None:
    assert len(UNet(1, 2, (1, 1), 80, num_groups=1, dropout=0.0).downs) == 161


def test_a_network_in_lower_precision_than_its_average() -> None:
    diffusion = pixelwise(ema_start=1, ema_decay=0.5)
    diffusion.model.bfloat16()
    diffusion.model.gain.data.fill_(1.0)
    diffusion.ema_model.gain.data.fill_(0.0)
    diffusion.update_ema()
    assert diffusion.ema_model.gain.dtype == torch.float32 and float(diffusion.ema_model.gain) == 0.5


@pytest.mark.filterwarnings("ignore:sampling from ema_model")
def test_under_other_default_devices() -> None:
    expected = pixelwise(seed=3).sample(2, "cpu", seed=1)
    diffusion = pixelwise(seed=3)
    with torch.device("meta"):
        assert torch.equal(diffusion.sample(2, "cpu", seed=1), expected)
        diffusion(torch.zeros(2, 2, 5, 7, device="cpu"))


def test_two_threads_with_diffusions_of_their_own() -> None:
    expected = pixelwise(seed=3).sample(4, "cpu", seed=1)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(pixelwise().sample(4, "cpu", seed=1))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 4 and all(torch.equal(r, expected) for r in results)
