"""The drawing half of Diffusion: from noise to images, by any sampler."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .chain import Network, Predictor
from .engine import Start, denoise, eval_mode, philox_start, torch_start
from .graphs import ENGINES, Graphs
from .memory import batch_that_fits, in_parts, out_of_memory
from .models.fusing import takes_noise_state
from .models.state import DiffusionState, fresh_seed
from .ops import NoiseState
from .ops import _checks as checks
from .progress import progress_bar
from .samplers import COLUMNS, Plan, make_plan

# On the CPU larger batches gain nothing, so only beyond this size is it worth a look at what fits the memory.
UNCHECKED_BATCH = 64


@contextmanager
def _bar(progress: bool, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar, told how much of the total is done; or nothing."""
    if not progress:
        yield lambda done: None
        return
    with progress_bar(total, "sampling, images x steps") as bar:
        yield lambda done: bar.update(done - bar.n)


class SamplingDiffusion(DiffusionState):
    """Samples from a pair of networks; Diffusion, which trains them, builds on it and documents the attributes."""

    model: nn.Module
    ema_model: nn.Module
    img_size: tuple[int, ...]
    img_channels: int
    num_classes: int | None
    rng: str
    engine: str

    def __init__(self, betas: Any, prediction: str, seed: int | None):
        super().__init__(betas, prediction, seed)
        self.graphs = Graphs()  # recorded steps: print(graphs) lists them, graphs.clear() releases their memory
        self._trained = False  # for the warnings: whether forward ran in train mode, what was said already
        self._warned: set[str] = set()

    @torch.no_grad()
    def remove_noise(self, x: Tensor, t: Tensor, y: Tensor | None, use_ema: bool = True) -> Tensor:
        """The mean of x_{t-1} given x_t (Ho et al. 2020, equation 11), for x [N, C, H, W] and t [N]; no noise added."""
        self._check_x(x)
        y = self._checked_y(y, x.shape[0], x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        # The full plan of the ddpm sampler counts its rows from T - 1 down.
        columns = self.plan().rows.flip(0)[:, 2:6].T.contiguous().to(x.device, dtype)
        p_x, p_m, c_x, c_0 = (ops.extract(column, t, x.shape) for column in columns)
        with eval_mode(self._sampled(use_ema)) as model:
            model_out = self._call(model, x, t, y).to(dtype)
        return c_x * x + c_0 * (p_x * x + p_m * model_out)

    def plan(
        self, sampler: str | Plan = "ddpm", num_steps: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Plan:
        """The table of a sampler for this schedule and prediction; see `sample` for the arguments."""
        return make_plan(sampler, self.exact_alphas_cumprod(), self.prediction, num_steps, options)

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
            y: [batch_size] int64, the classes of a conditional network.
            use_ema: draw from `ema_model`, else from `model`.
            sampler: name of a sampler ("ddpm") or a Plan.
            num_steps: how many steps to take, by default all T.
            sampler_options: keyword arguments of the sampler, such as {"variance": "posterior", "clip": True}.
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
        y = self._checked_y(y, batch_size, device)
        checks.flag("progress", progress)
        checks.choice("engine", self.engine, ENGINES)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function of (k, x), got {checks.text(callback)}")
        plan, predict = self._way(sampler, num_steps, sampler_options, y, use_ema)
        start = self._start(batch_size, device, seed, first_index, noise)
        with eval_mode(self._sampled(use_ema)) as model, _bar(progress, batch_size * len(plan)) as show:

            def run(part: slice) -> Tensor:
                def on_step(k: int, x: Tensor) -> None:
                    show(part.start * len(plan) + (k + 1) * x.shape[0])
                    if callback is not None:
                        callback(k, x)

                x, state = start(part)
                watched = on_step if progress or callback is not None else None
                return self._denoise(predict(model, part), x, plan, state, watched).cpu()

            if self.rng == "torch":  # one generator for the whole batch: it can't be split
                return run(slice(0, batch_size))
            limit = batch_size
            if batch_size > UNCHECKED_BATCH:
                one = slice(0, 1)
                limit = batch_that_fits(predict(model, one), start(one)[0], plan.timesteps(device)[:1])
            return in_parts(run, batch_size, limit)

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
        seed: int | None = None,
        first_index: int = 0,
        noise: Tensor | None = None,
    ) -> list[Tensor]:
        """All states of the chain, on the CPU: x_T, and x after each step. Arguments and errors as in `sample`."""
        batch_size, device = self._checked_place(batch_size, device)
        y = self._checked_y(y, batch_size, device)
        plan, predict = self._way(sampler, num_steps, sampler_options, y, use_ema)
        images = slice(0, batch_size)
        x, state = self._start(batch_size, device, seed, first_index, noise)(images)
        sequence = [x.cpu().clone()]
        with eval_mode(self._sampled(use_ema)) as model:
            self._denoise(predict(model, images), x, plan, state, lambda k, x: sequence.append(x.cpu().clone()))
        return sequence

    def _denoise(self, network: Network, x: Tensor, plan: Plan, state: NoiseState | None, on_step: Any) -> Tensor:
        try:
            return denoise(network, x, plan, state, on_step, graphs=self.graphs, engine=self.engine)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                self.graphs.clear()
            raise

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

    def _call(
        self, model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None, state: NoiseState | None = None
    ) -> Tensor:
        """The network's output, for x in the network's own dtype; dropout draws from `state` where it can."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
        more = {"noise_state": state} if state is not None and model.training and takes_noise_state(model) else {}
        out = model(x.to(dtype), t, y, **more)
        if not isinstance(out, Tensor):
            raise TypeError(f"model must return a tensor like x, {list(x.shape)}; got a {type(out).__name__}")
        if out.shape != x.shape:
            raise ValueError(f"model must return a tensor like x, {list(x.shape)}; got {checks.text(out)}")
        return out

    def _way(
        self, sampler: str | Plan, num_steps: int | None, options: Mapping[str, Any] | None, y: Tensor | None, ema: bool
    ) -> tuple[Plan, Callable[[nn.Module, slice], Network]]:
        """The plan, and what predicts in it for a part of the batch: the network, or a subclass's remove_noise."""

        def labels(part: slice) -> Tensor | None:
            return None if y is None else y[part]

        if getattr(self.remove_noise, "__func__", None) is not SamplingDiffusion.remove_noise:
            if sampler == "ddpm" and num_steps is None and not options:
                # It predicts the mean itself: x' = mean + sigma z is a table, too.
                rows = torch.zeros(self.num_timesteps, len(COLUMNS), dtype=torch.float64)
                rows[:, 0] = torch.arange(self.num_timesteps)
                rows[:, [1, 3, 5]] = 1.0
                rows[1:, 7] = self.sigma[1:].double().cpu()
                return Plan(rows.flip(0)), lambda _, part: lambda x, t: self.remove_noise(x, t, labels(part), ema)
            self._warn(
                "mean", "remove_noise was overridden, but only sample() with sampler='ddpm' and no options calls it"
            )
        plan = self.plan(sampler, num_steps, options)
        t = plan.column("t")
        wrong = (t < 0) | (t >= self.num_timesteps)
        if not plan.timesteps("cpu").is_floating_point() and wrong.any():  # a noise level is no index
            k = int(wrong.nonzero()[0])
            raise ValueError(f"sampler: row {k} has t = {t[k]:.0f}, expected 0 to {self.num_timesteps - 1}")
        own_call = getattr(self._call, "__func__", None) is not SamplingDiffusion._call  # wants t, and isn't watched
        if self.rng == "torch" or own_call:  # the former for parity: the time is embedded in each step
            return plan, lambda model, part: lambda x, t: self._call(model, x, t, labels(part))
        return plan, lambda model, part: Predictor(model, partial(self._call, model), labels(part))

    def _sampled(self, use_ema: bool) -> nn.Module:
        """The network to sample from."""
        if checks.flag("use_ema", use_ema) and self._trained and self.step == 0 and not self.loaded:
            self._warn(
                "ema",
                "sampling from ema_model, which still has its initial weights: update_ema() was never called. "
                "Call it after each optimizer step, or sample with use_ema=False.",
            )
        return self.ema_model if use_ema else self.model

    def _check_x(self, x: Tensor) -> None:
        checks.tensor("x", x)
        expected = (self.img_channels, *self.img_size)
        if x.shape[1:] != expected or x.ndim == 0 or x.shape[0] == 0:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"x must have shape [N, {shape}] with N >= 1, got {checks.text(x)}")
        if x.device != self.betas.device:
            raise ValueError(f"x is on {x.device}, this Diffusion on {self.betas.device}: move one of them with .to()")

    def _checked_place(self, batch_size: int, device: torch.device | str) -> tuple[int, torch.device]:
        """batch_size as an int, and the device, which must be the network's."""
        batch_size = checks.integer("batch_size", batch_size, 1)
        device = checks.device("device", device)
        home = next((p.device for p in self.model.parameters()), device)
        if home.type != device.type or None not in (home.index, device.index) and home.index != device.index:
            raise ValueError(f"device is {device}, the network is on {home}: call diffusion.to({str(device)!r}) first")
        return batch_size, home

    def _checked_y(self, y: Tensor | None, batch_size: int, device: torch.device) -> Tensor | None:
        """y on the device, after a look at its shape and range."""
        if y is None:
            return None
        if not isinstance(y, Tensor):
            raise TypeError(f"y must be a tensor, got {checks.text(y)}: torch.as_tensor(y) makes one")
        if y.ndim == 0 or y.shape[0] != batch_size:
            raise ValueError(f"y must have shape [{batch_size}], a class per image; got {checks.text(y)}")
        if y.is_meta and device.type != "meta":
            raise ValueError(f"y must hold numbers, got {checks.text(y)}")
        # A network that says nothing of classes may take any kind of condition.
        num_classes = getattr(self.model, "num_classes", self.num_classes)
        if num_classes is not None:
            if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
                raise TypeError(f"y must be int64, the classes; got {checks.text(y)}: convert it with .long()")
            y = y.long()
            checks.tensor("y", y, shape=(batch_size,), dtype=torch.int64)
            checks.indices("y", y, num_classes)
        elif hasattr(self.model, "num_classes"):
            self._warn("y", "y is ignored: the network was built without num_classes")
        return y.to(device)

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=4)
