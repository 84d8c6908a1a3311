"""Diffusion: the drop-in for the original DDPM code's class, over the ops and the engine."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .graphs import ENGINES
from .models.ema import EMA, copy_weights
from .models.presets import Config
from .models.unet import UNet
from .ops import NoiseState, extract
from .ops import _checks as checks
from .ops.noise import drawn
from .predictions import PREDICTIONS, target_coefficients
from .reference.diffusion_loss import losses_per_image
from .reference.philox import PERTURB
from .sampling import SamplingDiffusion
from .schedules import generate_cosine_schedule, generate_linear_schedule

# The names of the original code's `diffusion` module.
__all__ = [
    "EMA",
    "Diffusion",
    "GaussianDiffusion",
    "extract",
    "generate_cosine_schedule",
    "generate_linear_schedule",
]


class Diffusion(SamplingDiffusion):
    """Trains and samples a denoising diffusion model (Ho et al. 2020) around any network (x_t, t, y) -> prediction.

    Args:
        model: the network; a copy of it becomes `ema_model`.
        img_size: (height, width), or the sizes of data of another rank.
        img_channels: channels of the data.
        num_classes: number of classes, None without.
        betas: [T] noise schedule, float64 array or tensor.
        loss_type: "l1" or "l2".
        ema_decay, ema_start, ema_update_rate: every `ema_update_rate` calls of `update_ema`, the weights of `ema_model`
            are copied from `model` before call `ema_start`, and averaged with this decay from then on.
        rng: "philox" - every random number is a function of seed, call and image, the same on every device; or
            "torch" - torch's generator in the original code's order.
        seed: of training's noise, timesteps and dropout; drawn from torch's generator when first needed if not given.
        prediction: what the network predicts: "eps" (the noise), "x0" or "v".
        engine: how chains run: "eager"; "graph" - on a GPU one recorded step is replayed, wherever the network can be
            recorded; or "auto" - where that pays, too. A network whose Python must run in every step (it draws from
            Python's random, or reads globals that change) needs "eager".

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        img_size: Sequence[int],
        img_channels: int,
        num_classes: int | None,
        betas: Any,
        loss_type: str = "l2",
        ema_decay: float = 0.9999,
        ema_start: int = 5000,
        ema_update_rate: int = 1,
        *,
        rng: str = "philox",
        seed: int | None = None,
        prediction: str = "eps",
        engine: str = "auto",
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        size = checks.integers("img_size", img_size, 1)
        img_channels = checks.integer("img_channels", img_channels, 1)
        num_classes = None if num_classes is None else checks.integer("num_classes", num_classes, 1)
        ema = EMA(checks.number("ema_decay", ema_decay, 0, 1))
        ema_start = checks.integer("ema_start", ema_start)
        ema_update_rate = checks.integer("ema_update_rate", ema_update_rate, 1)
        checks.choice("loss_type", loss_type, ("l1", "l2"))
        checks.choice("rng", rng, ("philox", "torch"))
        checks.choice("prediction", prediction, PREDICTIONS)
        checks.choice("engine", engine, ENGINES)
        if rng == "torch" and seed is not None:
            raise ValueError("seed is for rng='philox'; with rng='torch' call torch.manual_seed")
        # A subclass, a hook or a patch may take other data than the network inside.
        if type(model) is UNet and not model._forward_pre_hooks and "forward" not in model.__dict__:
            model.check_data(size, img_channels)
        super().__init__(betas, prediction, seed)

        self._state: NoiseState | None = None  # where the random numbers of the forward call under way stand
        self.model = model
        self.ema_model = copy.deepcopy(model).requires_grad_(False)
        self.ema = ema
        self.ema_decay = ema.decay
        self.ema_start = ema_start
        self.ema_update_rate = ema_update_rate
        self.img_size = size
        self.img_channels = img_channels
        self.num_classes = num_classes
        self.loss_type = loss_type
        self.rng = rng
        self.engine = engine
        # Told t [N] and the loss of each image [N] by every forward call, if set.
        self.observer: Callable[[Tensor, Tensor], None] | None = None

    @classmethod
    def from_config(cls, config: Config, **options: Any) -> "Diffusion":
        """A Diffusion with a fresh UNet for a configuration; `options` are keyword arguments of the constructor."""
        if not isinstance(config, Config):
            raise TypeError(f"config must be a Config, got {checks.text(config)}: Config.from_dict makes one")
        names = ("img_size", "img_channels", "num_classes", "loss_type", "ema_decay", "ema_start", "ema_update_rate")
        arguments: dict[str, Any] = {name: getattr(config, name) for name in (*names, "prediction")}
        return cls(config.build_unet(), betas=config.betas(), **arguments | options)

    def perturb_x(self, x: Tensor, t: Tensor, noise: Tensor | NoiseState) -> Tensor:
        """x_t for clean x [N, C, H, W], timesteps t [N] and noise like x, or where to draw it."""
        return ops.q_sample(x, t, self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod, noise)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The loss at random timesteps.

        Args:
            x: [N, C, H, W], clean images in [-1, 1].
            y: [N] int64, the classes of a conditional network.

        Returns:
            A scalar.

        Raises:
            ValueError, TypeError: x or y does not fit what this Diffusion was built for.
        """
        self._check_x(x)
        if self.rng == "torch":
            t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=x.device)
            return self.get_losses(x, t, y)
        return self.at(self.noise_state(self.count_call(), x.device), x, y)

    def at(self, state: NoiseState, x: Tensor, y: Tensor | None = None) -> Tensor:
        """As `forward`, for the call whose random numbers stand at `state`; it isn't counted."""
        self._state = state
        try:
            return self.get_losses(x, ops.timesteps(x.shape[0], self.num_timesteps, state), y)
        finally:
            self._state = None

    def get_losses(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The loss at timesteps t [N]; see `forward`."""
        self._check_x(x)
        y = self._checked_y(y, x.shape[0], x.device)
        if self.training:  # written and not read, or a compiler would guard it
            self._trained = True
        state = self._state
        if state is None:
            calls = self.count_call()
            state = self.noise_state(calls, x.device) if self.rng == "philox" else None
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device) if state is None else state
        return self._loss(self.model, x, t, y, noise, state, self.observer)

    def loss_of(self, model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None, noise: Tensor | NoiseState) -> Tensor:
        """The loss of a network at timesteps t [N] with this noise; it counts as no call, and isn't observed."""
        self._check_x(x)
        return self._loss(model, x, t, self._checked_y(y, x.shape[0], x.device), noise)

    def _loss(
        self,
        model: nn.Module,
        x: Tensor,
        t: Tensor,
        y: Tensor | None,
        noise: Tensor | NoiseState,
        state: NoiseState | None = None,
        observer: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        x_t = self.perturb_x(x, t, noise)
        model_out = self._call(model, x_t, t, y, state)
        target: dict[str, Tensor] = {}
        if self.prediction != "eps":
            a, s = self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]
            noise_coef, x_coef = target_coefficients(self.prediction, a, s)
            target = {"noise_coef": noise_coef, "x_coef": x_coef, "x_start": x}
        if observer is not None:
            noise = drawn(noise, model_out, PERTURB)  # once for the loss and the observer
            observer(t, losses_per_image(model_out.detach(), noise, loss_type=self.loss_type, **target))
        return ops.diffusion_loss(model_out, noise, loss_type=self.loss_type, **target)

    def update_ema(self) -> None:
        """Call after each optimizer step: moves `ema_model` towards `model`."""
        self.step += 1
        self.move_ema(self.ema_move(self.step))

    def ema_move(self, step: int) -> str:
        """How call number `step` of `update_ema` moves `ema_model`: "stay", "copy" or "average"."""
        if step % self.ema_update_rate:
            return "stay"
        return "copy" if step < self.ema_start else "average"

    def move_ema(self, move: str) -> None:
        """Move `ema_model` as `ema_move` says; that isn't counted."""
        if move == "copy":
            copy_weights(self.ema_model, self.model)
        elif move == "average":
            self.ema.update_model_average(self.ema_model, self.model)


GaussianDiffusion = Diffusion
