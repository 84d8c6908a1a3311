"""1x1 convolutions on the native module, where they are faster than the library's."""

import torch
from torch import Tensor

from . import _native
from ._conv3x3 import KINDS, LAST, is_exact

# Up to how many pixels of a batch they are, of one image tensor and of two, by instruction set (docs/convolution.md).
ANY = 1 << 62
MOST_PIXELS = {
    ("avx2", torch.float32): (1024, ANY),
    ("avx512", torch.float32): (64, 64),
    ("avx512bf16", torch.float32): (64, 64),
    ("avx512bf16", torch.bfloat16): (256, 256),
}


def pays(dtype: torch.dtype, pixels: int, two: bool) -> bool:
    """Whether so many pixels of a batch are faster in this way than in the library's; `two` for those of two tensors,
    which a library takes concatenated."""
    if is_exact() or dtype not in KINDS:
        return False
    return 0 < pixels <= most_pixels(dtype)[two]


def most_pixels(dtype: torch.dtype) -> tuple[int, int]:
    """Of one image tensor and of two, on this CPU."""
    return MOST_PIXELS.get((_native.load().isa(), dtype), (0, 0))


def convolve(
    x: Tensor,
    weights: Tensor,  # as `lay_out` of _conv3x3.py lays out [K, C, 1, 1] for no tile
    out_channels: int,
    bias: Tensor | None = None,  # float32
    x2: Tensor | None = None,
    residual: Tensor | None = None,
    moments: Tensor | None = None,  # mean and sum of squares around it, float32 [2, N, K], to be written
) -> Tensor:
    """The 1x1 convolution of x [N, C, H, W], or of x and x2 concatenated, plus a residual; all in channels_last."""
    shape = (x.shape[0], out_channels, *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=LAST)
    _native.kernel("conv1x1")(x, x2, weights, bias, residual, y, moments, _native.threads())
    return y
