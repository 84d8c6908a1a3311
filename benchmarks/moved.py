"""The bytes that a step of the CIFAR-10 network moves between memory and chip, counted while it runs.

    python -m benchmarks.moved --json benchmarks/results/moved_cifar10.json

Ours run on the `meta` device, where layers take the way that they take on a GPU and nothing is computed. Counted is
what PyTorch's operators and the calls of this package's ops read and write by their arguments, each tensor once a call,
as kernels that read once move it. Two things about PyTorch's GPU kernels no argument shows: a convolution adds its bias
in a pass of its own, and a norm reads x twice. The difference of two batches is taken: an image's bytes, no weights.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import original_unet
from benchmarks.harness import Row, header, write_json
from ddpm_fast import preset
from ddpm_fast.models.made import fixed_weights
from ddpm_fast.ops._dispatch import Op

aten = torch.ops.aten
BIG = 4096  # numbers of an image's smallest activation: 4x4 pixels of 256 channels
SEVERAL = 5  # images, by which no number of channels can be divided
SUMS = ("add.Tensor", "add_.Tensor", "cat", "silu", "native_group_norm")  # passes that nothing but a reader needs
KINDS = {
    "convolutions": ("convolution", "conv3x3", "addmm", "addmm_", "mm"),
    "their biases": ("bias",),
    "norms": ("native_group_norm", "group_norm_silu"),
    "activations": ("silu",),
    "sums": ("add.Tensor", "add_.Tensor", "residual_sum"),
    "concats": ("cat",),
    "upsampling": ("upsample_nearest2d", "copy_"),
    "attention": ("attention", "bmm", "_softmax", "mul.Tensor"),
}


class Call(NamedTuple):
    """Of an operator or an op."""

    name: str
    tensors: tuple[Tensor, ...]
    biased: bool  # a convolution with a bias


class Traffic(TorchDispatchMode):
    """Counts bytes by operator while it is on, and lists the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: list[Call] = []
        self.inside = False  # of an op, which is counted as a whole

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            out = laid_out(out, args[0])
        name, returns, arguments = func.name().removeprefix("aten::"), func._schema.returns, func._schema.arguments
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in arguments)
        view = any(r.alias_info for r in returns) and not writes or name == "_unsafe_view"
        if self.inside or view or name.startswith("empty"):
            return out
        moved = size((args[1:] if name == "copy_" else args, kwargs)) + size(out)
        if name == "native_group_norm":
            moved += size(args[0])
        self.count(name, moved, (args, kwargs), out, name == "convolution" and args[2] is not None)
        return out

    def count(self, name: str, moved: int, tensors: Any, out: Any, biased: bool) -> None:
        """A call; the pass of a convolution's bias is told apart."""
        self.calls.append(Call(name, tuple(t for t in tree_leaves(tensors) if isinstance(t, Tensor)), biased))
        self.bytes[name] += moved
        self.bytes["bias"] += 2 * size(out) if biased else 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Operators, and calls of ops and of attention as a whole."""
        run, attention = Op._run, F.scaled_dot_product_attention

        def whole(name: str, tensors: Any, call: Callable[[], Any]) -> Any:
            before, self.inside = self.inside, True
            try:
                out = laid_out(call(), tensors[0])
            finally:
                self.inside = before
            if not before:
                biased = name == "conv3x3" and tensors[2] is not None
                self.count(name, size(tensors) + size(out), tensors, out, biased)
            return out

        def of_op(op: Op, args: tuple[Any, ...], check: Any) -> Any:
            return whole(op.name, args, lambda: run(op, args, check))

        def of_attention(*qkv: Tensor) -> Any:
            return whole("attention", qkv, lambda: attention(*qkv))

        patches = mock.patch.object(Op, "_run", of_op), mock.patch.object(F, attention.__name__, of_attention)
        with patches[0], patches[1], self:
            yield

    def passes(self) -> Counter[str]:
        """Passes over activations of `SEVERAL` images that are left: sums and the like, and convolutions' biases."""
        left: Counter[str] = Counter()
        for name, tensors, biased in self.calls:
            left[f"{name} with a bias"] += biased
            left[name] += name in SUMS and any(
                t.numel() >= BIG * SEVERAL and t.shape[0] % SEVERAL == 0 for t in tensors
            )
        return +left


def laid_out(out: Any, like: Tensor) -> Any:
    """In channels_last, if that is: as on a GPU, where `meta` loses layouts."""
    if not like.is_contiguous(memory_format=torch.channels_last):
        return out
    return tree_map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t, out)


def size(tree: Any) -> int:
    """Bytes of all tensors; what was expanded is there once."""
    total = 0
    for t in tree_leaves(tree):
        if isinstance(t, Tensor):
            numbers = 1
            for length, stride in zip(t.shape, t.stride(), strict=True):
                numbers *= length if stride else 1
            total += numbers * t.element_size()
    return total


def step(net: nn.Module, images: int, chain: bool) -> Traffic:
    """The traffic of a forward in bf16; of the second one in a chain."""
    traffic, device = Traffic(), next(net.parameters()).device
    x = torch.zeros(images, 3, 32, 32, dtype=torch.bfloat16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.zeros(images, dtype=x.dtype, device=device)
    told = net.embed_steps(t[:1]) if chain else t
    with torch.no_grad(), fixed_weights() if chain else nullcontext(), traffic.watching():
        if chain:
            net(x, told)
            traffic.bytes.clear()
            traffic.calls.clear()
        net(x, told)
    return traffic


def bytes_of_an_image(net: nn.Module, chain: bool) -> Counter[str]:
    """By kind."""
    one, two = step(net, 1, chain).bytes, step(net, 2, chain).bytes
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    found: Counter[str] = Counter()
    for name in two:
        found[kinds.get(name, "the rest")] += two[name] - one[name]
    return found


def networks() -> dict[str, tuple[nn.Module, bool]]:
    """By name, and whether as in a chain."""
    config = preset("cifar10")
    with torch.device("meta"):
        later, plain = config.build_unet(), config.build_unet()
    original = original_unet.UNet(3, 128, (1, 2, 2, 2), 2, 512, 1.0, None, F.silu, 0.1, (1,), "gn", 32, 0)
    original.time_mlp[0].register_forward_hook(lambda module, args, out: out.to(torch.bfloat16))
    later.fused, plain.fused = True, False
    made = {"original, eager": (original, False), "plain path": (plain, False)}
    made |= {"sums made later": (later, False), "sums made later, in a chain": (later, True)}
    form = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    return {name: (net.eval().to(**form), chain) for name, (net, chain) in made.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file, too")
    options = parser.parse_args()
    rows: list[Row] = []
    for name, (net, chain) in networks().items():
        found, traffic = bytes_of_an_image(net, chain), step(net, SEVERAL, chain)
        row: Row = {"path": name, **{kind: round(found[kind] / 1e6, 2) for kind in (*KINDS, "the rest")}}
        row |= {"MB": round(found.total() / 1e6, 2), "calls": len(traffic.calls)}
        rows.append(row | {"passes left": sum(traffic.passes().values())})
    head = header(torch.device("cpu"))
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if options.json:
        write_json(options.json, head, rows)


if __name__ == "__main__":
    main()
