"""The trainer: Adam, clipping, warm-up, EMA; a log, sample grids and checkpoints on the way; resumable."""

import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion import Diffusion
from ..models.presets import Config
from ..objectives import LossSecondMoment
from ..ops import _checks as checks
from ..progress import progress_bar
from .checkpoint import CHECKPOINT, Checkpoint, named, read_checkpoint, save_checkpoint
from .data import Batches, Images
from .diagnosis import explain
from .extras import require
from .files import remove_leftovers
from .grids import draw_grid
from .guards import check_fit, check_same, check_weights, interruptible, try_network
from .holdout import holdout_loss, split
from .journal import Journal
from .keep import Keeper
from .recipe import Recipe
from .step import TrainStep
from .watch import Watch

OWN = r"(model(-\d+)?|best)\.safetensors|log\.jsonl|samples-\d+\.png"  # the files a run writes
CPU_SAMPLE_STEPS = 100  # of a grid: all thousand would take a CPU longer than the training in between


class Trainer:
    """Trains a `Diffusion` on images held in memory.

    Writes into `out`: `model.safetensors` (the latest checkpoint), `log.jsonl` (a line per log interval, see
    `docs/training.md`) and `samples-<step>.png` (always the same noise and classes).

    Args:
        config: what to build.
        images: what to train on, of the size and channels `config` says.
        out: folder to write into.
        recipe: how to train.
        device: where.
        log_every, save_every, sample_every: steps between log lines, checkpoints, sample grids; 0: never
            (a checkpoint is always written at the end).
        keep: keep the last so many checkpoints as `model-<step>.safetensors`, and the best as `best.safetensors`.
        sample_steps: denoising steps of the grids; None: all, on a CPU at most 100.
        tensorboard: write the log's numbers as TensorBoard events too.
        progress: show a progress bar.
        workers: processes that pick batches ahead of time; 0: this one, seldom slower (docs/data.md).
        origin: who trains, written into the checkpoint.

    Raises:
        ValueError, TypeError: images and model don't fit, or an argument is out of range.
        ImportError: grids or events were asked for without the package that writes them.
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
        keep: int = 0,
        tensorboard: bool = False,
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
        network: Any = self.diffusion.model
        network.recompute = self.recipe.recompute
        self.optimizer = torch.optim.Adam(self.diffusion.model.parameters(), lr=self.recipe.lr, fused=True)
        seen, self.held_out = split(images, self.recipe.holdout, self.recipe.seed)
        recipe, dtype = self.recipe, torch.bfloat16 if self.recipe.bf16 else None
        self.batches = Batches(seen, seed=recipe.seed, flip=recipe.flip, device=self.device, workers=workers)
        self.fingerprint = images.fingerprint()
        self.step = 0  # optimizer steps made
        self.position = 0  # images seen
        self.interrupted = 0  # the signal that stopped it
        self.watch = Watch(config.num_timesteps, self.device)
        self._step = TrainStep(
            self.diffusion,
            self.optimizer,
            clip=recipe.clip or None,
            accumulate=recipe.accumulate,
            dtype=dtype,
            observer=self.watch.observe,
            check=self.watch.add,
        )
        if isinstance(self.diffusion.timestep_sampler, LossSecondMoment):
            self.diffusion.timestep_sampler.held = self.watch.failed  # so that a failed step can be made again
        keep = checks.integer("keep", keep, 0)
        self.keeper = Keeper(self.out / CHECKPOINT, keep, best=keep > 0 or self.held_out is not None)
        self.journal = Journal(self.out, tensorboard=checks.flag("tensorboard", tensorboard))
        if sample_steps is None and self.device.type == "cpu":
            sample_steps = min(config.num_timesteps, CPU_SAMPLE_STEPS)
        if sample_steps is not None:
            checks.integer("sample_steps (--sample-steps)", sample_steps, 1, config.num_timesteps)
        self.sample_steps = len(self.diffusion.plan(num_steps=sample_steps))
        if 0 < self.sample_every <= self.recipe.steps:  # better found missing now than after hours
            require("PIL.Image")
        try_network(self.diffusion, self.device)

    @classmethod
    def resume(
        cls, images: Images, out: str | Path, *, changes: dict[str, Any] | None = None, **options: Any
    ) -> "Trainer":
        """Goes on from the checkpoint in `out` as if training had never stopped.

        Args:
            images: the same as before.
            changes: fields of the recipe to change from here on; not the seed, nor what is held out.
            options: `device`, intervals and so on, as for `Trainer`.
        """
        checkpoint = read_checkpoint(Path(out) / CHECKPOINT)
        training = checkpoint.training
        if "recipe" not in training:
            raise ValueError(f"{checkpoint.path} wasn't written by the trainer: it can't be resumed")
        with named(checkpoint.path):
            saved = Recipe(**training["recipe"])
            step = checks.integer("step", training["step"], 0)
        recipe = saved.resumed(step, changes or {})
        check_same(checkpoint, images)
        trainer = cls(checkpoint.config, images, out, recipe=recipe, **options)
        trainer._restore(checkpoint)
        return trainer

    def run(self, steps: int | None = None) -> None:
        """Trains until `steps` (the recipe's) are made in all, or Ctrl-C or SIGTERM sets `interrupted`; then saves.

        A new run removes what an older one left in `out`, once its own first step is made. A checkpoint that can't be
        written on the way is a warning, and tried again when the next one is due.

        Raises:
            FloatingPointError: the loss, the gradient or the weights are no longer finite; the last checkpoint stays.
            OSError: the last checkpoint can't be written; the one before stays.
        """
        steps = self.recipe.steps if steps is None else checks.integer("steps", steps, 1)
        remove_leftovers(self.out, OWN)
        saved, self.interrupted = self.step, 0
        self.journal.start()
        options = {"initial": self.step, "disable": not self.progress, "unit": "step"}
        with interruptible(self), progress_bar(steps, "training", **options) as bar:
            while self.step < steps and not self.interrupted:
                self.train_step()
                self.journal.count(self.recipe.batch_size)
                bar.update()
                if self.step == 1:
                    self._check()
                    self._start_anew()
                saving = self._due(self.save_every) or self._due(self.sample_every)
                if saving:
                    self._mark()
                if self._due(self.log_every):
                    bar.set_postfix_str(self._write_line(), refresh=False)
                if saving:
                    with self.journal.paused():
                        saved = self._try_to_save(saved)  # also before drawing, which may be long and be interrupted
                        if self._due(self.sample_every):
                            self._try_to_draw()
            if saved != self.step:
                self._check()
                if self.step == steps and self.keeper.marked != steps:
                    self._mark()
                self.save()

    def train_step(self) -> Tensor:
        """One optimizer step; returns the loss, still on the device: nothing here waits for it.

        A step whose loss or gradient isn't finite, and those after it, change no weights; `run` finds out when it logs
        or saves.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * min(1.0, (self.step + 1) / max(1, self.recipe.warmup))
        loss = self._step(*self._batch(self.position))
        self.watch.count += 1
        self.step += 1
        self.position += self.recipe.batch_size
        return loss

    def _batch(self, position: int) -> tuple[Tensor, Tensor | None]:
        x, y = self.batches.take(position, self.recipe.batch_size)
        return x, y if self.config.num_classes is not None else None

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
            "watch": self.watch.state(),
            "keep": self.keeper.state(),
        }
        if self.config.num_classes and self.images.class_names is not None:
            training["class_names"] = list(self.images.class_names)
        path, optimizer = self.out / CHECKPOINT, self.optimizer
        with self.keeper.saving(self.step):
            save_checkpoint(path, self.diffusion, self.config, optimizer=optimizer, training=training)

    def draw(self) -> Path | None:
        """Writes a grid of samples, a row per class (at most ten) where there are classes; None after Ctrl-C."""
        return draw_grid(
            self.diffusion,
            self.out / f"samples-{self.step:07d}.png",
            num_steps=self.sample_steps,
            seed=self.recipe.seed,
            device=self.device,
            stop=lambda: self.interrupted,
            progress=self.progress,
        )

    def _try_to_save(self, saved: int) -> int:
        """The step of the last checkpoint: this one, or `saved` where it can't be written."""
        try:
            self.save()
        except OSError as error:
            warnings.warn(f"no checkpoint at step {self.step}: {error}; training goes on", stacklevel=3)
            return saved
        return self.step

    def _try_to_draw(self) -> None:
        try:
            self.draw()
        except Exception as error:  # no picture is worth the end of a run that goes well
            warnings.warn(f"no sample grid at step {self.step}: {error}", stacklevel=3)

    def _start_anew(self) -> None:
        """Removes what an older run left, so that no --resume goes on from it; starts the log."""
        for path in (self.out / CHECKPOINT, *self.out.glob("samples-" + "[0-9]" * 7 + ".png")):
            path.unlink(missing_ok=True)
        self.keeper.clear()
        self.journal.clear()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _mark(self) -> None:
        """Weighs the checkpoint that comes next."""
        self._check()  # waits for the device, so that the pause is that of the rest alone
        with self.journal.paused():
            loss = float(self.watch.smooth)
            if self.held_out is not None:
                loss = self.watch.holdout = holdout_loss(self.diffusion, self.held_out, self.recipe, self.device)
            self.keeper.mark(self.step, loss)

    def _check(self) -> None:
        """Raise FloatingPointError if a step since the last look wasn't finite; it is made once more to say why."""
        failed = self.watch.first_failure(self.step)
        if failed is not None:
            back = self.step - failed + 1
            position = self.position - back * self.recipe.batch_size
            self.diffusion.calls -= back * self.recipe.accumulate
            x, y = self._batch(position)
            losses = partial(self._step.losses, x, (y, None))
            raise FloatingPointError(explain(self.diffusion, failed, losses))

    def _write_line(self) -> str:
        self._check()
        start = {"step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        return self.journal.write(start | self.watch.line(), self.device)

    def _restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.load_into(self.diffusion, self.optimizer)
        with named(checkpoint.path):
            if checkpoint.rng is not None:
                torch.set_rng_state(checkpoint.rng)
            training = checkpoint.training
            self.step = checks.integer("step", training["step"], 0)
            self.position = checks.integer("position", training["position"], 0)
            if "watch" in training:  # of a file written before there was a watch, nothing is missing
                self.watch.load(training["watch"], self.step)
                self.keeper.load(training["keep"])
        self.keeper.keep(self.step)
        self.journal.cut(self.step)
