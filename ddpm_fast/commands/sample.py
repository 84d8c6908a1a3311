"""`ddpm-fast sample`."""

import math
from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor

from ..adaptive import adaptive
from ..corrections import dynamic_threshold
from ..diffusion import Diffusion
from ..models.presets import Config
from ..ops import _checks as checks
from ..samplers import ADAPTIVE, SAMPLERS, checked_options
from ..training.checkpoint import read_checkpoint
from ..training.extras import require
from ..training.files import check_writable
from ..training.guards import warn_where_busy
from ..training.images import Frames, grid, save_gif, save_npz, save_png, save_pngs, saved_pngs, to_uint8, upscale_for
from .shared import chosen_device, mapping


def sample(args: Namespace) -> int:
    """Draws, and writes what the suffix of --out says."""
    if args.sampler not in (*SAMPLERS, ADAPTIVE):
        raise ValueError(f"--sampler {args.sampler}: expected one of {', '.join((*SAMPLERS, ADAPTIVE))}")
    saved = read_checkpoint(args.checkpoint)
    if args.steps is not None:
        checks.integer("--steps", args.steps, 1, saved.config.num_timesteps)
    suffix = _checked_out(args, saved.config)
    classes = _classes(args.classes, saved.class_names)
    device = chosen_device(args.device)
    warn_where_busy(device)
    diffusion = saved.diffusion(device)
    num = (8 * len(classes) or 64) if args.num is None else args.num
    y = torch.tensor([classes[i * len(classes) // num] for i in range(num)]) if classes else None
    if args.guidance is not None and diffusion.null_label is None:
        what = "classes" if saved.config.num_classes is None else "--label-dropout"
        raise ValueError(f"--guidance: this model was trained without {what}: leave it out, or train another")
    frames = None
    try:
        if args.sampler == ADAPTIVE:
            checked_options(ADAPTIVE, adaptive, dict(args.option))
            for given, what in (
                (args.steps is not None, "takes as many steps as it needs: drop --steps"),
                (args.dynamic_threshold is not None, "knows no --dynamic-threshold"),
                (suffix == ".gif", "draws no .gif: its images take steps of their own"),
            ):
                if given:
                    raise ValueError(f"--sampler {ADAPTIVE} {what}")
        else:
            plan = diffusion.plan(args.sampler, args.steps, dict(args.option))
            frames = Frames(len(plan)) if suffix == ".gif" else None
    except TypeError as error:
        raise ValueError(f"--option: {error}") from error
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
        raise ValueError(f"--classes: there is no class {text!r}, this model has {mapping(names)}")
    return int(text)


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
            sampler_options=dict(args.option),
            guidance=args.guidance,
            corrections=[] if args.dynamic_threshold is None else [dynamic_threshold(args.dynamic_threshold)],
            seed=args.seed,
            first_index=first,
            progress=True,
            callback=frames,
        )
