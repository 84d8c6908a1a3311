"""Self-attention over the pixels."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _checks as checks
from ..ops._conv3x3 import is_exact
from ..ops._dispatch import forced
from ..ops._native import wanted
from ..ops.attention import OP as ATTENTION
from ..ops.attention import rejects
from ..reference.attention import attention
from .folding import told_onto
from .fusing import is_pointwise
from .inputs import check_input
from .made import are_fixed, made
from .norms import get_norm
from .sums import Sum, added
from .weights import Prepared, computed_in, convolve, takes, widens

# Where products are faster on CPUs than the fused kernel (docs/performance.md): in bf16 from so many tokens on, in
# float32 up to so many, of several images; and not beyond so many scores, which are memory.
LEAST_TOKENS, MOST_TOKENS, IMAGES, MOST_SCORES = 32, 64, 4, 1 << 26


class AttentionBlock(nn.Module):
    """Self-attention over the pixels with one head, scaled by C^-0.5, and a residual connection."""

    def __init__(self, in_channels: int, norm: str | None = "gn", num_groups: int = 32):
        super().__init__()
        self.in_channels = in_channels = checks.integer("in_channels", in_channels, 1)
        self.norm = get_norm(norm, in_channels, num_groups)
        self.to_qkv = nn.Conv2d(in_channels, in_channels * 3, 1)
        self.to_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_channels, self.to_qkv)
        return self.summed(Sum(x)).tensor()

    def summed(self, x: Sum) -> Sum:
        """As forward, of and to a sum that need not be made yet."""
        h = x.normed(self.norm, None)
        folded = self._folded(h)
        if folded is not None:
            keys = _tokens(h)
            out = _image(attend(_tokens(folded.to_query(h)), keys, keys), h)
            if not x.later:
                return told_onto(out, folded.to_out, x)
            if x.own:
                return x.with_products([out], [folded.to_out.matrix], added(x.bias, folded.bias))
            return Sum(folded.to_out(out, False), folded.bias, later=True).plus(x)
        if x.later and is_pointwise(self.to_qkv):  # a product adds its bias while it writes, unlike a convolution
            qkv = F.linear(h.permute(0, 2, 3, 1), self.to_qkv.weight.flatten(1), self.to_qkv.bias).flatten(1, 2)
        else:
            qkv = _tokens(convolve(h, self.to_qkv))
        out = _image(attend(*qkv.chunk(3, dim=-1)), h)
        if x.later and x.own and not torch.is_grad_enabled():  # else the norm keeps what x.x holds
            return x.through(self.to_out, Sum(out))
        return x.convolved(out, self.to_out).plus(x)

    def _folded(self, h: Tensor) -> "Folded | None":
        """What was made of the weights for inputs like h; None where a module was replaced or hooked."""
        qkv, out = self.to_qkv, self.to_out
        if not are_fixed() or not h.is_contiguous(memory_format=torch.channels_last) or not takes(h):
            return None
        if not is_pointwise(qkv) or not is_pointwise(out):
            return None
        kind = computed_in(h)
        of = qkv.weight, qkv.bias, out.weight, out.bias
        return made(("folded", kind, is_exact()), of, lambda: Folded.of(qkv, out, kind))


class Folded(NamedTuple):
    """Two of the four 1x1 convolutions, as products of their weights in float64.

    For tokens x, q_i k_j = x_j Wk^T (Wq x_i + bq) + a number that all j share, which softmax takes away; and as the
    rows of softmax add up to 1, out_i = Wo (Wv sum_j a_ij x_j + bv) + bo. So x itself is keys and values.
    """

    to_query: Prepared  # Wk^T Wq and Wk^T bq
    to_out: Prepared  # Wo Wv and Wo bv + bo
    bias: Tensor  # the latter, [C], in float32 at least

    @classmethod
    def of(cls, to_qkv: nn.Conv2d, to_out: nn.Conv2d, kind: torch.dtype) -> "Folded":
        """In the dtype `kind`."""
        wq, wk, wv = to_qkv.weight.double().flatten(1).chunk(3)
        wo = to_out.weight.double().flatten(1)
        zeros = wq.new_zeros(3 * wq.shape[0])
        bq, _, bv = (zeros if to_qkv.bias is None else to_qkv.bias.double()).chunk(3)
        bias = wo @ bv + (0 if to_out.bias is None else to_out.bias.double())
        kept = torch.promote_types(kind, torch.float32)
        query, out = (wk.t() @ wq).to(kept), (wo @ wv).to(kept)
        return cls(
            Prepared(query[:, :, None, None], wk.t() @ bq, kind),
            Prepared(out[:, :, None, None], bias, kind),
            bias.to(torch.promote_types(to_out.weight.dtype, torch.float32)),
        )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T C^-0.5) v for [N, H W, C] each."""
    if q.is_cpu and widens(q.dtype):
        with torch.autocast("cpu", enabled=False):
            keys = k.float()
            return attend(q.float(), keys, keys if v is k else v.float()).to(q.dtype)
    if q.is_cpu and not torch.compiler.is_compiling() and _products_pay(q):
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)
        return torch.bmm(scores.softmax(dim=-1), v)
    if not torch.compiler.is_compiling() and forced() and (forced() != "native" or rejects(q, k, v)):
        return attention(q, k, v)  # the forced backend has none for these
    return cast(Tensor, ATTENTION.unchecked(q, k, v))


def _products_pay(q: Tensor) -> bool:
    n, tokens, _ = q.shape
    if n * tokens * tokens > MOST_SCORES:
        return False
    if q.dtype is torch.bfloat16:
        return tokens >= LEAST_TOKENS
    # In float32 without gradients the native kernel is faster than both.
    native = q.dtype is torch.float32 and not torch.is_grad_enabled() and wanted()
    return n >= IMAGES and tokens <= MOST_TOKENS and not native


def _tokens(x: Tensor) -> Tensor:
    """[N, H W, C], dense; in channels_last no copy."""
    return x.flatten(2).transpose(1, 2).contiguous()


def _image(x: Tensor, like: Tensor) -> Tensor:
    """The tokens as an image in the layout of another."""
    image = x.transpose(1, 2).unflatten(2, like.shape[2:])
    return image.contiguous() if like.is_contiguous() else image
