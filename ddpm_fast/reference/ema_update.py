"""The exponential moving average of weights (Ho et al. 2020, appendix B; Polyak and Juditsky 1992)."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """average = decay average + (1 - decay) value, in place, for each pair of tensors of one shape."""
    if averages:
        new = [v if v.dtype == a.dtype else v.to(a.dtype) for a, v in zip(averages, values, strict=True)]
        torch._foreach_lerp_(list(averages), new, 1 - decay)
