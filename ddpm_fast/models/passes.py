"""One pass of a batch through the network: what its layers are told, and how each of them runs."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..ops import NoiseState
from .fusing import is_untouched, takes_noise_state
from .layers import Downsample, ResidualBlock, Upsample
from .sums import Sum


class Pass:
    """What all layers are told.

    Args:
        time_emb: [N, E], or None for a network without time.
        biases: of each residual block in turn what a chain computed from its steps, [C]; None to compute it now.
        y: [N] int64, the classes.
        noise_state: where dropout draws from.
        recompute: as of the network.
    """

    def __init__(
        self,
        time_emb: Tensor | None,
        biases: Sequence[Tensor] | None,
        y: Tensor | None,
        noise_state: NoiseState | None,
        recompute: str,
    ):
        self.time_emb, self.y, self.noise_state, self.recompute = time_emb, y, noise_state, recompute
        self.biases = None if biases is None else iter(biases)

    def through(self, layer: nn.Module, x: Sum, skip: Sum | None = None) -> Sum:
        """layer(x), with a skip as if concatenated; as modules are called wherever a layer was hooked or replaced."""
        if type(layer) is ResidualBlock:
            if self.biases is not None:
                return self._block(layer, next(self.biases), x, skip)
            if is_untouched(layer) and layer.is_fusible():
                return self._block(layer, layer.bias(x.x.shape[0], self.time_emb), x, skip)
        if type(layer) in (Downsample, Upsample) and is_untouched(layer):
            return cast(Downsample | Upsample, layer).summed(x)
        h = (x if skip is None else x.joined(skip)).tensor()
        x.moments = None  # it may write into what it is given, which may be a skip, too
        # Only residual blocks know of a noise state, unless they were replaced or wrapped.
        more: dict[str, Any] = {}
        if self.noise_state is not None and takes_noise_state(layer):
            more["noise_state"] = self.noise_state
        return Sum(layer(h, self.time_emb, self.y, **more), later=x.later)

    def _block(self, layer: ResidualBlock, bias: Tensor, x: Sum, skip: Sum | None) -> Sum:
        if self.recompute == "block":
            return layer.recomputed(x, bias, self.y, self.noise_state, skip)
        return layer.summed(x, bias, self.y, self.noise_state, skip, self.recompute == "none")
