"""The UNet of the original DDPM code, plainly: eager NCHW modules, no fused op.

It carries the parameter names and the order of creation of the original, so that it loads the same checkpoints and
starts from the same weights under a seed.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def get_norm(norm: str | None, num_channels: int, num_groups: int) -> nn.Module:
    """Return the normalisation layer called ``"gn"``, ``"in"``, ``"bn"`` or None (identity)."""
    if norm == "gn":
        return nn.GroupNorm(num_groups, num_channels)
    if norm == "in":
        return nn.InstanceNorm2d(num_channels, affine=True)
    if norm == "bn":
        return nn.BatchNorm2d(num_channels)
    if norm is None:
        return nn.Identity()
    raise ValueError(f"norm={norm!r}: expected 'gn', 'in', 'bn' or None")


class PositionalEmbedding(nn.Module):
    """Sinusoidal embedding of raw timestep indices: [N] -> [N, dim], sines first."""

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.scale = scale

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000) / half))
        angles = torch.outer(t * self.scale, frequencies)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Downsample(nn.Module):
    """Half the resolution by a strided 3x3 convolution."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time_emb: Tensor | None, y: Tensor | None) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"x is {x.shape[2]}x{x.shape[3]} at a downsampling: height and width must be even")
        return self.downsample(x)


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours and a 3x3 convolution."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.upsample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(in_channels, in_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, time_emb: Tensor | None, y: Tensor | None) -> Tensor:
        return self.upsample(x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels, with a residual: [N, C, H, W] -> the same."""

    def __init__(self, in_channels: int, norm: str | None = "gn", num_groups: int = 32) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = get_norm(norm, in_channels, num_groups)
        self.to_qkv = nn.Conv2d(in_channels, in_channels * 3, 1)
        self.to_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * c**-0.5, dim=-1)
        out = torch.bmm(v, weights.transpose(1, 2)).reshape(n, c, h, w)
        return self.to_out(out) + x


class ResidualBlock(nn.Module):
    """norm, act, conv, + time and class biases, norm, act, dropout, conv, + skip, then attention if asked for."""

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
    ) -> None:
        super().__init__()
        self.activation = activation
        self.norm_1 = get_norm(norm, in_channels, num_groups)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = get_norm(norm, out_channels, num_groups)
        self.conv_2 = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.time_bias = nn.Linear(time_emb_dim, out_channels) if time_emb_dim is not None else None
        self.class_bias = nn.Embedding(num_classes, out_channels) if num_classes is not None else None
        same = in_channels == out_channels
        self.residual_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = AttentionBlock(out_channels, norm, num_groups) if use_attention else nn.Identity()

    def forward(self, x: Tensor, time_emb: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        h = self.conv_1(self.activation(self.norm_1(x)))
        if self.time_bias is not None:
            if time_emb is None:
                raise ValueError("time_emb is None: this block was built with time_emb_dim and needs it")
            h = h + self.time_bias(self.activation(time_emb))[:, :, None, None]
        if self.class_bias is not None:
            if y is None:
                raise ValueError("y is None: this block was built with num_classes and needs class labels")
            h = h + self.class_bias(y)[:, :, None, None]
        h = self.conv_2(self.activation(self.norm_2(h)))
        return self.attention(h + self.residual_connection(x))


class UNet(nn.Module):
    """The noise predictor of the original code: (x [N, C, H, W], time [N], y [N]) -> [N, C, H, W]."""

    def __init__(
        self,
        img_channels: int,
        base_channels: int,
        channel_mults: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int = 2,
        time_emb_dim: int | None = None,
        time_emb_scale: float = 1.0,
        num_classes: int | None = None,
        activation: Activation = F.relu,
        dropout: float = 0.1,
        attention_resolutions: Sequence[int] = (),
        norm: str | None = "gn",
        num_groups: int = 32,
        initial_pad: int = 0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.initial_pad = initial_pad
        self.num_classes = num_classes
        self.time_mlp = None
        if time_emb_dim is not None:
            self.time_mlp = nn.Sequential(
                PositionalEmbedding(base_channels, time_emb_scale),
                nn.Linear(base_channels, time_emb_dim),
                nn.SiLU(),
                nn.Linear(time_emb_dim, time_emb_dim),
            )
        self.init_conv = nn.Conv2d(img_channels, base_channels, 3, padding=1)
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()  # registered before mid, filled after it

        def block(in_channels: int, out_channels: int, attention: bool) -> ResidualBlock:
            return ResidualBlock(
                in_channels, out_channels, dropout, time_emb_dim, num_classes, activation, norm, num_groups, attention
            )

        skips = [base_channels]
        channels = base_channels
        for level, mult in enumerate(channel_mults):
            for _ in range(num_res_blocks):
                self.downs.append(block(channels, base_channels * mult, level in attention_resolutions))
                channels = base_channels * mult
                skips.append(channels)
            if level < len(channel_mults) - 1:
                self.downs.append(Downsample(channels))
                skips.append(channels)
        self.mid = nn.ModuleList([block(channels, channels, True), block(channels, channels, False)])
        for level, mult in reversed(list(enumerate(channel_mults))):
            for _ in range(num_res_blocks + 1):
                self.ups.append(block(skips.pop() + channels, base_channels * mult, level in attention_resolutions))
                channels = base_channels * mult
            if level > 0:
                self.ups.append(Upsample(channels))
        self.out_norm = get_norm(norm, base_channels, num_groups)
        self.out_conv = nn.Conv2d(base_channels, img_channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        p = self.initial_pad
        if p:
            x = F.pad(x, (p, p, p, p))
        time_emb = None
        if self.time_mlp is not None:
            if time is None:
                raise ValueError("time is None: this network was built with time_emb_dim and needs timesteps")
            time_emb = self.time_mlp(time)
        if self.num_classes is not None and y is None:
            raise ValueError("y is None: this network was built with num_classes and needs class labels")
        x = self.init_conv(x)
        skips = [x]
        for layer in self.downs:
            x = layer(x, time_emb, y)
            skips.append(x)
        for layer in self.mid:
            x = layer(x, time_emb, y)
        for layer in self.ups:
            if isinstance(layer, ResidualBlock):
                x = torch.cat((x, skips.pop()), dim=1)
            x = layer(x, time_emb, y)
        x = self.out_conv(self.activation(self.out_norm(x)))
        return x[:, :, p:-p, p:-p] if p else x
