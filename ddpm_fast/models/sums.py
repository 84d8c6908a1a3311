"""What a layer of the network hands to the next: a raw tensor, and what is still to be added to it.

On a GPU a convolution's bias is a pass over its result, and a residual connection another one. So there a layer leaves
both to whoever reads the result: the next norm adds them in the pass that it makes anyway, storing the sum of the two
tensors on the way, while biases, [C] numbers, are only ever added to each other. A skip is a second tensor to read, and
no concatenation. On a CPU a convolution adds its bias while it writes, and nothing is left for later.
"""

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from typing import cast

import torch
from torch import Tensor, nn

from ..ops.residual_sum import OP as RESIDUAL_SUM
from .norms import Activation, norm_act, reads_sums
from .weights import computed_in, convolve, is_convolution, is_pointwise, once


class Sum:
    """x + residual + bias.

    Args:
        x: [N, C, H, W]; what is still to be added to it:
        bias: [C], or None.
        residual: like x, or None. The first norm that reads the sum puts x + residual in x's place.
        later: whether its terms, and those of what follows, are left to their reader.
        of: under what is kept what is made of its bias: whose result x is.
    """

    __slots__ = "bias", "later", "of", "residual", "x"

    def __init__(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        later: bool = False,
        of: Hashable = None,
    ):
        self.x, self.bias, self.residual, self.later, self.of = x, bias, residual, later, of

    def tensor(self) -> Tensor:
        """All of it, for whoever pads it with zeros, or may do anything with it."""
        if self.residual is not None or self.bias is not None:
            self.x = cast(Tensor, RESIDUAL_SUM.unchecked(self.x, self.residual, self.bias))
        self.bias = self.residual = None
        return self.x

    def joined(self, skip: "Sum") -> "Sum":
        """The concatenation of both."""
        return Sum(torch.cat([self.tensor(), skip.tensor()], dim=1), later=self.later)

    def as_it_is(self) -> "Sum":
        """The same sum, whatever becomes of this one."""
        return copy(self)

    def normed(self, norm: nn.Module, activation: Activation | None, skip: "Sum | None" = None) -> Tensor:
        """activation(norm(this)), with a skip as if concatenated."""
        if not self.later:
            return norm_act(norm, activation, self.x)
        if not reads_sums(norm):
            return norm_act(norm, activation, (self if skip is None else self.joined(skip)).tensor())
        if skip is None:
            x2, add = None, self.bias
        else:
            x2, add = skip.x, once((id(norm), "add"), lambda: _side_by_side(self, skip))
        y = norm_act(norm, activation, self.x, add=add, x2=x2, residual=self.residual)
        if self.residual is None:
            return y
        y, self.x = y
        self.residual = None
        return y

    def convolved(self, x: Tensor, conv: nn.Module, run: Callable[..., Tensor] = convolve) -> "Sum":
        """conv(x) as `run` does it, its bias left for later if this sum's is."""
        if not self.later or not is_convolution(conv):
            return Sum(run(x, conv), later=self.later)
        return Sum(run(x, conv, False), _wide(cast(nn.Conv2d, conv).bias), later=True, of=id(conv))

    def plus(self, other: "Sum") -> "Sum":
        """Both, where nothing but a bias is to be added to the other."""
        if self.later:
            bias = once((self.of, other.of, "plus"), lambda: _added(self.bias, other.bias))
            return Sum(self.x, bias, other.x, True, self.of)
        if torch.is_grad_enabled() or self.x.dtype is not other.x.dtype:
            return Sum(self.x + other.x)
        return Sum(self.x.add_(other.x))

    def through(self, conv: nn.Module, x: "Sum", skip: "Sum | None" = None) -> "Sum":
        """This and a 1x1 convolution of x, with a skip as if concatenated, after a norm has read both."""
        if not self.later:
            return self.plus(Sum(convolve(x.x, conv)))
        if not is_pointwise(conv):
            h = (x if skip is None else x.joined(skip)).tensor()
            return self.plus(Sum(cast(Tensor, conv(h)), later=True))
        c, sums = cast(nn.Conv2d, conv), [x] if skip is None else [x, skip]
        parts = once((id(c), computed_in(c.weight), "parts"), lambda: _parts(c, sums))
        bias = once((id(c), "bias"), lambda: _added(self.bias, _bias_through(c, sums)))
        return self.with_products([s.x for s in sums], parts, bias, id(c))

    def with_products(
        self, images: Sequence[Tensor], parts: Sequence[Tensor], bias: Tensor | None, of: Hashable
    ) -> "Sum":
        """x + the images times matrices [C, channels of the image], in x's own memory: a product adds in passing."""
        rows = _rows(self.x)
        for image, part in zip(images, parts, strict=True):
            rows.addmm_(_rows(image).to(rows.dtype), part.t())
        n, _, height, width = self.x.shape
        return Sum(rows.view(n, height, width, -1).permute(0, 3, 1, 2), bias, later=True, of=of)


def _wide(bias: Tensor | None) -> Tensor | None:
    """In float32 at least: where there is little to add, there is no need to round."""
    return None if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _side_by_side(*sums: Sum) -> Tensor | None:
    """The biases of all channels."""
    if all(s.bias is None for s in sums):
        return None
    like = next(s.bias for s in sums if s.bias is not None)
    return torch.cat([like.new_zeros(s.x.shape[1]) if s.bias is None else s.bias for s in sums])


def _rows(x: Tensor) -> Tensor:
    """[N H W, C], in channels_last no copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _parts(conv: nn.Conv2d, sums: list[Sum]) -> tuple[Tensor, ...]:
    """The weight's columns of each sum's channels, [O, C] each."""
    return conv.weight.flatten(1).to(computed_in(conv.weight)).split([s.x.shape[1] for s in sums], 1)


def _bias_through(conv: nn.Conv2d, sums: list[Sum]) -> Tensor | None:
    """What becomes of the biases; not as a matrix product, which autocast would round."""
    add = _side_by_side(*sums)
    if add is None:
        return _wide(conv.bias)
    return _added(_wide(conv.bias), (conv.weight.flatten(1).to(add.dtype) * add).sum(1))
