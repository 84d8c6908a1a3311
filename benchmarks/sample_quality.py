"""Quality of samples against steps and seconds: Frechet distance and class agreement, beside those of real images.

python benchmarks/sample_quality.py
python benchmarks/sample_quality.py --sampler ddpm ddim dpmpp_2m adaptive --steps 10 20 50
python benchmarks/sample_quality.py --sampler dpmpp_2m --steps 20 --guidance 0 1 2 4 8
python benchmarks/sample_quality.py --data fashion-mnist/ --checkpoint runs/fashion/model.safetensors

The distance is taken in the hidden layer of this project's own small classifier, trained on the training images. It
can be compared within a table only: not between data sets or numbers of images, and not with anyone's FID.
"""

import argparse
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.harness import OURS, Row, header, markdown, markdown_header, progress, write_json
from benchmarks.options import Parser, count, device, output_file, output_folder
from benchmarks.peers import schedulers
from ddpm_fast import Diffusion
from ddpm_fast.evaluation.classifier import FEATURES, Classifier, judge, train_classifier
from ddpm_fast.evaluation.metrics import agreement, frechet_distance
from ddpm_fast.models.presets import Config, preset
from ddpm_fast.samplers import ADAPTIVE, SAMPLERS
from ddpm_fast.training.checkpoint import read_checkpoint
from ddpm_fast.training.data import Images, digits, load_images, to_float
from ddpm_fast.training.extras import require
from ddpm_fast.training.files import write_atomically
from ddpm_fast.training.recipe import RECIPES
from ddpm_fast.training.trainer import CHECKPOINT, Trainer

STEPS = (10, 20, 50, 100)  # and all
TOLERANCES = (0.3, 0.1, 0.05, 0.02)  # of adaptive steps
THEIRS = {f"diffusers {name}": name for name in schedulers.SCHEDULERS}
LABEL_DROPOUT = 0.1  # of a model to be guided
SEEN = 60_000  # training images that the classifier sees, with repetition, at least 3 times each
TEST_IMAGES = "t10k-images*idx3-ubyte*"
REAL = "real held-out"
NAME_OF_FEATURES = f"{FEATURES} of ddpm_fast's classifier"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    p = Parser(__doc__.splitlines()[0])
    p.add_argument("--data", default="digits", help="digits (scikit-learn's), or a folder with MNIST's four files")
    p.add_argument("--checkpoint", type=Path, metavar="FILE", help="of the model (default: the demo's is trained)")
    p.add_argument("--steps", type=count, nargs="+", help=f"numbers of steps to compare (default: {STEPS} and all)")
    names = [*sorted(SAMPLERS), ADAPTIVE]
    p.add_argument("--sampler", nargs="+", choices=names, default=["ddpm"], help="samplers to compare")
    guided = "scales of guidance to compare; the demo's model is then one trained with label dropout"
    p.add_argument("--guidance", type=float, nargs="+", metavar="W", help=guided)
    p.add_argument("--diffusers", action="store_true", help="beside each sampler, diffusers' under its own settings")
    p.add_argument("--num", type=count, default=500, help="images drawn each time, at most as many as are held out")
    p.add_argument("--batch", type=count, default=250, help="images at a time")
    p.add_argument("--seed", type=int, default=1, help="of the drawing")
    p.add_argument("--device", type=device, default="auto", help="cpu, cuda, cuda:1...; auto: a GPU where there is one")
    p.add_argument("--out", type=output_folder, default="runs/quality", help="folder of the plot and a trained model")
    p.add_argument("--json", type=output_file, metavar="FILE", help="also write the header and the rows there")
    args = p.parse_args(argv)
    if args.diffusers and args.guidance:
        p.error("--diffusers knows no --guidance")
    if args.data != "digits" and args.checkpoint is None:
        p.error("--data needs the --checkpoint of a model of these images: ddpm-fast train --data ... writes one")
    return args


def trained(out: Path, device: torch.device, label_dropout: float) -> Path:
    """Return the checkpoint of the demo's model in ``out``, trained now if there is none."""
    path = out / CHECKPOINT
    if not path.exists():
        progress(f"training the demo's model into {out}")
        config = replace(preset("digits"), label_dropout=label_dropout)
        Trainer(config, digits("train"), out, recipe=RECIPES["digits"], device=device).run()
    return path


