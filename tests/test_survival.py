"""What can go wrong in a run: it is stopped, the disk is full, numbers break; and what is kept of it."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import TINY

from ddpm_fast import Diffusion
from ddpm_fast.models.presets import Config
from ddpm_fast.ops import NoiseState
from ddpm_fast.training import files, log
from ddpm_fast.training.checkpoint import read_checkpoint
from ddpm_fast.training.data import Images, to_float
from ddpm_fast.training.holdout import holdout_loss, split
from ddpm_fast.training.keep import kept
from ddpm_fast.training.log import read_log
from ddpm_fast.training.recipe import Recipe
from ddpm_fast.training.trainer import Trainer

RECIPE = Recipe(batch_size=16, lr=2e-3, warmup=4, flip=True, seed=1)
TRAIN = (
    "train --preset digits --base-channels 8 --num-timesteps 20 --batch 8 --log-every 1 --sample-every 0 --device cpu"
)


def images(count: int = 70) -> Images:
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 5)


def trainer(out: Path, config: Config = TINY, **options) -> Trainer:
    options = {"recipe": RECIPE, "progress": False, "log_every": 3, "save_every": 2} | options
    return Trainer(config, images(), out, **options)


def resumed(out: Path, **options) -> Trainer:
    return Trainer.resume(images(), out, progress=False, **{"log_every": 3, "save_every": 2} | options)


def without_clock(path: Path) -> list[dict]:
    clocked = ("images_per_s", "peak_memory_mb")
    return [{name: value for name, value in line.items() if name not in clocked} for line in read_log(path)]


def gradients(t: Trainer) -> list[torch.Tensor]:
    return [p.grad for p in t.diffusion.model.parameters() if p.grad is not None]


# Resuming


def test_every_step_may_be_the_last_one_before_a_resume(tmp_path: Path) -> None:
    options = {"keep": 2, "recipe": replace(RECIPE, steps=8, accumulate=2, holdout=0.1)}
    trainer(tmp_path / "whole", **options).run()
    run = trainer(tmp_path / "parts", **options)
    for stop in range(1, 9):
        step = run.train_step
        run.train_step = lambda step=step: (step(), os.kill(os.getpid(), signal.SIGINT))
        run.run()
        assert run.interrupted and run.step == stop
        run = resumed(tmp_path / "parts", keep=2) if stop < 8 else run
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {p.name for p in (tmp_path / "parts").iterdir()}
    lines = without_clock(tmp_path / "whole" / "log.jsonl")
    assert lines == without_clock(tmp_path / "parts" / "log.jsonl") and [line["step"] for line in lines] == [3, 6]


def test_accumulated_gradients_are_those_of_the_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, dropout=0.0)
    recipe = replace(RECIPE, clip=0, accumulate=4)
    t, calls = trainer(tmp_path, config, recipe=recipe), []
    forward = Diffusion.forward
    monkeypatch.setattr(Diffusion, "forward", lambda self, x, y: (calls.append((x, y)), forward(self, x, y))[1])
    before = {name: value.clone() for name, value in t.diffusion.state_dict().items()}
    loss, ours = t.train_step(), gradients(t)
    x, y = t.batches.take(0, 16)
    assert torch.equal(torch.cat([x for x, _ in calls]), x) and torch.equal(torch.cat([y for _, y in calls]), y)
    assert [len(x) for x, _ in calls] == [4] * 4 and t.position == 16 and t.diffusion.calls == 4
    # Once more by hand: part k is forward call k + 1, in float64.
    other = Diffusion.from_config(config, seed=1).double()
    other.load_state_dict(before, step=0)
    other.calls = 0
    expected = sum(other(x[k : k + 4].double(), y[k : k + 4]) for k in range(0, 16, 4)) / 4
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    theirs = [p.grad for p in other.model.parameters() if p.grad is not None]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="batch_size 16 can't be done in 3 equal parts"):
        replace(RECIPE, accumulate=3)


def test_sigterm_saves_and_ends_with_143(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddpm_fast", *TRAIN.split(), "--steps", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (path := tmp_path / "log.jsonl").exists() or not path.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    said = [line for line in errors.splitlines() if line.startswith("ddpm-fast:")]
    assert said == ["ddpm-fast: stopped by SIGTERM; the same command with --resume goes on"] and "Trace" not in errors
    step = read_checkpoint(tmp_path / "model.safetensors").training["step"]
    assert f"step {step}: saved" in printed and read_log(path)[-1]["step"] == step


def test_a_killed_write_leaves_nothing_behind_for_long(tmp_path: Path) -> None:
    trainer(tmp_path).run(2)
    ours = [
        ".model.safetensors.1.tmp",
        ".model-0000002.safetensors.7.tmp",
        ".log.jsonl.99.tmp",
        ".best.safetensors.3.tmp",
    ]
    others = [".grid.png.12.tmp", ".model.safetensors.tmp", "model.safetensors.1.tmp"]
    for name in (*ours, *others):
        (tmp_path / name).write_bytes(b"part")
    resumed(tmp_path).run(3)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")) == sorted(others)


# A full disk


def test_a_checkpoint_that_does_not_fit_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(tmp_path, keep=1)
    losses = iter([3.0, 1.0, 1.5, 2.0])  # the best two are those that don't fit
    monkeypatch.setattr(t, "_mark", lambda: t.keeper.mark(t.step, next(losses)))
    t.run(2)
    full = True

    def fsync(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.warns(UserWarning, match=r"no checkpoint at step 4: .*No space left.*; training goes on"):
        with pytest.raises(OSError, match=r"model\.safetensors can't be written: No space left on device"):
            t.run(5)
    assert t.step == 5 and (tmp_path / "model.safetensors").read_bytes() == before
    assert [p.name for p in kept(tmp_path)] == ["model-0000002.safetensors"]
    full = False
    t.run(6)
    assert read_checkpoint(tmp_path / "model.safetensors").training["step"] == 6
    whole = trainer(tmp_path / "whole", keep=1)
    whole.run(6)
    assert torch.equal(t.train_step(), whole.train_step())
    best = read_checkpoint(tmp_path / "best.safetensors").training
    assert best["step"] == 6 and best["keep"]["best"] == t.keeper.record == {"step": 6, "loss": 2.0}


def test_a_file_limit_is_a_full_disk(tmp_path: Path) -> None:
    t = trainer(tmp_path, log_every=1)
    t.run(2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "log.jsonl").stat().st_size
    before = (tmp_path / "model.safetensors").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))  # the next line fits in part
    try:
        with pytest.warns(UserWarning) as said, pytest.raises(OSError, match="model.safetensors can't be written"):
            t.run(5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sum("log.jsonl can't be written" in str(w.message) for w in said) == 3
    assert (tmp_path / "model.safetensors").read_bytes() == before and (tmp_path / "log.jsonl").stat().st_size == size
    t.run(6)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6] and len(lines) == 6
    assert not list(tmp_path.glob(".*"))


def test_a_log_that_cannot_be_opened_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(tmp_path, log_every=1, save_every=0)
    t.run(1)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log, "open", refuse, raising=False)
        with pytest.warns(UserWarning, match=r"log\.jsonl can't be written: No space left"):
            t.run(3)
    t.run(4)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]


# What is kept


@pytest.mark.parametrize("links", [True, False])
def test_the_last_and_the_best_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(files.os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no hard links")))
    t = trainer(tmp_path, keep=2)
    losses = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(t, "_mark", lambda: t.keeper.mark(t.step, next(losses)))
    t.run(8)
    assert [p.name for p in kept(tmp_path)] == ["model-0000006.safetensors", "model-0000008.safetensors"]
    for path, step in zip((*kept(tmp_path), tmp_path / "best.safetensors"), (6, 8, 4), strict=True):
        assert read_checkpoint(path).training["step"] == step
    assert kept(tmp_path)[-1].samefile(tmp_path / "model.safetensors") == links
    kept(tmp_path)[-1].unlink()  # as if killed between the save and the link
    t = resumed(tmp_path, keep=2)
    assert [p.name for p in kept(tmp_path)] == ["model-0000006.safetensors", "model-0000008.safetensors"]
    assert t.keeper.record == {"step": 4, "loss": 1.0}
    monkeypatch.setattr(t, "_mark", lambda: t.keeper.mark(t.step, 1.2))
    t.run(10)
    assert read_checkpoint(tmp_path / "best.safetensors").training["step"] == 4
    trainer(tmp_path).run(1)  # a new run
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "model.safetensors"]


def test_without_held_out_images_the_running_loss_judges(tmp_path: Path) -> None:
    t, smooth = trainer(tmp_path, keep=1), 0.0
    t.run(4)
    again = trainer(tmp_path / "again")
    for step in range(1, 5):
        smooth += (float(again.train_step()) - smooth) / step
    assert read_checkpoint(tmp_path / "model.safetensors").training["watch"]["smooth"] == pytest.approx(
        smooth, rel=1e-5
    )
    assert t.keeper.record["loss"] <= smooth * (1 + 1e-5)


def test_held_out_images_are_not_trained_on(tmp_path: Path) -> None:
    data = images()
    seen, held = split(data, 0.2, seed=1)
    rows = lambda x: {tuple(row.flatten().tolist()) for row in x}  # noqa: E731
    assert len(held.pixels) == 14 and not rows(seen.pixels) & rows(held.pixels)
    assert rows(seen.pixels) | rows(held.pixels) == rows(data.pixels)
    t = trainer(tmp_path, recipe=replace(RECIPE, holdout=0.2))
    assert torch.equal(t.batches.pixels, seen.pixels) and torch.equal(t.held_out.labels, held.labels)
    with pytest.raises(ValueError, match=r"holdout 0.001 of 70 images is 0: expected 1 to 69"):
        trainer(tmp_path, recipe=replace(RECIPE, holdout=0.001))
    with pytest.raises(ValueError, match="holdout must lie in"):
        replace(RECIPE, holdout=1)
    t.run(2)
    with pytest.raises(ValueError, match="holdout is 0.5, but the run to resume has 0.2"):
        resumed(tmp_path, changes={"holdout": 0.5})


def test_the_held_out_loss_is_that_of_the_average_at_fixed_noise(tmp_path: Path) -> None:
    t = trainer(tmp_path, recipe=replace(RECIPE, holdout=0.3), log_every=1)
    t.run(4)
    held, calls = t.held_out, t.diffusion.calls
    value = holdout_loss(t.diffusion, held, t.recipe, t.device)
    state = NoiseState.at(1, 0, 0, "cpu")
    steps = torch.tensor([int((i + 0.5) * 20 / 21) for i in range(21)])
    t.diffusion.ema_model.eval()
    with torch.no_grad():
        expected = t.diffusion.loss_of(t.diffusion.ema_model, to_float(held.pixels), steps, held.labels, state)
    assert value == pytest.approx(float(expected), rel=1e-5) and t.diffusion.calls == calls
    lines = read_log(tmp_path / "log.jsonl")
    assert [("holdout_loss" in line) for line in lines] == [False, True, False, True]
    assert lines[-1]["holdout_loss"] == value and t.keeper.record["loss"] == min(lines[1]["holdout_loss"], value)


# Numbers that break


def test_a_failed_step_and_those_after_it_change_nothing(tmp_path: Path) -> None:
    t = trainer(tmp_path, log_every=100, save_every=0)
    for _ in range(3):
        t.train_step()
    before = {name: value.clone() for name, value in t.diffusion.model.state_dict().items()}
    state = {k: {n: v.clone() for n, v in e.items()} for k, e in t.optimizer.state_dict()["state"].items()}
    take = t.batches.take
    t.batches.take = lambda p, n: (take(p, n)[0] * (torch.inf if p == 48 else 1), take(p, n)[1])
    for _ in range(3):
        t.train_step()
    assert all(torch.equal(value, before[name]) for name, value in t.diffusion.model.state_dict().items())
    for k, entries in t.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[k][name]) for name, value in entries.items())
    with pytest.raises(FloatingPointError, match="at step 4 "):
        t.run(10)


def test_a_run_whose_first_step_breaks_leaves_the_old_one(tmp_path: Path) -> None:
    trainer(tmp_path, keep=1).run(2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    t = trainer(tmp_path, log_every=100)
    with torch.no_grad():
        t.diffusion.model.out_conv.bias.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"at step 1 \(16 of 16 .* of out_conv, and the weight out_conv.bias"):
        t.run(4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def broken(t: Trainer, name: str, step: int, images: slice = slice(None)) -> list[torch.Tensor]:
    """From `step` on, the output of a layer overflows for some images; returns the timesteps of each call."""
    layer, seen = t.diffusion.model.get_submodule(name), []
    forward, observer = layer.forward, t.diffusion.observer
    t.diffusion.observer = lambda t, losses: (seen.append(t), observer(t, losses))

    def overflowing(*args):
        out = forward(*args)
        if t.step + 1 >= step or getattr(t, "again", False):
            out = out.clone()
            out[images] = torch.inf
        return out

    layer.forward = overflowing
    return seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_bad_step_layer_and_timesteps_are_named(tmp_path: Path, accumulate: int) -> None:
    t = trainer(tmp_path, log_every=100, save_every=5, recipe=replace(RECIPE, accumulate=accumulate))
    t.run(5)
    before = (tmp_path / "model.safetensors").read_bytes()
    seen = broken(t, "mid.1.conv_1", 8, slice(2, 5))
    with pytest.raises(FloatingPointError) as error:
        t.run(20)
    assert t.step == 10  # where it was found
    parts = seen[2 * accumulate : 3 * accumulate]  # of step 8: the third after step 5
    bad = torch.cat([part[2:5] for part in parts])
    where = f"{len(bad)} of 16 images, at timesteps {int(bad.min())} to {int(bad.max())} of 20"
    assert f"at step 8 ({where}); the first output not finite is that of mid.1.conv_1: try" in str(error.value)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not any(module._forward_hooks for module in t.diffusion.model.modules())


def test_a_gradient_that_overflows_is_named(tmp_path: Path) -> None:
    t = trainer(tmp_path, log_every=4)
    t.run(2)
    weight = t.diffusion.model.out_conv.weight
    weight.register_hook(lambda grad: grad * torch.inf if t.step >= 2 else grad)
    with pytest.raises(
        FloatingPointError, match="gradient is not finite at step 3, first that of out_conv.weight: try"
    ):
        t.run(8)
    assert read_checkpoint(tmp_path / "model.safetensors").training["step"] == 2


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.interrupted = signal.SIGINT  # as the call before it left it
    run.run(2)
    assert run.step == 2 and not run.interrupted
