"""Convolutions of weights that are laid out once, where they stay as they are: for the steps of chains."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import _C, Tensor, nn

from ..ops._conv3x3 import CHANGING, FIXED, Way, choose, computed_in, is_exact, lay_out, room
from ..ops._conv3x3 import convolve as convolve_tiles
from ..ops._dispatch import forced
from ..ops._native import is_watched, wanted
from ..ops.conv3x3 import OP as CONV3X3
from .fusing import is_convolution
from .made import are_fixed, in_use, made, transformed

# From how many products on a float32 convolution on a CPU gains from what oneDNN has packed (docs/performance.md): of a
# single image, whose plain path is another one, or a 1x1, which else is better a matrix product.
PRODUCTS = 1 << 21
# Of weights that are transformed for a chain, in bytes; layers that come later transform theirs in each call.
MOST_TRANSFORMED = 1 << 30


@cache
def onednn_takes_bf16() -> bool:
    """Whether oneDNN, where torch has it, has bf16 on this CPU; else torch takes up to a hundred times as long in it as
    in float32, where products of bf16 numbers are exact."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widens(dtype: torch.dtype) -> bool:
    """Whether products of numbers of this dtype are computed in float32 on this CPU, for that reason."""
    if torch.compiler.is_compiling() or dtype is not torch.bfloat16:  # in this order
        return False
    return forced() in (None, "native") and not onednn_takes_bf16()


