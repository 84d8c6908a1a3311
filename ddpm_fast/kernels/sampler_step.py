"""The reverse step of any sampler in Triton: one row of a plan, its noise drawn where it is used.

Least bytes: x and model_out read, x' written; hist read and x0_hat written where a sampler has them,
the variance read where it is learned. The row and its
number are read from device memory, so that a captured step serves every row.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..reference.philox import REVERSE, NoiseState
from .activations import LOG2_E
from .arrays import place
from .layouts import Array, array, pixels, room
from .noise import EXACT, blocks_of, normals

__all__ = ["room", "sampler_step", "sampler_step_kernel"]


@triton.jit(do_not_specialize=["first_sample", "stream"])
def sampler_step_kernel(
    out, out_sample, x0_out, x0_sample, x, x_sample, model_out, m_sample, hist, h_sample, z, z_sample,
    variance, v_sample, rows, k, seed, draw, first_sample, stream, clip, size, blocks, channels, pixels,
    OUT_LAST: tl.constexpr, X0_LAST: tl.constexpr, X_LAST: tl.constexpr, M_LAST: tl.constexpr, H_LAST: tl.constexpr,
    Z_LAST: tl.constexpr, V_LAST: tl.constexpr, COLUMNS: tl.constexpr, X0: tl.constexpr, HIST: tl.constexpr,
    NOISE: tl.constexpr, VARIANCE: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """NOISE: 0 none, 1 given, 2 drawn; VARIANCE: of noise; rows [S, COLUMNS] dense."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * COUNTERS
    e = first * 4 + tl.arange(0, 4 * COUNTERS)
    mask = e < size
    row = rows + tl.load(k) * COLUMNS
    x_t = tl.load(x + n * x_sample + place(e, channels, pixels, X_LAST), mask=mask).to(tl.float32)
    m = tl.load(model_out + n * m_sample + place(e, channels, pixels, M_LAST), mask=mask).to(tl.float32)
    x0 = tl.load(row + 2).to(tl.float32) * x_t + tl.load(row + 3).to(tl.float32) * m
    x0 = tl.where(x0 > clip, clip, tl.where(x0 < -clip, -clip, x0))  # NaN stays
    x_next = tl.load(row + 4).to(tl.float32) * x_t + tl.load(row + 5).to(tl.float32) * x0
    if HIST:
        h = tl.load(hist + n * h_sample + place(e, channels, pixels, H_LAST), mask=mask).to(tl.float32)
        x_next = x_next + tl.load(row + 6).to(tl.float32) * h
    if NOISE == 1:
        noise = tl.load(z + n * z_sample + place(e, channels, pixels, Z_LAST), mask=mask).to(tl.float32)
    if NOISE == 2:
        # By its address in a recorded step, which serves any part of a batch.
        start = tl.load(first_sample) if first_sample.dtype.is_ptr() else first_sample
        noise = normals(first, tl.load(seed), tl.load(draw), start + n, stream, COUNTERS)
    if VARIANCE:
        v = tl.load(variance + n * v_sample + place(e, channels, pixels, V_LAST), mask=mask).to(tl.float32)
        noise = tl.exp2(tl.load(row + 8).to(tl.float32) * v * LOG2_E) * noise
    if NOISE != 0:
        x_next = x_next + tl.load(row + 7).to(tl.float32) * noise
    if X0:
        to = x0_out + n * x0_sample + place(e, channels, pixels, X0_LAST)
        tl.store(to, x0.to(x0_out.dtype.element_ty), mask=mask)
    tl.store(out + n * out_sample + place(e, channels, pixels, OUT_LAST), x_next.to(out.dtype.element_ty), mask=mask)


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
    of_x, of_m = array(x), array(model_out)
    of_h, of_x0 = of_x if hist is None else array(hist), x0_out or out
    drawn = isinstance(noise, NoiseState)
    of_z = array(noise) if isinstance(noise, Tensor) else of_x
    of_v = None if variance is None or noise is None else array(variance)
    learned, of_v = of_v is not None, of_v or of_x
    seed, draw, first_sample = noise if isinstance(noise, NoiseState) else (k, k, 0)
    size = x[:1].numel()
    blocks, cut = blocks_of("sampler_step", x.shape[0], size, 4, x.device)
    if x.numel():
        sampler_step_kernel[(x.shape[0] * blocks,)](
            *out[:2], *of_x0[:2], *of_x[:2], *of_m[:2], *of_h[:2], *of_z[:2], *of_v[:2], rows.contiguous(), k,
            seed, draw, first_sample, REVERSE, math.inf if clip is None else clip, size, blocks, *pixels(x),
            OUT_LAST=out.last, X0_LAST=of_x0.last, X_LAST=of_x.last, M_LAST=of_m.last, H_LAST=of_h.last,
            Z_LAST=of_z.last, V_LAST=of_v.last, COLUMNS=rows.shape[1], X0=x0_out is not None, HIST=hist is not None,
            NOISE=0 if noise is None else 2 if drawn else 1, VARIANCE=learned, **cut, **EXACT,
        )  # fmt: skip
