"""One step of any sampler, read from one row of its plan (docs/sampling.md)."""

import torch
from torch import Tensor

from .noise import drawn
from .philox import REVERSE, NoiseState


def sampler_step(
    x: Tensor,  # [N, ...]
    model_out: Tensor,  # [N, ...]
    rows: Tensor,  # [S, 8]: t, c_in, p_x, p_m, c_x, c_0, c_h, c_z
    k: Tensor,  # [] int64, the row
    *,
    noise: Tensor | NoiseState | None = None,
    hist: Tensor | None = None,  # [N, ...], x0_hat of the row before
    clip: float | None = None,
    return_x0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x' = c_x x + c_0 x0_hat + c_h hist + c_z z with x0_hat = clip(p_x x + p_m model_out)."""
    # index_select and not rows[k]: indexing by a scalar tensor would read it on the host.
    _, _, p_x, p_m, c_x, c_0, c_h, c_z = rows.to(x.dtype).index_select(0, k.reshape(1))[0].unbind()
    x0_hat = p_x * x + p_m * model_out.to(x.dtype)
    if clip is not None and clip <= torch.finfo(x.dtype).max:  # torch refuses a bound that x could not hold
        x0_hat = torch.clamp(x0_hat, -clip, clip)
    x_next = c_x * x + c_0 * x0_hat
    if hist is not None:
        x_next = x_next + c_h * hist
    if noise is not None:
        x_next = x_next + c_z * drawn(noise, x, REVERSE)
    x_next = x_next.to(x.dtype)  # hist and noise may be wider
    return (x_next, x0_hat) if return_x0 else x_next
