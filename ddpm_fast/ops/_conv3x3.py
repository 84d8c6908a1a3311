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
from . import _native
from ._dispatch import forced


class Way(NamedTuple):
    """How to convolve."""

    tile: int = 0  # rows and columns of Winograd's tiles, 2 or 4; 0 for the library's direct convolution
    transformed: bool = False  # of weights that were transformed beforehand, which takes up to four times their memory

    def __str__(self) -> str:
        if not self.tile:
            return "direct"
        return f"F({self.tile}x{self.tile})" + (" prepared" if self.transformed else "")


DIRECT = Way()
LEAST_CHANNELS = 64  # for tiles of 4: with fewer the transforms round more than the direct sums
TABLE = Path(__file__).with_name("conv3x3_cpu.json")  # written by benchmarks/conv3x3_table.py
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_EXACT: ContextVar[bool] = ContextVar("ddpm_fast_exact", default=False)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """In here convolutions are direct, and round as the library's do."""
    token = _EXACT.set(True)
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
    return json.loads(TABLE.read_text())["ways"]


def lay_out(weight: Tensor, way: Way, dtype: torch.dtype, gradient: bool = False) -> Tensor:
    """The numbers of a weight [K, C, 3, 3] as `convolve` takes them; with `gradient`, as the one that makes of the
    result's gradient that of x."""
    weight, kernels, tile = weight.detach(), _native.load(), way.tile if way.transformed else 0
    to = torch.empty(kernels.conv3x3_room(weight, tile, dtype == torch.bfloat16, gradient), dtype=dtype)
    kernels.conv3x3_weights(weight, to, tile, gradient, _native.threads())
    return to


def room(weight: Tensor, way: Way, dtype: torch.dtype) -> int:
    """The bytes of what `lay_out` makes."""
    numbers: int = _native.load().conv3x3_room(
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
) -> Tensor:
    """conv(cat(x, x2)) + bias + residual in channels_last, of images in it and weights that are laid out for `way`."""
    n, _, height, width = x.shape
    y = torch.empty((n, out_channels, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    images = (x, x2, weights, bias, residual, y)
    _native.load().conv3x3(*images, way.tile, way.transformed, _native.threads())
    return y


def weight_gradient(x: Tensor, dy: Tensor, way: Way) -> Tensor:
    """The gradient [K, C, 3, 3] of a weight, for float32 images in channels_last."""
    dw = torch.empty((dy.shape[1], x.shape[1], 3, 3))
    _native.load().conv3x3_gradient(x, dy, dw, way.tile, _native.threads())
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
    if norm is not None or stats:
        return "folds in no norm, and takes no statistics"
    reason = _native.unfit(x, weight, bias, x2, residual)
    if reason is not None:
        return reason
    kind = computed_in(x)
    for value in (x, weight, bias, x2, residual):
        if value is not None and (value.dtype not in KINDS or kind not in KINDS):
            return f"takes {_native.dtype_names(tuple(KINDS))}, got {value.dtype}"
    alike = x2 is None or x2.dtype == x.dtype or torch.is_autocast_enabled("cpu")
    if not alike or (residual is not None and residual.dtype != kind):
        return f"takes images of one dtype, and a residual of {kind}, in which it computes"
    if _EXACT.get():
        return "rounds otherwise than the direct convolution that was asked for"
    if forced() != "native" and not _way(x, weight, x2).tile:
        return "the direct convolution is faster here"
    return None


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which x is multiplied."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _way(x: Tensor, weight: Tensor, x2: Tensor | None) -> Way:
    if not all(i is None or i.is_contiguous(memory_format=torch.channels_last) for i in (x, x2)):
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
) -> Tensor:
    """conv3x3 with a gradient, where nothing rejects it."""
    way = _way(x, weight, x2)
    tensors = (x, weight, bias, x2, residual)
    how = (way if way.tile else Way(2), computed_in(x))  # where it is forced, in the tiles that round least
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: Tensor = _Convolution.apply(*tensors, *how)
        return y
    return _forward(*tensors, *how)


def _image(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).contiguous(memory_format=torch.channels_last)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x2: Tensor | None,
    residual: Tensor | None,
    way: Way,
    dtype: torch.dtype,
) -> Tensor:
    wide = None if bias is None else bias.detach().float().contiguous()
    weights = lay_out(weight, way, dtype)
    images = (_image(x2, dtype), _image(residual, dtype))
    first = _image(x, dtype)
    assert first is not None
    return convolve(first, weights, way, weight.shape[0], wide, *images)


class _Convolution(torch.autograd.Function):
    """conv3x3 with its gradients: that of x is another convolution, and that of the weight has tiles, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None, *rest: Any) -> Tensor:
        residual, way, dtype = rest
        ctx.save_for_backward(x.to(dtype), weight, None if x2 is None else x2.to(dtype))
        ctx.kinds = [None if t is None else t.dtype for t in (x, weight, bias, x2, residual)]
        return _forward(x, weight, bias, x2, residual, way, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _native.check_backward("conv3x3", dy)
        x, weight, x2 = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_x2, needs_residual = ctx.needs_input_grad[:5]
        image, channels = _image(dy.resolve_neg(), x.dtype), x.shape[1]
        whole = _image(x if x2 is None else torch.cat([x, x2], dim=1), x.dtype)
        assert image is not None and whole is not None
        dx, dw, db = _gradients(whole, weight, image, needs_x or needs_x2, needs_weight, needs_bias)
        dx1 = dx if dx is None or x2 is None else dx[:, :channels]
        dx2 = dx if dx is None or x2 is None else dx[:, channels:]
        grads = (dx1 if needs_x else None, dw, db, dx2 if needs_x2 else None, dy if needs_residual else None)
        return *(g if g is None else g.to(kind) for g, kind in zip(grads, ctx.kinds, strict=True)), None, None


def _gradients(
    x: Tensor, weight: Tensor, dy: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> list[Tensor | None]:
    """Those that are wanted, each in the way that is the fastest; of images in channels_last."""
    found: list[Tensor | None] = [None, None, None]
    (n, k, height, width), channels = dy.shape, x.shape[1]
    way = choose(x.dtype, (n, k, height, width), channels, CHANGING)
    if of_x and way.tile:
        found[0], of_x = convolve(dy, lay_out(weight, way, x.dtype, gradient=True), way, channels), False
    way = choose(x.dtype, tuple(x.shape), k, WEIGHT)
    if of_weight and way.tile:
        found[1], of_weight = weight_gradient(x, dy, way), False
        found[2], of_bias = dy.sum((0, 2, 3)) if of_bias else None, False
    if of_x or of_weight or of_bias:
        wanted = [of_x, of_weight, of_bias]
        arguments = ([k], (1, 1), (1, 1), (1, 1), False, (0, 0), 1, wanted)
        rest = torch.ops.aten.convolution_backward(dy, x, weight.to(x.dtype), *arguments)
        found = [a if a is not None else b for a, b in zip(found, rest, strict=True)]
    return found
