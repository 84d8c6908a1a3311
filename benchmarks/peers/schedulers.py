"""diffusers' schedulers under their own settings, over a network of ours."""

import importlib
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import Diffusion, ops
from ddpm_fast.engine import eval_mode

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# By our sampler's name.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "ancestral_euler": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


@torch.no_grad()
def draw(diffusion: Diffusion, y: Tensor | None, name: str, num_steps: int, seed: int, first: int, size: int) -> Tensor:
    """Return images [size, C, H, W] of the scheduler that is like our sampler, from the x_T that ours starts from.

    Raises:
        ImportError: diffusers is not installed.
    """
    kind, options = SCHEDULERS[name]
    scheduler = getattr(importlib.import_module("diffusers"), kind)(
        num_train_timesteps=diffusion.num_timesteps,
        trained_betas=diffusion.betas.cpu().numpy(),
        prediction_type=PREDICTION_TYPES[diffusion.prediction],
        **options,
    )
    scheduler.set_timesteps(num_steps, device=diffusion.betas.device)
    shape, device = (size, diffusion.img_channels, *diffusion.img_size), diffusion.betas.device
    x = ops.noise(shape, ops.NoiseState.at(seed, 0, first, device), ops.X_T) * scheduler.init_noise_sigma
    generator = torch.Generator(device).manual_seed(seed * 2**20 + first)
    takes_generator = kind != "HeunDiscreteScheduler"
    with eval_mode(diffusion.ema_model) as model:
        for t in scheduler.timesteps:
            out = model(scheduler.scale_model_input(x, t), t.expand(size), y)
            x = scheduler.step(out, t, x, **({"generator": generator} if takes_generator else {})).prev_sample
    return x
