"""The trainer: Adam, clipping, warm-up, EMA; a log, sample grids and checkpoints on the way; resumable."""

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion import Diffusion
from ..models.presets import Config
from ..progress import progress_bar
from .checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from .data import Batches, Images
from .images import grid, save_png, to_uint8, upscale_for

CHECKPOINT, LOG = "model.safetensors", "log.jsonl"


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; saved with every checkpoint."""

    steps: int = 20_000  # optimizer steps in all
    batch_size: int = 128
    lr: float = 2e-4
    warmup: int = 500  # steps over which lr rises linearly from 0
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    flip: bool = False  # mirror images at random
    bf16: bool = False  # autocast to bfloat16
    seed: int = 0  # of initial weights, data order and noise

    def __post_init__(self) -> None:
        for name, smallest in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("clip", 0), ("seed", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {smallest}")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr is {self.lr}, expected between 0 and 1, for example 2e-4")


RECIPES = {
    "cifar10": Recipe(),
    "digits": Recipe(steps=1800, batch_size=64, lr=1e-3, warmup=100),
}


class Trainer:
    """Trains a `Diffusion` on images held in memory.

    Writes into `out`: `model.safetensors` (the latest checkpoint), `log.jsonl` (a line per log interval: step, loss
    averaged over the interval, lr, images_per_s) and `samples-<step>.png` (always the same noise and classes).

    Args:
        config: what to build.
        images: what to train on, of the size and channels `config` says.
        out: folder to write into.
        recipe: how to train.
        device: where.
        log_every, save_every, sample_every: steps between log lines, checkpoints, sample grids; 0: never
            (a checkpoint is always written at the end).
        sample_steps: denoising steps of the grids; None: all.
        progress: show a progress bar.
    """

    def __init__(
        self,
        config: Config,
        images: Images,
        out: str | Path,
        *,
        recipe: Recipe | None = None,
        device: torch.device | str = "cpu",
        log_every: int = 50,
        save_every: int = 1000,
        sample_every: int = 0,
        sample_steps: int | None = None,
        progress: bool = True,
    ) -> None:
        self.config, self.images, self.out = config, images, Path(out)
        self.recipe, self.device, self.progress = recipe or Recipe(), torch.device(device), progress
        self.log_every, self.save_every, self.sample_every = log_every, save_every, sample_every
        self.sample_steps = sample_steps
        _check_fit(config, images)
        torch.manual_seed(self.recipe.seed)
        self.diffusion = Diffusion.from_config(config, seed=self.recipe.seed).to(self.device).train()
        self.optimizer = torch.optim.Adam(self.diffusion.model.parameters(), lr=self.recipe.lr, fused=True)
        self.batches = Batches(images, seed=self.recipe.seed, flip=self.recipe.flip, device=self.device)
        self.fingerprint = images.fingerprint()
        self.step = 0  # optimizer steps made
        self.position = 0  # images seen
        self.interrupted = False

    @classmethod
    def resume(
        cls, images: Images, out: str | Path, *, changes: dict[str, Any] | None = None, **options: Any
    ) -> "Trainer":
        """Goes on from the checkpoint in `out` as if training had never stopped.

        Args:
            images: the same as before.
            changes: fields of the recipe to change from here on; not the seed.
            options: `device`, intervals and so on, as for `Trainer`.
        """
        checkpoint = read_checkpoint(Path(out) / CHECKPOINT)
        training = checkpoint.training
        if "recipe" not in training:
            raise ValueError(f"{checkpoint.path} wasn't written by the trainer: it can't be resumed")
        recipe = replace(Recipe(**training["recipe"]), **(changes or {}))
        if recipe.seed != training["recipe"]["seed"]:
            raise ValueError(f"seed is {recipe.seed}, but the run to resume has {training['recipe']['seed']}")
        trainer = cls(checkpoint.config, images, out, recipe=recipe, **options)
        if trainer.fingerprint != training["data"]:
            came, expected = trainer.fingerprint, training["data"]
            raise ValueError(f"{checkpoint.path} was trained on other images: expected {expected}, got {came}")
        trainer._restore(checkpoint)
        return trainer

    def run(self, steps: int | None = None) -> None:
        """Trains until `steps` (the recipe's) are made in all, or until Ctrl-C, which sets `interrupted`; then saves.

        Raises:
            FloatingPointError: the loss is no longer finite; the last checkpoint stays.
        """
        steps = self.recipe.steps if steps is None else steps
        self.out.mkdir(parents=True, exist_ok=True)
        if self.step == 0:
            (self.out / LOG).write_text("")
        total, count, clock = torch.zeros((), device=self.device), 0, time.perf_counter()
        options = {"initial": self.step, "disable": not self.progress, "unit": "step"}
        with _interruptible(self), progress_bar(steps, "training", **options) as bar:
            while self.step < steps and not self.interrupted:
                total += self.train_step()
                count += 1
                bar.update()
                if self._due(self.log_every):
                    bar.set_postfix_str(self._log(total, count, time.perf_counter() - clock), refresh=False)
                    total, count, clock = torch.zeros_like(total), 0, time.perf_counter()
                if self._due(self.save_every) and self.step < steps:
                    _finite(total, self.step)
                    self.save()
                if self._due(self.sample_every):
                    self.draw()
        _finite(total, self.step)
        self.save()

    def train_step(self) -> Tensor:
        """One optimizer step; returns the loss, still on the device: nothing here waits for it."""
        recipe = self.recipe
        x, y = self.batches.take(self.position, recipe.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (self.step + 1) / max(1, recipe.warmup))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
            loss = self.diffusion(x, y if self.config.num_classes else None)
        self.optimizer.zero_grad()
        loss.backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.diffusion.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.diffusion.update_ema()
        self.step += 1
        self.position += recipe.batch_size
        return loss.detach()

    def save(self) -> None:
        """Writes the checkpoint."""
        training = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "position": self.position,
            "data": self.fingerprint,
        }
        save_checkpoint(self.out / CHECKPOINT, self.diffusion, self.config, optimizer=self.optimizer, training=training)

    def draw(self) -> Path:
        """Writes a grid of samples, a row per class (at most ten) where there are classes."""
        rows, columns = min(self.config.num_classes or 8, 10), 8
        y = torch.arange(rows, device=self.device).repeat_interleave(columns) if self.config.num_classes else None
        x = self.diffusion.sample(rows * columns, self.device, y, num_steps=self.sample_steps, seed=self.recipe.seed)
        path = self.out / f"samples-{self.step:07d}.png"
        save_png(path, grid(to_uint8(x), columns=columns, upscale=upscale_for(x.shape[2])))
        return path

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log(self, total: Tensor, count: int, seconds: float) -> str:
        loss, images_per_s = _finite(total, self.step) / count, count * self.recipe.batch_size / seconds
        lr = self.optimizer.param_groups[0]["lr"]
        line = {"step": self.step, "loss": loss, "lr": lr, "images_per_s": round(images_per_s, 1)}
        with open(self.out / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return f"loss {loss:.4f}, {images_per_s:.0f} images/s"

    def _restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.load_into(self.diffusion, self.optimizer)
        if checkpoint.rng is not None:
            torch.set_rng_state(checkpoint.rng)
        self.step, self.position = checkpoint.training["step"], checkpoint.training["position"]
        log = self.out / LOG
        kept = [line for line in read_log(log) if line["step"] <= self.step] if log.exists() else []
        log.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The lines of a `log.jsonl`."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _finite(total: Tensor, step: int) -> float:
    value = float(total)
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at step {step}: try a lower lr, or without bf16")
    return value


def _check_fit(config: Config, images: Images) -> None:
    expected = (config.img_channels, *config.img_size)
    if tuple(images.pixels.shape[1:]) != expected:
        raise ValueError(f"images are {tuple(images.pixels.shape[1:])} (C, H, W), the model expects {expected}")
    if config.num_classes is None:
        return
    if images.labels is None:
        raise ValueError(f"the model has {config.num_classes} classes, but the images have no labels")
    if int(images.labels.max()) >= config.num_classes:
        raise ValueError(f"label {int(images.labels.max())} is too large for num_classes = {config.num_classes}")


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C lets the step finish; the second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        trainer.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
