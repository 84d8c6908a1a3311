"""Named configurations, and the configuration that a checkpoint carries."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch.nn.functional as F

from ..objectives import LOSS_WEIGHTINGS, TIMESTEP_SAMPLINGS
from ..ops import _checks as checks
from ..ops.diffusion_loss import LOSSES
from ..predictions import PREDICTIONS, TIME_INPUTS
from ..schedules import (
    Array,
    generate_constant_schedule,
    generate_cosine_schedule,
    generate_jsd_schedule,
    generate_linear_schedule,
    generate_quadratic_schedule,
    generate_sigmoid_schedule,
    generate_warmup_schedule,
    zero_terminal_snr,
)
from .norms import Activation
from .unet import UNet

ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "mish": F.mish, "silu": F.silu}
# From T and the ends, which are those of 1000 timesteps times 1000 / T.
SCHEDULES: dict[str, Callable[[int, float, float], Array]] = {
    "linear": generate_linear_schedule,
    "cosine": lambda T, low, high: generate_cosine_schedule(T),
    "quadratic": generate_quadratic_schedule,
    "sigmoid": generate_sigmoid_schedule,
    "warmup": generate_warmup_schedule,
    "constant": lambda T, low, high: generate_constant_schedule(T, high),
    "jsd": lambda T, low, high: generate_jsd_schedule(T),
}


@dataclass(frozen=True)
class Config:
    """All that is needed to build a Diffusion; the defaults are those of the original DDPM scripts (CIFAR-10)."""

    img_size: tuple[int, int] = (32, 32)  # height, width
    img_channels: int = 3
    num_classes: int | None = None
    base_channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    time_emb_dim: int | None = 512
    time_emb_scale: float = 1.0
    norm: str | None = "gn"
    num_groups: int = 32
    dropout: float = 0.1
    activation: str = "silu"
    attention_resolutions: tuple[int, ...] = (1,)  # indices of levels, 0 = full size
    initial_pad: int = 0
    num_timesteps: int = 1000
    schedule: str = "linear"
    schedule_low: float = 1e-4  # at 1000 timesteps; scaled by 1000 / num_timesteps
    schedule_high: float = 0.02
    zero_terminal_snr: bool = False  # stretch the schedule until nothing of the image is left at its end
    loss_type: str = "l2"
    prediction: str = "eps"
    loss_weighting: str = "none"
    timestep_sampling: str = "uniform"
    learned_variance: bool = False
    label_dropout: float = 0.0  # share of images trained without their class, for guidance
    time_input: str = "timestep"  # or "noise_level", in thousandths for the embedding
    cond_channels: int = 0
    ema_decay: float = 0.9999
    ema_start: int = 2000
    ema_update_rate: int = 1

    def __post_init__(self) -> None:
        values: dict[str, Any] = {}
        for name in ("img_size", "channel_mults", "attention_resolutions"):
            least = 0 if name == "attention_resolutions" else 1
            values[name] = checks.integers(name, getattr(self, name), least)
        if len(values["img_size"]) != 2:
            raise ValueError(f"img_size must be (height, width), got {values['img_size']}")
        if not values["channel_mults"]:
            raise ValueError("channel_mults must hold a positive integer per level, got none")
        for name in ("img_channels", "base_channels", "num_groups", "num_timesteps", "ema_update_rate"):
            values[name] = checks.integer(name, getattr(self, name), 1)
        for name in ("num_res_blocks", "initial_pad", "ema_start", "cond_channels"):
            values[name] = checks.integer(name, getattr(self, name), 0)
        for name in ("num_classes", "time_emb_dim"):
            value = getattr(self, name)
            values[name] = None if value is None else checks.integer(name, value, 1)
        for name in ("dropout", "schedule_low", "schedule_high", "ema_decay", "label_dropout"):
            values[name] = checks.number(name, getattr(self, name), 0, 1)
        values["time_emb_scale"] = checks.number("time_emb_scale", self.time_emb_scale)
        checks.choice("activation", self.activation, tuple(ACTIVATIONS))
        checks.choice("schedule", self.schedule, tuple(SCHEDULES))
        checks.flag("zero_terminal_snr", self.zero_terminal_snr)
        checks.flag("learned_variance", self.learned_variance)
        for name, options in (
            ("loss_type", tuple(LOSSES)),
            ("prediction", PREDICTIONS),
            ("loss_weighting", LOSS_WEIGHTINGS),
            ("timestep_sampling", TIMESTEP_SAMPLINGS),
            ("time_input", TIME_INPUTS),
        ):
            checks.choice(name, getattr(self, name), options)
        if values["label_dropout"] and values["num_classes"] is None:
            raise ValueError("label_dropout needs num_classes")
        if self.norm is not None:
            checks.choice("norm", self.norm, ("gn", "in", "bn"))
        for name, value in values.items():  # plain ints, floats and tuples, also from numpy or JSON
            object.__setattr__(self, name, value)

    def build_unet(self) -> UNet:
        """The network, with fresh weights."""
        null_class = self.num_classes is not None and self.label_dropout > 0
        return UNet(
            img_channels=self.img_channels + self.cond_channels,
            base_channels=self.base_channels,
            channel_mults=self.channel_mults,
            num_res_blocks=self.num_res_blocks,
            time_emb_dim=self.time_emb_dim,
            time_emb_scale=self.time_emb_scale * (1000 if self.time_input == "noise_level" else 1),
            num_classes=self.num_classes and self.num_classes + null_class,
            activation=ACTIVATIONS[self.activation],
            dropout=self.dropout,
            attention_resolutions=self.attention_resolutions,
            norm=self.norm,
            num_groups=self.num_groups,
            initial_pad=self.initial_pad,
            out_channels=self.img_channels * (1 + self.learned_variance),
        )

    def betas(self) -> Array:
        """The noise schedule, [num_timesteps]."""
        scale = 1000 / self.num_timesteps
        betas = SCHEDULES[self.schedule](self.num_timesteps, self.schedule_low * scale, self.schedule_high * scale)
        return zero_terminal_snr(betas) if self.zero_terminal_snr else betas

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_dict`, also after a trip through JSON.

        Raises:
            ValueError, TypeError: a key is no field, or a value is out of range or of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a dictionary, got {checks.text(values)}")
        known = {f.name for f in fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"unknown configuration key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return cls(**values)


PRESETS = {
    "cifar10": Config(),
    "digits": Config(
        img_size=(8, 8),
        img_channels=1,
        num_classes=10,
        base_channels=32,
        channel_mults=(1, 2),
        num_res_blocks=1,
        time_emb_dim=128,
        num_groups=8,
        attention_resolutions=(1,),
        num_timesteps=100,
        schedule="cosine",
        prediction="v",  # good digits after a third of the steps that "eps" takes
        ema_decay=0.995,
        ema_start=200,
    ),
}


def preset(name: str) -> Config:
    """A configuration by name.

    Raises:
        ValueError: there is none of that name.
    """
    checks.choice("preset", name, tuple(PRESETS))
    return PRESETS[name]