class Prepared:
    """A convolution whose weight is laid out for many calls.

    Args:
        weight: [O, I, kh, kw].
        bias: [O], or None.
        dtype: of its results.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ):
        self._given = weight.detach()
        self.dtype, self.stride, self.padding = dtype, stride, padding
        self.pointwise = weight.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0)
        packable = weight.is_cpu and dtype in (torch.float32, torch.bfloat16)
        self.packs = packable and forced() in (None, "native") and torch.backends.mkldnn.is_available()
        self._kind = torch.float32 if self.packs and widens(dtype) else dtype  # in which it computes
        self.bias = None if bias is None else bias.detach().to(self._kind)
        self.filters = weight.shape[2:] == (3, 3) and stride == (1, 1) and padding == (1, 1)
        self._packed: dict[torch.Size, Tensor] = {}  # by x's shape, which decides how
        self._laid_out: dict[Way, Tensor] = {}
        self._ways: dict[torch.Size, _Run] = {}  # by x's shape

    @cached_property
    def weight(self) -> Tensor:
        """As it is multiplied where it isn't packed."""
        return self._given.to(self.dtype, memory_format=torch.channels_last)

    @cached_property
    def matrix(self) -> Tensor:
        """[O, I] of a 1x1 convolution."""
        return self.weight.flatten(1)

    def __call__(self, x: Tensor, with_bias: bool = True, residual: Tensor | None = None) -> Tensor:
        """x [N, I, H, W] in channels_last -> [N, O, ...] likewise, plus a residual like it."""
        if x.dtype is not self._kind:
            x = x.to(self._kind)
        way = self._chosen(x)
        bias = self.bias if with_bias else None
        if self._kind is self.dtype:
            return way(x, bias, residual)
        return plus(way(x, bias, None).to(self.dtype), residual)

    def in_tiles(self, x: Tensor) -> "InTiles | None":
        """What convolves x itself, where that is our own kernel."""
        way = self._chosen(x) if x.dtype is self._kind is self.dtype else None
        return way if isinstance(way, InTiles) else None

    def _chosen(self, x: Tensor) -> "_Run":
        way = self._ways.get(x.shape)
        if way is None:
            way = self._ways[x.shape] = self._way(x)
        return way

    def _way(self, x: Tensor) -> "_Run":
        n, _, height, width = x.shape
        if self.packs and self.filters and wanted():
            way = choose(self._kind, tuple(x.shape), self._given.shape[0], FIXED)
            if way.tile:
                return self._filtering(way, x)
        products = n * height * width * self._given.numel() // (self.stride[0] * self.stride[1])
        small = x.is_cpu and self.dtype is torch.float32 and products < PRODUCTS
        if self.packs and not (small and (self.pointwise or n == 1)):
            return self._packing
        return self._multiplying if self.pointwise and (not x.is_cpu or small and n > 1) else self._plain

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held = [self._given, self.bias, self.__dict__.get("weight"), *self._laid_out.values(), *self._packed.values()]
        return [t for t in held if t is not None]

    def transformed(self) -> int:
        """Bytes of its weights that were transformed for tiles."""
        return sum(t.nbytes for way, t in self._laid_out.items() if way.transformed)

    def _filtering(self, way: Way, x: Tensor) -> "_Run":
        if way not in self._laid_out:
            if way.transformed:
                if in_use().transformed() + room(self._given, way, self._kind) > MOST_TRANSFORMED:
                    way = choose(self._kind, tuple(x.shape), self._given.shape[0], CHANGING)
                    return self._filtering(way, x) if way.tile else self._packing
            self._laid_out[way] = lay_out(self._given, way, self._kind)
        bias = None if self.bias is None else self.bias.float()
        return InTiles(self._laid_out[way], way, self._given.shape[0], bias)

    def _plain(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = F.conv2d(x, self.weight, bias, self.stride, self.padding)
        return plus(y.contiguous(memory_format=torch.channels_last), residual)

    def _multiplying(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return plus(F.linear(x.permute(0, 2, 3, 1), self.matrix, bias).permute(0, 3, 1, 2), residual)

    def _packing(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        packed = self._packed.get(x.shape)
        if packed is None:
            pack: Any = _C._nn.mkldnn_reorder_conv2d_weight
            packed = pack(self._given.to_mkldnn(self._kind), self.padding, self.stride, (1, 1), 1, x.shape)
            self._packed[x.shape] = packed
        # What torch's own compiler calls where weights are frozen.
        y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            x, packed, bias, self.padding, self.stride, (1, 1), 1, "none", (), ""
        )
        return plus(y, residual)


@dataclass(frozen=True)
class InTiles:
    """Convolves x in tiles, of weights that are laid out."""

    weights: Tensor
    way: Way
    out_channels: int
    bias: Tensor | None  # in float32

    def __call__(
        self,
        x: Tensor,
        bias: Tensor | None,  # None without one
        residual: Tensor | None,
        norm: tuple[Tensor, int] | tuple[()] = (),
        moments: Tensor | None = None,
    ) -> Tensor:
        own = None if bias is None else self.bias
        more: Any = {"residual": residual, "norm": norm, "moments": moments}
        return convolve_tiles(x, self.weights, self.way, self.out_channels, own, **more)


_Run = Callable[..., Tensor]  # (x, bias, residual) -> y


def plus(y: Tensor, residual: Tensor | None) -> Tensor:
    """Their sum, which may take y's memory: nobody else holds it."""
    if residual is None:
        return y
    if torch.is_grad_enabled() or residual.dtype is not y.dtype or transformed():
        return y + residual
    return y.add_(residual)


def prepared(conv: nn.Module, x: Tensor) -> Prepared | None:
    """What was made of this module's weight for inputs like x, if it is plain and anything was made."""
    if not are_fixed() or type(conv) is not nn.Conv2d:
        return None
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    if weight is None or is_tiny(x, weight.numel()) or not _takes(x) or not is_convolution(conv):
        return None
    stride, padding = cast(tuple[tuple[int, int], tuple[int, int]], (conv.stride, conv.padding))
    kind = computed_in(x)
    return made(
        (kind, stride, padding, is_exact()), (weight, bias), lambda: Prepared(weight, bias, kind, stride, padding)
    )


def in_tiles(conv: nn.Conv2d, x: Tensor, residual: Tensor | None) -> InTiles | None:
    """What convolves x, and images like it, with our own kernel and adds such a residual; None where others do."""
    fast = prepared(conv, x)
    if fast is None or residual is not None and not _fits(residual, fast, x, conv):
        return None
    return fast.in_tiles(x)


def _fits(residual: Tensor, fast: Prepared, x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a convolution adds it while it writes."""
    shape = (x.shape[0], conv.out_channels, *x.shape[2:])
    return residual.dtype is fast.dtype and residual.shape == shape and _takes(residual)


def is_tiny(x: Tensor, weights: int) -> bool:
    """Whether so many weights for one image gain nothing on a CPU from what is made of them."""
    n, _, height, width = x.shape
    return n == 1 and height * width * weights < PRODUCTS and x.dtype is torch.float32 and x.is_cpu


def _takes(x: Tensor) -> bool:
    """Whether what is prepared takes x; a dispatch mode wants to see torch's own operators."""
    if not x.is_cpu:
        return True
    seen = is_watched() and forced() in (None, "native")
    plain = type(x) is Tensor and not x.is_neg() and _C._get_tracing_state() is None
    return plain and not seen and x.is_contiguous(memory_format=torch.channels_last)


def convolve(x: Tensor, conv: nn.Module, with_bias: bool = True) -> Tensor:
    """conv(x); without its bias only if `is_convolution`."""
    fast = prepared(conv, x)
    if fast is not None:
        return fast(x, with_bias)
    if with_bias:
        return cast(Tensor, conv(x))
    c = cast(nn.Conv2d, conv)
    return F.conv2d(x, c.weight, None, c.stride, c.padding)


def convolve3x3(x: Tensor, conv: nn.Conv2d, with_bias: bool = True, residual: Tensor | None = None) -> Tensor:
    """The same where `is_conv3x3`, plus a residual [N, O, H, W]."""
    fast = prepared(conv, x)
    if fast is not None:
        if residual is None or _fits(residual, fast, x, conv):
            return fast(x, with_bias, residual)
        return plus(fast(x, with_bias), residual)
    if not torch.compiler.is_compiling() and is_exact():  # in this order
        return plus(F.conv2d(x, conv.weight, conv.bias if with_bias else None, padding=1), residual)
    y: Tensor = CONV3X3.unchecked(x, conv.weight, conv.bias if with_bias else None, None, None, None, False)
    return plus(y, residual)
