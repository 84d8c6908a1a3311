"""The drawing half of Diffusion: from noise to images, by any sampler."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .adaptive import adaptive
from .chain import Correction, Predictor, halves
from .conditions import Conditions, given
from .engine import Start, eval_mode, philox_start, torch_start
from .functional import Way, by_adaptive_steps, by_plan, check_callback, check_corrections, run_chains
from .graphs import ENGINES, Graphs
from .models.made import Kept
from .models.state import fresh_seed
from .ops import _checks as checks
from .samplers import ADAPTIVE, Plan, checked_options, make_plan, mean_plan

Guidance = float | Sequence[float] | Tensor | None
# (network, conditions, part of the batch) -> what predicts for it
Call = Callable[[nn.Module, Sequence[Tensor | None], slice], Predictor]


class SamplingDiffusion(Conditions):
    """Samples from a pair of networks; Diffusion, which trains them, builds on it and documents the attributes."""

    ema_model: nn.Module
    rng: str
    engine: str

    def __init__(self, betas: Any, prediction: str, seed: int | None):
        super().__init__(betas, prediction, seed)
        self.graphs = Graphs()  # what is kept from chain to chain: print(graphs) lists it, graphs.clear() releases it
        self._trained = False  # whether forward ran in train mode, for a warning

    @torch.no_grad()
    def remove_noise(
        self, x: Tensor, t: Tensor, y: Tensor | None, use_ema: bool = True, *, cond: Tensor | None = None
    ) -> Tensor:
        """The mean of x_{t-1} given x_t (Ho et al. 2020, equation 11), for x [N, C, H, W] and t [N]; no noise added."""
        self._check_x(x)
        y = self._checked_y(y, x.shape[0], x.device)
        cond = self._checked_cond(cond, x.shape[0], x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        # The full plan of the ddpm sampler counts its rows from T - 1 down.
        columns = self.plan().rows.flip(0)[:, 2:6].T.contiguous().to(x.device, dtype)
        p_x, p_m, c_x, c_0 = (ops.extract(column, t, x.shape) for column in columns)
        model_out, _ = self._evaluated(x, t, y, use_ema, cond)
        return c_x * x + c_0 * (p_x * x + p_m * model_out.to(dtype))

    @torch.no_grad()
    def pred_x_start(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, use_ema: bool = True, *, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the network makes of x_t [N, C, H, W] at timesteps t [N]: (x0_hat, v), both like x in at least float32;
        v is the learned variance (`log_variance`), None without."""
        self._check_x(x)
        y, cond = self._checked_y(y, x.shape[0], x.device), self._checked_cond(cond, x.shape[0], x.device)
        model_out, v = self._evaluated(x, t, y, use_ema, cond)
        x0_hat = self._x0_hat(x, t, model_out)
        return x0_hat, None if v is None else v.to(x0_hat.dtype)

    def _evaluated(
        self, x: Tensor, t: Tensor, y: Tensor | None, use_ema: bool, cond: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One call of the network in eval mode: the prediction and the learned variance."""
        with eval_mode(self._sampled(use_ema)) as model:
            told = t if self.time_input == "timestep" else self.sqrt_alphas_cumprod[t]
            return halves(self._call(model, x, told, y, **given(cond)), self.img_channels)

    def plan(
        self, sampler: str | Plan = "ddpm", num_steps: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Plan:
        """The table of a sampler for this schedule and prediction; see `sample` for the arguments."""
        if self.learned_variance and sampler == "ddpm" and (options is None or isinstance(options, Mapping)):
            options = {"variance": "learned"} | dict(options or {})
        plan = make_plan(sampler, self.exact_alphas_cumprod(), self.prediction, num_steps, options)
        if plan.learned and not self.learned_variance:
            raise ValueError("this plan has a learned variance: the network must be one with learned_variance=True")
        levels = self.time_input == "noise_level" and not isinstance(sampler, Plan)
        return plan.told_noise_levels() if levels else plan

    def sample(
        self,
        batch_size: int,
        device: torch.device | str,
        y: Tensor | None = None,
        use_ema: bool = True,
        *,
        sampler: str | Plan = "ddpm",
        num_steps: int | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        guidance: Guidance = None,
        cond: Tensor | None = None,
        corrections: Sequence[Correction] = (),
        seed: int | None = None,
        first_index: int = 0,
        noise: Tensor | None = None,
        progress: bool = False,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw images; one thread at a time for one Diffusion.

        Image i depends on `seed` and `first_index` + i alone, whatever the batch size. A batch too large for the memory
        is split.

        Args:
            batch_size: number of images.
            device: where the network is.
            y: [batch_size] int64, the classes of a conditional network; without it, a network that was trained with
                label dropout draws from all of them.
            use_ema: draw from `ema_model`, else from `model`.
            sampler: name of a sampler, "adaptive", or a Plan.
            num_steps: how many steps to take, by default all T.
            sampler_options: keyword arguments of the sampler, such as {"variance": "posterior", "clip": True}.
            guidance: scale of classifier-free guidance, for a network that was trained with label dropout: 1 is none, 0
                leaves the condition out, more than 1 follows it more closely. One number, or one for each row of the
                plan. Each step then works on twice the images.
            cond: [batch_size, cond_channels, H, W], the image condition of a network that takes one.
            corrections: functions (x0_hat, now) -> x0_hat that run in each step, such as `dynamic_threshold()` and
                `classifier_guidance(...)`; on a GPU the steps are then eager.
            seed: of all noise; by default drawn from torch's generator.
            first_index: index of the first image.
            noise: [batch_size, C, H, W], x_T; by default drawn.
            progress: show a progress bar.
            callback: called with (k, x) after row k of the plan; x is the loop's own tensor, to be read and not kept.
                Where a batch was split, its parts run one after the other.

        Returns:
            [batch_size, C, H, W] on the CPU, about [-1, 1], not clipped.

        Raises:
            ValueError, TypeError: an argument is out of range or does not fit.
        """
        batch_size, device = self._checked_place(batch_size, device)
        checks.flag("progress", progress)
        check_callback(callback)
        inputs, without = self._conditions(y, cond, batch_size, device, guidance, corrections)
        way, call = self._way(sampler, num_steps, sampler_options, guidance, corrections, use_ema, without, device)
        start = self._start(batch_size, device, seed, first_index, noise)
        whole = self.rng == "torch"  # one generator for the whole batch: it can't be split
        with eval_mode(self._sampled(use_ema)) as model:
            predict, kept = partial(call, model, inputs), self._kept(model)
            return run_chains(
                *(way, predict, start, batch_size),
                progress=progress,
                callback=callback,
                whole=whole,
                place="cpu",
                kept=kept,
            )

    def sample_diffusion_sequence(
        self,
        batch_size: int,
        device: torch.device | str,
        y: Tensor | None = None,
        use_ema: bool = True,
        *,
        sampler: str | Plan = "ddpm",
        num_steps: int | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        guidance: Guidance = None,
        cond: Tensor | None = None,
        corrections: Sequence[Correction] = (),
        seed: int | None = None,
        first_index: int = 0,
        noise: Tensor | None = None,
    ) -> list[Tensor]:
        """All states of the chain, on the CPU: x_T, and x after each step. Arguments and errors as in `sample`."""
        batch_size, device = self._checked_place(batch_size, device)
        inputs, without = self._conditions(y, cond, batch_size, device, guidance, corrections)
        way, call = self._way(sampler, num_steps, sampler_options, guidance, corrections, use_ema, without, device)
        x, state = self._start(batch_size, device, seed, first_index, noise)(slice(0, batch_size))
        sequence = [x.cpu().clone()]
        with eval_mode(self._sampled(use_ema)) as model:
            keep = lambda k, x: sequence.append(x.cpu().clone())  # noqa: E731
            predict, kept = partial(call, model, inputs), self._kept(model)
            run_chains(way, predict, lambda part: (x, state), batch_size, callback=keep, whole=True, kept=kept)
        return sequence

    def _kept(self, model: nn.Module) -> Kept:
        return self.graphs.made_of(model, self.exact)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SamplingDiffusion":
        self.graphs.clear()  # what they read moves away
        super()._apply(fn, recurse)
        return self

    def _start(
        self, batch_size: int, device: torch.device, seed: int | None, first_index: int, noise: Tensor | None
    ) -> Start:
        shape = (batch_size, self.img_channels, *self.img_size)
        dtype = torch.promote_types(self.betas.dtype, torch.float32)
        if self.rng == "philox":
            return philox_start(shape, dtype, device, fresh_seed() if seed is None else seed, first_index, noise)
        if seed is not None or first_index:
            raise ValueError("seed and first_index are for rng='philox'; with rng='torch' call torch.manual_seed")
        return torch_start(shape, dtype, device, noise)

    def _conditions(
        self,
        y: Tensor | None,
        cond: Tensor | None,
        batch_size: int,
        device: torch.device,
        guidance: Guidance,
        corrections: object,
    ) -> tuple[list[Tensor | None], list[Tensor | None] | None]:
        """What the network is given of each image, and the same without the condition, where there is such a thing."""
        null = self._null(batch_size, device)
        if y is None and guidance is not None and null is not None:
            raise ValueError("guidance needs y: without it there is nothing to follow")
        y = null if y is None else self._checked_y(y, batch_size, device, bool(corrections))
        cond = self._checked_cond(cond, batch_size, device)
        rest = [] if cond is None else [cond]
        return [y, *rest], None if null is None else [null, *rest]

    def _way(
        self,
        sampler: str | Plan,
        num_steps: int | None,
        options: Mapping[str, Any] | None,
        guidance: Guidance,
        corrections: Sequence[Correction],
        ema: bool,
        without: Sequence[Tensor | None] | None,
        device: torch.device,
    ) -> tuple[Way, Call]:
        """How to get there, and what predicts on it: the network, or a subclass's remove_noise."""
        checks.choice("engine", self.engine, ENGINES)
        own_mean = getattr(self.remove_noise, "__func__", None) is not SamplingDiffusion.remove_noise
        if own_mean and not (sampler == "ddpm" and num_steps is None and not options):
            own_mean = False
            self._warn(
                "mean", "remove_noise was overridden, but only sample() with sampler='ddpm' and no options calls it"
            )
        if own_mean and corrections:
            raise ValueError("corrections need x0_hat: remove_noise was overridden, and gives the mean")
        if own_mean and self.learned_variance:
            self._warn("variance", "remove_noise was overridden: its chains draw with beta, not the learned variance")
        if isinstance(sampler, str) and sampler == ADAPTIVE:
            scale = None if guidance is None or guidance == 1 else checks.number("guidance", guidance)
            way, guides = self._adaptive_way(num_steps, options, scale, corrections, device), scale is not None
        else:
            plan = mean_plan(self.sigma) if own_mean else self.plan(sampler, num_steps, options)
            plan.check_network(self.prediction, self.num_timesteps, self.time_input == "noise_level")
            plan = plan if guidance is None else plan.guided(guidance)
            corrections, guides = check_corrections(corrections), plan.guidance is not None
            way = by_plan(plan, device, self.graphs, engine=self.engine, corrections=corrections)
        if guides and without is None:
            raise ValueError("guidance needs y, and a network that was trained with label_dropout > 0")
        own_call = getattr(self._call, "__func__", None) is not SamplingDiffusion._call  # wants t, and isn't watched
        in_full = own_mean or own_call or self.rng == "torch"  # the last for parity: the time is embedded in each step

        def call(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None, cond: Tensor | None = None) -> Tensor:
            if own_mean:
                return self.remove_noise(x, t, y, ema, **given(cond))
            return self._call(model, x, t, y, **given(cond))

        plain = not own_mean and not self.cond_channels

        def predict(model: nn.Module, inputs: Sequence[Tensor | None], part: slice) -> Predictor:
            cut = [[None if v is None else v[part] for v in values] for values in (inputs, without or ())]
            by = partial(self._call if plain else call, model)
            return Predictor(None if in_full else model, by, cut[0], cut[1] if guides else None)

        return way, predict

    def _adaptive_way(
        self,
        num_steps: int | None,
        options: Mapping[str, Any] | None,
        scale: float | None,
        corrections: Sequence[Correction],
        device: torch.device,
    ) -> Way:
        if num_steps is not None or corrections:
            raise ValueError(f"num_steps and corrections are for tables: {ADAPTIVE!r} takes as many steps as it needs")
        options = checked_options(ADAPTIVE, adaptive, options) | {"time_input": self.time_input}
        return by_adaptive_steps(self.exact_alphas_cumprod(), self.prediction, device, scale, options)

    def _sampled(self, use_ema: bool) -> nn.Module:
        """The network to sample from."""
        if checks.flag("use_ema", use_ema) and self._trained and self.step == 0 and not self.loaded:
            self._warn(
                "ema",
                "sampling from ema_model, which still has its initial weights: update_ema() was never called. "
                "Call it after each optimizer step, or sample with use_ema=False.",
            )
        return self.ema_model if use_ema else self.model
