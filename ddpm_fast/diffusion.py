"""Diffusion: the drop-in for the original DDPM code's class, over the ops and the engine."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .conditions import null_label_of, takes_labels
from .graphs import ENGINES
from .losses import TrainingLoss
from .models.ema import EMA, copy_weights
from .models.presets import Config
from .models.unet import UNet
from .ops import _checks as checks
from .ops import extract
from .ops.diffusion_loss import LOSSES
from .predictions import PREDICTIONS, TIME_INPUTS
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


class Diffusion(SamplingDiffusion, TrainingLoss):
    """Trains and samples a denoising diffusion model (Ho et al. 2020) around any network (x_t, t, y) -> prediction.

    Args:
        model: the network; a copy of it becomes `ema_model`.
        img_size: (height, width), or the sizes of data of another rank.
        img_channels: channels of the data.
        num_classes: number of classes, None without.
        betas: [T] noise schedule, float64 array or tensor.
        loss_type: "l1", "l2" or "huber".
        ema_decay, ema_start, ema_update_rate: every `ema_update_rate` calls of `update_ema`, the weights of `ema_model`
            are copied from `model` before call `ema_start`, and averaged with this decay from then on.
        rng: "philox" - every random number is a function of seed, call and image, the same on every device; or
            "torch" - torch's generator in the original code's order.
        seed: of training's noise, timesteps and dropout; drawn from torch's generator when first needed if not given.
        prediction: what the network predicts: "eps" (the noise), "x0" or "v".
        loss_weighting: of the loss at each timestep: "none", "min_snr" or "p2" (`objectives`), or numbers [T].
        timestep_sampling: which timesteps training draws: "uniform"; "log_normal", as in EDM; "loss_second_moment",
            those of large losses more often, with weights that keep the mean; or probabilities [T].
        learned_variance: the network returns 2 img_channels, and the second half, v, says where between its bounds the
            log variance of the reverse step lies; it learns that from 0.001 of the variational bound beside the loss
            (Nichol & Dhariwal 2021, section 3.1).
        label_dropout: share of training images whose y is replaced by `null_label`, for classifier-free guidance (Ho &
            Salimans 2022).
        null_label: what stands for no class or condition: an integer, by default `num_classes` where `label_dropout` is
            positive (so the network needs one class more), or a tensor like the y of one image.
        time_input: what the network is told of the noise: "timestep", an integer; or "noise_level", sqrt(abar), in
            training a random one between those of neighbouring timesteps (Chen et al. 2021; SR3).
        cond_channels: channels of an image condition, which the network is given beside x_t: torch.cat([x_t, cond], 1).
        engine: how chains run: "eager"; "graph" - one recorded step is replayed, on a GPU as a CUDA graph, wherever the
            network can be recorded; or "auto" - where that pays, too. A network whose Python must run in every step (it
            draws from Python's random, or reads globals that change) needs "eager".
        exact: convolutions are the library's direct ones. Else on CPUs some are computed by Winograd's filtering, which
            is two to three times as fast; in float32 it rounds as much, up to three times that (docs/convolution.md).
            rng="torch" implies it.

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
        loss_weighting: str | Sequence[float] | Tensor = "none",
        timestep_sampling: str | Sequence[float] | Tensor = "uniform",
        learned_variance: bool = False,
        label_dropout: float = 0.0,
        null_label: int | Tensor | None = None,
        time_input: str = "timestep",
        cond_channels: int = 0,
        engine: str = "auto",
        exact: bool = False,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        size = checks.integers("img_size", img_size, 1)
        img_channels = checks.integer("img_channels", img_channels, 1)
        num_classes = None if num_classes is None else checks.integer("num_classes", num_classes, 1)
        ema = EMA(checks.number("ema_decay", ema_decay, 0, 1))
        ema_start = checks.integer("ema_start", ema_start)
        ema_update_rate = checks.integer("ema_update_rate", ema_update_rate, 1)
        checks.choice("loss_type", loss_type, tuple(LOSSES))
        checks.choice("rng", rng, ("philox", "torch"))
        checks.choice("prediction", prediction, PREDICTIONS)
        checks.choice("engine", engine, ENGINES)
        checks.choice("time_input", time_input, TIME_INPUTS)
        checks.flag("learned_variance", learned_variance)
        checks.flag("exact", exact)
        cond_channels = checks.integer("cond_channels", cond_channels, 0)
        label_dropout = checks.number("label_dropout", label_dropout, 0, 1)
        null_label = null_label_of(model, null_label, num_classes if label_dropout else None)
        if label_dropout and null_label is None:
            raise ValueError("label_dropout needs num_classes, or a null_label that stands for no condition")
        if learned_variance and time_input == "noise_level":
            raise ValueError("learned_variance needs time_input='timestep': its bound goes from one to the next")
        if rng == "torch" and seed is not None:
            raise ValueError("seed is for rng='philox'; with rng='torch' call torch.manual_seed")
        # A subclass, a hook or a patch may take other data than the network inside.
        if type(model) is UNet and not model._forward_pre_hooks and "forward" not in model.__dict__:
            model.check_data(size, img_channels, img_channels * (1 + learned_variance), cond_channels)
        if type(model) is UNet and time_input == "noise_level" and not model.tells_noise_levels_apart():
            warnings.warn(
                "this UNet can hardly tell noise levels, 0 to 1, apart: build it with time_emb_scale=1000", stacklevel=2
            )
        super().__init__(betas, prediction, seed)

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
        self.exact = exact
        self.learned_variance, self.time_input, self.cond_channels = learned_variance, time_input, cond_channels
        self.label_dropout = label_dropout
        self._takes_labels = takes_labels(model)
        if isinstance(null_label, Tensor):
            self.register_buffer("null_label", null_label, persistent=False)
        else:
            self.null_label = null_label
        self.weigh(loss_weighting, timestep_sampling)

    @classmethod
    def from_config(cls, config: Config, **options: Any) -> "Diffusion":
        """A Diffusion with a fresh UNet for a configuration; `options` are keyword arguments of the constructor."""
        if not isinstance(config, Config):
            raise TypeError(f"config must be a Config, got {checks.text(config)}: Config.from_dict makes one")
        names = [
            *("img_size", "img_channels", "num_classes", "loss_type", "ema_decay", "ema_start", "ema_update_rate"),
            *("prediction", "loss_weighting", "timestep_sampling", "learned_variance", "label_dropout"),
            *("time_input", "cond_channels"),
        ]
        arguments: dict[str, Any] = {name: getattr(config, name) for name in names} | {"betas": config.betas()}
        return cls(config.build_unet(), **arguments | options)

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
