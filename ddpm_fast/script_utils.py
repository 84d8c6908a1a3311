"""What training scripts written for the original DDPM code call: argument parsing, data helpers, construction."""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .diffusion import Diffusion
from .models.presets import Config
from .ops import _checks as checks

Batch = TypeVar("Batch")


def cycle(dl: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a data loader, again and again.

    Raises:
        ValueError: the loader is empty.
        TypeError: it can be gone through only once.
    """
    if isinstance(dl, Iterator) or not isinstance(dl, Iterable) or getattr(dl, "ndim", 1) == 0:
        raise TypeError(
            f"dl must be a loader or list, which can be gone through again and again; got {checks.text(dl)}"
        )
    while True:
        empty = True
        for batch in dl:
            empty = False
            yield batch
        if empty:
            raise ValueError("dl gave no batch: an empty loader can't be cycled (drop_last with too few images?)")


def get_transform() -> Callable[[Any], Tensor]:
    """The transform that turns a PIL image or array into what Diffusion takes; see `image_to_tensor`."""
    return image_to_tensor


def image_to_tensor(image: Any) -> Tensor:
    """A PIL image or array [H, W] or [H, W, C], uint8 or floating point in [0, 1], to float32 [C, H, W] in [-1, 1].

    Raises:
        TypeError: pixels are neither uint8 (or bool) nor floating point.
        ValueError: not two or three dimensions, or floating point outside [0, 1].
    """
    if isinstance(image, Tensor):
        raise TypeError("image must be a PIL image or an array [H, W, C], got a tensor: it needs no transform")
    pixels = np.asarray(image)
    if pixels.ndim not in (2, 3):
        raise ValueError(f"image must have shape [H, W] or [H, W, C], got {list(pixels.shape)}")
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) / 255
    elif pixels.dtype != np.bool_ and not np.issubdtype(pixels.dtype, np.floating):
        raise TypeError(f"image must hold uint8 or floating point in [0, 1], got {pixels.dtype}: convert it to uint8")
    if pixels.size and pixels.dtype != np.bool_ and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"image must lie in [0, 1] where it is floating point, got {pixels.min()} to {pixels.max()}")
    chw = np.atleast_3d(pixels.astype(np.float32)).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(chw)) * 2 - 1


def str2bool(v: Any) -> bool:
    """ "yes", "true", "t", "y", "1" and their opposites, in any case, for argparse.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    word = str(v).lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected yes or no, true or false; got {v!r}")


def _numbers(text: str, kind: type = int) -> tuple[Any, ...]:
    """ "1,2,2", "1 2 2" or "(1, 2, 2)" to a tuple; the empty string to ()."""
    parts = [p for p in re.split(r"[,\s]+", text.strip().strip("()[]")) if p]
    try:
        return tuple(kind(p) for p in parts)
    except ValueError as error:
        what = "integers such as 1,2,2,2" if kind is int else "values separated by commas"
        raise argparse.ArgumentTypeError(f"expected {what}; got {text!r}") from error


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add an option --key of the value's type for each entry; None makes a string, a tuple is read as "1,2,2,2"."""
    if not isinstance(parser, argparse._ActionsContainer):  # a parser or a group of one
        raise TypeError(f"parser must be an argparse.ArgumentParser, got {checks.text(parser)}")
    if not isinstance(default_dict, Mapping):
        raise TypeError(f"default_dict must be a dictionary, got {checks.text(default_dict)}")
    special: dict[type, Callable[[str], Any]] = {bool: str2bool, type(None): str}
    for key, value in default_dict.items():
        kind = special.get(type(value), type(value))
        if isinstance(value, (tuple, list)):
            kind = partial(_numbers, kind=type(value[0]) if value else int)
        parser.add_argument(f"--{key}", default=value, type=kind)


def diffusion_defaults() -> dict[str, Any]:
    """The options of `get_diffusion_from_args` with their defaults: the CIFAR-10 model of the original scripts."""
    return {
        "num_timesteps": 1000,
        "schedule": "linear",
        "loss_type": "l2",
        "use_labels": False,
        "base_channels": 128,
        "channel_mults": (1, 2, 2, 2),
        "num_res_blocks": 2,
        "time_emb_dim": 512,
        "norm": "gn",
        "dropout": 0.1,
        "activation": "silu",
        "attention_resolutions": (1,),
        "ema_decay": 0.9999,
        "ema_update_rate": 1,
    }


def get_diffusion_from_args(args: Any) -> Diffusion:
    """A Diffusion for parsed options, a namespace or a dictionary; those that are missing take their defaults.

    Beside the entries of `diffusion_defaults`: schedule_low, schedule_high, ema_start (2000), img_size ((32, 32)),
    img_channels (3), num_classes (10), initial_pad, num_groups, time_emb_scale, prediction.

    Raises:
        ValueError: an option has a value that is out of range.
    """
    given = dict(args) if isinstance(args, Mapping) else getattr(args, "__dict__", None)
    if given is None:
        raise TypeError(f"args must be what argparse returns, got {checks.text(args)}")
    # None is a value of its own for norm and time_emb_dim; elsewhere it stands for the default.
    given = {k: v for k, v in given.items() if v is not None or k in ("norm", "time_emb_dim")}
    options = diffusion_defaults() | {"num_classes": 10} | given
    if not isinstance(options["use_labels"], (bool, int, np.bool_)):
        raise TypeError(f"use_labels must be True or False, got {checks.text(options['use_labels'])}")
    num_classes = options["num_classes"]
    # The original takes any schedule but "cosine" for the linear one.
    schedule = options["schedule"]
    options["schedule"] = "cosine" if isinstance(schedule, str) and schedule == "cosine" else "linear"
    options["num_classes"] = num_classes if options["use_labels"] else None
    config = Config.from_dict({field.name: options[field.name] for field in fields(Config) if field.name in options})
    return Diffusion.from_config(config, num_classes=num_classes)
