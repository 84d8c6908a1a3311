"""What training weighs: the loss at each timestep, and how often each is drawn. Tables [T], made once in float64.

Let SNR = abar / (1 - abar). A weight w on the squared error of x_0 is w / SNR on that of eps and w / (SNR + 1) on that
of v: then all three predictions are trained alike.
"""

import base64

import numpy as np
import torch
from torch import Tensor, nn

from . import ops
from .ops import NoiseState
from .ops import _checks as checks
from .predictions import PREDICTIONS
from .reference.philox import TIMESTEPS
from .samplers.steps import sigma_of
from .schedules import Array

LOSS_WEIGHTINGS = ("none", "min_snr", "p2")
TIMESTEP_SAMPLINGS = ("uniform", "log_normal", "loss_second_moment")
WORDS = 2**31  # what a drawn number is out of
EXACT = 2**52


def min_snr_weights(alphas_cumprod: Array, prediction: str, gamma: float = 5.0) -> Array:
    """Min-SNR-gamma (Hang et al. 2023, section 3.4): min(SNR, gamma) on the error of x_0. 0 where nothing is left.

    Raises:
        ValueError, TypeError: gamma is not positive, or an unknown prediction.
    """
    if not checks.number("gamma", gamma, 0):
        raise ValueError("gamma must be positive, got 0")
    snr = _snr(alphas_cumprod)
    return _for(prediction, np.minimum(snr, gamma), snr)


def p2_weights(alphas_cumprod: Array, prediction: str, gamma: float = 1.0, k: float = 1.0) -> Array:
    """P2 (Choi et al. 2022, equation 8): 1 / (k + SNR)^gamma on the error of eps.

    Raises:
        ValueError, TypeError: k is not positive, gamma below 0, or an unknown prediction.
    """
    if not checks.number("k", k, 0):
        raise ValueError("k must be positive, got 0")
    snr = _snr(alphas_cumprod)
    return _for(prediction, snr / (k + snr) ** checks.number("gamma", gamma, 0), snr)


def _snr(alphas_cumprod: Array) -> Array:
    return alphas_cumprod / (1 - alphas_cumprod)


def _for(prediction: str, of_x0: Array, snr: Array) -> Array:
    checks.choice("prediction", prediction, PREDICTIONS)
    return {"eps": lambda: of_x0 / snr, "x0": lambda: of_x0, "v": lambda: of_x0 / (snr + 1)}[prediction]()


def loss_weights(weighting: object, alphas_cumprod: Array, prediction: str) -> Array | None:
    """The weights [T] of a name in LOSS_WEIGHTINGS, or a table of one's own; None for 1 everywhere.

    Raises:
        ValueError, TypeError: neither.
    """
    if not isinstance(weighting, str):
        return _own_table("loss_weighting", weighting, len(alphas_cumprod))
    checks.choice("loss_weighting", weighting, LOSS_WEIGHTINGS)
    if weighting == "none":
        return None
    return {"min_snr": min_snr_weights, "p2": p2_weights}[weighting](alphas_cumprod, prediction)


def log_normal_probabilities(alphas_cumprod: Array, mean: float = -1.2, std: float = 1.2) -> Array:
    """How often each timestep is drawn where log sigma is normal (Karras et al. 2022, table 1): the mass between the
    middles of neighbours, all of the tails at the ends.

    Raises:
        ValueError, TypeError: std is not positive.
    """
    mean, std = checks.number("mean", mean), checks.number("std", std, 0)
    if not std:
        raise ValueError("std must be positive, got 0")
    sigma = sigma_of(alphas_cumprod)
    log_sigma = np.log(sigma[np.isfinite(sigma)])
    if len(log_sigma) < len(sigma):  # pure noise, half a step after the last one
        gap = log_sigma[-1] - log_sigma[-2] if len(log_sigma) > 1 else 0.0
        log_sigma = np.append(log_sigma, log_sigma[-1] + gap)
    edges = torch.from_numpy((log_sigma[1:] + log_sigma[:-1]) / 2)
    below = torch.special.ndtr((edges - mean) / std).numpy()
    return np.diff(below, prepend=0.0, append=1.0)


def timestep_sampler(sampling: object, alphas_cumprod: Array) -> "TimestepSampler | None":
    """The sampler of a name in TIMESTEP_SAMPLINGS, or of probabilities [T]; None where all are as likely.

    Raises:
        ValueError, TypeError: neither.
    """
    if not isinstance(sampling, str):
        table = _own_table("timestep_sampling", sampling, len(alphas_cumprod))
        if not table.sum():
            raise ValueError("timestep_sampling must hold a positive probability, got none")
        return TimestepSampler(table)
    checks.choice("timestep_sampling", sampling, TIMESTEP_SAMPLINGS)
    if sampling == "log_normal":
        return TimestepSampler(log_normal_probabilities(alphas_cumprod))
    return LossSecondMoment(len(alphas_cumprod)) if sampling == "loss_second_moment" else None


