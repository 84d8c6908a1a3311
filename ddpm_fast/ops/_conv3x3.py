"""conv3x3 on the native module: Winograd's filtering (docs/convolution.md), where a table says that it is faster than
the library's direct convolution."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.conv3x3 import Norm
from ..reference.group_norm_silu import ACTIVATIONS
from . import _native
from ._dispatch import forced


class Way(NamedTuple):
    """How to convolve."""

    tile: int = 0  # columns of Winograd's tiles, 2 or 4; their rows, but in bf16 2; 0 for the library's convolution
    transformed: bool = False  # of weights that were transformed beforehand, which takes up to four times their memory

    def text(self, dtype: torch.dtype) -> str:
        """What it is called."""
        if not self.tile:
            return "direct"
        rows = 2 if dtype is torch.bfloat16 else self.tile
        return f"F({rows}x{self.tile})" + (" prepared" if self.transformed else "")


DIRECT = Way()
LEAST_CHANNELS = 64  # for tiles of 4: with fewer the transforms round more than the direct sums
TABLE = Path(__file__).with_name("conv3x3_cpu.json")  # written by benchmarks/conv3x3_table.py
LAST = torch.channels_last
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # as csrc/cpu/group_norm_silu.h numbers them
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_EXACT: ContextVar[bool] = ContextVar("ddpm_fast_exact", default=False)


@contextmanager
def exact_convolutions(exact: bool = True) -> Iterator[None]:
    """In here convolutions are direct, and round as the library's do; or, without `exact`, in the fastest way again."""
    token = _EXACT.set(exact)
    try:
        yield
    finally:
        _EXACT.reset(token)


# What is computed: a result or the gradient of x, of weights that stay as they are for many calls or that change with
# each; or the gradient of a weight.
FIXED, CHANGING, WEIGHT = "fixed", "changing", "weight"


def is_exact() -> bool:
    """Whether convolutions are to be direct here."""
    return _EXACT.get()


def choose(dtype: torch.dtype, shape: tuple[int, ...], out_channels: int, what: str) -> Way:
    """The fastest way to compute `what` by the table, for x of this dtype and shape [N, C, H, W] in channels_last."""
    if _EXACT.get() or dtype not in KINDS or 0 in shape:
        return DIRECT
    return _nearest(_native.load().isa(), KINDS[dtype], what, *shape, out_channels)


@functools.lru_cache(1 << 14)
def _nearest(isa: str, kind: str, what: str, n: int, c: int, h: int, w: int, k: int) -> Way:
    """The way of the measured shape that is most alike: in pixels of an image, of the batch, and in channels."""

    def distance(row: Any) -> float:
        images, channels, out_channels, side = row[:4]
        pairs = ((h * w, side**2), (n * h * w, images * side**2), (c, channels), (k, out_channels))
        return sum(abs(log2(a / b)) for a, b in pairs)

    rows = _table().get(isa, {}).get(kind, {}).get(what, ())
    rows = [row for row in rows if row[4] < 4 or c >= LEAST_CHANNELS]
    return Way(*min(rows, key=distance)[4:]) if rows else DIRECT


@functools.cache
def _table() -> Any:
    return json.loads(TABLE.read_text())["ways"] if TABLE.exists() else {}


def lay_out(weight: Tensor, way: Way, dtype: torch.dtype, gradient: bool = False) -> Tensor:
    """The numbers of a weight [K, C, 3, 3] as `convolve` takes them; with `gradient`, as the one that makes of the
    result's gradient that of x."""
    weight, tile = weight.detach(), way.tile if way.transformed else 0
    numbers = _native.load().convolution_room(weight, tile, dtype == torch.bfloat16, gradient)
    to = torch.empty(numbers, dtype=dtype, device="cpu")
    _native.kernel("convolution_weights")(weight, to, tile, gradient, _native.threads())
    return to


def room(weight: Tensor, way: Way, dtype: torch.dtype) -> int:
    """The bytes of what `lay_out` makes."""
    numbers: int = _native.load().convolution_room(
        weight, way.tile if way.transformed else 0, dtype == torch.bfloat16, False
    )
    return numbers * dtype.itemsize


def convolve(
    x: Tensor,
    weights: Tensor,
    way: Way,
    out_channels: int,
    bias: Tensor | None = None,  # float32
    x2: Tensor | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, int] | tuple[()] = (),  # scale and shift, float32 [2, N, C], and the activation's code
    moments: Tensor | None = None,  # mean and sum of squares around it, float32 [2, N, K], to be written
) -> Tensor:
    """The reference's in channels_last, of images in it and weights that are laid out for `way`."""
    n, _, height, width = x.shape
    shape = (n, out_channels, height, width)
    y = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=LAST)
    images = (x, x2, norm, weights, bias, residual, y, moments)
    _native.kernel("conv3x3")(*images, way.tile, way.transformed, _native.threads())
    return y


def weight_gradient(x: Tensor, dy: Tensor, way: Way) -> Tensor:
    """The gradient [K, C, 3, 3] of a weight, for float32 images in channels_last."""
    dw = torch.empty((dy.shape[1], x.shape[1], 3, 3), dtype=torch.float32, device="cpu")
    _native.kernel("conv3x3_gradient")(x, dy, dw, way.tile, _native.threads())
    return dw


