"""Upsampling and its convolution in phases: the same numbers, and only where nothing else would run or be stale."""

from collections.abc import Iterator

import pytest
import torch
from oracle import assert_rule
from torch import Tensor, nn

from ddpm_fast import Diffusion, UNet, Upsample, generate_cosine_schedule, ops
from ddpm_fast.models import upsampling
from ddpm_fast.models.made import fixed_weights, plain_path
from ddpm_fast.models.upsampling import in_phases, phase_weights, phases_pay
from ddpm_fast.ops._dispatch import forced

LAST = torch.channels_last


pytestmark = pytest.mark.skipif(forced() not in (None, "native"), reason="what is forced has no phases")


@pytest.fixture(autouse=True)
def direct_convolutions() -> Iterator[None]:
    """Without gradients; Winograd's filtering would take the upsampled image in the place of phases."""
    with torch.no_grad(), ops.exact_convolutions():
        yield


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often phases ran, and with how many images."""
    calls: list[int] = []
    plain = upsampling.in_phases
    monkeypatch.setattr(upsampling, "in_phases", lambda x, *rest: calls.append(x.shape[0]) or plain(x, *rest))
    return calls


def test_weights_by_hand() -> None:
    """One channel, one dimension at a time: (w0, w1 + w2) and (w0 + w1, w2)."""
    w = torch.arange(9.0).view(1, 1, 3, 3)
    rows = [torch.stack([w[0, 0, 0], w[0, 0, 1] + w[0, 0, 2]]), torch.stack([w[0, 0, 0] + w[0, 0, 1], w[0, 0, 2]])]
    expected = [
        torch.stack([r[:, 0], r[:, 1] + r[:, 2]], 1) if b == 0 else torch.stack([r[:, 0] + r[:, 1], r[:, 2]], 1)
        for r in rows
        for b in (0, 1)
    ]
    assert torch.equal(phase_weights(w)[:, 0], torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128, 16, 16), (4, 128, 8, 8), (3, 130, 9, 11), (2, 128, 16, 8)])
def test_the_numbers_of_the_layer(counted: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Odd sizes, and borders, which see zeros."""
    torch.manual_seed(0)
    layer = Upsample(shape[1]).to(dtype)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAST)
    with fixed_weights():
        fast = layer(x)
    assert counted == [shape[0]] and fast.is_contiguous(memory_format=LAST)
    plain = layer(x)
    assert len(counted) == 1
    truth = Upsample(shape[1]).double()
    truth.load_state_dict(layer.state_dict())
    assert_rule("y", fast, plain, truth(x.double()), 2)


def test_under_autocast(counted: list[int]) -> None:
    layer, x = Upsample(128), torch.randn(2, 128, 16, 16).contiguous(memory_format=LAST)
    with torch.autocast("cpu", torch.bfloat16):
        with fixed_weights():
            fast = layer(x)
        plain = layer(x)
    assert len(counted) == 1
    assert_rule("y", fast, plain, layer.double()(x.double()), 2)


class Watched(nn.Conv2d):
    pass


def replaced(layer: Upsample) -> None:
    layer.upsample[1] = Watched(128, 128, 3, padding=1)


def hooked(layer: Upsample) -> None:
    layer.upsample[0].register_forward_hook(lambda module, args, out: out + 1)


def parametrized(layer: Upsample) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer.upsample[1])


@pytest.mark.parametrize("change", [replaced, hooked, parametrized])
def test_modules_that_were_changed_are_called(counted: list[int], change) -> None:
    layer, x = Upsample(128), torch.randn(2, 128, 16, 16).contiguous(memory_format=LAST)
    change(layer)
    expected = layer(x)
    with fixed_weights():
        assert torch.equal(layer(x), expected)
    assert not counted


def test_where_it_does_not_pay() -> None:
    conv = nn.Conv2d(128, 128, 3, padding=1)
    x = torch.zeros(4, 128, 8, 8).contiguous(memory_format=LAST)
    large = torch.zeros(16, 128, 16, 16).contiguous(memory_format=LAST)
    assert not phases_pay(x, conv) and not phases_pay(large, conv)  # weights may change
    with fixed_weights():
        assert phases_pay(x, conv)
        for other in (x[:3], x[:, :, :4], x.contiguous(), x.double(), x[:, :64].contiguous(memory_format=LAST)):
            assert not phases_pay(other, conv)
        with ops.use_backend("reference"):
            assert not phases_pay(x, conv)
        with plain_path():
            assert not phases_pay(x, conv)
    with torch.enable_grad():
        assert phases_pay(large, conv) and not phases_pay(large[:15], conv)
        with plain_path():
            assert not phases_pay(large, conv)
        transformed = torch.func.vmap(lambda x: torch.ones(()) * phases_pay(large, conv))(torch.zeros(2))
        assert not transformed.any()
    assert not phases_pay(x, conv)


def test_a_chain_makes_them_anew(counted: list[int]) -> None:
    """Weights that change in between, also past torch's counters, are seen."""
    torch.manual_seed(0)
    net = UNet(1, 64, (1, 2), 1, time_emb_dim=8, num_groups=8)
    diffusion = Diffusion(net, (16, 16), 1, None, generate_cosine_schedule(12))
    draw = lambda images, steps: diffusion.sample(images, "cpu", seed=1, num_steps=steps)  # noqa: E731

    def expected(images: int, steps: int) -> Tensor:
        with ops.use_backend("reference"):
            return draw(images, steps)

    for _ in range(2):
        counted.clear()
        torch.testing.assert_close(draw(4, 8), expected(4, 8), rtol=1e-3, atol=1e-3)
        assert counted == [4] * 8
        for p in diffusion.ema_model.parameters():
            p.data.mul_(1.1)
    counted.clear()
    draw(3, 8)
    assert not counted  # too few pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype) -> None:
    """Of x and the weights, which are made of the layer's while gradients are asked for; and theirs."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, padding=1).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64).to(dtype)
    with torch.enable_grad():

        def gradients(fast: bool, kind: torch.dtype) -> list[Tensor]:
            layer = nn.Conv2d(6, 10, 3, padding=1).to(kind)
            layer.load_state_dict(conv.state_dict())
            leaf = x.to(kind).contiguous(memory_format=LAST).requires_grad_()
            large = nn.functional.interpolate(leaf, scale_factor=2.0)
            y = in_phases(leaf, layer) if fast else layer(large)
            dx, dw, db = torch.autograd.grad(y.square().sum(), [leaf, layer.weight, layer.bias], create_graph=True)
            return [y, dx, dw, db, torch.autograd.grad(dx.square().sum(), layer.weight)[0]]

        truth = [g.detach() for g in gradients(False, torch.float64)]
        results = zip(gradients(True, dtype), gradients(False, dtype), truth, strict=True)
        for i, (fast, plain, exact) in enumerate(results):
            assert_rule(f"result {i}", fast.detach(), plain.detach(), exact, 3)
