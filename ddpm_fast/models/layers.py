"""The layers of the UNet. Modules hold the parameters under the original DDPM code's names; ops do the work.

Where a submodule was hooked, parametrized or replaced, the modules themselves are called: nothing of it is skipped.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import DROPOUT, Dropout, NoiseState, apply_dropout, timestep_embedding
from ..ops import _checks as checks
from ..ops.conv3x3 import OP as conv3x3  # without the public function's checks: modules check what they are given
from ..ops.group_norm_silu import OP as group_norm_silu

Activation = Callable[[Tensor], Tensor]

_FUSED: dict[Activation, str] = {F.relu: "relu", torch.relu: "relu", F.silu: "silu", F.mish: "mish"}
_STOCK = {nn.GroupNorm, nn.InstanceNorm2d, nn.BatchNorm2d, nn.Identity, nn.Conv2d, nn.Dropout, nn.Sequential}


def is_plain(*modules: nn.Module) -> bool:
    """Whether an op may stand in for these modules: PyTorch's own classes, without hooks."""
    if nn.modules.module._has_any_global_hook():
        return False
    for m in modules:
        if type(m) not in _STOCK or m._forward_hooks or m._forward_pre_hooks:
            return False
        if m._backward_hooks or m._backward_pre_hooks:
            return False
    return True


def is_conv3x3(conv: nn.Module) -> bool:
    """Whether `conv3x3` computes what this module does."""
    return (
        type(conv) is nn.Conv2d
        and is_plain(conv)
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.bias is not None
    )


def get_norm(norm: str | None, num_channels: int, num_groups: int) -> nn.Module:
    """The normalisation "gn" (group), "in" (instance, affine), "bn" (batch) or None.

    Raises:
        ValueError: another name, or a number of groups that does not divide the channels.
    """
    if norm == "gn":
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_groups must divide the number of channels, {num_channels}; got {num_groups}")
        return nn.GroupNorm(num_groups, num_channels)
    if norm == "in":
        return nn.InstanceNorm2d(num_channels, affine=True)
    if norm == "bn":
        return nn.BatchNorm2d(num_channels)
    if norm is None:
        return nn.Identity()
    raise ValueError(f"norm must be 'gn', 'in', 'bn' or None, got {norm!r}")


