"""The trainer: it learns, it writes what it says, and a resumed run equals an uninterrupted one bit for bit."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.models.presets import Config
from ddpm_fast.training.data import Batches, Images, digits
from ddpm_fast.training.trainer import Recipe, Trainer, read_log

TINY = Config(
    img_size=(8, 8),
    img_channels=1,
    num_classes=10,
    base_channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    time_emb_dim=16,
    num_groups=4,
    num_timesteps=20,
    schedule="cosine",
    ema_decay=0.9,
    ema_start=3,
)
RECIPE = Recipe(batch_size=16, lr=2e-3, warmup=4, flip=True, seed=1)


def trainer(out: Path, images: Images | None = None, config: Config = TINY, **options) -> Trainer:
    options = {"recipe": RECIPE, "progress": False, "log_every": 5, "save_every": 0} | options
    return Trainer(config, images or digits(), out, **options)


def assert_same_state(a: Trainer, b: Trainer) -> None:
    assert (a.step, a.position) == (b.step, b.position)
    assert a.diffusion.extra_state() == b.diffusion.extra_state()
    expected = b.diffusion.state_dict()
    for name, value in a.diffusion.state_dict().items():
        assert torch.equal(value, expected[name]), name
    ours, theirs = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, entries in theirs.items():
        assert all(torch.equal(ours[index][name], value) for name, value in entries.items())


def test_it_learns_and_logs(tmp_path: Path) -> None:
    t = trainer(tmp_path, log_every=20)
    t.run(60)
    log = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in log] == [20, 40, 60]
    assert log[-1]["loss"] < 0.6 * log[0]["loss"] < 1.0
    assert all(line["images_per_s"] > 0 and line["lr"] == 2e-3 for line in log)


def test_logged_loss_is_the_mean_of_the_steps(tmp_path: Path) -> None:
    t = trainer(tmp_path / "a")
    t.run(5)
    steps = trainer(tmp_path / "b")
    losses = [float(steps.train_step()) for _ in range(5)]
    assert read_log(tmp_path / "a" / "log.jsonl")[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize("stop", [2, 7])  # in the first epoch of 4.4 batches, and in the second
def test_resume_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    images = digits().select(torch.arange(70))
    whole = trainer(tmp_path / "whole", images)
    whole.run(stop + 6)
    trainer(tmp_path / "parts", images).run(stop)
    torch.manual_seed(99)
    resumed = Trainer.resume(images, tmp_path / "parts", progress=False, log_every=5, save_every=0)
    assert resumed.recipe == RECIPE and resumed.config == TINY
    resumed.run(stop + 6)
    assert_same_state(resumed, whole)
    assert torch.equal(resumed.train_step(), whole.train_step())


def test_resume_drops_log_lines_after_the_checkpoint(tmp_path: Path) -> None:
    t = trainer(tmp_path, save_every=10)
    for _ in range(3):
        t.train_step()
    t.save()
    lines = [{"step": s, "loss": 1.0} for s in (1, 2, 4, 5)]  # 4 and 5 were logged, and then the power went
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Trainer.resume(digits(), tmp_path, progress=False, log_every=2).run(6)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 4, 6]


def test_sampling_and_saving_on_the_way_change_nothing(tmp_path: Path) -> None:
    plain, busy = trainer(tmp_path / "plain"), trainer(tmp_path / "busy", save_every=2, sample_every=3)
    plain.run(6)
    busy.run(6)
    assert_same_state(plain, busy)
    names = sorted(p.name for p in (tmp_path / "busy").iterdir())
    assert names == ["log.jsonl", "model.safetensors", "samples-0000003.png", "samples-0000006.png"]
    sheets = [np.array(Image.open(tmp_path / "busy" / name)) for name in names[2:]]
    assert sheets[0].shape == (10 * 50 + 2, 8 * 50 + 2) and not np.array_equal(*sheets)


def test_changes_on_resume(tmp_path: Path) -> None:
    trainer(tmp_path).run(2)
    resumed = Trainer.resume(digits(), tmp_path, changes={"lr": 1e-5, "batch_size": 8}, progress=False)
    resumed.run(8)
    assert resumed.optimizer.param_groups[0]["lr"] == 1e-5
    assert resumed.position == 2 * 16 + 6 * 8
    with pytest.raises(ValueError, match="seed is 2, but the run to resume has 1"):
        Trainer.resume(digits(), tmp_path, changes={"seed": 2})
    with pytest.raises(ValueError, match="trained on other images"):
        Trainer.resume(digits("held_out"), tmp_path)


def test_ctrl_c_saves_and_stops(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    images = digits()
    t = trainer(tmp_path / "a", images)
    take, count = t.batches.take, iter(range(100))

    def interrupting(*args: int):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return take(*args)

    t.batches.take = interrupting
    t.run(50)
    assert t.interrupted and t.step == 4
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = Trainer.resume(images, tmp_path / "a", progress=False, log_every=5, save_every=0)
    resumed.run(8)
    whole = trainer(tmp_path / "b", images)
    whole.run(8)
    assert_same_state(resumed, whole)


def test_a_diverged_run_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    t = trainer(tmp_path, log_every=100, save_every=2)
    t.run(2)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(t.diffusion.model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 4: try a lower lr"):
        t.run(6)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_warmup_and_clipping(tmp_path: Path) -> None:
    t = trainer(tmp_path, recipe=replace(RECIPE, clip=1e-3, warmup=4))
    rates = []
    for _ in range(6):
        t.train_step()
        rates.append(t.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3, 2e-3, 2e-3])
    norm = torch.stack([p.grad.norm() for p in t.diffusion.model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    exact, half = trainer(tmp_path), trainer(tmp_path, recipe=replace(RECIPE, bf16=True))
    a, b = (torch.stack([t.train_step() for _ in range(5)]) for t in (exact, half))
    assert not torch.equal(a, b)
    assert ((a - b).abs() / a).max() < 0.02
    assert all(p.dtype == torch.float32 for p in half.diffusion.parameters())


def test_unconditional_training_ignores_labels(tmp_path: Path) -> None:
    images = digits()
    free = replace(TINY, num_classes=None)
    with_labels, without = trainer(tmp_path, images, free), trainer(tmp_path, images._replace(labels=None), free)
    assert torch.equal(with_labels.train_step(), without.train_step())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i._replace(pixels=i.pixels[..., :7]), r"images are \(1, 8, 7\).*expects \(1, 8, 8\)"),
        (lambda i: i._replace(labels=None), "no labels"),
        (lambda i: i._replace(labels=i.labels + 1), "label 10 is too large"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, change(digits()))


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": 5.0}, {"warmup": -1}, {"clip": -1.0}, {"seed": -1}]
)
def test_bad_recipes_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Recipe(**bad)


def test_first_batch_is_the_documented_one(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    x, y = t.batches.take(0, 16)
    expected = Batches(digits(), seed=1, flip=True).take(0, 16)
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
