"""The network whose sums are left to their readers, against the plain one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import DTYPES, NETWORKS, PLACES, N, hold, hooked, inputs, network, parametrized, replaced, run
from oracle import assert_rule, error
from torch import Tensor

from ddpm_fast import ResidualBlock
from ddpm_fast.models import attention, weights
from ddpm_fast.models.made import fixed_weights
from ddpm_fast.models.sums import Sum


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


def wide(product: Callable) -> Callable:
    """The product, which is to be one of float32."""

    def run(*images: Tensor, **more: object) -> Tensor:
        assert all(image.dtype is torch.float32 for image in images)
        return product(*images, **more)

    return run


@pytest.mark.parametrize("fused", [True, None])
def test_bf16_on_a_cpu_that_has_none(fused: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of images are float32's, which are far faster there."""
    net = network(attention_resolutions=(0, 1), base_channels=32).eval()
    monkeypatch.setattr(weights, "onednn_takes_bf16", lambda: True)
    plain = run(net, False, torch.bfloat16)
    monkeypatch.setattr(weights, "onednn_takes_bf16", lambda: False)
    for owner, name in ((torch, "bmm"), (torch, "baddbmm"), (Tensor, "addmm_")):
        monkeypatch.setattr(owner, name, wide(getattr(owner, name)))
    with fixed_weights():
        first, second = run(net, fused, torch.bfloat16), run(net, fused, torch.bfloat16)
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


# A module that was hooked, parametrized, replaced or wrapped is called, not stood in for.


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


def test_networks_of_older_pickles() -> None:
    net = network()
    del net.__dict__["_fused"], net.__dict__["_recompute"]
    assert net(*inputs(net)).shape == (N, 3, 8, 12)
