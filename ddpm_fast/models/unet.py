"""The UNet of the original DDPM code (Ho et al. 2020, appendix B)."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import _C, Tensor, nn

from ..ops import DROPOUT, NoiseState
from ..ops import _checks as checks
from ..ops._dispatch import forced
from ..reference.philox import MAX_STREAM
from .fusing import TakesNoiseState, is_known_throughout, is_untouched, remember
from .inputs import Switch, check_input, check_labels, check_size
from .layers import LAYERS, Downsample, PositionalEmbedding, ResidualBlock, Upsample
from .made import plain_path
from .norms import Activation, checked_activation, get_norm, is_known
from .passes import Pass
from .recomputing import RECOMPUTE
from .sums import Sum


class UNet(TakesNoiseState):
    """Predicts, for a noisy image, its timestep and class, what Diffusion trains it to: the noise, x_start or v.

    Args:
        img_channels: channels of the image.
        base_channels: channels of the first level.
        channel_mults: channels of each level as a multiple of `base_channels`; every further level halves the size.
        num_res_blocks: residual blocks a level.
        time_emb_dim: size of the time embedding; None for a network without time.
        time_emb_scale: factor on the timestep before its embedding.
        num_classes: number of classes; None for an unconditional network.
        activation: any callable; relu, silu and mish run inside the norm.
        dropout: probability, in each residual block.
        attention_resolutions: indices of the levels (0 = full size) whose blocks have attention.
        norm: "gn" (group), "in" (instance), "bn" (batch) or None.
        num_groups: groups of "gn".
        initial_pad: pixels of zero padding on every side, cropped again at the end.
        out_channels: channels of the result, `img_channels` by default: twice as many with a learned variance, fewer
            where the network is also given an image condition.
        recompute: what the backward computes again instead of keeping it: "none", "norm" (what goes into the residual
            blocks' convolutions), or "block" (all inside of residual blocks). Also an attribute, to be set at any time.
        fused: None for what pays (docs/fused.md): sums left to their readers on GPUs, and weights that chains prepare
            everywhere; True for both on CPUs, too; False for the plain path, layer by layer. An attribute, too.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
    """

    recompute = Switch(*RECOMPUTE)
    fused = Switch(None, True, False)

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
        *,
        out_channels: int | None = None,
        recompute: str = "none",
        fused: bool | None = None,
    ):
        super().__init__()
        self.recompute, self.fused = recompute, fused
        self.img_channels = img_channels = checks.integer("img_channels", img_channels, 1)
        self.out_channels = img_channels if out_channels is None else checks.integer("out_channels", out_channels, 1)
        base_channels = checks.integer("base_channels", base_channels, 1)
        channel_mults = checks.integers("channel_mults", channel_mults, 1)
        if not channel_mults:
            raise ValueError("channel_mults must hold a positive integer a level, got none")
        num_res_blocks = checks.integer("num_res_blocks", num_res_blocks, 0)
        self.num_classes = None if num_classes is None else checks.integer("num_classes", num_classes, 1)
        self.activation = checked_activation(activation)
        self.initial_pad = checks.integer("initial_pad", initial_pad, 0)
        attention_resolutions = checks.integers("attention_resolutions", attention_resolutions)
        if any(not 0 <= level < len(channel_mults) for level in attention_resolutions):
            warnings.warn(
                f"attention_resolutions are indices of levels, 0 to {len(channel_mults) - 1} here, and not sizes: of "
                f"{attention_resolutions} those outside have no effect",
                stacklevel=2,
            )
        time_emb_dim = None if time_emb_dim is None else checks.integer("time_emb_dim", time_emb_dim, 1)
        if time_emb_dim is not None and base_channels % 2:
            raise ValueError(f"base_channels must be even for the time embedding, got {base_channels}")
        self.multiple = 2 ** (len(channel_mults) - 1)

        def block(in_channels: int, out_channels: int, use_attention: bool) -> ResidualBlock:
            return ResidualBlock(
                in_channels,
                out_channels,
                dropout,
                time_emb_dim=time_emb_dim,
                num_classes=num_classes,
                activation=activation,
                norm=norm,
                num_groups=num_groups,
                use_attention=use_attention,
            )

        # Old checkpoints fix the order of registration (downs, ups, mid), old seeds that of creation (downs, mid, ups).
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
        self.ups = nn.ModuleList()

        skips, now = [base_channels], base_channels
        for level, mult in enumerate(channel_mults):
            for _ in range(num_res_blocks):
                self.downs.append(block(now, base_channels * mult, level in attention_resolutions))
                now = base_channels * mult
                skips.append(now)
            if level < len(channel_mults) - 1:
                self.downs.append(Downsample(now))
                skips.append(now)
        self.mid = nn.ModuleList([block(now, now, True), block(now, now, False)])
        for level, mult in reversed(list(enumerate(channel_mults))):
            for _ in range(num_res_blocks + 1):
                self.ups.append(block(skips.pop() + now, base_channels * mult, level in attention_resolutions))
                now = base_channels * mult
            if level > 0:
                self.ups.append(Upsample(now))
        self.out_norm = get_norm(norm, now, num_groups)
        self.out_conv = nn.Conv2d(now, self.out_channels, 3, padding=1)

        self._ups_take_skip = [isinstance(layer, ResidualBlock) for layer in self.ups]
        blocks = [m for m in self._layers() if isinstance(m, ResidualBlock)]
        if dropout > 0 and len(blocks) > MAX_STREAM - DROPOUT + 1:
            raise ValueError(f"at most {MAX_STREAM - DROPOUT + 1} residual blocks can draw dropout, got {len(blocks)}")
        for k, b in enumerate(blocks):
            b.dropout_stream = DROPOUT + k

    def forward(
        self, x: Tensor, time: Tensor | None = None, y: Tensor | None = None, noise_state: NoiseState | None = None
    ) -> Tensor:
        """
        Args:
            x: [N, img_channels, H, W].
            time: [N], the timesteps (or another conditioning number); or [1, E], a row of `embed_steps` for all images.
            y: [N] int64, the classes.
            noise_state: where dropout draws its masks from; None for torch's generator.

        Returns:
            [N, out_channels, H, W].

        Raises:
            ValueError, TypeError: a size that cannot be halved often enough; a wrong shape; bad `time` or `y`.
        """
        self._check(x, time, y)
        eager = not torch.compiler.is_compiling()
        with plain_path() if eager and self.fused is False else nullcontext():
            return self._forward(x, time, y, noise_state, eager)

    def _forward(
        self, x: Tensor, time: Tensor | None, y: Tensor | None, noise_state: NoiseState | None, eager: bool
    ) -> Tensor:
        # Transforms of torch.func know no layouts.
        known = not eager or _C._functorch.maybe_current_level() is None
        nchw, later = known and x.is_contiguous(), eager and known and self._adds_later(x)
        last = known and (x.is_cpu or later)  # where channels_last is faster
        recompute = self.recompute if eager and known and torch.is_grad_enabled() else "none"
        if self.initial_pad:
            x = F.pad(x, (self.initial_pad,) * 4)
        if self.time_mlp is None or cast(Tensor, time).ndim == 1:
            now = Pass(time if self.time_mlp is None else self.time_mlp(time), None, y, noise_state, recompute)
        else:
            now = Pass(time, cast(Tensor, time)[0].split(self._bias_sizes()), y, noise_state, recompute)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        h = Sum(x, later=later).convolved(x, self.init_conv)
        if last:  # an image of one channel doesn't show its layout
            h.x = h.x.contiguous(memory_format=torch.channels_last)
        skips = [h]
        for layer in self.downs:
            h = now.through(layer, h)
            skips.append(h)
        for layer in self.mid:
            h = now.through(layer, h)
        for layer, takes_skip in zip(self.ups, self._ups_take_skip, strict=True):
            h = now.through(layer, h, skips.pop() if takes_skip else None)
        x = h.convolved(h.normed(self.out_norm, self.activation), self.out_conv).tensor()
        if nchw:  # as it came
            x = x.contiguous()
        p = self.initial_pad
        return x[:, :, p : x.shape[2] - p, p : x.shape[3] - p] if p else x

    def _adds_later(self, x: Tensor) -> bool:
        """Whether sums are left to their readers."""
        return self.fused is True or self.fused is None and x.is_cuda and forced() != "reference"

    def embed_steps(self, t: Tensor) -> Tensor | None:
        """All that this network computes from timesteps alone, so that a sampler does it once for all of its steps.

        Args:
            t: [S], what `forward` would be told of each step.

        Returns:
            [S, E], of which `forward` takes a row [1, E] in place of the time; or None where a module was replaced or
            hooked, and must see the time itself.
        """
        mlp, layers = self.time_mlp, self._layers()
        if mlp is None or type(self).forward is not UNet.forward or not is_untouched(*self.modules()):
            return None
        if [type(m) for m in (mlp, *mlp)] != [nn.Sequential, PositionalEmbedding, nn.Linear, nn.SiLU, nn.Linear]:
            return None
        blocks = [m for m in layers if type(m) is ResidualBlock]
        if any(type(m) not in (ResidualBlock, Downsample, Upsample) for m in layers):
            return None
        if not all(b.is_fusible() and type(b.time_bias) is nn.Linear for b in blocks):
            return None
        time_emb = mlp(t)
        return torch.cat([b.embed(time_emb) for b in blocks], dim=1)

    def does_the_same_each_time(self) -> bool:
        """Whether each call does the same to its arguments and to weights: all in it is known, and nothing is drawn."""
        activations = [m.activation for m in self.modules() if isinstance(m, (UNet, ResidualBlock))]
        return all(map(is_known, activations)) and is_known_throughout(self, UNet, *LAYERS)

    def _layers(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [*self.downs, *self.mid, *self.ups]

    def _bias_sizes(self) -> list[int]:
        """Channels of each residual block in a row of `embed_steps`."""
        return [m.out_channels for m in self._layers() if isinstance(m, ResidualBlock)]

    def _check(self, x: Tensor, time: Tensor | None, y: Tensor | None) -> None:
        check_input(x, self.img_channels)
        dtype = next(self.parameters()).dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must have the dtype of the network, {dtype}; got {checks.text(x)}")
        check_size("x", x.shape[2], x.shape[3], self.multiple, self.initial_pad)
        if self.time_mlp is not None:
            if time is None:
                raise ValueError("time is required: this network was built with time_emb_dim")
            embedded = isinstance(time, Tensor) and time.ndim == 2 and time.shape == (1, sum(self._bias_sizes()))
            if not embedded and (not isinstance(time, Tensor) or time.shape != x.shape[:1]):
                raise ValueError(f"time must have shape [{x.shape[0]}], got {checks.text(time)}")
            if time.is_complex():
                raise TypeError(f"time must hold real numbers, got {checks.text(time)}")
        if self.num_classes is not None:
            if y is None:
                raise ValueError(f"y is required: this network was built with num_classes={self.num_classes}")
            check_labels(y, x.shape[0])

    def tells_noise_levels_apart(self) -> bool:
        """Whether its embedding is made for numbers in [0, 1]."""
        embedding = None if self.time_mlp is None else self.time_mlp[0]
        return not isinstance(embedding, PositionalEmbedding) or embedding.scale >= 100

    def check_data(
        self, img_size: Sequence[int], img_channels: int, out_channels: int | None = None, cond_channels: int = 0
    ) -> None:
        """Raise ValueError unless this network takes such images, with their condition, and returns what is wanted."""
        if img_channels + cond_channels != self.img_channels:
            more = f" and cond_channels {cond_channels}" if cond_channels else ""
            advice = f"build it with img_channels={img_channels + cond_channels}" if more else "give both one value"
            raise ValueError(
                f"img_channels is {img_channels}{more}, but the UNet was built with img_channels={self.img_channels}: "
                f"{advice}"
            )
        expected = img_channels if out_channels is None else out_channels
        if expected != self.out_channels:
            raise ValueError(
                f"the UNet returns {self.out_channels} channels, expected {expected}: build it with "
                f"out_channels={expected}"
            )
        if len(img_size) != 2:
            raise ValueError(f"img_size must be (height, width) for a UNet, got {tuple(img_size)}")
        check_size("img_size", img_size[0], img_size[1], self.multiple, self.initial_pad)


remember(UNet)
