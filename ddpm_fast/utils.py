"""The names of the original code's `utils` module; nothing else belongs here."""

from .ops import extract

__all__ = ["extract"]
