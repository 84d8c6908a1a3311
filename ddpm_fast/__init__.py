"""Training and sampling of denoising diffusion models, fast: a drop-in for the original DDPM code in PyTorch."""

from .diffusion import Diffusion, GaussianDiffusion
from .models.ema import EMA
from .models.layers import AttentionBlock, Downsample, PositionalEmbedding, ResidualBlock, Upsample, get_norm
from .models.presets import Config, preset
from .models.unet import UNet
from .ops import use_backend
from .samplers import Plan
from .schedules import generate_cosine_schedule, generate_linear_schedule

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "AttentionBlock",
    "Config",
    "Diffusion",
    "Downsample",
    "GaussianDiffusion",
    "Plan",
    "PositionalEmbedding",
    "ResidualBlock",
    "UNet",
    "Upsample",
    "generate_cosine_schedule",
    "generate_linear_schedule",
    "get_norm",
    "preset",
    "use_backend",
]
