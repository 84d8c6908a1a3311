"""What the commands of `cli.py` do: each takes the parsed arguments and returns the exit code."""

import math
import platform
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import __version__, ops
from .demo import run as run_demo
from .diffusion import Diffusion
from .models.presets import Config, preset
from .training.checkpoint import load_diffusion
from .training.data import Images, load_images
from .training.images import Frames, grid, save_gif, save_npz, save_png, save_pngs, to_uint8, upscale_for
from .training.trainer import CHECKPOINT, RECIPES, Trainer

MODEL_OPTIONS = (
    "base_channels",
    "channel_mults",
    "num_res_blocks",
    "attention_resolutions",
    "dropout",
    "num_timesteps",
    "schedule",
    "ema_decay",
)
RECIPE_OPTIONS = ("steps", "batch_size", "lr", "warmup", "clip", "flip", "bf16", "seed")


def train(args: Namespace) -> int:
    """Trains, from the start or on."""
    out = args.out or Path("runs") / Path(args.data).name.split(".")[0]
    if (out / CHECKPOINT).exists() and not (args.resume or args.overwrite):
        raise ValueError(f"{out / CHECKPOINT} exists: --resume goes on from it, --overwrite starts anew")
    trainer = _trainer(args, out, load_images(args.data, size=args.size, pad=args.pad))
    parameters = sum(p.numel() for p in trainer.diffusion.model.parameters())
    shape = "x".join(str(n) for n in trainer.images.pixels.shape)
    print(f"{shape} images, {trainer.config.num_classes or 'no'} classes, {parameters:,} parameters, {trainer.device}")
    print(f"step {trainer.step} to {trainer.recipe.steps} into {out}/; Ctrl-C saves and stops")
    trainer.run()
    print(f"step {trainer.step}: saved {out / CHECKPOINT}")
    if trainer.interrupted:
        print("ddpm-fast: stopped by Ctrl-C; the same command with --resume goes on", file=sys.stderr)
    return 130 if trainer.interrupted else 0


def _trainer(args: Namespace, out: Path, images: Images) -> Trainer:
    changes = _given(args, *RECIPE_OPTIONS)
    options = {"device": _device(args.device), "sample_steps": args.sample_steps}
    options |= _given(args, "log_every", "save_every", "sample_every")
    model = _given(args, *MODEL_OPTIONS)
    if args.resume:
        if model or args.preset or args.unconditional:
            raise ValueError("--resume goes on with the model of the checkpoint: drop the model options")
        return Trainer.resume(images, out, changes=changes, **options)
    name = args.preset or ("digits" if args.data == "digits" else "cifar10")
    config = _fit(preset(name), images, with_classes=not args.unconditional)
    return Trainer(replace(config, **model), images, out, recipe=replace(RECIPES[name], **changes), **options)


def _fit(config: Config, images: Images, *, with_classes: bool) -> Config:
    """The configuration for images of this size, channels and classes."""
    _, channels, height, width = images.pixels.shape
    num_classes = int(images.labels.max()) + 1 if with_classes and images.labels is not None else None
    return replace(config, img_size=(height, width), img_channels=channels, num_classes=num_classes)


def sample(args: Namespace) -> int:
    """Draws, and writes what the suffix of --out says."""
    suffix = args.out.suffix.lower()
    if suffix not in (".png", ".gif", ".npz", ""):
        raise ValueError(f"--out {args.out}: expected .png, .gif, .npz or a folder")
    diffusion, config = load_diffusion(args.checkpoint, _device(args.device))
    classes = _classes(args.classes, config.num_classes)
    num = (8 * len(classes) or 64) if args.num is None else args.num
    if num < 1 or args.batch < 1:
        raise ValueError(f"--num is {num} and --batch is {args.batch}: expected at least 1")
    y = torch.tensor([classes[i * len(classes) // num] for i in range(num)]) if classes else None
    frames = Frames(args.steps or config.num_timesteps) if suffix == ".gif" else None
    pixels = torch.cat([to_uint8(x) for x in _draw(diffusion, y, num, args, frames)])
    rows = len(classes) if classes and num % len(classes) == 0 else math.isqrt(num)
    layout = {"columns": args.columns or -(-num // rows), "upscale": args.upscale or upscale_for(pixels.shape[2])}
    if suffix == ".png":
        save_png(args.out, grid(pixels, **layout))
    elif frames is not None:
        save_gif(args.out, frames.grids(**layout))
    elif suffix == ".npz":
        save_npz(args.out, pixels, y)
    else:
        save_pngs(args.out, pixels, y)
    print(f"{num} images: {args.out}")
    return 0


def _classes(asked: tuple[int, ...] | None, num_classes: int | None) -> tuple[int, ...]:
    if asked is None:
        return tuple(range(num_classes or 0))
    if num_classes is None:
        raise ValueError("--classes: this model was trained without classes")
    if wrong := [k for k in asked if k >= num_classes]:
        raise ValueError(f"--classes: {wrong[0]} is too large, this model has classes 0 to {num_classes - 1}")
    return asked


def _draw(diffusion: Diffusion, y: Tensor | None, num: int, args: Namespace, frames: Frames | None) -> Iterator[Tensor]:
    device = next(diffusion.parameters()).device
    for first in range(0, num, args.batch):
        count = min(args.batch, num - first)
        yield diffusion.sample(
            count,
            device,
            None if y is None else y[first : first + count].to(device),
            use_ema=not args.no_ema,
            sampler=args.sampler,
            num_steps=args.steps,
            seed=args.seed,
            first_index=first,
            progress=True,
            callback=frames,
        )


def demo(args: Namespace) -> int:
    """Trains on the digits, draws and judges."""
    run_demo(args.out, steps=args.steps, seed=args.seed, device=_device(args.device))
    return 0


def info(args: Namespace) -> int:
    """Prints versions, devices and op x backend."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for name, value in (
        ("ddpm_fast", f"{__version__} in {Path(__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, numpy {np.__version__}"),
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
        ("cuda", f"{torch.version.cuda}, {', '.join(names)}" if names else "no device"),
    ):
        print(f"{name:<10} {value}")
    print()
    for op, backend, reason in ops.availability():
        print(f"{op:<20} {backend:<10} {reason or 'available'}")
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {"train": train, "sample": sample, "demo": demo, "info": info}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} can't be used here: {str(error).splitlines()[0]}") from error


def _given(args: Namespace, *names: str) -> dict[str, Any]:
    """The options among `names` that stand on the command line, or have a default."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