def _own_table(name: str, values: object, size: int) -> Array:
    try:
        if "complex" in str(getattr(values, "dtype", "")):
            raise TypeError  # what numpy would make real, with a warning
        table = np.array(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a name or {size} numbers, got {checks.text(values)}") from error
    if table.shape != (size,) or not np.isfinite(table).all() or (table < 0).any():
        raise ValueError(f"{name} must be a name or {size} numbers of at least 0, got {checks.text(values)}")
    return table


class TimestepSampler(nn.Module):
    """Draws timesteps with given probabilities.

    Args:
        probabilities: [T], of any sum.
    """

    below: Tensor

    def __init__(self, probabilities: Array):
        super().__init__()
        shares = torch.from_numpy(probabilities / probabilities.sum())
        # [T], how many of EXACT draws are of this timestep and all before.
        self.register_buffer("below", _cumulated(shares), persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves with the network, but stays as exact as it is."""
        for name, table in self._buffers.items():
            self._buffers[name] = None if table is None else table.to(fn(table).device)
        return self

    def forward(self, num_samples: int, state: NoiseState | None) -> Tensor:
        """Timesteps, int64 [num_samples]; without a state from torch's generator."""
        below = self.below
        if state is None:
            word = torch.randint(0, WORDS, (num_samples,), device=below.device)
        else:
            word = ops.timesteps(num_samples, WORDS, state, TIMESTEPS)
        place = ((word.double() + 0.5) / WORDS * below[-1]).long()
        return torch.searchsorted(below, place, right=True).clamp(max=len(below) - 1)

    def weights(self, t: Tensor) -> Tensor | None:
        """[N], for losses at t [N], so that their mean is as with uniform timesteps; None for no such weights."""
        return None

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Told the losses [N] at t [N] in each step, before these weights."""


def _cumulated(probabilities: Tensor) -> Tensor:
    """[T] in whole numbers: sums of them have the same bits in any order."""
    return (probabilities * EXACT).round().long().cumsum(0)


class LossSecondMoment(TimestepSampler):
    """Timesteps in proportion to sqrt(E[loss^2]) of their last losses, weighted so that the mean stays what it was
    (Nichol & Dhariwal 2021, section 3.3); uniform until each has had `history` losses. A batch with a loss that isn't
    finite is not remembered. In a distributed run each process goes by its own losses, or by those of the first where
    buffers are broadcast, as DistributedDataParallel does.

    Args:
        num_timesteps: T.
        history: losses of each that count.
        uniform: share of uniform draws, so that none is forgotten.
    """

    losses: Tensor
    seen: Tensor

    def __init__(self, num_timesteps: int, history: int = 10, uniform: float = 0.001):
        super().__init__(np.ones(num_timesteps))
        self.history, self.uniform = history, uniform
        # One column more than is read: for losses that are not remembered.
        self.register_buffer("losses", torch.zeros(num_timesteps, history + 1), persistent=False)
        self.register_buffer("seen", torch.zeros(num_timesteps, dtype=torch.int64), persistent=False)
        # On the device of the losses: while it isn't 0, nothing is remembered.
        self.held: Tensor | None = None

    def probabilities(self) -> Tensor:
        """[T] float64."""
        size = len(self.seen)
        moment = self.losses[:, : self.history].double().square().mean(1).sqrt()
        total = moment.sum()
        learned = (1 - self.uniform) * moment / total + self.uniform / size
        known = (self.seen >= self.history).all() & (total > 0) & total.isfinite()
        return torch.where(known, learned, 1 / size)

    def weights(self, t: Tensor) -> Tensor | None:
        draws = self.below.diff(prepend=self.below.new_zeros(1))
        return (self.below[-1] / draws[t].double() / len(draws)).float()

    def state(self) -> str:
        """For a checkpoint: the losses so far, exact, as text."""
        numbers = torch.cat([self.losses[:, : self.history], self.seen[:, None].float()], dim=1)
        return base64.b64encode(numbers.cpu().numpy().astype("<f4").tobytes()).decode()

    def load(self, state: str) -> None:
        """Take over what `state` gave.

        Raises:
            ValueError: it is of another number of timesteps, or no such text.
        """
        try:
            numbers = np.frombuffer(base64.b64decode(state, validate=True), dtype="<f4")
        except (ValueError, TypeError) as error:
            raise ValueError(f"timestep_losses is no text that `state` gave: {checks.text(state)}") from error
        if numbers.size != self.losses.numel():
            raise ValueError(f"timestep_losses holds {numbers.size} numbers, expected {self.losses.numel()}")
        table = torch.from_numpy(numbers.reshape(self.losses.shape).copy()).to(self.losses.device)
        self.losses[:, : self.history] = table[:, : self.history]
        self.seen.copy_(table[:, self.history].long())
        self.below.copy_(_cumulated(self.probabilities()))

    @torch.no_grad()
    def observe(self, t: Tensor, losses: Tensor) -> None:
        taken = losses.isfinite().all()
        if self.held is not None:
            taken = taken & (self.held == 0)
        # Sorted by timestep: how many of each one's losses come before and after, all without a look at the numbers.
        t, order = t.sort(stable=True)
        index = torch.arange(len(t), device=t.device)
        before, after = index - torch.searchsorted(t, t), torch.searchsorted(t, t, right=True) - 1 - index
        place = torch.where(taken & (after < self.history), (self.seen[t] + before) % self.history, self.history)
        self.losses[t, place] = losses[order].float()
        self.seen.index_add_(0, t, taken.long().expand(len(t)))
        # Where the next one goes, and that there are enough: all that counts, and exact in a float32.
        self.seen.copy_(torch.where(self.seen >= 2 * self.history, self.seen % self.history + self.history, self.seen))
        self.below.copy_(_cumulated(self.probabilities()))