def real_images(data: str, config: Config) -> tuple[Images, Images]:
    """Return the training images and those held out, in the model's size; FileNotFoundError without them.

    Smaller ones are padded as by ``ddpm-fast train --pad``, larger ones scaled as by ``--size``.
    """
    if data == "digits":
        return digits("train"), digits("held_out")
    test = next(iter(sorted(Path(data).glob(TEST_IMAGES))), None)
    if test is None:
        raise FileNotFoundError(f"no {TEST_IMAGES} in {data!r}")
    missing = config.img_size[0] - load_images(test).pixels.shape[2]
    fit: dict[str, Any] = {"pad": missing // 2} if missing >= 0 else {"size": config.img_size}
    return load_images(data, **fit), load_images(test, **fit)


class Judge:
    """Figures of images float [N, C, H, W]: the Frechet distance to as many held-out ones, and class agreement."""

    def __init__(self, train: Images, held_out: Images, num: int) -> None:
        progress("training the classifier")
        order = torch.randperm(len(held_out.pixels), generator=torch.Generator().manual_seed(0))
        self.held_out = held_out.select(order[:num])
        self.train, self.all_held_out = train, held_out
        x, y = to_float(train.pixels), train.classes
        epochs = max(3, SEEN // len(x)) if len(x) > SEEN // 40 else 40
        self.classifier: Classifier = train_classifier(x, y, num_classes=int(y.max()) + 1, epochs=epochs)
        self.features, self.logits = judge(self.classifier, to_float(self.held_out.pixels))

    def figures(self, x: Tensor, labels: Tensor) -> Row:
        """Return what is known of images drawn for ``labels``; of some that aren't finite, how many."""
        broken = int((~x.flatten(1).isfinite().all(1)).sum())
        if broken:
            return {"features": NAME_OF_FEATURES, "note": f"{broken} of {len(x)} images are not finite"}
        features, logits = judge(self.classifier, x)
        return {
            "frechet": frechet_distance(features, self.features),
            "agreement": agreement(logits, labels),
            "features": NAME_OF_FEATURES,
        }

    def real(self) -> Row:
        """Return the class agreement of the held-out images, and the distance of two disjoint sets of all real ones.

        Each set has as many images of each class as were drawn: their shares alone would move the distance. Between
        training and held-out images it would be larger: the classifier knows the former.
        """
        pixels = torch.cat([self.train.pixels, self.all_held_out.pixels])
        labels = torch.cat([self.train.classes, self.all_held_out.classes])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        sets: tuple[list[Tensor], list[Tensor]] = [], []
        for label, number in zip(*self.held_out.classes.unique(return_counts=True), strict=True):
            members = order[labels[order] == label]
            for k, chosen in enumerate(sets):
                chosen.append(members[k * number : (k + 1) * number])
        (a, _), (b, _) = (judge(self.classifier, to_float(pixels[torch.cat(chosen)])) for chosen in sets)
        return {
            "frechet": frechet_distance(a, b),
            "agreement": agreement(self.logits, self.held_out.classes),
            "features": NAME_OF_FEATURES,
            "note": "distance between two sets of all real images",
        }


def draw(diffusion: Diffusion, labels: Tensor, args: argparse.Namespace, **way: Any) -> Tensor:
    """Return an image float [N, C, H, W] for each label; an unconditional model gets none."""
    parts = []
    for first in range(0, len(labels), args.batch):
        y = labels[first : first + args.batch].to(args.device)
        known = None if diffusion.num_classes is None else y
        where = {"seed": args.seed, "first_index": first}
        if way["sampler"] in THEIRS:
            name, steps = THEIRS[way["sampler"]], way["num_steps"]
            parts.append(schedulers.draw(diffusion, known, name, steps, args.seed, first, len(y)).cpu())
        else:
            parts.append(diffusion.sample(len(y), args.device, known, progress=True, **where, **way))
    return torch.cat(parts).clamp(-1, 1)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the figures over steps and over seconds as a PNG, with the real images' as lines."""
    ticker = require("matplotlib.ticker")
    figure = require("matplotlib.figure").Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    drawn, real = [row for row in rows if row["name"] != REAL], next(row for row in rows if row["name"] == REAL)
    names = {"frechet": f"Frechet distance,\n{NAME_OF_FEATURES}", "agreement": "class agreement"}
    # One colour a sampler; what is not ours is dashed.
    kinds = {row["name"]: row["name"].removeprefix("diffusers ").removeprefix(f"{OURS} ") for row in drawn}
    colours = {kind: f"C{k}" for k, kind in enumerate(dict.fromkeys(kinds.values()))}
    for line, (key, label) in zip(axes, names.items(), strict=True):
        for axis, x in zip(line, ("num_steps", "seconds"), strict=True):
            for name, kind in kinds.items():
                style = {"color": colours[kind], "linestyle": "-" if name.startswith(OURS) else ":", "marker": "."}
                of = [row for row in drawn if row["name"] == name and key in row]
                axis.plot([row[x] for row in of], [row[key] for row in of], label=name, **style)
            axis.axhline(real[key], color="grey", linestyle="--", label=REAL)
            axis.set_xscale("log")
            axis.grid(alpha=0.3, which="both")
            if key == "frechet":
                axis.set_yscale("log")
            for logarithmic in (axis.xaxis, axis.yaxis)[: 2 if key == "frechet" else 1]:
                logarithmic.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
                logarithmic.set_major_formatter(ticker.ScalarFormatter())
                logarithmic.set_minor_locator(ticker.NullLocator())
        line[0].set_ylabel(label)
    axes[1][0].set_xlabel("steps")
    axes[1][1].set_xlabel(f"seconds for {drawn[0]['batch']} images")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomically(path, data.getvalue())


def measure(diffusion: Diffusion, judged: Judge, args: argparse.Namespace) -> list[Row]:
    """Draw with each sampler and number of steps; the last row is of the real images."""
    labels, case = judged.held_out.classes, f"quality {Path(args.data).name}"
    row: Row = {"case": case, "precision": "float32", "batch": len(labels)}
    rows = []
    samplers = list(args.sampler)
    if args.diffusers:
        samplers += [theirs for theirs, ours in THEIRS.items() if ours in args.sampler]
    for sampler, scale in itertools.product(samplers, args.guidance or [None]):
        name = OURS if samplers == ["ddpm"] else sampler if sampler in THEIRS else f"{OURS} {sampler}"
        name += "" if scale is None else f", guidance {scale:g}"
        for way in ways(sampler, args.steps):
            progress(f"{case}: {name}, {way}")
            warm = way | ({} if sampler == ADAPTIVE else {"num_steps": min(2, way["num_steps"])})
            draw(diffusion, labels[: args.batch], args, sampler=sampler, guidance=scale, **warm)
            with counted(diffusion.ema_model, sampler) as images:
                start = time.perf_counter()
                x = draw(diffusion, labels, args, sampler=sampler, guidance=scale, **way)
                seconds = time.perf_counter() - start
            calls = images() / len(x) / (1 if scale is None else 2)  # of an image, in the mean
            steps = way.get("num_steps", round(calls))
            times = {"num_steps": steps, "ms": seconds * 1e3 / steps, "seconds": seconds}
            rate = {"images_per_s": len(x) / seconds}
            rows.append(row | {"name": name} | times | rate | judged.figures(x, labels))
    return [*rows, row | {"name": REAL} | judged.real()]


def ways(sampler: str, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Return the numbers of steps to take; where each image has its own number, tolerances."""
    if sampler != ADAPTIVE:
        return [{"num_steps": n} for n in steps]
    return [{"sampler_options": {"rtol": rtol, "atol": rtol / 6}} for rtol in TOLERANCES]


@contextmanager
def counted(model: nn.Module, sampler: str) -> Iterator[Callable[[], int]]:
    """Count the images that a network is called with; only where that is not known, as a hook makes it slower."""
    seen = [0]
    if sampler != ADAPTIVE:
        yield lambda: 0
        return
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    try:
        yield lambda: sum(seen)
    finally:
        handle.remove()


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status; data that isn't there is skipped, not an error."""
    args = parse(argv)
    saved = read_checkpoint(args.checkpoint or trained(args.out, args.device, LABEL_DROPOUT if args.guidance else 0.0))
    try:
        train, held_out = real_images(args.data, saved.config)
    except (FileNotFoundError, ImportError) as error:
        print(f"skipped: {error}")
        return 0
    if (*train.pixels.shape[1:],) != (saved.config.img_channels, *saved.config.img_size):
        came = list(train.pixels.shape[1:])
        raise ValueError(f"{saved.path} draws {saved.config.img_size} pixels, --data {args.data} has {came}")
    total = saved.config.num_timesteps
    args.steps = sorted({steps for steps in args.steps or (*STEPS, total) if steps <= total})
    head = header(args.device) | {"checkpoint": f"{saved.path.name}, step {saved.extra_state.get('step')}"}
    rows = measure(saved.diffusion(args.device), Judge(train, held_out, args.num), args)
    print(f"{markdown_header(head)}\n\n{markdown(rows)}\n")
    path = args.out / f"quality_{Path(args.data).name}.png"
    plot(rows, path)
    print(f"plot: {path}")
    if args.json:
        write_json(args.json, head, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
