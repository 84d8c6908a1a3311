"""The names of the original code's `ema` module."""

from .models.ema import EMA

__all__ = ["EMA"]
