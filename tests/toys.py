"""Small diffusions and files that tests share."""

import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_fast import Config, Diffusion, UNet, generate_linear_schedule
from ddpm_fast.samplers.steps import sigma_of

# For training that takes a second.
TINY = Config(
    img_size=(8, 8),
    img_channels=1,
    num_classes=5,
    base_channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    time_emb_dim=16,
    num_groups=4,
    dropout=0.1,
    num_timesteps=20,
    schedule="cosine",
    ema_decay=0.9,
    ema_start=3,
)
BETAS = generate_linear_schedule(12, 1e-2, 0.3)


def condition(y: Tensor) -> Tensor:
    """A number for each image, [N]: its class, or the sum of whatever else it is given."""
    return y if y.ndim == 1 else y.flatten(1).sum(1)


class Pixelwise(nn.Module):
    """A network whose result for an image depends on that image alone, bit for bit, in any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.times.append(t)
        shape = (-1, *[1] * (x.ndim - 1))
        shift = 0 if y is None else condition(y).view(shape) * 0.01
        return self.gain * x + 0.001 * t.view(shape) + shift


def pixelwise(size: tuple[int, ...] = (5, 7), **options: Any) -> Diffusion:
    return Diffusion(Pixelwise(), size, 2, None, BETAS, **options)


def small(num_classes: int | None = None, **options: Any) -> Diffusion:
    torch.manual_seed(0)
    net = UNet(1, 8, (1, 2), 1, time_emb_dim=8, num_classes=num_classes, num_groups=4, dropout=0.2)
    return Diffusion(net, (8, 8), 1, num_classes, BETAS, **options)


class NormalData:
    """Data N(0.3, 0.5^2): the best x0_hat is known, and so is where the probability flow ends."""

    mean, deviation = 0.3, 0.5

    def __init__(self, abar: np.ndarray):
        self.sigma = sigma_of(abar)

    def x0_hat(self, x: Tensor, t: Tensor) -> Tensor:
        """For x [N, ...] at real timesteps t [N]."""
        log_sigma = np.interp(t.double().numpy(), np.arange(len(self.sigma)), np.log(self.sigma))
        s2 = torch.from_numpy(np.exp(2 * log_sigma)).view(-1, *[1] * (x.ndim - 1))
        return (self.deviation**2 * x * (1 + s2).sqrt() + s2 * self.mean) / (self.deviation**2 + s2)

    def flow(self, x_T: Tensor) -> Tensor:
        """x at timestep 0, for x_T at the last one."""
        high, low = self.sigma[[-1, 0]]
        shrunk = np.sqrt((self.deviation**2 + low**2) / (self.deviation**2 + high**2))
        return (self.mean + (x_T * np.sqrt(1 + high**2) - self.mean) * shrunk) / np.sqrt(1 + low**2)


def idx_bytes(array: np.ndarray) -> bytes:
    """A file of MNIST's format."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
