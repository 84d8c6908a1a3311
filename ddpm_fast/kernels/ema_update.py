"""The moving average of a network's weights in Triton: all tensors in one launch.

Least bytes: average and value read, average written. A program has a stretch of one tensor, and reads from a table in
device memory where that lies. The table is kept, as the weights of a network stay where they are: a call before the
capture of a graph makes it, the captured one only reads it.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 2048  # elements of a program


@triton.jit
def _update(average, value, count, weight, STRETCH: tl.constexpr, WHOLE: tl.constexpr):
    e = tl.arange(0, STRETCH)
    mask = None if WHOLE else e < count
    old = tl.load(average + e, mask=mask).to(tl.float32)
    new = tl.load(value + e, mask=mask).to(tl.float32)
    # From the nearer end, as torch's lerp: a weight of 0 or 1 gives that end.
    mixed = tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))
    tl.store(average + e, mixed.to(average.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["weight"])
def ema_update_kernel(
    table, weight, AVERAGE: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, STRETCH: tl.constexpr
):
    """Rows of the table: address of the average, of the value, elements. WIDE: all addresses are those of 16 bytes."""
    row = table + tl.program_id(0) * 3
    average = tl.load(row).to(tl.pointer_type(AVERAGE))
    value = tl.load(row + 1).to(tl.pointer_type(VALUE))
    if WIDE:
        average, value = tl.multiple_of(average, 16), tl.multiple_of(value, 16)
    count = tl.load(row + 2)
    if count == STRETCH:  # without a mask, which would split wide accesses
        _update(average, value, count, weight, STRETCH, True)
    else:
        _update(average, value, count, weight, STRETCH, False)


@functools.cache  # a captured graph reads its table at every replay: none is ever dropped
def _table(stretches: tuple[tuple[int, int, int], ...], sizes: tuple[int, int], device: torch.device) -> Tensor:
    """int64 [programs, 3] on the device, for (address, address, elements) of each tensor and the dtypes' bytes."""
    rows = [
        (average + first * sizes[0], value + first * sizes[1], min(STRETCH, count - first))
        for average, value, count in stretches
        for first in range(0, count, STRETCH)
    ]
    return torch.tensor(rows, dtype=torch.int64).to(device)


def ema_update(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """Arguments as in ops.ema_update; dense, each pair alike, averages of one dtype and values of one."""
    pairs = [(a, v) for a, v in zip(averages, values, strict=True) if a.numel()]
    if not pairs:
        return
    a, v = pairs[0]
    stretches = tuple((a.data_ptr(), v.data_ptr(), a.numel()) for a, v in pairs)
    wide = all(first % 16 == 0 and second % 16 == 0 for first, second, _ in stretches)
    table = _table(stretches, (a.itemsize, v.itemsize), a.device)
    average, value = (getattr(tl, str(x.dtype).removeprefix("torch.")) for x in (a, v))
    ema_update_kernel[(len(table),)](table, 1 - decay, AVERAGE=average, VALUE=value, WIDE=wide, STRETCH=STRETCH)
