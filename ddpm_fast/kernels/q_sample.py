"""The perturb step in Triton, its noise drawn where it is used.

Least bytes: x_start read, x_t written; noise costs no bytes.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..reference.philox import PERTURB, NoiseState
from .arrays import place
from .layouts import array, like, pixels
from .noise import EXACT, blocks_of, normals


@triton.jit(do_not_specialize=["first_sample", "stream"])
def q_sample_kernel(
    out, out_sample, x, x_sample, z, z_sample, t, signal, sigma, seed, draw, first_sample, stream,
    size, blocks, channels, pixels,
    OUT_LAST: tl.constexpr, X_LAST: tl.constexpr, Z_LAST: tl.constexpr, DRAWN: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * COUNTERS
    e = first * 4 + tl.arange(0, 4 * COUNTERS)
    mask = e < size
    row = tl.load(t + n)
    if DRAWN:
        noise = normals(first, tl.load(seed), tl.load(draw), first_sample + n, stream, COUNTERS)
    else:
        noise = tl.load(z + n * z_sample + place(e, channels, pixels, Z_LAST), mask=mask).to(tl.float32)
    x_start = tl.load(x + n * x_sample + place(e, channels, pixels, X_LAST), mask=mask).to(tl.float32)
    x_t = tl.load(signal + row) * x_start + tl.load(sigma + row) * noise
    tl.store(out + n * out_sample + place(e, channels, pixels, OUT_LAST), x_t.to(out.dtype.element_ty), mask=mask)


def q_sample(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Tensor | NoiseState) -> Tensor:
    """Arguments as in ops.q_sample; t and the tables contiguous, the tables float32."""
    out, x = like(x_start), array(x_start)
    size = x_start[:1].numel()
    blocks, cut = blocks_of("q_sample", x_start.shape[0], size, 4, x_start.device)
    drawn = isinstance(noise, NoiseState)
    z = x if isinstance(noise, NoiseState) else array(noise)
    seed, draw, first_sample = noise if isinstance(noise, NoiseState) else (t, t, 0)
    if x_start.numel():
        q_sample_kernel[(x_start.shape[0] * blocks,)](
            out.data, out.sample, x.data, x.sample, z.data, z.sample, t, signal, sigma, seed, draw, first_sample,
            PERTURB, size, blocks, *pixels(x_start),
            OUT_LAST=out.last, X_LAST=x.last, Z_LAST=z.last, DRAWN=drawn, **cut, **EXACT,
        )  # fmt: skip
    return out.data
