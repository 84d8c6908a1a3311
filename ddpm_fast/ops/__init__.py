"""The ops: public functions that check their arguments and run the best implementation for them."""

import importlib

from ..reference.philox import DROPOUT, PERTURB, REVERSE, TIMESTEPS, X_T, Dropout, NoiseState
from ._conv3x3 import exact_convolutions
from ._dispatch import BACKENDS, use_backend
from .attention import attention
from .conv3x3 import Norm, conv3x3
from .diffusion_loss import diffusion_loss
from .ema_update import ema_update
from .group_norm_silu import group_norm_silu
from .noise import apply_dropout, dropout_mask, noise, timesteps
from .q_sample import extract, q_sample
from .residual_sum import residual_sum
from .sampler_step import sampler_step
from .timestep_embedding import timestep_embedding

# An op is the function that its file is named after.
OPS = tuple(n for n, f in sorted(globals().items()) if getattr(f, "__module__", None) == f"{__name__}.{n}")


def availability() -> list[tuple[str, str, str | None]]:
    """(op, backend, None or why it can't be used here) for every op and backend, in order of preference."""
    table = []
    for name in OPS:
        impls = {i.backend: i for i in importlib.import_module(f"{__name__}.{name}").OP.impls}
        for backend in BACKENDS:
            reason = impls[backend].unavailable() if backend in impls else "not implemented"
            table.append((name, backend, reason))
    return table


__all__ = [
    "BACKENDS",
    "DROPOUT",
    "OPS",
    "PERTURB",
    "REVERSE",
    "TIMESTEPS",
    "X_T",
    "Dropout",
    "NoiseState",
    "Norm",
    "apply_dropout",
    "attention",
    "availability",
    "conv3x3",
    "diffusion_loss",
    "dropout_mask",
    "ema_update",
    "exact_convolutions",
    "extract",
    "group_norm_silu",
    "noise",
    "q_sample",
    "residual_sum",
    "sampler_step",
    "timestep_embedding",
    "timesteps",
    "use_backend",
]
