"""The training loss: distance of the network's output from the noise (or x_start, or v) it should have predicted."""

from typing import Any

from torch import Tensor

from ..reference import diffusion_loss as reference
from ..reference.philox import PERTURB, NoiseState
from . import _checks
from ._dispatch import Impl, Op
from ._library import composition
from .noise import check_source, drawn

LOSSES = ("l1", "l2")


def _reference(model_out: Tensor, noise: Tensor | NoiseState, **rest: Any) -> Tensor:
    return reference.diffusion_loss(model_out, drawn(noise, model_out, PERTURB), **rest)


_NODE = composition(
    "diffusion_loss(Tensor model_out, Tensor noise, *, str loss_type='l2', Tensor? noise_coef=None, "
    "Tensor? x_coef=None, Tensor? x_start=None) -> Tensor",
    reference.diffusion_loss,
)


def _traced(model_out: Tensor, noise: Tensor | NoiseState, **rest: Any) -> Tensor:
    return _NODE(model_out, drawn(noise, model_out, PERTURB), **rest)


OP = Op("diffusion_loss", Impl("reference", lambda: _reference), traced=_traced)


def diffusion_loss(
    model_out: Tensor,
    noise: Tensor | NoiseState,
    *,
    loss_type: str = "l2",
    noise_coef: Tensor | None = None,
    x_coef: Tensor | None = None,
    x_start: Tensor | None = None,
) -> Tensor:
    """Mean of |d| or d^2 over all elements, d = model_out - (noise_coef noise + x_coef x_start).

    Without coefficients the target is the noise (Ho et al. 2020, equation 14). Computed in at least float32.

    Args:
        model_out: [N, ...].
        noise: like `model_out`, or the NoiseState that `q_sample` was given: it is drawn again, not stored.
        loss_type: "l1" or "l2".
        noise_coef, x_coef: [N]; `x_coef` needs `x_start`.
        x_start: like `model_out`.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, device or value.
    """
    _checks.tensor("model_out", model_out)
    if model_out.ndim < 1:
        raise ValueError("model_out must have a batch dimension, got a scalar")
    check_source(noise, model_out)
    _checks.choice("loss_type", loss_type, LOSSES)
    for name, coef in (("noise_coef", noise_coef), ("x_coef", x_coef)):
        if coef is not None:
            _checks.tensor(name, coef, shape=model_out.shape[:1], device=model_out.device)
    if (x_coef is None) != (x_start is None):
        raise ValueError("x_coef and x_start go together: give both or neither")
    if x_start is not None:
        _checks.tensor("x_start", x_start, shape=model_out.shape, device=model_out.device)
    return OP(model_out, noise, loss_type=loss_type, noise_coef=noise_coef, x_coef=x_coef, x_start=x_start)
