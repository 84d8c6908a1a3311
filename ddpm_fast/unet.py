"""The names of the original code's `unet` module."""

from .models.layers import AttentionBlock, Downsample, PositionalEmbedding, ResidualBlock, Upsample, get_norm
from .models.unet import UNet

__all__ = ["AttentionBlock", "Downsample", "PositionalEmbedding", "ResidualBlock", "UNet", "Upsample", "get_norm"]
