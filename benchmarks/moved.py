"""The bytes that a forward of the UNet moves between memory and chip, counted while it runs.

    python -m benchmarks.moved --json benchmarks/results/moved_cifar10.json

On the `meta` device, where every layer takes the way that it takes on a GPU and nothing is computed. Counted are what
PyTorch's operators read and write, and what the calls of this package's ops do, by their arguments: each tensor once a
call, as kernels that read once move it. Two things are known of PyTorch's GPU kernels and not seen in arguments: a
convolution's bias is added in a pass of its own, and its norm reads x twice. Of two batches the difference is taken: an
image's bytes, without weights.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import original_unet
from ddpm_fast import preset
from ddpm_fast.models.weights import fixed_weights
from ddpm_fast.ops._dispatch import Op

aten = torch.ops.aten
BIG = 1024  # numbers of an image from which on a tensor is an activation, here 4x4 pixels of 64 channels


class Traffic(TorchDispatchMode):
    """Counts bytes by operator while it is on; `calls` are operators with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            self._count(func, args, kwargs or {}, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func.name().removeprefix("aten::")
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if any(r.alias_info for r in func._schema.returns) and not writes or name.startswith(("empty", "detach")):
            return  # a view, or memory with nothing in it yet
        moved = sizes((args, kwargs)) + sizes(out)
        if name == "copy_":
            moved = sizes(args[1:]) + sizes(out)
        elif name == "convolution" and args[2] is not None:
            moved += 2 * sizes(out)
        elif name == "native_group_norm":
            moved += sizes(args[0])
        self.calls.append((name, args))
        self.bytes[name] += moved

    @contextmanager
    def ops(self) -> Iterator[None]:
        """Counts calls of ops whole, and not what runs in them."""
        run, attention = Op._run, F.scaled_dot_product_attention

        def whole(name: str, function: Callable[..., Any], tensors: Any, *given: Any) -> Any:
            inside, self.paused = self.paused, True
            try:
                out = function(*given)
            finally:
                self.paused = inside
            if not inside:
                self.calls.append((name, given))
                self.bytes[name] += sizes(tensors) + sizes(out)
            return out

        def of_op(op: Op, args: tuple[Any, ...], check: Any) -> Any:
            return whole(op.name, run, args, op, args, check)

        def of_attention(*qkv: Tensor) -> Any:
            return whole("attention", attention, qkv, *qkv)

        with mock.patch.object(Op, "_run", of_op), mock.patch.object(F, "scaled_dot_product_attention", of_attention):
            yield


def sizes(tree: Any) -> int:
    """Bytes of all tensors; of what was expanded, those that there are."""
    total = 0
    for t in tree_leaves(tree):
        if isinstance(t, Tensor):
            numbers = 1
            for size, stride in zip(t.shape, t.stride(), strict=True):
                numbers *= size if stride else 1
            total += numbers * t.element_size()
    return total


def forward(net: nn.Module, images: int, chain: bool) -> Traffic:
    """The traffic of a step in bf16: the second one of a chain, or a single call."""
    traffic = Traffic()
    x = torch.empty(images, 3, 32, 32, dtype=torch.bfloat16, device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.empty(images, device="meta")
    told = net.embed_steps(t[:1]) if chain else t
    with torch.no_grad(), fixed_weights() if chain else fixed_weights(False):
        if chain:
            net(x, told)
        with traffic.ops(), traffic:
            net(x, told)
    return traffic


def of_an_image(net: nn.Module, chain: bool) -> tuple[Counter[str], list[tuple[str, tuple[Any, ...]]]]:
    """Bytes by operator, and the calls for one image."""
    one, two = forward(net, 1, chain), forward(net, 2, chain)
    return Counter({name: two.bytes[name] - one.bytes[name] for name in two.bytes}), one.calls


def paths() -> dict[str, tuple[nn.Module, bool]]:
    """The networks by name, and whether as in a chain."""
    config = preset("cifar10")
    with torch.device("meta"):
        ours, plain = config.build_unet(), config.build_unet()
        eager = original_unet.UNet(3, 128, (1, 2, 2, 2), 2, 512, 1.0, None, F.silu, 0.1, (1,), "gn", 32, 0)
    ours.fused, plain.fused = True, False
    made = {"original, eager": (eager, False), "plain path": (plain, False)}
    made |= {"sums made later": (ours, False), "in a chain": (ours, True)}
    return {name: (net.eval().to(torch.bfloat16), chain) for name, (net, chain) in made.items()}
