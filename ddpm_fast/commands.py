"""What the commands of `cli.py` do: each takes the parsed arguments and returns the exit code."""

import math
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .demo import run as run_demo
from .diffusion import Diffusion
from .info import show
from .models.presets import Config, preset
from .ops import _checks as checks
from .samplers import SAMPLERS, Plan
from .training.cache import default_folder
from .training.checkpoint import CHECKPOINT, read_checkpoint
from .training.data import Images, load_images, write_skipped
from .training.extras import require
from .training.files import check_writable
from .training.guards import warn_where_busy
from .training.images import Frames, grid, save_gif, save_npz, save_png, save_pngs, saved_pngs, to_uint8, upscale_for
from .training.plot import plot_runs
from .training.recipe import RECIPES
from .training.trainer import Trainer

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
    "ema_decay",
    "ema_start",
)
RECIPE_OPTIONS = ("steps", "batch_size", "accumulate", "lr", "warmup", "clip", "flip", "bf16", "seed", "holdout")


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
    device = _device(args.device)
    warn_where_busy(device)
    keep = {"cache": None if args.no_cache else args.cache or default_folder(), "skip_bad": args.skip_bad}
    images = load_images(args.data, size=args.size, pad=args.pad, workers=args.decode_workers, progress=True, **keep)
    trainer = _trainer(args, out, images, device)
    write_skipped(out, images)
    parameters = sum(p.numel() for p in trainer.diffusion.model.parameters())
    shape = "x".join(str(n) for n in trainer.images.pixels.shape)
    print(f"{shape} images, {trainer.config.num_classes or 'no'} classes, {parameters:,} parameters, {device}")
    if trainer.config.num_classes and trainer.images.class_names:
        print(f"classes {_mapping(trainer.images.class_names)}")
    print(f"step {trainer.step} to {trainer.recipe.steps} into {out}/; Ctrl-C saves and stops")
    trainer.run()
    if trainer.step:
        print(f"step {trainer.step}: saved {out / CHECKPOINT}")
    if trainer.interrupted:
        cause = "Ctrl-C" if trainer.interrupted == signal.SIGINT else signal.Signals(trainer.interrupted).name
        advice = "the same command with --resume goes on" if trainer.step else "before the first step"
        print(f"ddpm-fast: stopped by {cause}; {advice}", file=sys.stderr)
    return 128 + trainer.interrupted if trainer.interrupted else 0


def _mapping(names: tuple[str, ...]) -> str:
    """'0 to 9', or '0 = cat, 1 = dog' where the names say more than the numbers."""
    if names == tuple(str(k) for k in range(len(names))):
        return f"0 to {len(names) - 1}"
    return ", ".join(f"{k} = {name}" for k, name in enumerate(names))


def _trainer(args: Namespace, out: Path, images: Images, device: torch.device) -> Trainer:
    changes = _given(args, *RECIPE_OPTIONS)
    options = {"device": device, "sample_steps": args.sample_steps, "workers": args.workers}
    options |= _given(args, "log_every", "save_every", "sample_every", "keep", "tensorboard")
    model = _given(args, *MODEL_OPTIONS)
    if args.resume:
        if model or args.preset or args.unconditional:
            raise ValueError("--resume goes on with the model of the checkpoint: drop the model options")
        return Trainer.resume(images, out, changes=changes, **options)
    name = args.preset or ("digits" if args.data == "digits" else "cifar10")
    base = preset(name)
    recipe = replace(RECIPES[name], **changes)
    config = replace(_fit(base, images, args), **(_ema(base, recipe.steps) | model))
    return Trainer(_checked(config, args), images, out, recipe=recipe, **options)


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


