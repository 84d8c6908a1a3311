"""One step of any sampler, read from one row of its plan (docs/sampling.md)."""

import torch
from torch import Tensor

from .noise import drawn
from .philox import REVERSE, NoiseState


def sampler_step(
    x: Tensor,  # [N, ...]
    model_out: Tensor,  # [N, ...]
    rows: Tensor,  # [S, 8 or 9]: t, c_in, p_x, p_m, c_x, c_0, c_h, c_z, c_v
    k: Tensor,  # [] int64, the row
    *,
    noise: Tensor | NoiseState | None = None,
    hist: Tensor | None = None,  # [N, ...], x0_hat of the row before
    variance: Tensor | None = None,  # [N, ...], v of the network: where the log variance lies between its bounds
    clip: float | None = None,
    return_x0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x' = c_x x + c_0 x0_hat + c_h hist + c_z exp(c_v v) z with x0_hat = clip(p_x x + p_m model_out).

    v in [-1, 1] interpolates the log variance of the reverse step between its bounds (Nichol & Dhariwal 2021,
    equation 15, whose v is (v + 1) / 2): c_z is the geometric mean of their deviations, c_v half the log of the ratio.
    """
    # index_select and not rows[k]: indexing by a scalar tensor would read it on the host.
    row = rows.to(x.dtype).index_select(0, k.reshape(1))[0]
    _, _, p_x, p_m, c_x, c_0, c_h, c_z = row[:8].unbind()
    x0_hat = p_x * x + p_m * model_out.to(x.dtype)
    if clip is not None and clip <= torch.finfo(x.dtype).max:  # torch refuses a bound that x could not hold
        x0_hat = torch.clamp(x0_hat, -clip, clip)
    x_next = c_x * x + c_0 * x0_hat
    if hist is not None:
        x_next = x_next + c_h * hist
    if noise is not None:
        z = drawn(noise, x, REVERSE)
        if variance is not None:
            z = torch.exp(row[8] * variance.to(x.dtype)) * z
        x_next = x_next + c_z * z
    x_next = x_next.to(x.dtype)  # hist and noise may be wider
    return (x_next, x0_hat) if return_x0 else x_next
