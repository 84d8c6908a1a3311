"""How well a model explains images: the variational bound in bits per dimension."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion import Diffusion
from ..ops import NoiseState
from ..ops import _checks as checks
from ..progress import progress_bar
from ..samplers.ddpm import VARIANCES
from ..variational import Posterior, log_variance_bounds, prior_term, reverse_term


class BitsPerDimension(NamedTuple):
    """Of N images, on the CPU."""

    total: Tensor  # [N] the bound: prior and all terms
    prior: Tensor  # [N] of x_T, nothing that training changes
    terms: Tensor  # [N, T] of the reverse step at each timestep


@torch.no_grad()
def bits_per_dimension(
    diffusion: Diffusion,
    x: Tensor,
    y: Tensor | None = None,
    *,
    cond: Tensor | None = None,
    use_ema: bool = True,
    variance: str | None = None,
    clip: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> BitsPerDimension:
    """An upper bound of -log2 p(x) / dimensions (Ho et al. 2020, equation 5; Nichol & Dhariwal 2021, section 3).

    The network is called T times for each image, with one draw of noise each: means over many images are what counts.

    Args:
        diffusion: whose network is told timesteps.
        x: [N, C, H, W], images of bytes, k / 127.5 - 1.
        y, cond: as in training.
        use_ema: of `ema_model`, else of `model`.
        variance: of the reverse steps: "posterior", "beta" or "learned"; by default "learned" where it is, else
            "beta", as for sampling.
        clip: bound x0_hat to [-1, 1].
        seed: of the noise; an image's depends on its place in x.
        batch_size: images at a time.
        progress: show a progress bar.

    Raises:
        ValueError, TypeError: an argument is out of range or does not fit.
    """
    checks.tensor("x", x)
    if x.ndim == 0 or not x.shape[0]:
        raise ValueError(f"x must hold images, got {checks.text(x)}")
    bytes_ = x * 127.5 + 127.5
    if not ((bytes_ - bytes_.round()).abs() < 1e-3).all():
        raise ValueError("x must be images of bytes, k / 127.5 - 1: ((x + 1) * 127.5).round() / 127.5 - 1 makes them")
    batch_size = checks.integer("batch_size", batch_size, 1)
    variance = ("learned" if diffusion.learned_variance else "beta") if variance is None else variance
    checks.choice("variance", variance, tuple(VARIANCES))
    if variance == "learned" and not diffusion.learned_variance:
        raise ValueError("variance 'learned' needs a Diffusion made with learned_variance=True")
    if diffusion.time_input != "timestep":
        raise ValueError("the bound is of integer timesteps: this network is told noise levels")
    abar, steps, total = diffusion.exact_alphas_cumprod(), diffusion.num_timesteps, x.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    low, high = (torch.from_numpy(v).to(x.device, dtype) for v in log_variance_bounds(abar))
    posterior = Posterior.of(abar, x.device, dtype)
    terms: list[Tensor] = []
    with progress_bar(total * steps, "bound, images x timesteps", disable=not progress) as bar:
        for first in range(0, total, batch_size):
            part = slice(first, min(first + batch_size, total))
            x_0, y_0, cond_0 = x[part], None if y is None else y[part], None if cond is None else cond[part]
            row = []
            for k in range(steps):
                t = torch.full((x_0.shape[0],), k, device=x.device)
                x_t = diffusion.perturb_x(x_0, t, NoiseState.at(seed, k, first, x.device))
                x0_hat, v = diffusion.pred_x_start(x_t, t, y_0, use_ema, cond=cond_0)
                if variance == "learned" and v is not None:
                    log_variance = diffusion.log_variance(t, v.clamp(-1, 1))
                else:
                    log_variance = (low if variance == "posterior" else high)[t]
                row.append(reverse_term(x_0, t, x0_hat.clamp(-1, 1) if clip else x0_hat, log_variance, posterior))
                bar.update(x_0.shape[0])
            terms.append(torch.stack(row, dim=1).cpu())
    prior, each = prior_term(x, float(abar[-1])).cpu(), torch.cat(terms)
    return BitsPerDimension(prior + each.sum(1), prior, each)
