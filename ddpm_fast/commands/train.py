"""`ddpm-fast train`."""

import math
import signal
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..models.presets import Config, preset
from ..training.cache import default_folder
from ..training.checkpoint import CHECKPOINT, read_checkpoint
from ..training.data import Images, load_images, write_skipped
from ..training.files import check_writable
from ..training.guards import warn_where_busy
from ..training.recipe import RECIPES
from ..training.trainer import Trainer
from .shared import chosen_device, mapping

MODEL_OPTIONS = (
    "base_channels",
    "channel_mults",
    "num_res_blocks",
    "attention_resolutions",
    "dropout",
    "num_timesteps",
    "schedule",
    "zero_terminal_snr",
    "prediction",
    "loss_type",
    "loss_weighting",
    "timestep_sampling",
    "learned_variance",
    "label_dropout",
    "ema_decay",
    "ema_start",
)
RECIPE_OPTIONS = (
    *("steps", "batch_size", "accumulate", "recompute"),
    *("lr", "warmup", "clip", "flip", "bf16", "seed", "holdout"),
)


def train(args: Namespace) -> int:
    """Trains, from the start or on."""
    data = Path(args.data)
    out = args.out or Path("runs") / (data.resolve().name.lstrip(".").split(".")[0] or "data")
    if args.data != "digits" and data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--out {out} lies inside --data {data}: what is drawn there would become data")
    if (out / CHECKPOINT).exists() and not (args.resume or args.overwrite):
        raise ValueError(f"{out / CHECKPOINT} exists: --resume goes on from it, --overwrite starts anew")
    if args.resume and not (out / CHECKPOINT).exists():
        raise ValueError(f"nothing to resume in {out}: drop --resume")
    check_writable(out)
    device = chosen_device(args.device)
    warn_where_busy(device)
    keep = {"cache": None if args.no_cache else args.cache or default_folder(), "skip_bad": args.skip_bad}
    images = load_images(args.data, size=args.size, pad=args.pad, workers=args.decode_workers, progress=True, **keep)
    trainer = _trainer(args, out, images, device)
    write_skipped(out, images)
    parameters = sum(p.numel() for p in trainer.diffusion.model.parameters())
    shape = "x".join(str(n) for n in trainer.images.pixels.shape)
    print(f"{shape} images, {trainer.config.num_classes or 'no'} classes, {parameters:,} parameters, {device}")
    if trainer.config.num_classes and trainer.images.class_names:
        print(f"classes {mapping(trainer.images.class_names)}")
    print(f"step {trainer.step} to {trainer.recipe.steps} into {out}/; Ctrl-C saves and stops")
    trainer.run()
    if trainer.step:
        print(f"step {trainer.step}: saved {out / CHECKPOINT}")
    if trainer.interrupted:
        cause = "Ctrl-C" if trainer.interrupted == signal.SIGINT else signal.Signals(trainer.interrupted).name
        advice = "the same command with --resume goes on" if trainer.step else "before the first step"
        print(f"ddpm-fast: stopped by {cause}; {advice}", file=sys.stderr)
    return 128 + trainer.interrupted if trainer.interrupted else 0


def _trainer(args: Namespace, out: Path, images: Images, device: torch.device) -> Trainer:
    changes = _given(args, *RECIPE_OPTIONS)
    options = {"device": device, "sample_steps": args.sample_steps, "workers": args.workers}
    options |= _given(args, "log_every", "save_every", "sample_every", "keep", "tensorboard")
    model = _given(args, *MODEL_OPTIONS)
    if args.resume:
        _check_same_model(out, model | ({"num_classes": None} if args.unconditional else {}))
        return Trainer.resume(images, out, changes=changes, **options)
    name = args.preset or ("digits" if args.data == "digits" else "cifar10")
    base = preset(name)
    recipe = replace(RECIPES[name], **changes)
    if args.label_dropout and (args.unconditional or images.num_classes is None):
        raise ValueError("--label-dropout needs classes: drop it" + " or --unconditional" * args.unconditional)
    config = replace(_fit(base, images, args), **(_ema(base, recipe.steps) | model))
    return Trainer(_checked(config, args), images, out, recipe=recipe, **options)


def _check_same_model(out: Path, asked: dict[str, Any]) -> None:
    """Raise ValueError, naming it, where an option isn't what the checkpoint has."""
    config = read_checkpoint(out / CHECKPOINT).config
    for name, value in asked.items():
        if getattr(config, name) != value:
            option = {"num_classes": "unconditional", "loss_type": "loss"}.get(name, name).replace("_", "-")
            came = "" if value is None else f" {value}"
            raise ValueError(
                f"--{option}{came}: the checkpoint has {getattr(config, name)}, and --resume goes on with its model"
            )


def _fit(config: Config, images: Images, args: Namespace) -> Config:
    """The configuration for images of this size, channels and classes; groups and attention as the options allow."""
    _, channels, height, width = images.pixels.shape
    levels = len(args.channel_mults or config.channel_mults)
    return replace(
        config,
        img_size=(height, width),
        img_channels=channels,
        num_classes=None if args.unconditional else images.num_classes,
        num_groups=math.gcd(config.num_groups, args.base_channels or config.base_channels),
        attention_resolutions=tuple(level for level in config.attention_resolutions if level < levels),
    )


def _ema(config: Config, steps: int) -> dict[str, Any]:
    """Averaging that a short run still gets something out of: over a tenth of it, from its first fifth on."""
    if steps >= 5 * config.ema_start:
        return {}
    return {"ema_start": steps // 5, "ema_decay": min(config.ema_decay, max(0.0, 1 - 10 / steps))}


def _checked(config: Config, args: Namespace) -> Config:
    """The configuration, after a look at what the options made of it, in the words of the command line."""
    levels = len(config.channel_mults)
    if wrong := [level for level in config.attention_resolutions if level >= levels]:
        raise ValueError(f"--attention-resolutions {wrong[0]}: this model has levels 0 to {levels - 1}")
    multiple, (height, width) = 2 ** (levels - 1), config.img_size
    if height % multiple or width % multiple:
        fits = [p for p in range(multiple) if (height + 2 * p) % multiple == (width + 2 * p) % multiple == 0]
        up = [-(-side // multiple) * multiple for side in (height, width)]
        advice = f"--pad {args.pad + fits[0]} or " if fits else ""
        raise ValueError(
            f"images of {height}x{width} can't be halved {levels - 1} times: a side must be divisible by {multiple}; "
            f"use {advice}--size {up[0]}x{up[1]}" + (" --pad 0" if args.pad else "")
        )
    return config


def _given(args: Namespace, *names: str) -> dict[str, Any]:
    """The options among `names` that stand on the command line, or have a default."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
