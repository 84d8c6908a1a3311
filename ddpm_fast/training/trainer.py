"""The trainer: Adam, clipping, warm-up, EMA; a log, sample grids and checkpoints on the way; resumable."""

import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion import Diffusion
from ..engine import eval_mode
from ..models.presets import Config
from ..ops import _checks as checks
from ..progress import progress_bar
from .checkpoint import CHECKPOINT, Checkpoint, named, read_checkpoint, save_checkpoint
from .data import Batches, Images
from .extras import require
from .guards import check_fit, check_weights, finite, interruptible
from .images import grid, save_png, to_uint8, upscale_for
from .log import append_log, read_log, write_log
from .recipe import Recipe

LOG = "log.jsonl"
CPU_SAMPLE_STEPS = 100  # of a grid: all thousand would take a CPU longer than the training in between


class _Interrupted(Exception):
    """Ctrl-C came while a grid was drawn."""


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
        sample_steps: denoising steps of the grids; None: all, on a CPU at most 100.
        progress: show a progress bar.
        workers: processes that pick batches ahead of time; 0: this one, seldom slower (docs/data.md).
        origin: who trains, written into the checkpoint.

    Raises:
        ValueError, TypeError: images and model don't fit, or an argument is out of range.
        ImportError: grids were asked for without the package that writes them.
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
        workers: int = 0,
        origin: str = "train",
    ) -> None:
        self.config, self.images, self.out = config, images, Path(out)
        self.recipe, self.device, self.progress = recipe or Recipe(), torch.device(device), progress
        self.log_every = checks.integer("log_every", log_every, 0)
        self.save_every = checks.integer("save_every", save_every, 0)
        self.sample_every = checks.integer("sample_every", sample_every, 0)
        self.origin = origin
        check_fit(config, images)
        torch.manual_seed(self.recipe.seed)
        self.diffusion = Diffusion.from_config(config, seed=self.recipe.seed).to(self.device).train()
        self.optimizer = torch.optim.Adam(self.diffusion.model.parameters(), lr=self.recipe.lr, fused=True)
        self.batches = Batches(
            images, seed=self.recipe.seed, flip=self.recipe.flip, device=self.device, workers=workers
        )
        self.fingerprint = images.fingerprint()
        self.step = 0  # optimizer steps made
        self.position = 0  # images seen
        self.interrupted = False
        if sample_steps is None and self.device.type == "cpu":
            sample_steps = min(config.num_timesteps, CPU_SAMPLE_STEPS)
        if sample_steps is not None:
            checks.integer("sample_steps (--sample-steps)", sample_steps, 1, config.num_timesteps)
        self.sample_steps = len(self.diffusion.plan(num_steps=sample_steps))
        if 0 < self.sample_every <= self.recipe.steps:  # better found missing now than after hours
            require("PIL.Image")
        self._try_network()

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
        with named(checkpoint.path):
            saved, data = Recipe(**training["recipe"]), training["data"]
            step, count = checks.integer("step", training["step"], 0), checks.integer("images", data["images"], 1)
        recipe = replace(saved, **(changes or {}))
        if recipe.seed != saved.seed:
            raise ValueError(f"seed is {recipe.seed}, but the run to resume has {saved.seed}")
        if recipe.steps < step:
            raise ValueError(f"steps is {recipe.steps}, but the run to resume has made {step}: ask for more")
        try:
            check_fit(checkpoint.config, images)
        except ValueError as error:
            raise ValueError(f"{error}: give the --data, --size and --pad of the first run") from error
        trainer = cls(checkpoint.config, images, out, recipe=recipe, **options)
        if trainer.fingerprint != data:
            raise ValueError(
                f"{checkpoint.path} was trained on other images, {count} then and {len(images.pixels)} now: "
                "--data, --size and --pad must be the same as in the first run"
            )
        trainer._restore(checkpoint)
        return trainer

    def run(self, steps: int | None = None) -> None:
        """Trains until `steps` (the recipe's) are made in all, or until Ctrl-C, which sets `interrupted`; then saves.

        A new run removes what an older one left in `out`, once its own first step is made.

        Raises:
            FloatingPointError: the loss or the weights are no longer finite; the last checkpoint stays.
        """
        steps = self.recipe.steps if steps is None else checks.integer("steps", steps, 1)
        total, count, clock, saved = torch.zeros((), device=self.device), 0, time.perf_counter(), self.step
        options = {"initial": self.step, "disable": not self.progress, "unit": "step"}
        with interruptible(self), progress_bar(steps, "training", **options) as bar:
            while self.step < steps and not self.interrupted:
                total += self.train_step()
                count += 1
                bar.update()
                if self.step == 1:
                    self._start_anew()
                if self._due(self.log_every):
                    bar.set_postfix_str(self._log(total, count, time.perf_counter() - clock), refresh=False)
                    total, count, clock = torch.zeros_like(total), 0, time.perf_counter()
                if self._due(self.save_every) or self._due(self.sample_every):
                    finite(total, self.step)  # waits for the device, so that the pause is that of the rest alone
                    pause = time.perf_counter()
                    self.save()  # also before drawing, which may be long and end with a second Ctrl-C
                    saved = self.step
                    if self._due(self.sample_every):
                        self._try_to_draw()
                    clock += time.perf_counter() - pause
            if saved != self.step:
                finite(total, self.step)
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
        """Writes the checkpoint.

        Raises:
            FloatingPointError: a weight is not finite; the last checkpoint stays.
            OSError: it can't be written; the last checkpoint stays.
        """
        check_weights(self.diffusion, self.step)
        training = {
            "origin": self.origin,
            "recipe": asdict(self.recipe),
            "step": self.step,
            "position": self.position,
            "data": self.fingerprint,
        }
        if self.config.num_classes and self.images.class_names is not None:
            training["class_names"] = list(self.images.class_names)
        save_checkpoint(self.out / CHECKPOINT, self.diffusion, self.config, optimizer=self.optimizer, training=training)

    def draw(self) -> Path | None:
        """Writes a grid of samples, a row per class (at most ten) where there are classes; None after Ctrl-C."""
        rows, columns = min(self.config.num_classes or 8, 10), 8
        y = torch.arange(rows, device=self.device).repeat_interleave(columns) if self.config.num_classes else None
        # It stays hidden where a grid takes less than a second.
        options = {"leave": False, "disable": not self.progress, "unit": "step", "delay": 1}
        with progress_bar(self.sample_steps, "drawing", **options) as bar:

            def on_step(k: int, x: Tensor) -> None:
                bar.update(k + 1 - bar.n)
                if self.interrupted:
                    raise _Interrupted

            try:
                x = self.diffusion.sample(
                    rows * columns,
                    self.device,
                    y,
                    num_steps=self.sample_steps,
                    seed=self.recipe.seed,
                    callback=on_step,
                )
            except _Interrupted:
                return None
        path = self.out / f"samples-{self.step:07d}.png"
        save_png(path, grid(to_uint8(x), columns=columns, upscale=upscale_for(x.shape[2])))
        return path

    def _try_to_draw(self) -> None:
        try:
            self.draw()
        except Exception as error:  # no picture is worth the end of a run that goes well
            warnings.warn(f"no sample grid at step {self.step}: {error}", stacklevel=3)

    def _try_network(self) -> None:
        """One image through the network: what doesn't fit shows before anything is written."""
        x = torch.zeros(1, self.config.img_channels, *self.config.img_size, device=self.device)
        index = torch.zeros(1, dtype=torch.int64, device=self.device)
        with eval_mode(self.diffusion.model) as model:
            model(x, index, index if self.config.num_classes else None)

    def _start_anew(self) -> None:
        """Removes what an older run left, so that no --resume goes on from it; starts the log."""
        for path in (self.out / CHECKPOINT, *self.out.glob("samples-" + "[0-9]" * 7 + ".png")):
            path.unlink(missing_ok=True)
        write_log(self.out / LOG, [])

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log(self, total: Tensor, count: int, seconds: float) -> str:
        loss, images_per_s = finite(total, self.step) / count, count * self.recipe.batch_size / seconds
        lr = self.optimizer.param_groups[0]["lr"]
        append_log(self.out / LOG, {"step": self.step, "loss": loss, "lr": lr, "images_per_s": round(images_per_s, 1)})
        return f"loss {loss:.4f}, {images_per_s:.0f} images/s"

    def _restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.load_into(self.diffusion, self.optimizer)
        with named(checkpoint.path):
            if checkpoint.rng is not None:
                torch.set_rng_state(checkpoint.rng)
            self.step = checks.integer("step", checkpoint.training["step"], 0)
            self.position = checks.integer("position", checkpoint.training["position"], 0)
        log = self.out / LOG
        write_log(log, [line for line in read_log(log) if line["step"] <= self.step] if log.exists() else [])
