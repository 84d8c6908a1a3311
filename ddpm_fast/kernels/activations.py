"""Activations and their derivatives in Triton, for float32."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return z / (1.0 + tl.exp2(z * -LOG2_E))
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # NaN stays
    elif ACTIVATION == "mish":
        e = tl.exp2(tl.minimum(z, 30.0, propagate_nan=tl.PropagateNan.ALL) * LOG2_E)
        u = e * (e + 2.0)
        return z * (u / (u + 2.0))
    else:
        return z


@triton.jit
def through(dy, z, ACTIVATION: tl.constexpr):
    """dy times the activation's derivative at z."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp2(z * -LOG2_E))
        return dy * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, dy)
    elif ACTIVATION == "mish":
        e = tl.exp2(tl.minimum(z, 30.0, propagate_nan=tl.PropagateNan.ALL) * LOG2_E)
        u = e * (e + 2.0)
        v = u + 2.0
        held = tl.where(z > 21.0, 21.0 + (z - z), z)  # from there on the rest is 0; inf becomes NaN
        return dy * ((u + held * (4.0 * e * (e + 1.0) / v)) / v)
    else:
        return dy
