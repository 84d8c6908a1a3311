"""Attention of one head."""

from typing import Any

import torch
from torch import Tensor

from ..reference import attention as reference
from . import _checks, _native
from ._dispatch import Impl, Op, forced
from ._library import composition

_NODE = composition("attention(Tensor q, Tensor k, Tensor v) -> Tensor", reference.attention)


def _native_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float32, device="cpu")
    q, k, v = (t if t.shape[2] == 1 or t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    _native.kernel("attention")(q, k, v, out, q.shape[2] ** -0.5, _native.threads())
    return out


def _load_native() -> Any:
    _native.load()
    return _native_attention


def rejects(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the native module doesn't take these arguments."""
    reason = _native.unfit_arrays(q, k, v, dtypes=(torch.float32,)) or _native.unfit(q, k, v)
    if reason is None and torch.is_autocast_enabled("cpu"):
        return "computes in float32, autocast asks for less"
    if reason is None and forced() is None and _native.load().isa() == "baseline":
        return "has vectors of four numbers here, no faster than the library's"
    return reason


def _check(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    _checks.tensor("q", q, ndim=3)
    for name, t in (("k", k), ("v", v)):
        _checks.tensor(name, t, shape=tuple(q.shape), dtype=q.dtype, device=q.device)
    if 0 in q.shape[1:]:
        raise ValueError(f"q must have tokens and channels, got {_checks.text(q)}")
    return q, k, v


OP = Op(
    "attention",
    Impl("native", _load_native, rejects),
    Impl("reference", lambda: reference.attention),
    check=_check,
    traced=_NODE,
)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T C^-0.5) v of one head (Vaswani et al. 2017, equation 1).

    Args:
        q, k, v: [N, S, C] queries, keys and values of S tokens.

    Returns:
        [N, S, C].

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, dtype or device.
    """
    out: Tensor = OP(q, k, v)
    return out
