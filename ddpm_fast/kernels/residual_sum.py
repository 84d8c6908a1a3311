"""The sum at the end of a residual block in Triton.

Least bytes: x and residual read, y written. Memory is a matrix, pixels by channels in channels_last and channels by
pixels else, so that an element's bias is that of its column or its row, and no element's place is divided for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # bytes of each tensor a program: four accesses of 16 bytes a thread
LINE = 128  # bytes of a row that a tile has at least, where rows are as long


@triton.jit
def residual_sum_kernel(
    y, x, residual, bias, rows, columns, tiles, channels,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """LAST: columns are channels, else rows are, image after image; `tiles`: of a row."""
    first = (tl.program_id(0) // tiles).to(tl.int64) * HEIGHT
    row = tl.arange(0, HEIGHT)
    column = (tl.program_id(0) % tiles).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    mask = (first + row < rows)[:, None] & inside[None, :]
    e = (first + row)[:, None] * columns + column[None, :]
    total = tl.load(x + e, mask=mask).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + e, mask=mask).to(tl.float32)
    if BIAS:
        if LAST:
            total += tl.load(bias + column, mask=inside).to(tl.float32)[None, :]
        else:
            channel = ((first % channels).to(tl.int32) + row) % channels
            total += tl.load(bias + channel).to(tl.float32)[:, None]
    tl.store(y + e, total.to(y.dtype.element_ty), mask=mask)


def _tile(columns: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a program: no lane beyond a row's end, unless that makes pieces of less than a line."""
    width = columns & -columns
    if width * itemsize < LINE:
        width = triton.next_power_of_2(columns)
    width = min(width, TILE // itemsize)
    return TILE // itemsize // width, width


def residual_sum(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> Tensor:
    """Arguments as in ops.residual_sum; images of one dtype, in x's layout or copied to it."""
    last = x.stride(1) == 1 and x.shape[1] > 1
    layout = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    other = x if residual is None else residual.contiguous(memory_format=layout)
    y = torch.empty_like(x, memory_format=layout)
    if x.numel():
        images, channels, height, width = x.shape
        pixels = height * width
        rows, columns = (images * pixels, channels) if last else (images * channels, pixels)
        tall, wide = _tile(columns, x.itemsize)
        tiles = triton.cdiv(columns, wide)
        residual_sum_kernel[(triton.cdiv(rows, tall) * tiles,)](
            y, x, other, x if bias is None else bias.contiguous(), rows, columns, tiles, channels,
            RESIDUAL=residual is not None, BIAS=bias is not None, LAST=last, HEIGHT=tall, WIDTH=wide,
        )  # fmt: skip
    return y
