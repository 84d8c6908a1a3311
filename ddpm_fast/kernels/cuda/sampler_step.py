"""Launches csrc/cuda/sampler_step.cu: the reverse step of any sampler, one row of a plan.

Least bytes: x and model_out read, x' written; hist read and x0_hat written where a sampler has them, the
variance read where it is learned.
"""

import math

from torch import Tensor

from ...reference.philox import REVERSE, NoiseState
from ..layouts import Array, array, pixels, room
from ._module import TYPES, draws, module, place

__all__ = ["room", "sampler_step"]


def _array(a: Array | None) -> tuple[int, int, int, bool]:
    return (0, 0, 0, False) if a is None else (a.data.data_ptr(), a.sample, TYPES[a.data.dtype], a.last)


def sampler_step(
    out: Array,
    x0_out: Array | None,
    x: Tensor,
    model_out: Tensor,
    rows: Tensor,
    k: Tensor,
    noise: Tensor | NoiseState | None,
    hist: Tensor | None,
    variance: Tensor | None,
    clip: float | None,
) -> None:
    """Writes x' and x0_hat; arguments as in ops.sampler_step. Results may lie where x and hist do, else apart."""
    if not x.numel():
        return
    state, z = (noise, None) if isinstance(noise, NoiseState) else (None, noise)
    scale = None if noise is None else variance
    read = [None if v is None else array(v) for v in (x, model_out, hist, z, scale)]
    rows = rows.contiguous()
    module.sampler_step(
        tuple(map(_array, (out, x0_out, *read))),
        (x.shape[0], x[:1].numel(), *pixels(x)),
        rows.data_ptr(),
        TYPES[rows.dtype],
        rows.shape[1],
        k.data_ptr(),
        math.inf if clip is None else clip,
        state is not None,
        draws(state, REVERSE),
        *place(x),
    )
