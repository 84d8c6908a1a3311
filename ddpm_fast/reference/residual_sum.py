"""The sum at the end of a residual block whose convolution ran without its bias."""

from torch import Tensor


def residual_sum(
    x: Tensor,  # [N, C, H, W]
    residual: Tensor | None,  # [N, C, H, W]
    bias: Tensor | None = None,  # [C]
) -> Tensor:  # [N, C, H, W]
    """x + residual + bias, of the dtype of x + residual whatever the bias has."""
    y = x if residual is None else x + residual
    return y if bias is None else (y + bias[:, None, None]).to(y.dtype)
