"""What a call of group_norm_silu gives the kernels of a GPU, Triton's and CUDA's."""

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors of a call; x, x2 and the rest laid out as `image` takes them, parameters contiguous."""

    x: Tensor
    x2: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    add: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    groups: int
    activation: str
    dropout: tuple[Tensor, Tensor, int, int, int, float] | None  # seed, draw, first sample, stream, threshold, factor

    @property
    def channels(self) -> int:
        return self.x.shape[1] + (0 if self.x2 is None else self.x2.shape[1])

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What a configuration depends on: images, rounded up to a power of two, pixels, channels, groups."""
        images, _, height, width = self.x.shape
        return 1 << (images - 1).bit_length(), height * width, self.channels, self.groups
