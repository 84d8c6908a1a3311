"""The layers of the UNet. Modules hold the parameters under the original DDPM code's names; ops do the work."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import DROPOUT, Dropout, NoiseState, timestep_embedding
from ..ops import _checks as checks
from .attention import AttentionBlock
from .folding import alike, normed_conv3x3
from .fusing import TakesNoiseState, is_conv3x3, is_convolution, is_plain, is_untouched, remember
from .inputs import check_input, check_labels
from .made import are_fixed
from .norms import Activation, checked_activation, get_norm, is_known, norm_act, reads_sums
from .recomputing import check_unchanged, frozen, frozen_state, kept, whole
from .sums import Sum
from .upsampling import NearestUpsample, Upsample
from .weights import convolve, convolve3x3


class PositionalEmbedding(nn.Module):
    """Timesteps [N] to their sinusoidal embedding [N, dim]; see `ops.timestep_embedding`."""

    def __init__(self, dim: int, scale: float = 1.0):
        super().__init__()
        self.dim, self.scale = checks.integer("dim", dim, 2), checks.number("scale", scale)
        if self.dim % 2:
            raise ValueError(f"dim must be even, got {dim}: {dim + 1} would work")
        # Empty, and not saved: it follows .half() and .to(), and so tells the dtype of the layers to come.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = cast(Tensor, self._like).dtype
        return timestep_embedding(x.double() if dtype == torch.float64 else x, self.dim, self.scale).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, scale={self.scale}"


class Downsample(nn.Module):
    """Halves height and width with a 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_channels = in_channels = checks.integer("in_channels", in_channels, 1)
        self.downsample = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time_emb: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        check_input(x, self.in_channels, self.downsample)
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"x must have even height and width to be halved, got {list(x.shape)}")
        return self.summed(Sum(x)).tensor()

    def summed(self, x: Sum) -> Sum:
        """As forward, of and to a sum that need not be made yet."""
        return x.convolved(x.tensor(), self.downsample)


