"""What a layer of the network hands to the next: a raw tensor, and what is still to be added to it.

On a GPU a convolution's bias is a pass over its result, and a residual connection another one. So there a layer leaves
both to whoever reads the result: the next norm adds them in the pass that it makes anyway, storing the sum of the two
tensors on the way, while biases, [C] numbers, are only ever added to each other. A skip is a second tensor to read, and
no concatenation. On a CPU a convolution adds its bias while it writes, and nothing is left for later; in chains it may
tell the moments of what it wrote, of which the next norm is made (folding.py).
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import cast

import torch
from torch import Tensor, nn

from ..ops.residual_sum import OP as RESIDUAL_SUM
from .fusing import is_convolution, is_pointwise
from .made import once
from .norms import Activation, norm_act, reads_sums
from .weights import computed_in, convolve, plus, widens


class Sum:
    """x + residual + bias.

    Args:
        x: [N, C, H, W]; what is still to be added to it:
        bias: [C], or None.
        residual: like x, or None. The first norm that reads the sum puts x + residual in x's place.
        later: whether its terms, and those of what follows, are left to their reader.
        own: whether nobody else can hold x, so that something may be added in its memory.
        moments: where they are known, x's mean and sum of squares around it, [2, N, C].
    """

    __slots__ = "bias", "later", "moments", "own", "residual", "x"

    def __init__(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        later: bool = False,
        own: bool = False,
        moments: Tensor | None = None,
    ):
        self.x, self.bias, self.residual, self.later, self.own = x, bias, residual, later, own
        self.moments = moments

    def tensor(self) -> Tensor:
        """All of it, for whoever pads it with zeros, or may do anything with it."""
        if self.residual is not None or self.bias is not None:
            self.x = cast(Tensor, RESIDUAL_SUM.unchecked(self.x, self.residual, self.bias))
        self.bias = self.residual = None
        self.own = False
        return self.x

    def joined(self, skip: "Sum") -> "Sum":
        """The concatenation of both."""
        moments = self.moments_with(skip)
        return Sum(torch.cat([self.tensor(), skip.tensor()], dim=1), later=self.later, moments=moments)

    def moments_with(self, skip: "Sum") -> Tensor | None:
        """Those of the concatenation."""
        if self.moments is None or skip.moments is None:
            return None
        return torch.cat([self.moments, skip.moments], dim=2)

    def as_it_is(self) -> "Sum":
        """The same sum, whatever becomes of this one."""
        return copy(self)

    def normed(self, norm: nn.Module, activation: Activation | None, skip: "Sum | None" = None) -> Tensor:
        """activation(norm(this)); where sums are made later, with a skip as if concatenated."""
        if not self.later:
            return cast(Tensor, norm_act(norm, activation, self.x))
        if not reads_sums(norm):
            return cast(Tensor, norm_act(norm, activation, (self if skip is None else self.joined(skip)).tensor()))
        if skip is None:
            x2, add = None, self.bias
        else:
            x2, add = skip.settled(), _side_by_side(self, skip)
        y = norm_act(norm, activation, self.x, add=add, x2=x2, residual=self.residual)
        if self.residual is None:
            return cast(Tensor, y)
        y, self.x = y
        self.residual, self.own = None, True
        return cast(Tensor, y)

    def settle(self) -> None:
        """Put x + residual in x's place."""
        if self.residual is not None:
            self.x, self.residual = cast(Tensor, RESIDUAL_SUM.unchecked(self.x, self.residual, None)), None

    def settled(self) -> Tensor:
        """x, to which no more than the bias is to be added."""
        self.settle()
        return self.x

    def convolved(self, x: Tensor, conv: nn.Module, run: Callable[..., Tensor] = convolve) -> "Sum":
        """conv(x) as `run` does it, its bias left for later if this sum's is."""
        if not is_convolution(conv):
            self.moments = None  # it may write into what it is given
            return Sum(run(x, conv), later=self.later)
        if not self.later:
            return Sum(run(x, conv), own=True)
        return Sum(run(x, conv, False), _wide(cast(nn.Conv2d, conv).bias), later=True, own=True)

    def plus(self, other: "Sum") -> "Sum":
        """Both, where nothing but a bias is to be added to the other."""
        if self.later:
            return Sum(self.x, added(self.bias, other.bias), other.settled(), True)
        return Sum(plus(self.x, other.x) if self.own else self.x + other.x)

    def through(self, conv: nn.Module, x: "Sum", skip: "Sum | None" = None) -> "Sum":
        """This and a 1x1 convolution of x, with a skip as if concatenated, after a norm has read both; where sums are
        made later."""
        if not self.own or not is_pointwise(conv):
            h = (x if skip is None else x.joined(skip)).tensor()
            return self.plus(Sum(cast(Tensor, conv(h)), later=True))
        c, sums = cast(nn.Conv2d, conv), [x] if skip is None else [x, skip]
        images = [s.settled() for s in sums]
        channels = [i.shape[1] for i in images]
        kind = computed_in(c.weight)
        parts = once(("parts", kind, *channels), [c.weight], lambda: c.weight.flatten(1).to(kind).split(channels, 1))
        return self.with_products(images, parts, added(self.bias, _bias_through(c, sums)))

    def with_products(self, images: Sequence[Tensor], parts: Sequence[Tensor], bias: Tensor | None) -> "Sum":
        """x + the images times matrices [C, channels of the image], in x's own memory: a product adds in passing."""
        rows = _rows(self.x)
        for image, part in zip(images, parts, strict=True):
            row = _rows(image).to(rows.dtype)
            if rows.is_cpu and widens(rows.dtype):
                with torch.autocast("cpu", enabled=False):
                    rows.add_(row.float() @ part.t().float())
            else:
                rows.addmm_(row, part.t())
        n, channels, height, width = self.x.shape
        return Sum(rows.view(n, height, width, channels).permute(0, 3, 1, 2), bias, later=True, own=True)


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b of biases, either of which may be missing."""
    return b if a is None else a if b is None else once("sum", (a, b), lambda: a + b)


def _wide(bias: Tensor | None) -> Tensor | None:
    """In float32 at least: where there is little to add, there is no need to round."""
    if bias is None:
        return None
    return once("wide", [bias], lambda: bias.to(torch.promote_types(bias.dtype, torch.float32)))


def _side_by_side(*sums: Sum) -> Tensor | None:
    """The biases of all channels."""
    biases, channels = [s.bias for s in sums], [s.x.shape[1] for s in sums]
    like = next((b for b in biases if b is not None), None)
    if like is None:
        return None
    return once(
        ("side by side", *channels),
        biases,
        lambda: torch.cat([like.new_zeros(c) if b is None else b for b, c in zip(biases, channels, strict=True)]),
    )


def _rows(x: Tensor) -> Tensor:
    """[N H W, C], in channels_last no copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _bias_through(conv: nn.Conv2d, sums: list[Sum]) -> Tensor | None:
    """What becomes of the biases; not as a matrix product, which autocast would round."""
    add = _side_by_side(*sums)
    if add is None:
        return _wide(conv.bias)
    through = once("through", (conv.weight, add), lambda: (conv.weight.flatten(1).to(add.dtype) * add).sum(1))
    return added(_wide(conv.bias), through)
