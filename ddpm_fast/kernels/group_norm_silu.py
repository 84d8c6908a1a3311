"""Group normalisation with what stands around it, in Triton, forward and backward.

Least bytes: x read, y written; in the backward x and dy read, dx written. A program has an image's slab of channels,
whole groups of it: where all its pixels fit the registers it reads them once, else two kernels share the image's pixels
out in chunks: the first leaves moments (or sums) of each chunk, the second merges them in a fixed order, without
atomics. Sums are taken of x less a pivot, the channel's own mean, so that an offset costs no accuracy.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activations import activate, through
from .noise import dropout_factors, words
from .norm_cut import Config, candidates
from .norm_merge import added_sums, few, merged_moments
from .norm_operands import Operands


@triton.jit
def _tile(x, x2, n, p, c, mask, x_n, x_c, x_p, x2_n, x2_c, x2_p, channels_1, X2: tl.constexpr):
    """cat(x, x2) of an image at pixels p and channels c, float32, 0 beyond the mask."""
    at = x + n * x_n + p[:, None] * x_p + c[None, :] * x_c
    if X2:
        first = c[None, :] < channels_1
        v = tl.load(at, mask=mask & first, other=0.0).to(tl.float32)
        more = x2 + n * x2_n + p[:, None] * x2_p + (c - channels_1)[None, :] * x2_c
        w = tl.load(more, mask=mask & (c[None, :] >= channels_1), other=0.0).to(tl.float32)
        return tl.where(first, v, w)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _over_groups(v, c, inside, PER_GROUP: tl.constexpr, SLAB: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of each channel's group, at each of its channels."""
    if PER_GROUP == 1:
        return v
    if PER_GROUP == SLAB:
        return tl.zeros([WIDTH], tl.float32) + tl.sum(tl.where(inside, v, 0.0), 0)
    if WIDTH % PER_GROUP == 0 and PER_GROUP & (PER_GROUP - 1) == 0:
        groups: tl.constexpr = WIDTH // PER_GROUP
        sums = tl.sum(tl.reshape(tl.where(inside, v, 0.0), [groups, PER_GROUP]), 1)
        return tl.reshape(tl.broadcast_to(sums[:, None], [groups, PER_GROUP]), [WIDTH])
    same = (c[:, None] // PER_GROUP == c[None, :] // PER_GROUP) & inside[None, :]
    return tl.sum(tl.where(same, v[None, :], 0.0), 1)


@triton.jit
def _moments(x, mask, pixels):
    """Of each channel a pivot, the mean less the pivot and the sum of squares around the mean; and x less the pivot."""
    pivot = tl.sum(x, 0) / pixels
    d = tl.where(mask, x - pivot[None, :], 0.0)
    mean = tl.sum(d, 0) / pixels
    squares = tl.maximum(tl.sum(d * d, 0) - mean * mean * pixels, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return d, pivot, mean, squares


@triton.jit
def _parameter(p, at, inside, GIVEN: tl.constexpr, ABSENT: tl.constexpr):
    if GIVEN:
        return tl.load(p + at, mask=inside, other=ABSENT).to(tl.float32)
    return tl.full(at.shape, ABSENT, tl.float32)


@triton.jit
def _affine(
    pivot, mean, squares, weight, bias, add, add_n, scale, shift, statistics, n, c, stored, inside, channels, pixels,
    eps, AFFINE: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, PER_GROUP: tl.constexpr,
    SLAB: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """From the channels' moments the map from x - pivot to what the activation takes; stores the groups' statistics."""
    both = n * channels + c
    more = _parameter(add, n * add_n + c, inside, ADD, 0.0)
    factor = 1.0 + _parameter(scale, both, inside, SCALE, 0.0)
    origin = _over_groups(tl.where(c % PER_GROUP == 0, pivot, 0.0), c, inside, PER_GROUP, SLAB, WIDTH)  # of each group
    from_origin = (pivot - origin) + more + mean
    count = pixels * PER_GROUP
    group_mean = _over_groups(from_origin, c, inside, PER_GROUP, SLAB, WIDTH) / PER_GROUP
    d = from_origin - group_mean
    variance = _over_groups(squares + d * d * pixels, c, inside, PER_GROUP, SLAB, WIDTH) / count
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    gain = rstd * _parameter(weight, c, inside, AFFINE, 1.0) * factor
    offset = _parameter(bias, c, inside, AFFINE, 0.0) * factor + _parameter(shift, both, inside, SHIFT, 0.0)
    at = statistics + 2 * (n * (channels // PER_GROUP) + c // PER_GROUP)
    first = stored & (c % PER_GROUP == 0)
    tl.store(at, origin.to(tl.float64) + group_mean.to(tl.float64), mask=first)
    tl.store(at + 1, rstd.to(tl.float64), mask=first)
    return gain, offset + ((pivot - origin) + more - group_mean) * gain


@triton.jit
def _factors(
    n, pixel, slab, c, p, channels, seed, draw, first_sample, stream, threshold, factor, WHOLE: tl.constexpr,
    PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The factors of dropout of a tile; WHOLE: eight channels of a pixel share a counter."""
    sample = first_sample + n
    if WHOLE:
        eights: tl.constexpr = WIDTH // 8
        rows = (pixel + tl.arange(0, PIXELS)).to(tl.int64)[:, None] * (channels // 8)
        counters = tl.reshape(rows + (slab // 8 + tl.arange(0, eights))[None, :], [PIXELS * eights])
        flat = dropout_factors(counters, tl.load(seed), tl.load(draw), sample, stream, threshold, factor)
        return tl.reshape(flat, [PIXELS, WIDTH])
    e = p.to(tl.int64)[:, None] * channels + c[None, :]
    w0, w1, w2, w3 = words(e // 8, tl.load(seed), tl.load(draw), sample, stream)
    place = (e % 8).to(tl.int32)
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    half = tl.where(place % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)
    return tl.where(half >= threshold, factor, 0.0)


# What every kernel below is told, in this order: the images (data, elements from image to image, channel to channel,
# pixel to pixel), the parameters, the noise, the sizes, and what of it there is.
@triton.jit(do_not_specialize=["first_sample", "stream", "threshold"])
def group_norm_silu_fwd_kernel(
    x, x_n, x_c, x_p, x2, x2_n, x2_c, x2_p, residual, r_n, r_c, r_p, h, h_n, h_c, h_p, y, y_n, y_c, y_p,
    weight, bias, add, add_n, scale, shift, statistics, moments, seed, draw, first_sample, stream, threshold, factor,
    channels, channels_1, pixels, eps, entries, each,
    X2: tl.constexpr, RESIDUAL: tl.constexpr, AFFINE: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr, DROPOUT: tl.constexpr, ACTIVATION: tl.constexpr, PART: tl.constexpr, PER_GROUP: tl.constexpr,
    SLAB: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, CHUNKS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """PART 0: all of a slab in one pass. PART 1: a chunk's moments, and h = x + residual. PART 2: a chunk of y."""
    slabs = tl.cdiv(channels, SLAB)
    n = (tl.program_id(0) // (slabs * CHUNKS)).to(tl.int64)
    slab = tl.program_id(0) // CHUNKS % slabs * SLAB
    chunk = tl.program_id(0) % CHUNKS
    lane = tl.arange(0, WIDTH)
    c = slab + lane
    inside = (lane < SLAB) & (c < channels)
    p = chunk * PIXELS + tl.arange(0, PIXELS)
    mask = (p < pixels)[:, None] & inside[None, :]
    if RESIDUAL and PART == 2:
        v = _tile(h, x2, n, p, c, mask, h_n, h_c, h_p, x2_n, x2_c, x2_p, channels_1, X2)
    else:
        v = _tile(x, x2, n, p, c, mask, x_n, x_c, x_p, x2_n, x2_c, x2_p, channels_1, X2)
        if RESIDUAL:
            first = mask & (c < channels_1)[None, :] if X2 else mask
            r = tl.load(residual + n * r_n + p[:, None] * r_p + c[None, :] * r_c, mask=first, other=0.0)
            total = (v + r.to(tl.float32)).to(h.dtype.element_ty)  # x2's channels stay as they are
            tl.store(h + n * h_n + p[:, None] * h_p + c[None, :] * h_c, total, mask=first)
            v = total.to(tl.float32)
    if PART == 2:
        pivot, mean, squares = merged_moments(moments, n, 0, entries, c, inside, channels, pixels, each, ENTRIES)
        d = v - pivot[None, :]
    else:
        in_chunk = tl.minimum(pixels - chunk * PIXELS, PIXELS)
        d, pivot, mean, squares = _moments(v, mask, in_chunk)
    if PART == 1:
        at = moments + (n * CHUNKS + chunk) * 3 * channels + c
        tl.store(at, pivot, mask=inside)
        tl.store(at + channels, mean, mask=inside)
        tl.store(at + 2 * channels, squares, mask=inside)
    else:
        gain, offset = _affine(
            pivot, mean, squares, weight, bias, add, add_n, scale, shift, statistics, n, c, inside & (chunk == 0),
            inside, channels, pixels, eps, AFFINE, ADD, SCALE, SHIFT, PER_GROUP, SLAB, WIDTH,
        )  # fmt: skip
        out = activate(d * gain[None, :] + offset[None, :], ACTIVATION)
        if DROPOUT != 0:
            out = out * _factors(
                n, chunk * PIXELS, slab, c, p, channels, seed, draw, first_sample, stream, threshold, factor,
                DROPOUT == 2, PIXELS, WIDTH,
            )  # fmt: skip
        tl.store(y + n * y_n + p[:, None] * y_p + c[None, :] * y_c, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_sample", "stream", "threshold"])
def group_norm_silu_bwd_kernel(
    x, x_n, x_c, x_p, x2, x2_n, x2_c, x2_p, dy, dy_n, dy_c, dy_p, dh, dh_n, dh_c, dh_p,
    dx, dx_n, dx_c, dx_p, dx2, dx2_n, dx2_c, dx2_p,
    weight, bias, add, add_n, scale, shift, statistics, sums, rows, seed, draw, first_sample, stream, threshold, factor,
    images, channels, channels_1, pixels, entries,
    X2: tl.constexpr, DH: tl.constexpr, AFFINE: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr, DROPOUT: tl.constexpr, ACTIVATION: tl.constexpr, PART: tl.constexpr, PER_GROUP: tl.constexpr,
    SLAB: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, CHUNKS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """PART 0: all of a slab in one pass. PART 1: a chunk's sums. PART 2: a chunk of dx, and the first one's rows."""
    slabs = tl.cdiv(channels, SLAB)
    n = (tl.program_id(0) // (slabs * CHUNKS)).to(tl.int64)
    slab = tl.program_id(0) // CHUNKS % slabs * SLAB
    chunk = tl.program_id(0) % CHUNKS
    lane = tl.arange(0, WIDTH)
    c = slab + lane
    inside = (lane < SLAB) & (c < channels)
    p = chunk * PIXELS + tl.arange(0, PIXELS)
    mask = (p < pixels)[:, None] & inside[None, :]

    # The forward's map: z = (x - centre) gain + offset, with what the centre loses by rounding.
    at = statistics + 2 * (n * (channels // PER_GROUP) + c // PER_GROUP)
    exact = tl.load(at, mask=inside, other=0.0) - _parameter(add, n * add_n + c, inside, ADD, 0.0).to(tl.float64)
    rstd = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    centre = exact.to(tl.float32)
    lost = (exact - centre.to(tl.float64)).to(tl.float32)
    both = n * channels + c
    w, b = _parameter(weight, c, inside, AFFINE, 1.0), _parameter(bias, c, inside, AFFINE, 0.0)
    slope = 1.0 + _parameter(scale, both, inside, SCALE, 0.0)
    gain = rstd * w * slope
    offset = b * slope + _parameter(shift, both, inside, SHIFT, 0.0) - lost * gain

    d = _tile(x, x2, n, p, c, mask, x_n, x_c, x_p, x2_n, x2_c, x2_p, channels_1, X2) - centre[None, :]
    g = tl.load(dy + n * dy_n + p[:, None] * dy_p + c[None, :] * dy_c, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT != 0:
        g = g * _factors(
            n, chunk * PIXELS, slab, c, p, channels, seed, draw, first_sample, stream, threshold, factor,
            DROPOUT == 2, PIXELS, WIDTH,
        )  # fmt: skip
    d = tl.where(mask, d, 0.0)
    g = tl.where(mask, through(g, d * gain[None, :] + offset[None, :], ACTIVATION), 0.0)
    if PART != 2:
        of_g, of_product, of_d = tl.sum(g, 0), tl.sum(g * d, 0), tl.sum(d, 0)
    if PART == 1:
        to = sums + (n * CHUNKS + chunk) * 3 * channels + c
        tl.store(to, of_g, mask=inside)
        tl.store(to + channels, of_product, mask=inside)
        tl.store(to + 2 * channels, of_d, mask=inside)
    else:
        if PART == 2:
            of_g, of_product, of_d = added_sums(sums, n, 0, entries, c, inside, channels, ENTRIES)
        of_product = of_product - lost * of_g
        count = pixels * PER_GROUP
        if count == 1:  # such an element is its mean: x's gradient and the products are exactly 0, or no number
            gain, of_product, rstd = gain * 0.0, of_product * 0.0, rstd * 0.0
        k = -rstd * rstd * _over_groups(gain * of_product, c, inside, PER_GROUP, SLAB, WIDTH) / count
        m = -_over_groups(gain * of_g, c, inside, PER_GROUP, SLAB, WIDTH) / count - k * lost
        if chunk == 0:
            row = rows + n * channels + c
            step = images * channels
            tl.store(row, slope * (rstd * of_product), mask=inside)
            tl.store(row + step, slope * of_g, mask=inside)
            tl.store(row + 2 * step, gain * of_g + k * of_d + pixels * m, mask=inside)
            tl.store(row + 3 * step, w * (rstd * of_product) + b * of_g, mask=inside)
            tl.store(row + 4 * step, of_g, mask=inside)
        out = g * gain[None, :] + d * k[None, :] + m[None, :]
        first = mask & (c < channels_1)[None, :] if X2 else mask
        if DH:
            more = dh + n * dh_n + p[:, None] * dh_p + c[None, :] * dh_c
            out += tl.load(more, mask=first, other=0.0).to(tl.float32)
        out = out.to(dx.dtype.element_ty)
        tl.store(dx + n * dx_n + p[:, None] * dx_p + c[None, :] * dx_c, out, mask=first)
        if X2:
            to = dx2 + n * dx2_n + p[:, None] * dx2_p + (c - channels_1)[None, :] * dx2_c
            tl.store(to, out, mask=mask & (c >= channels_1)[None, :])


def key(direction: str, of: Operands) -> str:
    """Under which a table has the name: direction, dtype, layout, images (the next power of two), channels..."""
    last, dtype = "last" if of.x.stride(1) == 1 else "nchw", str(of.x.dtype).removeprefix("torch.")
    images, pixels, channels, groups = of.sizes
    return f"{direction} {dtype} {last} {images}x{channels}x{pixels}/{groups}"


def config(direction: str, of: Operands, run: Callable[[Config], None]) -> Config:
    """How this call is cut; `run` is the call itself, for a search."""
    return configs.chosen("group_norm_silu", key(direction, of), candidates(direction, *of.sizes), of.x.device, run)


def _image(x: Tensor | None, other: Tensor) -> tuple[Any, ...]:
    """An image as the kernels take it, its rows as far apart as its pixels; any tensor where there is none."""
    if x is None:
        return other, 0, 0, 0
    n, channel, row, pixel = x.stride()
    return x, n, channel, row if x.shape[3] == 1 else pixel


def _parameters(of: Operands) -> tuple[Any, ...]:
    per_image = 0 if of.add is None or of.add.ndim == 1 else of.channels
    given = [of.x if v is None else v for v in (of.weight, of.bias, of.add, of.scale, of.shift)]
    return *given[:3], per_image, *given[3:]


def _noise(of: Operands) -> tuple[Any, ...]:
    return (of.x, of.x, 0, 0, 0, 1.0) if of.dropout is None else of.dropout


def _flags(of: Operands, cut: Config) -> dict[str, Any]:
    whole = of.channels % 8 == 0 and cut.slab % 8 == 0 and cut.width >= 8
    return {
        "X2": of.x2 is not None,
        "AFFINE": of.weight is not None,
        "ADD": of.add is not None,
        "SCALE": of.scale is not None,
        "SHIFT": of.shift is not None,
        "DROPOUT": 0 if of.dropout is None else 2 if whole else 1,
        "ACTIVATION": of.activation,
        "PER_GROUP": of.channels // of.groups,
        "SLAB": cut.slab,
        "WIDTH": cut.width,
        "PIXELS": cut.pixels,
        "CHUNKS": cut.chunks,
        "num_warps": cut.warps,
    }


def forward(of: Operands, residual: Tensor | None, y: Tensor, h: Tensor | None, statistics: Tensor, eps: float) -> None:
    """Writes y, h and the groups' statistics (float64 [N, groups, 2]: mean, 1 / deviation)."""
    x, pixels = of.x, of.x.shape[2] * of.x.shape[3]

    def run(cut: Config) -> None:
        grid = (x.shape[0] * triton.cdiv(of.channels, cut.slab) * cut.chunks,)
        moments, each = _table(cut, x.shape[0], of.channels, x), cut.pixels
        for part in (0,) if cut.chunks == 1 else (1, 2):
            if part == 2:
                moments, each = few(moments, pixels, cut.pixels, moments=True)
            group_norm_silu_fwd_kernel[grid](
                *_image(x, x), *_image(of.x2, x), *_image(residual, x), *_image(h, x), *_image(y, x), *_parameters(of),
                statistics, moments, *_noise(of), of.channels, x.shape[1], pixels, eps, moments.shape[1], each,
                RESIDUAL=residual is not None, PART=part, **_flags(of, cut), **_entries(moments, part),
            )  # fmt: skip

    run(config("forward", of, run))


def backward(of: Operands, dy: Tensor, dh: Tensor | None, dx: Tensor, dx2: Tensor | None, statistics: Tensor) -> Tensor:
    """Writes dx and dx2; returns each image's gradients of weight, bias, add, scale and shift: float32 [5, N, C]."""
    x, n, pixels = of.x, of.x.shape[0], of.x.shape[2] * of.x.shape[3]
    rows = torch.empty((5, n, of.channels), dtype=torch.float32, device=x.device)

    def run(cut: Config) -> None:
        grid = (n * triton.cdiv(of.channels, cut.slab) * cut.chunks,)
        sums = _table(cut, n, of.channels, x)
        for part in (0,) if cut.chunks == 1 else (1, 2):
            if part == 2:
                sums, _ = few(sums, pixels, cut.pixels, moments=False)
            group_norm_silu_bwd_kernel[grid](
                *_image(x, x), *_image(of.x2, x), *_image(dy, x), *_image(dh, x), *_image(dx, x), *_image(dx2, x),
                *_parameters(of), statistics, sums, rows, *_noise(of), n, of.channels, x.shape[1], pixels,
                sums.shape[1], DH=dh is not None, PART=part, **_flags(of, cut), **_entries(sums, part),
            )  # fmt: skip

    run(config("backward", of, run))
    return rows


def _table(cut: Config, images: int, channels: int, like: Tensor) -> Tensor:
    """Room for what the chunks leave; one pass needs none."""
    entries = cut.chunks if cut.chunks > 1 else 0
    return torch.empty((images, entries, 3, channels), dtype=torch.float32, device=like.device)


def _entries(table: Tensor, part: int) -> dict[str, int]:
    return {"ENTRIES": triton.next_power_of_2(table.shape[1]) if part == 2 else 1}