class ResidualBlock(TakesNoiseState):
    """conv_2(act(norm_2(conv_1(act(norm_1(x))) + time bias + class bias))) + residual_connection(x), then attention.

    Args:
        in_channels, out_channels: channels of input and output.
        dropout: probability, before the second convolution.
        time_emb_dim: size of the time embedding; None for no time bias.
        num_classes: number of classes; None for no class bias.
        activation: any callable; relu, silu and mish run inside the norm.
        norm: "gn", "in", "bn" or None.
        num_groups: groups of "gn".
        use_attention: whether an AttentionBlock follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float,
        time_emb_dim: int | None = None,
        num_classes: int | None = None,
        activation: Activation = F.relu,
        norm: str | None = "gn",
        num_groups: int = 32,
        use_attention: bool = False,
    ):
        super().__init__()
        self.in_channels = in_channels = checks.integer("in_channels", in_channels, 1)
        self.out_channels = out_channels = checks.integer("out_channels", out_channels, 1)
        dropout = checks.number("dropout", dropout, 0, 1)
        self.time_emb_dim = None if time_emb_dim is None else checks.integer("time_emb_dim", time_emb_dim, 1)
        self.num_classes = None if num_classes is None else checks.integer("num_classes", num_classes, 1)
        checks.flag("use_attention", use_attention)
        self.activation = checked_activation(activation)
        self.dropout_stream = DROPOUT  # a network numbers its blocks
        self.norm_1 = get_norm(norm, in_channels, num_groups)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = get_norm(norm, out_channels, num_groups)
        self.conv_2 = nn.Sequential(nn.Dropout(p=dropout), nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.time_bias = None if self.time_emb_dim is None else nn.Linear(self.time_emb_dim, out_channels)
        self.class_bias = None if self.num_classes is None else nn.Embedding(self.num_classes, out_channels)
        same = in_channels == out_channels
        self.residual_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = AttentionBlock(out_channels, norm, num_groups) if use_attention else nn.Identity()

    def forward(
        self,
        x: Tensor,  # [N, in_channels, H, W]
        time_emb: Tensor | None = None,  # [N, time_emb_dim]
        y: Tensor | None = None,  # [N] int64
        noise_state: NoiseState | None = None,  # where dropout draws from; torch's generator without it
    ) -> Tensor:  # [N, out_channels, H, W]
        check_input(x, self.in_channels, self.conv_1)
        if self.is_fusible():
            return self.summed(Sum(x), self.bias(x.shape[0], time_emb), y, noise_state).tensor()
        time = self._time(x.shape[0], time_emb)
        h = self.conv_1(self.activation(self.norm_1(x)))
        bias = self._with_class(time, x.shape[0], y)
        h = h if bias is None else h + bias[..., None, None]
        return self.attention(self.conv_2(self.activation(self.norm_2(h))) + self.residual_connection(x))

    def is_fusible(self) -> bool:
        """Whether `summed` computes what the modules would."""
        layers = list(self.conv_2.children())
        return (
            is_plain(self.norm_1, self.norm_2, self.conv_2, *layers)
            and [type(m) for m in layers] == [nn.Dropout, nn.Conv2d]
            and is_conv3x3(self.conv_1)
            and is_conv3x3(layers[1])
        )

    def summed(
        self,
        x: Sum,
        bias: Tensor,
        y: Tensor | None,
        noise_state: NoiseState | None = None,
        skip: Sum | None = None,
        keep: bool = True,
    ) -> Sum:
        """As forward, of and to a sum that need not be made yet, if `is_fusible`. The ops unchecked: the modules' own
        arguments are right.

        Args:
            bias: [C] or [N, C], of conv_1 and the time; the class's joins it, and norm_2 adds both in its own pass.
            skip: what else goes in, as if concatenated.
            keep: for the backward, what goes into the convolutions; else the norms run again in it.
        """
        drop, conv_2 = cast(tuple[nn.Dropout, nn.Conv2d], tuple(self.conv_2.children()))
        fixed = not x.later and are_fixed() and not drop.training
        norm_1, norm_2, activation = self.norm_1, self.norm_2, self.activation
        if skip is not None and not x.later and not (fixed and reads_sums(norm_1) and alike(x.x, skip.x)):
            x, skip = x.joined(skip), None
        if fixed:
            h = normed_conv3x3(x, norm_1, activation, self.conv_1, False, skip=skip)
            add, residual = self._with_class(bias, h.x.shape[0], y), self._residual(x, skip)
            return self._attended(normed_conv3x3(h, norm_2, activation, conv_2, add=add, residual=residual), False)

        def first() -> Callable[[], Tensor]:
            return partial(x.as_it_is().normed, norm_1, activation, skip and skip.as_it_is())

        def second() -> Callable[[], Tensor]:
            return partial(norm_act, norm_2, activation, raw, add=add, dropout=frozen(dropout))

        h_1 = x.normed(norm_1, activation, skip)
        keep = keep or not is_known(activation)
        with kept(h_1, keep or not reads_sums(norm_1), first):
            raw = convolve3x3(h_1, self.conv_1, False)
        add = self._with_class(bias, raw.shape[0], y)
        dropout = Dropout(drop.p, noise_state, self.dropout_stream) if drop.training and drop.p > 0 else None
        h_2 = norm_act(norm_2, activation, raw, add=add, dropout=dropout)
        drawn = dropout is not None and dropout.state is None
        with kept(h_2, keep or drawn or not reads_sums(norm_2), second):
            out = self._onto(x, h_2, conv_2, skip)
        return self._attended(out, x.later)

    def _attended(self, out: Sum, later: bool) -> Sum:
        if type(self.attention) is nn.Identity and is_plain(self.attention):
            return out
        if type(self.attention) is AttentionBlock and is_untouched(self.attention):
            return self.attention.summed(out)
        return Sum(self.attention(out.tensor()), later=later)

    def _onto(self, x: Sum, h: Tensor, conv: nn.Conv2d, skip: Sum | None) -> Sum:
        """conv(h) + residual_connection(x), with a skip as if concatenated."""
        if not x.later:
            return Sum(convolve3x3(h, conv, residual=self._residual(x)), own=True)
        out = x.convolved(h, conv, convolve3x3)
        if self._connects_as_it_is():
            return out.plus(x if skip is None else x.joined(skip))
        return out.through(self.residual_connection, x, skip)

    def _residual(self, x: Sum, skip: Sum | None = None) -> Tensor:
        """residual_connection(x), where sums are not made later, with a skip as if concatenated."""
        if self._connects_as_it_is():
            return (x if skip is None else x.joined(skip)).x
        if not is_convolution(self.residual_connection):
            x.moments = None  # it may write into what it is given
        return convolve(x.x, self.residual_connection, x2=None if skip is None else skip.x)

    def _connects_as_it_is(self) -> bool:
        return type(self.residual_connection) is nn.Identity and is_plain(self.residual_connection)

    def recomputed(
        self, x: Sum, bias: Tensor, y: Tensor | None, noise_state: NoiseState | None = None, skip: Sum | None = None
    ) -> Sum:
        """As `summed`, keeping for the backward nothing but what goes in, if all inside is the same in another run."""
        if not self._repeats():
            return self.summed(x, bias, y, noise_state, skip)
        x.settle()
        given, other, state = x.as_it_is(), skip and skip.as_it_is(), frozen_state(noise_state)

        drop, weights = cast(nn.Dropout, self.conv_2[0]), list(self.parameters())
        versions, training = [w._version for w in weights], drop.training

        def run() -> Sum:
            check_unchanged(weights, versions)
            now, drop.training = drop.training, training
            try:
                return self.summed(given.as_it_is(), bias, y, state, other and other.as_it_is())
            finally:
                drop.training = now

        return whole(run, x.x, draws=training and drop.p > 0 and state is None)

    def _repeats(self) -> bool:
        """Whether nothing but the block's own dropout is known to differ from run to run, or to count runs."""
        norms, others = [self.norm_1, self.norm_2], cast(list[nn.Module], [self.residual_connection])
        if type(self.attention) is AttentionBlock and is_untouched(self.attention):
            norms.append(self.attention.norm)
            others += [self.attention.to_qkv, self.attention.to_out]
        else:
            others.append(self.attention)
        known = all(type(m) in (nn.Identity, nn.Conv2d) for m in others) and is_plain(*others)
        return known and is_known(self.activation) and all(map(reads_sums, norms))

    def bias(self, num_images: int, time_emb: Tensor | None) -> Tensor:
        """The bias for `summed`, of a time embedding [N, time_emb_dim]: [N, out_channels], or [out_channels]."""
        return self._with_time(self._time(num_images, time_emb))

    def embed(self, time_emb: Tensor) -> Tensor:
        """The biases for `summed` of time embeddings: [S, time_emb_dim] -> [S, out_channels]."""
        bias = self.bias(time_emb.shape[0], time_emb)
        return bias if bias.ndim == 2 else bias.expand(time_emb.shape[0], -1)

    def _with_time(self, time: Tensor | None) -> Tensor:
        bias = cast(Tensor, self.conv_1.bias)
        return bias if time is None else bias + time

    def _time(self, num_images: int, time_emb: Tensor | None) -> Tensor | None:
        """The time bias, [N, C]."""
        if self.time_bias is None:
            return None
        if time_emb is None:
            raise ValueError("time_emb is required: this block was built with time_emb_dim")
        checks.tensor("time_emb", time_emb, shape=(num_images, cast(int, self.time_emb_dim)))
        dtype = self.time_bias.weight.dtype if type(self.time_bias) is nn.Linear else time_emb.dtype
        if time_emb.dtype != dtype and not torch.is_autocast_enabled(time_emb.device.type):
            checks.tensor("time_emb", time_emb, dtype=dtype)
        bias: Tensor = self.time_bias(self.activation(time_emb))
        return bias

    def _with_class(self, bias: Tensor | None, num_images: int, y: Tensor | None) -> Tensor | None:
        """`bias` and the class bias, [N, C]."""
        if self.class_bias is None:
            return bias
        if y is None:
            raise ValueError("y is required: this block was built with num_classes")
        check_labels(y, num_images)
        try:
            label: Tensor = self.class_bias(y)
        except IndexError as error:
            raise ValueError(f"y must lie in [0, {self.num_classes}), got {y.tolist()}") from error
        return label if bias is None else bias + label


# All that a network of ours is made of, beside PyTorch's own modules.
LAYERS = PositionalEmbedding, Downsample, NearestUpsample, Upsample, ResidualBlock, AttentionBlock
remember(*LAYERS)
