"""The training half of Diffusion: the loss at random timesteps, and what weighs it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import ops
from .chain import halves
from .conditions import Conditions, given
from .graphs import Graphs
from .objectives import WORDS, LossSecondMoment, TimestepSampler, loss_weights, timestep_sampler
from .ops import NoiseState
from .predictions import target_coefficients
from .reference.philox import LABELS, LEVELS
from .schedules import Array
from .variational import Posterior, log_variance_bounds, reverse_term

BOUND = 0.001  # share of the variational bound in the loss that learns the variance (Nichol & Dhariwal 2021)

Observer = Callable[[Tensor, Tensor], None]


class TrainingLoss(Conditions):
    """The loss of a network; Diffusion, which builds on it, documents the attributes."""

    loss_type: str
    rng: str
    label_dropout: float
    loss_weights: Tensor | None
    posterior_c_0: Tensor
    log_variances: Tensor
    graphs: Graphs

    def __init__(self, betas: Any, prediction: str, seed: int | None):
        super().__init__(betas, prediction, seed)
        self._state: NoiseState | None = None  # where the random numbers of the forward call under way stand
        # Told t [N] and the loss of each image [N], without weights, by every forward call, if set.
        self.observer: Observer | None = None
        self.timestep_sampler: TimestepSampler | None = None
        self._tables_of: tuple[Array, torch.dtype] | None = None  # what the tables here were made of

    def weigh(self, loss_weighting: object, timestep_sampling: object) -> None:
        """Choose the weights of the loss and how often timesteps are drawn; Diffusion documents the arguments."""
        self.loss_weighting, self.timestep_sampling = loss_weighting, timestep_sampling
        self._make_tables()

    def _make_tables(self) -> None:
        """All that follows from the schedule here, in the dtype of the other tables."""
        abar, device, dtype = self.exact_alphas_cumprod(), self.betas.device, self.betas.dtype
        tables = {"loss_weights": loss_weights(self.loss_weighting, abar, self.prediction)}
        if self.learned_variance:
            tables["posterior_c_0"] = Posterior.of(abar, dtype=torch.float64).c_0.numpy()
            tables["log_variances"] = np.stack(log_variance_bounds(abar))
        for name in ("loss_weights", "posterior_c_0", "log_variances"):
            table = tables.get(name)
            self.register_buffer(
                name, None if table is None else torch.tensor(table, dtype=dtype, device=device), persistent=False
            )
        made, before = timestep_sampler(self.timestep_sampling, abar), self.timestep_sampler
        if not (
            isinstance(made, LossSecondMoment)
            and isinstance(before, LossSecondMoment)
            and len(made.seen) == len(before.seen)
        ):  # else what it remembers goes on
            self.timestep_sampler = None if made is None else made.to(device)
        self._tables_of = self._betas, dtype

    def _rebuild_tables(self) -> None:
        super()._rebuild_tables()
        if self._tables_of is None:  # not yet made
            return
        betas, dtype = self._tables_of
        table = self.loss_weights if self.loss_weights is not None else self.log_variances
        if betas is not self._betas or dtype != self.betas.dtype or table is not None and table.dtype != dtype:
            self._make_tables()

    def perturb_x(self, x: Tensor, t: Tensor, noise: Tensor | NoiseState) -> Tensor:
        """x_t for clean x [N, C, H, W], timesteps t [N] and noise like x, or where to draw it. Not for
        networks that are told noise levels, which training draws between timesteps."""
        return ops.q_sample(x, t, self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod, noise)

    def forward(self, x: Tensor, y: Tensor | None = None, *, cond: Tensor | None = None) -> Tensor:
        """The loss at random timesteps.

        Args:
            x: [N, C, H, W], clean images in [-1, 1].
            y: [N] int64, the classes of a conditional network.
            cond: [N, cond_channels, H, W], the image condition of a network that takes one.

        Returns:
            A scalar.

        Raises:
            ValueError, TypeError: x, y or cond does not fit what this Diffusion was built for.
        """
        self._check_x(x)
        if self.rng == "torch":
            return self.get_losses(x, self._timesteps(x, None), y, **given(cond))
        return self.at(self.noise_state(self.count_call(), x.device), x, y, **given(cond))

    def at(self, state: NoiseState, x: Tensor, y: Tensor | None = None, *, cond: Tensor | None = None) -> Tensor:
        """As `forward`, for the call whose random numbers stand at `state`; it isn't counted."""
        self._state = state
        try:
            return self.get_losses(x, self._timesteps(x, state), y, **given(cond))
        finally:
            self._state = None

    def get_losses(self, x: Tensor, t: Tensor, y: Tensor | None, *, cond: Tensor | None = None) -> Tensor:
        """The loss at timesteps t [N]; see `forward`."""
        self._check_x(x)
        y = self._checked_y(y, x.shape[0], x.device)
        cond = self._checked_cond(cond, x.shape[0], x.device)
        if self.training:  # written and not read, or a compiler would guard it
            self._trained = True
            if not torch.compiler.is_compiling():
                self.graphs.made.clear()  # weights will change
        state = self._state
        if state is None:
            calls = self.count_call()
            state = self.noise_state(calls, x.device) if self.rng == "philox" else None
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device) if state is None else state
        if self.training and self.label_dropout and y is not None:
            y = self._dropped(y, state)
        return self._loss(self.model, x, t, y, noise, state, cond=cond, training=True)

    def loss_of(
        self,
        model: nn.Module,
        x: Tensor,
        t: Tensor,
        y: Tensor | None,
        noise: Tensor | NoiseState,
        *,
        cond: Tensor | None = None,
    ) -> Tensor:
        """The loss of a network at timesteps t [N] with this noise; it counts as no call, and isn't observed."""
        self._check_x(x)
        y, cond = self._checked_y(y, x.shape[0], x.device), self._checked_cond(cond, x.shape[0], x.device)
        return self._loss(model, x, t, y, noise, cond=cond)

    def _loss(
        self,
        model: nn.Module,
        x: Tensor,
        t: Tensor,
        y: Tensor | None,
        noise: Tensor | NoiseState,
        state: NoiseState | None = None,
        *,
        cond: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        """`training`: at random timesteps, which are observed, and at levels between them."""
        level: tuple[Tensor, Tensor] | None = None  # a and s of each image
        if self.time_input == "noise_level":
            level = self._levels(t, state, training)
            x_t = ops.q_sample(x, torch.arange(x.shape[0], device=x.device), *level, noise)
        else:
            x_t = self.perturb_x(x, t, noise)
        told = t if level is None else level[0]
        model_out, v = halves(self._call(model, x_t, told, y, state, **given(cond)), x.shape[1])
        target: dict[str, Any] = {}
        if self.prediction != "eps":
            a, s = level or (self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t])
            noise_coef, x_coef = target_coefficients(self.prediction, a, s)
            target = {"noise_coef": noise_coef, "x_coef": x_coef, "x_start": x}

        def simple(out: Tensor, reduction: str = "mean") -> Tensor:
            return ops.diffusion_loss(out, noise, loss_type=self.loss_type, reduction=reduction, **target)

        observer, sampler = (self.observer, self.timestep_sampler) if training else (None, None)
        if observer is not None:  # apart, as the bits of the loss shall not depend on who looks
            observer(t, simple(model_out.detach(), "none"))
        if sampler is None and self.loss_weights is None and v is None:
            return simple(model_out)
        losses = simple(model_out, "none")
        if self.loss_weights is not None:
            losses = losses * self.loss_weights[t]
        if v is not None:
            losses = losses + BOUND * self.num_timesteps * self._bound(x, x_t, t, model_out.detach(), v)
        if sampler is not None:
            weights = sampler.weights(t)  # of what it went by when it drew t
            if self.training:
                sampler.observe(t, losses.detach())
            losses = losses if weights is None else losses * weights
        return losses.mean()

    def _bound(self, x: Tensor, x_t: Tensor, t: Tensor, model_out: Tensor, v: Tensor) -> Tensor:
        """The variational bound's term of each image, [N] in bits per dimension, for the learned variance v."""
        x0_hat = self._x0_hat(x_t, t, model_out)
        return reverse_term(x, t, x0_hat, self.log_variance(t, v.to(x0_hat.dtype)), self.posterior())

    def log_variance(self, t: Tensor, v: Tensor) -> Tensor:
        """Log variance of the reverse step for what the network says of it, v [N, ...] (about -1 to 1)."""
        low, high = (ops.extract(table, t, v.shape) for table in self.log_variances)
        return low + (high - low) * (v + 1) / 2

    def posterior(self) -> Posterior:
        """q(x_{t-1} | x_t, x_0), for a learned variance."""
        return Posterior(self.posterior_c_0, self.log_variances[0])

    def _timesteps(self, x: Tensor, state: NoiseState | None) -> Tensor:
        if self.timestep_sampler is not None:
            return self.timestep_sampler(x.shape[0], state)
        if state is None:
            return torch.randint(0, self.num_timesteps, (x.shape[0],), device=x.device)
        return ops.timesteps(x.shape[0], self.num_timesteps, state)

    def _levels(self, t: Tensor, state: NoiseState | None, random: bool) -> tuple[Tensor, Tensor]:
        """a and s [N] at t; `random`: between t - 1 and t, abar uniform between theirs."""
        a, s = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        if not random:
            return a[t], s[t]
        first, before = t == 0, (t - 1).clamp(min=0)
        u = _uniform(t, state, LEVELS).to(a.dtype)
        # Both as sums of positive numbers: 1 - a^2 would lose the digits of a small s.
        a_before, s_before = torch.where(first, 1.0, a[before]), torch.where(first, 0.0, s[before])
        return torch.lerp(a_before**2, a[t] ** 2, u).sqrt(), torch.lerp(s_before**2, s[t] ** 2, u).sqrt()

    def _dropped(self, y: Tensor, state: NoiseState | None) -> Tensor:
        """y with the null label in a random share of the images."""
        null = self._null(y.shape[0], y.device)
        if null is None:
            return y
        drop = _uniform(y, state, LABELS) < self.label_dropout
        return torch.where(drop.view(-1, *[1] * (y.ndim - 1)), null.to(y.dtype), y)

    def extra_state(self) -> dict[str, Any]:
        state = super().extra_state()
        if isinstance(self.timestep_sampler, LossSecondMoment):
            state["timestep_losses"] = self.timestep_sampler.state()
        return state

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        if isinstance(self.timestep_sampler, LossSecondMoment) and state.get("timestep_losses") is not None:
            self.timestep_sampler.load(state["timestep_losses"])


def _uniform(images: Tensor, state: NoiseState | None, stream: int) -> Tensor:
    """Numbers in (0, 1], one for each image; without a state from torch's generator."""
    n = images.shape[0]
    if state is None:
        return torch.rand(n, device=images.device)
    return ((ops.timesteps(n, WORDS, state, stream).double() + 0.5) / WORDS).float()