def sample(args: Namespace) -> int:
    """Draws, and writes what the suffix of --out says."""
    if args.sampler not in SAMPLERS:
        raise ValueError(f"--sampler {args.sampler}: expected one of {', '.join(SAMPLERS)}")
    saved = read_checkpoint(args.checkpoint)
    if args.steps is not None:
        checks.integer("--steps", args.steps, 1, saved.config.num_timesteps)
    suffix = _checked_out(args, saved.config)
    classes = _classes(args.classes, saved.class_names)
    device = _device(args.device)
    warn_where_busy(device)
    diffusion = saved.diffusion(device)
    num = (8 * len(classes) or 64) if args.num is None else args.num
    y = torch.tensor([classes[i * len(classes) // num] for i in range(num)]) if classes else None
    try:
        plan = diffusion.plan(args.sampler, args.steps, dict(args.option))
    except TypeError as error:
        raise ValueError(f"--option: {error}") from error
    frames = Frames(len(plan)) if suffix == ".gif" else None
    pixels = torch.cat([to_uint8(x) for x in _draw(diffusion, plan, y, num, args, frames)])
    rows = len(classes) if classes and num % len(classes) == 0 else math.isqrt(num)
    layout = {"columns": args.columns or -(-num // rows), "upscale": args.upscale or upscale_for(pixels.shape[2])}
    if suffix == ".png":
        save_png(args.out, grid(pixels, **layout))
    elif frames is not None:
        save_gif(args.out, frames.grids(**layout))
    elif suffix == ".npz":
        save_npz(args.out, pixels, y)
    else:
        for path in saved_pngs(args.out):
            path.unlink()
        save_pngs(args.out, pixels, y)
    print(f"{num} images{_drawn(y, saved.class_names)}: {args.out}")
    return 0


def _drawn(y: Tensor | None, names: tuple[str, ...]) -> str:
    """' of classes cat, dog': which classes y [N] holds; '' without classes."""
    drawn = [] if y is None else [names[k] for k in dict.fromkeys(y.tolist())]
    listed = ", ".join(drawn[:10]) + (f"... ({len(drawn)})" if len(drawn) > 10 else "")
    return f" of class{'es' if len(drawn) > 1 else ''} {listed}" if drawn else ""


def _checked_out(args: Namespace, config: Config) -> str:
    """The suffix of --out in lower case, "" for a folder, after a look at whether it can be written."""
    out, suffix = args.out, args.out.suffix.lower()
    if suffix not in (".png", ".gif", ".npz", ""):
        raise ValueError(f"--out {out}: expected .png, .gif, .npz or a folder")
    if suffix and out.is_dir():
        raise ValueError(f"--out {out} is a folder: expected a file, or a folder without a suffix")
    check_writable(out.parent if suffix else out)
    if suffix != ".npz":
        require("PIL.Image")
        if config.img_channels not in (1, 3):
            raise ValueError(f"--out {out}: images of {config.img_channels} channels can only be written as .npz")
    if suffix and out.exists() and not args.overwrite:
        raise ValueError(f"--out {out} exists: --overwrite replaces it")
    earlier = saved_pngs(out)
    if not suffix and len(list(out.glob("*"))) > len(earlier):  # such as training data: what is drawn would become data
        raise ValueError(f"--out {out} holds other files: name a new folder")
    if earlier and not args.overwrite:
        raise ValueError(f"--out {out} holds images of an earlier call: --overwrite replaces them")
    return suffix


def _classes(asked: str | None, names: tuple[str, ...]) -> tuple[int, ...]:
    """The numbers of the classes asked for: names, numbers or ranges A-B, with commas between."""
    if asked is None:
        return tuple(range(len(names)))
    if not names:
        raise ValueError("--classes: this model was trained without classes")
    numbers: list[int] = []
    for part in asked.split(","):
        first, dash, last = ("", "", "") if part in names else part.partition("-")
        if dash:
            numbers += range(_class(first, names), _class(last, names) + 1)
        else:
            numbers.append(_class(part, names))
    if not numbers:
        raise ValueError(f"--classes {asked}: this range holds no class")
    return tuple(numbers)


def _class(text: str, names: tuple[str, ...]) -> int:
    """A class by its name, or by its number where no class has that for a name."""
    if text in names:
        return names.index(text)
    if not (text.isdecimal() and len(text) < 10 and int(text) < len(names)):
        raise ValueError(f"--classes: there is no class {text!r}, this model has {_mapping(names)}")
    return int(text)


def _draw(
    diffusion: Diffusion, plan: Plan, y: Tensor | None, num: int, args: Namespace, frames: Frames | None
) -> Iterator[Tensor]:
    device = next(diffusion.parameters()).device
    for first in range(0, num, args.batch):
        count = min(args.batch, num - first)
        yield diffusion.sample(
            count,
            device,
            None if y is None else y[first : first + count].to(device),
            use_ema=not args.no_ema,
            sampler=plan,
            seed=args.seed,
            first_index=first,
            progress=True,
            callback=frames,
        )


def plot(args: Namespace) -> int:
    """Draws the logs of runs."""
    check_writable(args.out.parent)
    plot_runs(args.runs, args.out)
    print(args.out)
    return 0


def demo(args: Namespace) -> int:
    """Trains on the digits, draws and judges."""
    run_demo(args.out, steps=args.steps, seed=args.seed, device=_device(args.device))
    return 0


def info(args: Namespace) -> int:
    """Prints versions, devices and op x backend."""
    show()
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "train": train,
    "sample": sample,
    "plot": plot,
    "demo": demo,
    "info": info,
}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(name)
    except RuntimeError as error:  # whose text lists all that torch has ever run on
        raise ValueError(f"--device {name} can't be used here: expected cpu, cuda, cuda:1...") from error
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()  # "meta" holds no data
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--device {name} can't be used here: {text}") from error


def _given(args: Namespace, *names: str) -> dict[str, Any]:
    """The options among `names` that stand on the command line, or have a default."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
