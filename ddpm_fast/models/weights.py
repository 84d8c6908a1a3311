"""What follows from weights alone, made once where they stay as they are: for the steps of a chain.

A convolution's weight in the layout and dtype in which it is multiplied, which a library else makes in each call, and
other weights that stand for several (phases of upsampling, products of attention's).
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import _C, Tensor, nn

from ..ops._dispatch import forced
from ..ops.conv3x3 import OP as CONV3X3
from .fusing import is_plain

T = TypeVar("T")

_MADE: ContextVar[dict[Hashable, Any] | None] = ContextVar("ddpm_fast_made_of_weights", default=None)
_PLAIN: dict[Hashable, Any] = {}  # in its place on the plain path; stays empty

# From how many products on a float32 convolution gains from what oneDNN has packed (docs/performance.md): of a single
# image, whose plain path is another one, and of 1x1, which then are better a matrix product.
PRODUCTS_OF_ONE, PRODUCTS_OF_1X1 = 1 << 20, 1 << 21


@contextmanager
def fixed_weights() -> Iterator[dict[Hashable, Any]]:
    """In here no weight changes: what follows from weights alone is made once, and is in this table."""
    table: dict[Hashable, Any] = {}
    token = _MADE.set(table)
    try:
        yield table
    finally:
        _MADE.reset(token)


@contextmanager
def plain_path() -> Iterator[None]:
    """In here nothing is made of weights, and every layer computes as it is written."""
    token = _MADE.set(_PLAIN)
    try:
        yield
    finally:
        _MADE.reset(token)


def are_fixed() -> bool:
    """Whether something can be made of weights here: in `fixed_weights`, and without gradients."""
    if torch.compiler.is_compiling():  # compilers know no ContextVar
        return False
    table = _MADE.get()
    if table is None or table is _PLAIN or torch.is_grad_enabled():
        return False
    return _C._functorch.maybe_current_level() is None


def are_trained() -> bool:
    """Whether weights change from step to step here, and gradients are those of `backward`."""
    if torch.compiler.is_compiling() or _MADE.get() is _PLAIN:  # in this order
        return False
    return torch.is_grad_enabled() and _C._functorch.maybe_current_level() is None


def made(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns, made once; `are_fixed`."""
    table = cast(dict[Hashable, Any], _MADE.get())
    if key not in table:
        table[key] = make()
    return cast(T, table[key])


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns, made once if `are_fixed`."""
    return made(key, make) if are_fixed() else make()


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes to which x is given, or whose weight it is."""
    kind = "cpu" if x.is_cpu else x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


class Prepared:
    """A convolution whose weight is laid out for many calls.

    Args:
        weight: [O, I, kh, kw].
        bias: [O], or None.
        dtype: in which it computes.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ):
        # For a single small image torch takes a way on CPUs that wants contiguous weights.
        layout = torch.contiguous_format if weight.is_cpu else torch.channels_last
        self.weight = weight.detach().to(dtype, memory_format=layout)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype, self.stride, self.padding = dtype, stride, padding
        self.pointwise = weight.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0)
        self.matrix = self.weight.flatten(1) if self.pointwise else None  # [O, I]
        packable = weight.is_cpu and dtype in (torch.float32, torch.bfloat16)
        self.packs = packable and forced() in (None, "native") and torch.backends.mkldnn.is_available()
        self._packed: Tensor | None = None
        self._ways: dict[torch.Size, Callable[[Tensor, Tensor | None], Tensor]] = {}  # by x's shape

    def __call__(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """x [N, I, H, W], best in channels_last -> [N, O, ...]."""
        if x.dtype is not self.dtype:
            x = x.to(self.dtype)
        way = self._ways.get(x.shape)
        if way is None:
            way = self._ways[x.shape] = self._way(x)
        return way(x, self.bias if with_bias else None)

    def _way(self, x: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
        n, _, height, width = x.shape
        products = n * height * width * self.weight.numel() // (self.stride[0] * self.stride[1])
        few = products < (PRODUCTS_OF_1X1 if self.pointwise else PRODUCTS_OF_ONE)
        small = x.is_cpu and self.dtype is torch.float32 and few
        if self.packs and not (small and (self.pointwise or n == 1)):
            return self._packing
        return self._multiplying if self.pointwise and (not x.is_cpu or small and n > 1) else self._plain

    def _plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, self.weight, bias, self.stride, self.padding)

    def _multiplying(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), cast(Tensor, self.matrix), bias).permute(0, 3, 1, 2)

    def _packing(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._packed is None:
            pack: Any = _C._nn.mkldnn_reorder_conv2d_weight
            self._packed = pack(self.weight.to_mkldnn(), self.padding, self.stride, (1, 1), 1, x.shape)
        # What torch's own compiler calls where weights are frozen.
        y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            x, self._packed, bias, self.padding, self.stride, (1, 1), 1, "none", (), ""
        )
        return y


def is_convolution(conv: nn.Module) -> bool:
    """Whether `convolve` may stand in for this module."""
    return (
        type(conv) is nn.Conv2d
        and is_plain(conv)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def is_pointwise(conv: nn.Module) -> bool:
    """Whether this is a plain 1x1 convolution."""
    if not is_convolution(conv):
        return False
    c = cast(nn.Conv2d, conv)
    return c.kernel_size == c.stride == (1, 1) and c.padding == (0, 0)


def prepared(conv: nn.Module, x: Tensor) -> Prepared | None:
    """What was made of this module's weight for inputs like x, if anything was."""
    if not are_fixed() or x.is_cpu and not x.is_contiguous(memory_format=torch.channels_last):
        return None
    kind = computed_in(x)
    return made((id(conv), kind), lambda: _prepared(conv, kind))


def _prepared(conv: nn.Module, kind: torch.dtype) -> Prepared | None:
    if not is_convolution(conv):
        return None
    c = cast(nn.Conv2d, conv)
    return Prepared(c.weight, c.bias, kind, cast(tuple[int, int], c.stride), cast(tuple[int, int], c.padding))


def convolve(x: Tensor, conv: nn.Module, with_bias: bool = True) -> Tensor:
    """conv(x); without its bias only if `is_convolution`."""
    fast = prepared(conv, x)
    if fast is not None:
        return fast(x, with_bias)
    if with_bias:
        return cast(Tensor, conv(x))
    c = cast(nn.Conv2d, conv)
    return F.conv2d(x, c.weight, None, c.stride, c.padding)


def convolve3x3(x: Tensor, conv: nn.Conv2d, with_bias: bool = True) -> Tensor:
    """The same where `is_conv3x3`."""
    fast = prepared(conv, x)
    if fast is not None:
        return fast(x, with_bias)
    y: Tensor = CONV3X3.unchecked(x, conv.weight, conv.bias if with_bias else None, None, None, None, False)
    return y
