"""Training and sampling of denoising diffusion models, fast: a drop-in for the original DDPM code in PyTorch."""

try:
    from .corrections import classifier_guidance, dynamic_threshold
    from .diffusion import Diffusion, GaussianDiffusion
    from .functional import sample
    from .models.ema import EMA
    from .models.layers import AttentionBlock, Downsample, PositionalEmbedding, ResidualBlock, Upsample, get_norm
    from .models.presets import Config, preset
    from .models.unet import UNet
    from .ops import use_backend
    from .samplers import Plan, make_plan
    from .schedules import generate_cosine_schedule, generate_linear_schedule
    from .training.step import TrainStep
except KeyboardInterrupt:  # while PyTorch is loading; the command line then ends without a traceback
    import os
    import sys

    if os.path.basename(sys.argv[0]) in ("-m", "ddpm-fast", "ddpm-fast.exe"):  # python -m is "-m" until it has imported
        sys.exit(130)
    raise

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
    "TrainStep",
    "UNet",
    "Upsample",
    "classifier_guidance",
    "dynamic_threshold",
    "generate_cosine_schedule",
    "generate_linear_schedule",
    "get_norm",
    "make_plan",
    "preset",
    "sample",
    "use_backend",
]
