"""The fused network of a GPU against its plain path, by the rule of the tests."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import ROOT
from ddpm_fast import UNet, preset
from ddpm_fast.models.made import fixed_weights
from ddpm_fast.ops import NoiseState

sys.path.insert(0, str(ROOT / "tests" / "ops"))
from oracle import assert_rule  # type: ignore[import-not-found]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _network(model: str, device: torch.device, dry: bool) -> UNet:
    torch.manual_seed(0)
    config = preset(model)
    if dry:
        config = replace(config, base_channels=16, num_res_blocks=1, channel_mults=(1, 2), num_groups=8)
    net = config.build_unet().to(device)
    with torch.no_grad():
        for p in net.parameters():  # biases and scales, too
            p += 0.05 * torch.randn_like(p)
    return net


def _run(net: UNet, fused: bool, dtype: torch.dtype, gradients: bool, noise: NoiseState | None) -> list[Tensor]:
    """The result, and the gradients of all weights as one."""
    net.fused, device = fused, next(net.parameters()).device
    exact = next(net.parameters()).dtype is torch.float64
    torch.manual_seed(1)
    x = torch.randn(3, net.img_channels, 32, 32).to(device, torch.float64 if exact else torch.float32)
    t, y = torch.tensor([1, 50, 99], device=device), torch.tensor([0, 3, 4], device=device)
    half = dtype is not torch.float32 and not exact
    with torch.autocast(device.type, dtype, enabled=half), torch.set_grad_enabled(gradients):
        out = net(x, t, y if net.num_classes else None, noise)
    if not gradients:
        return [out]
    cotangent = torch.randn(out.shape, dtype=torch.float64).to(device, out.dtype)
    grads = torch.autograd.grad(out, list(net.parameters()), cotangent)
    return [out.detach(), torch.cat([g.flatten() for g in grads])]


def networks(device: torch.device, dry: bool) -> str:
    """Results, in chains and alone, and gradients, in every precision."""
    count = 0
    for model in ("digits", "cifar10"):
        net, exact = (_network(model, device, dry) for _ in range(2))
        exact.double()
        for dtype in DTYPES[: 2 if device.type == "cpu" else 3]:
            for gradients in (False, True):
                noise = NoiseState.at(3, 0, 0, device) if gradients else None  # dropout in training
                for each in (net, exact):
                    each.train(gradients)
                truth = _run(exact, False, dtype, gradients, noise)
                plain, fast = (_run(net, fused, dtype, gradients, noise) for fused in (False, True))
                results = [fast]
                if not gradients:
                    with fixed_weights():
                        results += [_run(net, True, dtype, gradients, noise) for _ in range(2)]
                for got in results:
                    for name, *three, factor in zip(("result", "gradients"), got, plain, truth, (2, 3), strict=False):
                        assert_rule(f"{model}, {dtype}: {name}", *three, factor)
                        count += 1
    return f"{count} results and gradients"


def recomputation(device: torch.device, dry: bool) -> str:
    """The same gradients, and how much less memory is in use at the most."""
    net, exact = (_network("cifar10", device, dry).train() for _ in range(2))
    options: tuple[Any, ...] = torch.bfloat16, True, NoiseState.at(3, 0, 0, device)
    with torch.backends.cudnn.flags(deterministic=True):
        plain, truth, notes, got = _run(net, False, *options), _run(exact.double(), False, *options), [], {}
        for what in ("none", "norm", "block"):
            net.recompute = what
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            got[what] = _run(net, True, *options)
            peak = torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else 0
            notes.append(f"{what} {peak} MiB")
    assert all(torch.equal(a, b) for a, b in zip(got["norm"], got["none"], strict=True)), "norm"
    assert torch.equal(got["block"][0], got["none"][0]), "block"
    assert_rule("gradients of block", got["block"][1], plain[1], truth[1], 3)  # each block's is rounded once more
    return "at the most " + ", ".join(notes)


FUSED: dict[str, Callable[[torch.device, bool], Any]] = {
    "network against its plain path": networks,
    "recomputation": recomputation,
}
