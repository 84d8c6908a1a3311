"""What may change x0_hat in each step of a chain, outside of the table: functions (x0_hat, now) -> x0_hat.

They run eagerly, before x0_hat is clipped; `now` (`chain.Now`) has the state x, what the network is told, its
conditions and the level.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .chain import Correction, Now
from .ops import _checks as checks


def dynamic_threshold(ratio: float = 0.995, largest: float | None = None) -> Correction:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): x0_hat of each image is clipped to [-q, q] and divided
    by q, the `ratio` quantile of its |x0_hat| where that is above 1. For images in [-1, 1] under strong guidance.

    Args:
        ratio: which quantile, in [0, 1].
        largest: bound of q; None for none.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """
    ratio = checks.number("ratio", ratio, 0, 1)
    bound = math.inf if largest is None else checks.number("largest", largest, 1)

    def correct(x0_hat: Tensor, now: Now) -> Tensor:
        sizes = x0_hat.abs().flatten(1)
        # By sorting: torch.quantile takes no more than 2^24 numbers.
        place = ratio * (sizes.shape[1] - 1)
        below = math.floor(place)
        order = sizes.sort(1).values[:, below : below + 2]
        q = torch.lerp(order[:, :1], order[:, -1:], place - below).clamp(1, bound)
        q = q.view(-1, *[1] * (x0_hat.ndim - 1))
        return torch.minimum(torch.maximum(x0_hat, -q), q) / q

    return correct


def classifier_guidance(log_probability: Callable[..., Tensor], scale: float = 1.0) -> Correction:
    """Guidance by a classifier of noisy images (Dhariwal & Nichol 2021, algorithm 2): the noise moves by
    -s scale grad log p(y | x), and so x0_hat by s^2 / a of it.

    Args:
        log_probability: (x, t, *inputs) -> [N], log p(y | x_t) of each image; x has gradients. `inputs` are what the
            network is given beside t: y in a Diffusion, or y and cond where there is one.
        scale: of the gradient; 1 is Bayes' rule.

    Raises:
        ValueError, TypeError: scale is not a number; in a step: the plan doesn't know its levels, or `log_probability`
            returns anything but [N].
    """
    if not callable(log_probability):
        raise TypeError(f"log_probability must be a function of (x, t, *inputs), got {checks.text(log_probability)}")
    scale = checks.number("scale", scale)

    def correct(x0_hat: Tensor, now: Now) -> Tensor:
        if now.a is None or now.s is None:
            raise ValueError("classifier guidance needs the level of each row: a Plan with abar")
        with torch.inference_mode(False), torch.enable_grad():
            x = now.x.detach().clone().requires_grad_()
            last = max((k for k, v in enumerate(now.inputs) if v is not None), default=-1)
            given = now.t, *now.inputs[: last + 1]
            value: Any = log_probability(x, *(None if v is None else v.clone() for v in given))
            checks.tensor("log_probability's result", value, shape=x.shape[:1])
            if not value.requires_grad:
                raise ValueError("log_probability's result must depend on x by operations that have gradients")
            (grad,) = torch.autograd.grad(value.sum(), x)
        # Pure noise says nothing of y, and its gradient is 0.
        return x0_hat + scale * torch.where(now.a > 0, now.s**2 / now.a, 0) * torch.where(now.a > 0, grad, 0)

    return correct
