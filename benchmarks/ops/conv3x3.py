"""3x3 convolution on the shapes of the CIFAR-10 network: with weights that stay, as in a chain, and in training."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ops import Case, Inputs
from ddpm_fast import ops
from ddpm_fast.models.made import fixed_weights
from ddpm_fast.models.weights import convolve3x3, onednn_takes_bf16

SHAPES = (  # channels, output channels, size: those of most FLOP at each size, and both ends of a row
    *((128, 128, 32), (384, 128, 32), (256, 256, 32), (256, 256, 16), (512, 256, 16)),
    *((256, 256, 8), (512, 256, 8), (256, 256, 4)),
)


def _is_packed(dtype: torch.dtype) -> bool:
    return torch.backends.mkldnn.is_available() and (dtype is torch.float32 or onednn_takes_bf16())


class Kept:
    """A convolution and what is made of its weight for a chain."""

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        self.conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1).to(weight.device, weight.dtype)
        self.conv.weight = nn.Parameter(weight)
        with torch.no_grad():
            self.conv.bias.zero_()
        self.weights, self.prepared = fixed_weights(), None
        with torch.no_grad(), self.weights as made:
            convolve3x3(x, self.conv, False)
            self.prepared = next(iter(made.values())).value if made else None
        self.packed = None
        if x.device.type == "cpu" and _is_packed(weight.dtype):
            pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            self.packed = pack(weight.to_mkldnn(), (1, 1), (1, 1), (1, 1), 1, x.shape)

    def ours(self, x: Tensor) -> Tensor:
        """As in a chain."""
        return self.prepared(x, False) if self.prepared is not None else convolve3x3(x, self.conv, False)

    def frozen(self, x: Tensor) -> Tensor:
        """As torch.compile has it where weights are frozen."""
        run = torch.ops.mkldnn._convolution_pointwise.default
        return run(x, self.packed, None, (1, 1), (1, 1), (1, 1), 1, "none", (), "")


def _plain(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def _ours(x: Tensor, weight: Tensor) -> Tensor:
    return ops.conv3x3(x, weight)


def _kept(x: Tensor, weight: Tensor, kept: Kept) -> Tensor:
    return kept.ours(x)


def _frozen(x: Tensor, weight: Tensor, kept: Kept) -> Tensor:
    return kept.frozen(x)


def _make(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    kept: bool,
    seed: int,
    device: torch.device,
    memory_format: torch.memory_format,
) -> Inputs:
    batch, channels, out_channels, size = shape
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, channels, size, size, device=device, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, device=device, generator=generator) / (9 * channels) ** 0.5
    made = tuple(a.to(dtype).to(memory_format=memory_format) for a in (x, weight))
    return (*made, Kept(made[1], made[0])) if kept else made


def _case(batch: int, channels: int, out_channels: int, size: int, dtype: torch.dtype, training: bool) -> Case:
    x, y, w = batch * channels * size**2, batch * out_channels * size**2, 9 * channels * out_channels
    # Forward: read x and w, write y. Backward: read x, w and dy, write dx and dw.
    numel = 3 * x + 2 * y + 3 * w if training else x + y + w
    flops = 2 * batch * size**2 * w * (3 if training else 1)
    what = "forward+backward" if training else "weights that stay"
    label = f"{[batch, channels, size, size]} -> {out_channels} {what}"
    return Case(
        "conv3x3",
        label,
        batch,
        numel * dtype.itemsize,
        partial(_make, (batch, channels, out_channels, size), dtype, not training),
        _ours if training else _kept,
        _plain,
        dtype,
        flops,
        (0, 1) if training else (),
        backends=training,
        peers={"torch frozen": _frozen} if not training and _is_packed(dtype) else {},
        peers_on="cpu",
        errors=True,
        factor=3.0 if dtype == torch.float32 else None,
    )


def cases(batch: int) -> list[Case]:
    """Return the cases: both precisions, every shape with weights that stay, some in training."""
    shapes = [(*shape, False) for shape in SHAPES] + [(128, 128, 32, True), (256, 256, 16, True), (256, 256, 8, True)]
    return [
        _case(batch, *shape, dtype, training)
        for *shape, training in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]