def rejects(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x2: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    stats: bool,
) -> str | None:
    """Why the native module doesn't take these arguments."""
    tensors = (x, weight, bias, x2, residual, *(() if norm is None else norm[:2]))
    reason = _native.unfit(*tensors)
    if reason is not None:
        return reason
    if (
        (norm is not None or stats)
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
    ):
        return "has no gradient with a norm or statistics"
    kind = computed_in(x)
    for value in (x, weight, bias, x2, residual):
        if value is not None and (value.dtype not in KINDS or kind not in KINDS):
            return f"takes {_native.dtype_names(tuple(KINDS))}, got {value.dtype}"
    if norm is not None and x.dtype != kind:
        return f"takes a norm of images in {kind}, in which it computes, got {x.dtype}"
    alike = x2 is None or x2.dtype == x.dtype or torch.is_autocast_enabled("cpu")
    if not alike or (residual is not None and residual.dtype != kind):
        return f"takes images of one dtype, and a residual of {kind}, in which it computes"
    if _EXACT.get():
        return "rounds otherwise than the direct convolution that was asked for"
    if forced() != "native" and not _way(x, weight, x2).tile:
        return "the direct convolution is faster here"
    return None


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes to which x is given, or whose weight it is."""
    kind = "cpu" if x.is_cpu else x.device.type
    if kind == "meta" or x.dtype is torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def _way(x: Tensor, weight: Tensor, x2: Tensor | None) -> Way:
    last = all(i is None or i.is_contiguous(memory_format=LAST) for i in (x, x2))
    if not last or x.shape[1] == 1:  # a single channel doesn't tell its layout
        return DIRECT
    n, _, height, width = x.shape
    return choose(computed_in(x), (n, weight.shape[1], height, width), weight.shape[0], CHANGING)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x2: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    stats: bool,
) -> Any:
    """conv3x3 with a gradient, where nothing rejects it."""
    way = _way(x, weight, x2)
    tensors = (x, weight, bias, x2, residual)
    how = (way if way.tile else Way(2), computed_in(x))  # where it is forced, in the tiles that round least
    if stats:
        moments = torch.empty((2, x.shape[0], weight.shape[0]), dtype=torch.float32, device="cpu")
        return _forward(*tensors, *how, norm, moments), *moments.unbind()
    if norm is not None:
        return _forward(*tensors, *how, norm)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: Tensor = _Convolution.apply(*tensors, *how)
        return y
    return _forward(*tensors, *how)


def _image(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).contiguous(memory_format=LAST)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x2: Tensor | None,
    residual: Tensor | None,
    way: Way,
    dtype: torch.dtype,
    norm: Norm | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    wide = None if bias is None else bias.detach().float().contiguous()
    weights = lay_out(weight, way, dtype)
    images = (_image(x2, dtype), _image(residual, dtype))
    first = _image(x, dtype)
    assert first is not None
    rows: Any = (
        () if norm is None else (torch.stack([row.detach().float() for row in norm[:2]]), CODES[norm.activation])
    )
    return convolve(first, weights, way, weight.shape[0], wide, *images, rows, moments)


class _Convolution(torch.autograd.Function):
    """conv3x3 with its gradients: that of x is another convolution, and that of the weight has tiles, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None, *rest: Any) -> Tensor:
        residual, way, dtype = rest
        of_weight, of_x = ctx.needs_input_grad[1], ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
        images = [x.to(dtype), None if x2 is None else x2.to(dtype)] if of_weight else [None, None]
        ctx.save_for_backward(weight if of_x else None, *images)
        ctx.kinds = [None if t is None else t.dtype for t in (x, weight, bias, x2, residual)]
        ctx.channels, ctx.both, ctx.dtype = x.shape[1], weight.shape[1], dtype
        return _forward(x, weight, bias, x2, residual, way, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _native.check_backward("conv3x3", dy)
        weight, x, x2 = ctx.saved_tensors
        image = _image(dy.resolve_neg(), ctx.dtype)
        whole = _image(x if x2 is None else torch.cat([x, x2], dim=1), ctx.dtype)
        assert image is not None
        dx, dw = _gradients(image, whole, weight, ctx.both)
        needs_x, _, needs_bias, needs_x2, needs_residual = ctx.needs_input_grad[:5]
        grads = (
            dx[:, : ctx.channels] if dx is not None and needs_x else None,
            dw,
            image.sum((0, 2, 3)) if needs_bias else None,
            dx[:, ctx.channels :] if dx is not None and needs_x2 else None,
            dy if needs_residual else None,
        )
        return *(g if g is None else g.to(kind) for g, kind in zip(grads, ctx.kinds, strict=True)), None, None


def _gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, channels: int
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x, where a weight is given, and of the weight, where x is; what is the library's in one call."""
    (n, k, height, width), dx, dw = dy.shape, None, None
    if weight is not None:
        way = choose(dy.dtype, (n, k, height, width), channels, CHANGING)
        if way.tile:
            dx = convolve(dy, lay_out(weight, way, dy.dtype, gradient=True), way, channels)
    if x is not None:
        way = choose(dy.dtype, tuple(x.shape), k, WEIGHT)
        if way.tile:
            dw = weight_gradient(x, dy, way)
    wanted = [weight is not None and dx is None, x is not None and dw is None, False]
    if any(wanted):
        # Of what isn't given only shape and layout count.
        images = torch.empty((n, channels, height, width), dtype=dy.dtype, device="cpu", memory_format=LAST)
        given = (images if x is None else x, dy.new_empty(k, channels, 3, 3) if weight is None else weight.to(dy.dtype))
        rest = torch.ops.aten.convolution_backward(dy, *given, [k], (1, 1), (1, 1), (1, 1), False, (0, 0), 1, wanted)
        dx, dw = (rest[0] if wanted[0] else dx), (rest[1] if wanted[1] else dw)
    return dx, dw
