"""The original DDPM formulation, plainly: an eager UNet and a loop with a host-made ``t`` and three gathers a step.

The peer to measure against, and an independent oracle of the tests: it carries the parameter names, the order of
creation and the order of random draws of the original code, so it loads the same checkpoints and repeats the same
numbers under a seed. Ho et al., "Denoising Diffusion Probabilistic Models" (2020).
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original_unet import AttentionBlock, Downsample, ResidualBlock, UNet, Upsample

__all__ = ["AttentionBlock", "Diffusion", "Downsample", "ResidualBlock", "UNet", "Upsample", "extract"]


def extract(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Gather ``a[t]`` and shape it to broadcast against [N, ...]."""
    return a.gather(-1, t).reshape(-1, *([1] * (len(x_shape) - 1)))


class Diffusion(nn.Module):
    """Training loss, EMA and ancestral sampling around a noise predictor, as the original does them.

    ``betas``: float64 array [T]. The tables are computed in float64 and kept in float32.
    """

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    reciprocal_sqrt_alphas: Tensor
    remove_noise_coeff: Tensor
    sigma: Tensor

    def __init__(
        self,
        model: nn.Module,
        img_size: Sequence[int],
        img_channels: int,
        num_classes: int | None,
        betas: np.ndarray,
        loss_type: str = "l2",
        ema_decay: float = 0.9999,
        ema_start: int = 5000,
        ema_update_rate: int = 1,
    ) -> None:
        super().__init__()
        if loss_type not in ("l1", "l2"):
            raise ValueError(f"loss_type={loss_type!r}: expected 'l1' or 'l2'")
        self.model = model
        self.ema_model = copy.deepcopy(model)
        self.img_size, self.img_channels, self.num_classes = tuple(img_size), img_channels, num_classes
        self.loss_type, self.num_timesteps = loss_type, len(betas)
        self.ema_decay, self.ema_start, self.ema_update_rate, self.step = ema_decay, ema_start, ema_update_rate, 0
        alphas = 1.0 - betas
        alphas_cumprod = np.cumprod(alphas)
        tables = {
            "betas": betas,
            "alphas": alphas,
            "alphas_cumprod": alphas_cumprod,
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
            "reciprocal_sqrt_alphas": np.sqrt(1 / alphas),
            "remove_noise_coeff": betas / np.sqrt(1 - alphas_cumprod),
            "sigma": np.sqrt(betas),
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32))

    def update_ema(self) -> None:
        """Copy the weights until ``ema_start``, then average them (parameters only, new storage every time)."""
        self.step += 1
        if self.step % self.ema_update_rate:
            return
        if self.step < self.ema_start:
            self.ema_model.load_state_dict(self.model.state_dict())
            return
        for old, new in zip(self.ema_model.parameters(), self.model.parameters(), strict=True):
            old.data = old.data * self.ema_decay + (1 - self.ema_decay) * new.data

    @torch.no_grad()
    def remove_noise(self, x: Tensor, t: Tensor, y: Tensor | None, use_ema: bool = True) -> Tensor:
        """Return the mean of the reverse step from ``x`` [N, C, H, W] at ``t`` [N]."""
        eps = (self.ema_model if use_ema else self.model)(x, t, y)
        x = x - extract(self.remove_noise_coeff, t, x.shape) * eps
        return x * extract(self.reciprocal_sqrt_alphas, t, x.shape)

    @torch.no_grad()
    def sample_diffusion_sequence(
        self, batch_size: int, device: torch.device | str, y: Tensor | None = None, use_ema: bool = True
    ) -> list[Tensor]:
        """Return the T+1 states of a sampling run on the CPU, x_T first."""
        x = torch.randn(batch_size, self.img_channels, *self.img_size, device=device)
        sequence = [x.cpu()]
        for step in reversed(range(self.num_timesteps)):
            x = self._reverse_step(x, step, y, use_ema)
            sequence.append(x.cpu())
        return sequence

    @torch.no_grad()
    def sample(
        self, batch_size: int, device: torch.device | str, y: Tensor | None = None, use_ema: bool = True
    ) -> Tensor:
        """Return ``batch_size`` samples [N, C, H, W] on the CPU, unclipped."""
        x = torch.randn(batch_size, self.img_channels, *self.img_size, device=device)
        for step in reversed(range(self.num_timesteps)):
            x = self._reverse_step(x, step, y, use_ema)
        return x.cpu()

    def _reverse_step(self, x: Tensor, step: int, y: Tensor | None, use_ema: bool) -> Tensor:
        t = torch.tensor([step], device=x.device).repeat(len(x))
        x = self.remove_noise(x, t, y, use_ema)
        return x + extract(self.sigma, t, x.shape) * torch.randn_like(x) if step > 0 else x

    def perturb_x(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t from q(x_t | x) with the given noise."""
        return (
            extract(self.sqrt_alphas_cumprod, t, x.shape) * x
            + extract(self.sqrt_one_minus_alphas_cumprod, t, x.shape) * noise
        )

    def get_losses(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean l1 or l2 distance between the drawn noise and its prediction."""
        noise = torch.randn_like(x)
        estimate = self.model(self.perturb_x(x, t, noise), t, y)
        return F.l1_loss(estimate, noise) if self.loss_type == "l1" else F.mse_loss(estimate, noise)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        t = torch.randint(0, self.num_timesteps, (len(x),), device=x.device)
        return self.get_losses(x, t, y)