def norm_act(
    norm: nn.Module,
    activation: Activation | None,
    x: Tensor,
    *,
    add: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """dropout(activation(norm(x + add))); one op where the norm is over groups and the activation a known one."""
    fused = "none" if activation is None else _FUSED.get(activation)
    if type(norm) is nn.InstanceNorm2d and not norm.track_running_stats:
        groups = norm.num_features  # a group a channel
    else:
        groups = norm.num_groups if type(norm) is nn.GroupNorm else 0
    if groups and is_plain(norm):
        inside = {"activation": fused, "dropout": dropout} if fused else {"activation": "none"}
        norm = cast(nn.GroupNorm, norm)
        y = cast(Tensor, group_norm_silu(x, norm.weight, norm.bias, groups, eps=norm.eps, add=add, **inside))
        if fused:
            return y
    else:
        y = norm(x if add is None else x + add.to(x.dtype)[..., None, None])
    y = y if activation is None else activation(y)
    return y if dropout is None else apply_dropout(y, dropout)


def check_input(x: Tensor, channels: int) -> None:
    """Raise unless x is [N, channels, H, W]."""
    checks.tensor("x", x, ndim=4)
    if x.shape[1] != channels:
        raise ValueError(f"x must have {channels} channels, got {checks.text(x)}")


class PositionalEmbedding(nn.Module):
    """Timesteps [N] to their sinusoidal embedding [N, dim]; see `ops.timestep_embedding`."""

    def __init__(self, dim: int, scale: float = 1.0):
        super().__init__()
        self.dim, self.scale = dim, scale
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
        self.in_channels = in_channels
        self.downsample = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time_emb: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        check_input(x, self.in_channels)
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"x must have even height and width to be halved, got {list(x.shape)}")
        return self.downsample(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.upsample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(in_channels, in_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, time_emb: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        check_input(x, self.in_channels)
        return self.upsample(x)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels with one head, scaled by C^-0.5, and a residual connection."""

    def __init__(self, in_channels: int, norm: str | None = "gn", num_groups: int = 32):
        super().__init__()
        self.in_channels = in_channels
        self.norm = get_norm(norm, in_channels, num_groups)
        self.to_qkv = nn.Conv2d(in_channels, in_channels * 3, 1)
        self.to_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_channels)
        qkv = self.to_qkv(norm_act(self.norm, None, x))
        # One head, [N, 1, H W, 3 C] with dense rows: other forms miss the fused kernels. No copy in channels_last.
        tokens = qkv.flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
        out = F.scaled_dot_product_attention(*tokens.chunk(3, dim=-1)).transpose(2, 3).reshape(x.shape)
        return self.to_out(out.contiguous() if x.is_contiguous() else out) + x


class ResidualBlock(nn.Module):
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
        self.in_channels = in_channels
        self.activation = activation
        self.dropout_stream = DROPOUT  # a network numbers its blocks
        self.norm_1 = get_norm(norm, in_channels, num_groups)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = get_norm(norm, out_channels, num_groups)
        self.conv_2 = nn.Sequential(nn.Dropout(p=dropout), nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.time_bias = nn.Linear(time_emb_dim, out_channels) if time_emb_dim is not None else None
        self.class_bias = nn.Embedding(num_classes, out_channels) if num_classes is not None else None
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
        check_input(x, self.in_channels)
        norm_1, conv_1, norm_2, conv_2 = self.norm_1, self.conv_1, self.norm_2, self.conv_2
        layers = list(conv_2.children())
        if (
            is_plain(norm_1, norm_2, conv_2, *layers)
            and [type(m) for m in layers] == [nn.Dropout, nn.Conv2d]
            and is_conv3x3(conv_1)
            and is_conv3x3(layers[1])
        ):
            drop, last_conv = cast(nn.Dropout, layers[0]), cast(nn.Conv2d, layers[1])
            # conv_1's bias joins the time and class biases in norm_2: one pass less over the activations.
            h = conv3x3(norm_act(norm_1, self.activation, x), conv_1.weight)
            add = self._bias(time_emb, y, conv_1.bias)
            dropout = Dropout(drop.p, noise_state, self.dropout_stream) if drop.training and drop.p > 0 else None
            h = norm_act(norm_2, self.activation, h, add=add, dropout=dropout)
            out = conv3x3(h, last_conv.weight, last_conv.bias, residual=self.residual_connection(x))
        else:
            h = self.conv_1(self.activation(self.norm_1(x)))
            bias = self._bias(time_emb, y)
            h = h if bias is None else h + bias[..., None, None]
            out = self.conv_2(self.activation(self.norm_2(h))) + self.residual_connection(x)
        return self.attention(out)

    def _bias(self, time_emb: Tensor | None, y: Tensor | None, bias: Tensor | None = None) -> Tensor | None:
        """The sum of `bias` [C], the time bias and the class bias [N, C]."""
        if self.time_bias is not None:
            if time_emb is None:
                raise ValueError("time_emb is required: this block was built with time_emb_dim")
            if time_emb.ndim != 2 or time_emb.shape[1] != self.time_bias.in_features:
                size = self.time_bias.in_features
                raise ValueError(f"time_emb must have shape [N, {size}], got {checks.text(time_emb)}")
            time = self.time_bias(self.activation(time_emb))
            bias = time if bias is None else bias + time
        if self.class_bias is not None:
            if y is None:
                raise ValueError("y is required: this block was built with num_classes")
            checks.tensor("y", y, ndim=1, dtype=torch.int64)
            try:
                label = self.class_bias(y)
            except IndexError as error:
                raise ValueError(f"y must lie in [0, {self.class_bias.num_embeddings}), got {y.tolist()}") from error
            bias = label if bias is None else bias + label
        return bias
