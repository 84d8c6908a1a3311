"""Sinusoidal embedding of the timestep."""

from torch import Tensor

from ..reference import timestep_embedding as reference
from . import _checks
from ._dispatch import Impl, Op
from ._library import composition

_NODE = composition("timestep_embedding(Tensor t, int dim, float scale=1.0) -> Tensor", reference.timestep_embedding)
OP = Op("timestep_embedding", Impl("reference", lambda: reference.timestep_embedding), traced=_NODE)


def timestep_embedding(t: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """Sines, then cosines, of scale * t * 10000^(-i / half) for i < half = dim / 2 (Vaswani et al. 2017, section 3.5).

    Args:
        t: [N], integer or floating point.
        dim: size of the embedding, even.
        scale: factor on t.

    Returns:
        [N, dim], float32 (float64 for float64 t).

    Raises:
        ValueError, TypeError: `t` is no vector, or `dim` is not a positive even number.
    """
    if not isinstance(t, Tensor) or t.is_complex():
        raise TypeError(f"t must be a tensor of numbers, got {_checks.text(t)}")
    if t.ndim != 1:
        raise ValueError(f"t must have shape [N], got {_checks.text(t)}: one timestep per image")
    dim, scale = _checks.integer("dim", dim, 2), _checks.number("scale", scale)
    if dim % 2:
        raise ValueError(f"dim must be a positive even number, got {dim}: {dim + 1} would work")
    return OP(t, dim, scale)
