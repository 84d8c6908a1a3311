"""Networks, what goes into them, and the rule by which their fused and plain results are compared."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from oracle import assert_rule
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ddpm_fast import UNet

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


# What may be done to a module.


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
