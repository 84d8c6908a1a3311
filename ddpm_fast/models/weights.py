"""Convolutions of weights that are laid out once, where they stay as they are: for the steps of chains."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import _C, Tensor, nn

from ..ops import _conv1x1 as by_pixels
from ..ops import _conv3x3 as by_tiles
from ..ops._conv3x3 import CHANGING, DIRECT, FIXED, KINDS, Way, choose, computed_in, is_exact, lay_out, room
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
        self._ways: dict[tuple[int, ...], _Run] = {}  # by x's shape, and how many of its channels are another tensor's

    @cached_property
    def weight(self) -> Tensor:
        """As it is multiplied where it isn't packed."""
        return self._given.to(self.dtype, memory_format=torch.channels_last)

    @cached_property
    def matrix(self) -> Tensor:
        """[O, I] of a 1x1 convolution."""
        return self.weight.flatten(1)

    def __call__(
        self, x: Tensor, with_bias: bool = True, residual: Tensor | None = None, x2: Tensor | None = None
    ) -> Tensor:
        """x [N, I, H, W] in channels_last -> [N, O, ...] likewise, plus a residual like it; x2 as if concatenated."""
        bias = self.bias if with_bias else None
        if x2 is not None:
            own = self.own(x, x2)
            if own is not None:
                return own(x, bias, residual, x2=x2)
            x = torch.cat([x, x2], dim=1)
        if x.dtype is not self._kind:
            x = x.to(self._kind)
        way = self._chosen(x)
        if self._kind is self.dtype:
            return way(x, bias, residual)
        return plus(way(x, bias, None).to(self.dtype), residual)

    def own(self, x: Tensor, x2: Tensor | None = None) -> "Own | None":
        """What convolves x itself, where that is our own kernel."""
        alike = x.dtype is self._kind is self.dtype and (x2 is None or x2.dtype is x.dtype)
        alike &= x.shape[1] + (0 if x2 is None else x2.shape[1]) == self._given.shape[1]
        way = self._chosen(x, x2) if alike else None
        return way if isinstance(way, Own) else None

    def adds(self, residual: Tensor, x: Tensor) -> bool:
        """Whether it adds this residual of x's convolution while it writes."""
        shape = (x.shape[0], self._given.shape[0], *x.shape[2:])
        return residual.dtype is self.dtype and residual.shape == shape and takes(residual)

    def _chosen(self, x: Tensor, x2: Tensor | None = None) -> "_Run":
        key = (*x.shape, 0 if x2 is None else x2.shape[1])
        way = self._ways.get(key)
        if way is None:
            way = self._ways[key] = self._way(x, x2 is not None)
        return way

    def _way(self, x: Tensor, two: bool) -> "_Run":
        n, _, height, width = x.shape
        if self.packs and wanted():
            if self.filters:
                way = choose(self._kind, (n, self._given.shape[1], height, width), self._given.shape[0], FIXED)
                if way.tile:
                    return self._filtering(way, x)
            elif self.pointwise and by_pixels.pays(self._kind, n * height * width, two):
                return self._own(DIRECT, by_pixels.convolve)
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
        new = way.transformed and way not in self._laid_out
        if new and in_use().transformed() + room(self._given, way, self._kind) > MOST_TRANSFORMED:
            shape = (x.shape[0], self._given.shape[1], *x.shape[2:])
            way = choose(self._kind, shape, self._given.shape[0], CHANGING)
            return self._filtering(way, x) if way.tile else self._packing
        return self._own(way, partial(by_tiles.convolve, way=way))

    def _own(self, way: Way, run: Callable[..., Tensor]) -> "Own":
        if way not in self._laid_out:
            given = self._given if self._given.dtype in KINDS else self._given.to(self._kind)
            self._laid_out[way] = lay_out(given, way, self._kind)
        bias = None if self.bias is None else self.bias.float()
        channels = self._given.shape[0]
        return Own(partial(run, weights=self._laid_out[way], out_channels=channels), channels, bias)

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
class Own:
    """A kernel of our own that convolves x, with weights that are laid out."""

    run: Callable[..., Tensor]
    out_channels: int
    bias: Tensor | None  # in float32

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, **more: Any) -> Tensor:
        """As `_Run`, without a bias where it is None; and what else the kernel takes."""
        return self.run(x, bias=None if bias is None else self.bias, residual=residual, **more)


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
    if weight is None or not takes(x) or not is_convolution(conv):
        return None
    stride, padding = cast(tuple[tuple[int, int], tuple[int, int]], (conv.stride, conv.padding))
    kind = computed_in(x)
    return made(
        (kind, stride, padding, is_exact()), (weight, bias), lambda: Prepared(weight, bias, kind, stride, padding)
    )


def own_kernel(conv: nn.Conv2d, x: Tensor, residual: Tensor | None, x2: Tensor | None = None) -> Own | None:
    """What convolves x, and images like it, with our own kernel and adds such a residual; None where others do."""
    fast = prepared(conv, x)
    if fast is None or residual is not None and not fast.adds(residual, x):
        return None
    return fast.own(x, x2)


def takes(x: Tensor) -> bool:
    """Whether what is prepared takes x; a dispatch mode wants to see torch's own operators."""
    if not x.is_cpu:
        return True
    seen = is_watched() and forced() in (None, "native")
    plain = type(x) is Tensor and not x.is_neg() and _C._get_tracing_state() is None
    return plain and not seen and x.is_contiguous(memory_format=torch.channels_last)


def convolve(x: Tensor, conv: nn.Module, with_bias: bool = True, x2: Tensor | None = None) -> Tensor:
    """conv(x), with x2 as if concatenated, which is taken as x is; without its bias only if `is_convolution`."""
    fast = prepared(conv, x)
    if fast is not None:
        return fast(x, with_bias, x2=x2)
    if x2 is not None:
        x = torch.cat([x, x2], dim=1)
    if with_bias:
        return cast(Tensor, conv(x))
    c = cast(nn.Conv2d, conv)
    return F.conv2d(x, c.weight, None, c.stride, c.padding)


def convolve3x3(x: Tensor, conv: nn.Conv2d, with_bias: bool = True, residual: Tensor | None = None) -> Tensor:
    """The same where `is_conv3x3`, plus a residual [N, O, H, W]."""
    fast = prepared(conv, x)
    if fast is not None:
        if residual is None or fast.adds(residual, x):
            return fast(x, with_bias, residual)
        return plus(fast(x, with_bias), residual)
    if not torch.compiler.is_compiling() and is_exact():  # in this order
        return plus(F.conv2d(x, conv.weight, conv.bias if with_bias else None, padding=1), residual)
    y: Tensor = CONV3X3.unchecked(x, conv.weight, conv.bias if with_bias else None, None, None, None, False)
    return plus(y, residual)
