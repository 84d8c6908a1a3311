"""The demo: learns handwritten digits by class, draws some, and judges them against digits it never saw."""

import io
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .diffusion import Diffusion
from .evaluation.classifier import FEATURES, judge, train_classifier
from .evaluation.metrics import agreement, frechet_distance, nearest_distances
from .models.presets import preset
from .training.checkpoint import CHECKPOINT, read_checkpoint
from .training.data import Images, digits, stratified, to_float
from .training.extras import require
from .training.files import check_writable, write_atomically
from .training.images import Frames, grid, save_gif, save_png, to_uint8
from .training.journal import LOG
from .training.log import read_log
from .training.recipe import RECIPES
from .training.trainer import Trainer

COLUMNS = 10
ORIGIN = "demo"  # what its checkpoints say, so that the next demo may replace them


@contextmanager
def _one_thread() -> Iterator[None]:
    """8x8 images are too little work to share: two threads gain little, and on a busy machine they lose tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run(
    out: str | Path, *, steps: int | None = None, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Trains, draws and judges; prints the figures.

    Writes into `out`: samples.png, denoising.gif, loss.png, metrics.json, model.safetensors and log.jsonl.

    Args:
        out: a folder; an earlier demo in it is replaced.
        steps: of training, all it takes for good digits by default.
        seed: of training and sampling.

    Returns:
        The figures, as in metrics.json.

    Raises:
        ValueError: `out` holds a model that no demo trained, or an argument is out of range.
    """
    out = Path(out)
    check_writable(out)
    if (out / CHECKPOINT).exists() and read_checkpoint(out / CHECKPOINT).training.get("origin") != ORIGIN:
        raise ValueError(f"{out / CHECKPOINT} exists, and no demo wrote it: choose another folder (--out)")
    for package in ("PIL", "matplotlib"):  # better found missing now than after training
        require(package)
    train, held_out = digits("train"), digits("held_out")
    recipe = RECIPES["digits"]
    recipe = replace(recipe, seed=seed, steps=recipe.steps if steps is None else steps)
    print(f"training on {len(train.pixels)} real digits, {len(held_out.pixels)} more are held out")
    trainer = Trainer(preset("digits"), train, out, recipe=recipe, device=device, origin=ORIGIN)
    start = time.perf_counter()
    trainer.run()
    if trainer.interrupted:
        raise KeyboardInterrupt if trainer.interrupted == signal.SIGINT else SystemExit(128 + trainer.interrupted)
    seconds = time.perf_counter() - start
    draw(trainer.diffusion, out, seed=seed, device=device)
    plot_loss(out)
    start = time.perf_counter()
    drawn = trainer.diffusion.sample(
        len(held_out.pixels), device, held_out.classes.to(device), seed=seed + 1, progress=True
    )
    metrics = {
        "training_images_per_s": trainer.position / seconds,
        "sampling_images_per_s": len(drawn) / (time.perf_counter() - start),
        "sampling_steps": trainer.config.num_timesteps,
        **evaluate(held_out._replace(pixels=to_uint8(drawn)), train, held_out),
    }
    write_atomically(out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print(report(metrics))
    print(f"pictures: {out}/samples.png, {out}/denoising.gif, {out}/loss.png")
    return metrics


def draw(diffusion: Diffusion, out: Path, *, seed: int, device: torch.device | str) -> None:
    """Writes samples.png, a class per row, and denoising.gif, how they came about."""
    y = torch.arange(10, device=device).repeat_interleave(COLUMNS)
    frames = Frames(diffusion.num_timesteps, count=40)
    x = diffusion.sample(len(y), device, y, seed=seed, callback=frames)
    save_png(out / "samples.png", grid(to_uint8(x), columns=COLUMNS, upscale=6))
    save_gif(out / "denoising.gif", frames.grids(columns=COLUMNS, upscale=4))


def plot_loss(out: Path) -> None:
    """Writes loss.png from the log."""
    log = read_log(out / LOG)
    figure = require("matplotlib.figure").Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in log], [line["loss"] for line in log])
    axes.set(xlabel="training step", ylabel="loss (mean squared error)", ylim=(0, None))
    axes.grid(alpha=0.3)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomically(out / "loss.png", data.getvalue())


def evaluate(drawn: Images, train: Images, held_out: Images) -> dict[str, float]:
    """Judges images drawn for the classes `drawn.labels` by a classifier that saw real digits only.

    Every set compared by Frechet distance has as many images as `held_out`, because the distance depends on it.
    """
    x, x_train, x_held_out = (to_float(images.pixels) for images in (drawn, train, held_out))
    classifier = train_classifier(x_train, train.classes, num_classes=10)
    (features, logits), (held_features, held_logits) = judge(classifier, x), judge(classifier, x_held_out)
    nearest, held_nearest = nearest_distances(x, x_train), nearest_distances(x_held_out, x_train)
    return {
        "class_share": agreement(logits, drawn.classes),
        "class_share_held_out": agreement(held_logits, held_out.classes),
        "frechet": frechet_distance(features, held_features),
        "frechet_real_halves": frechet_distance(*_halves(train, held_out, classifier)),
        "nearest_median": float(nearest.median()),
        "nearest_median_held_out": float(held_nearest.median()),
        "nearest_1_percent": float(nearest.quantile(0.01)),
        "nearest_1_percent_held_out": float(held_nearest.quantile(0.01)),
    }


def _halves(train: Images, held_out: Images, classifier: Any) -> tuple[Tensor, Tensor]:
    """Features of two random halves of all real digits, cut to the size of `held_out`."""
    everything = Images(torch.cat([train.pixels, held_out.pixels]), torch.cat([train.classes, held_out.classes]))
    mask = stratified(everything, 0.5, seed=0)
    features, _ = judge(classifier, to_float(everything.pixels))
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    features, mask = features[order], mask[order]
    return features[mask][: len(held_out.pixels)], features[~mask][: len(held_out.pixels)]


def report(metrics: dict[str, Any]) -> str:
    """The figures as a table."""
    m, unseen = metrics, "held-out digits"
    rows = (
        ("share the classifier gives the class asked for", "class_share", "class_share_held_out", unseen),
        (
            f"Frechet distance, the classifier's {FEATURES} features",
            "frechet",
            "frechet_real_halves",
            "two real halves",
        ),
        ("distance to the nearest training digit, median", "nearest_median", "nearest_median_held_out", unseen),
        ("  and of the nearest 1 %", "nearest_1_percent", "nearest_1_percent_held_out", unseen),
    )
    lines = [
        f"training {m['training_images_per_s']:,.0f} images/s, "
        f"sampling {m['sampling_images_per_s']:,.1f} images/s at {m['sampling_steps']} steps each",
        f"{'':<48}   drawn    real",
        *(f"{text:<48} {m[drawn]:7.3f} {m[real]:7.3f}  ({what})" for text, drawn, real, what in rows),
        "(distances: root mean square per pixel, black to white is 2)",
    ]
    return "\n".join(lines)
