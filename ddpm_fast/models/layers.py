"""The layers of the UNet. Modules hold the parameters under the original DDPM code's names; ops do the work."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import DROPOUT, Dropout, NoiseState, timestep_embedding
from ..ops import _checks as checks
from ..ops.conv3x3 import OP as CONV3X3
from .fusing import Activation, TakesNoiseState, is_conv3x3, is_plain, is_untouched, norm_act
from .upsampling import in_phases, phases_pay


def get_norm(norm: str | None, num_channels: int, num_groups: int) -> nn.Module:
    """The normalisation "gn" (group), "in" (instance, affine), "bn" (batch) or None.

    Raises:
        ValueError: another name, or a number of groups that does not divide the channels.
    """
    if norm is not None and not (isinstance(norm, str) and norm in ("gn", "in", "bn")):
        raise ValueError(f"norm must be 'gn', 'in', 'bn' or None, got {checks.text(norm)}")
    num_channels = checks.integer("num_channels", num_channels, 1)
    if norm == "gn":
        if num_channels % checks.integer("num_groups", num_groups, 1):
            raise ValueError(f"num_groups must divide the number of channels, {num_channels}; got {num_groups}")
        return nn.GroupNorm(num_groups, num_channels)
    if norm == "in":
        return nn.InstanceNorm2d(num_channels, affine=True)
    if norm == "bn":
        return nn.BatchNorm2d(num_channels)
    return nn.Identity()


def checked_activation(activation: Activation) -> Activation:
    """The activation; raise TypeError unless it is a function of tensors."""
    if isinstance(activation, type) or not callable(activation):
        raise TypeError(f"activation must be a function such as F.silu, got {checks.text(activation)}")
    return activation


def check_input(x: Tensor, channels: int, conv: nn.Module | None = None) -> None:
    """Raise unless x is [N, channels, H, W], and of the dtype of `conv`, which is what takes it."""
    checks.tensor("x", x, ndim=4)
    if x.shape[1] != channels:
        raise ValueError(f"x must have {channels} channels, got {checks.text(x)}")
    for name, size in zip(("height", "width"), x.shape[2:], strict=True):
        if size < 1:
            raise ValueError(f"x: {name} must be at least 1, got 0")
    if type(conv) is nn.Conv2d and x.dtype != conv.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must have the dtype of the layer, {conv.weight.dtype}; got {checks.text(x)}")


def check_labels(y: Tensor, num_images: int) -> None:
    """Raise unless y is [N], int64 or int32."""
    dtype = torch.int32 if isinstance(y, Tensor) and y.dtype == torch.int32 else torch.int64
    checks.tensor("y", y, shape=(num_images,), dtype=dtype)


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
        return self.downsample(x)


class NearestUpsample(nn.Module):
    """Doubles height and width by repetition: [N, C, H, W] -> [N, C, 2H, 2W]."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        # The inductor of torch 2.13 loses the gradients of interpolate on CPUs, in silence.
        n, c, h, w = x.shape
        return x[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_channels = in_channels = checks.integer("in_channels", in_channels, 1)
        self.upsample = nn.Sequential(NearestUpsample(), nn.Conv2d(in_channels, in_channels, 3, padding=1))

    def forward(self, x: Tensor, time_emb: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        check_input(x, self.in_channels, self.upsample[-1])
        if self._is_plain() and phases_pay(x, self.upsample[1]):
            return in_phases(x, cast(nn.Conv2d, self.upsample[1]))
        return cast(Tensor, self.upsample(x))

    def _is_plain(self) -> bool:
        """Whether nothing was put into or around the two steps."""
        layers = [type(m) for m in self.upsample]
        return layers == [NearestUpsample, nn.Conv2d] and is_untouched(self.upsample, self.upsample[0])


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
        qkv = self.to_qkv(norm_act(self.norm, None, x))
        # One head, [N, 1, H W, 3 C] with dense rows: other forms miss the fused kernels. No copy in channels_last.
        tokens = qkv.flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
        out = F.scaled_dot_product_attention(*tokens.chunk(3, dim=-1)).transpose(2, 3).reshape(x.shape)
        return self.to_out(out.contiguous() if x.is_contiguous() else out) + x


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
        time = self._time(x.shape[0], time_emb)
        if self.is_fusible():
            return self.fused(x, self._with_time(time), y, noise_state)
        h = self.conv_1(self.activation(self.norm_1(x)))
        bias = self._with_class(time, x.shape[0], y)
        h = h if bias is None else h + bias[..., None, None]
        return self.attention(self.conv_2(self.activation(self.norm_2(h))) + self.residual_connection(x))

    def is_fusible(self) -> bool:
        """Whether `fused` computes what the modules would."""
        layers = list(self.conv_2.children())
        return (
            is_plain(self.norm_1, self.norm_2, self.conv_2, *layers)
            and [type(m) for m in layers] == [nn.Dropout, nn.Conv2d]
            and is_conv3x3(self.conv_1)
            and is_conv3x3(layers[1])
        )

    def fused(self, x: Tensor, bias: Tensor, y: Tensor | None, noise_state: NoiseState | None = None) -> Tensor:
        """As forward, given the bias [C] or [N, C] of conv_1 and the time; the class's joins them in norm_2: one pass
        less over the activations. The ops unchecked: the modules' own arguments are right."""
        drop, last_conv = cast(tuple[nn.Dropout, nn.Conv2d], tuple(self.conv_2.children()))
        x_1 = norm_act(self.norm_1, self.activation, x)
        h = CONV3X3.unchecked(x_1, self.conv_1.weight, None, None, None, None, False)
        add = self._with_class(bias, x.shape[0], y)
        dropout = Dropout(drop.p, noise_state, self.dropout_stream) if drop.training and drop.p > 0 else None
        h = norm_act(self.norm_2, self.activation, h, add=add, dropout=dropout)
        residual = self.residual_connection(x)
        return self.attention(CONV3X3.unchecked(h, last_conv.weight, last_conv.bias, None, None, residual, False))

    def embed(self, time_emb: Tensor) -> Tensor:
        """The biases for `fused` of time embeddings: [S, time_emb_dim] -> [S, out_channels]."""
        bias = self._with_time(self._time(time_emb.shape[0], time_emb))
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
