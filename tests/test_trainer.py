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
from tape import Tape
from toys import TINY as FIVE_CLASSES

from ddpm_fast import ops
from ddpm_fast.models.presets import Config
from ddpm_fast.training import journal as journal_module
from ddpm_fast.training import trainer as trainer_module
from ddpm_fast.training.checkpoint import read_checkpoint
from ddpm_fast.training.data import Batches, Images, digits
from ddpm_fast.training.images import to_uint8
from ddpm_fast.training.log import read_log
from ddpm_fast.training.recipe import Recipe
from ddpm_fast.training.trainer import Trainer

TINY = replace(FIVE_CLASSES, num_classes=10)
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recorded_steps_train_as_eager_ones(tmp_path: Path, tape: Tape, accumulate: int) -> None:
    """Weights, counts and the log; over a stop and a resumption, after which steps are recorded anew."""
    recipe = replace(RECIPE, lr=2**-9, accumulate=accumulate)  # rates that float32 holds
    with ops.use_backend("reference"):
        eager = trainer(tmp_path / "eager", recipe=recipe)
        eager._step.engine = "eager"
        eager.run(14)
        recorded = trainer(tmp_path / "recorded", recipe=recipe)
        recorded.run(9)
        assert tape.replays == 4, "the average moves from step 3 on, in three eager steps at first"
        recorded = Trainer.resume(digits(), tmp_path / "recorded", progress=False, log_every=5)
        recorded.run(14)
    assert tape.replays == 6 and tape.records == 2
    assert_same_state(recorded, eager)
    ours, theirs = (read_log(tmp_path / name / "log.jsonl") for name in ("recorded", "eager"))
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[key] == b[key] for key in ("step", "lr", "loss", "loss_by_t", "grad_norm"))


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
    with pytest.raises(ValueError, match="steps is 7, but the run to resume has made 8: ask for more"):
        Trainer.resume(digits(), tmp_path, changes={"steps": 7})
    with pytest.raises(ValueError, match="trained on other images, 1198 then and 599 now: --data.* must be the same"):
        Trainer.resume(digits("held_out"), tmp_path)
    wide = digits()._replace(pixels=digits().pixels.repeat(1, 1, 1, 2))
    with pytest.raises(ValueError, match=r"\(1, 8, 16\).*give the --data, --size and --pad of the first run"):
        Trainer.resume(wide, tmp_path)


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
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 3 \(16 of 16.*time_mlp\.1\.weight isn't.*: try a lower lr"
    ):
        t.run(6)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_weights_that_broke_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.run(2)
    before = (tmp_path / "model.safetensors").read_bytes()
    step = t.optimizer.step

    def breaking() -> None:  # after a loss that was fine
        step()
        with torch.no_grad():
            next(t.diffusion.model.parameters()).view(-1)[0] = torch.inf

    t.optimizer.step = breaking
    with pytest.raises(FloatingPointError, match="a weight is not finite after step 3: try a lower lr"):
        t.run(3)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    clean = trainer(tmp_path / "ema")
    next(clean.diffusion.ema_model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        clean.save()


def test_checkpoints_come_when_due_and_before_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t, seen = trainer(tmp_path, save_every=3, sample_every=4), []
    save = t.save
    monkeypatch.setattr(t, "save", lambda: (seen.append(f"save {t.step}"), save()))
    monkeypatch.setattr(t, "draw", lambda: seen.append(f"draw {t.step}"))
    t.run(7)
    assert seen == ["save 3", "save 4", "draw 4", "save 6", "save 7"]
    t.run(8)
    assert seen[5:] == ["save 8", "draw 8"]  # and not once more


def test_images_per_s_counts_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(journal_module, "time", clock)
    t = trainer(tmp_path, log_every=4, save_every=2, sample_every=3)

    def taking(seconds: float, do):
        def timed(*args):
            clock.now += seconds
            return do(*args)

        return timed

    for owner, name, seconds in ((t.batches, "take", 0.5), (t, "save", 1000.0), (t, "draw", 1000.0)):
        monkeypatch.setattr(owner, name, taking(seconds, getattr(owner, name)))
    t.run(8)
    assert [line["images_per_s"] for line in read_log(tmp_path / "log.jsonl")] == [32.0, 32.0]


def test_grids_show_the_averaged_weights_in_the_steps_asked_for(tmp_path: Path) -> None:
    # A net after two steps draws greys of "x0", but nothing except black and white of "eps".
    t = trainer(tmp_path, config=replace(TINY, prediction="x0"), sample_every=2, sample_steps=3)
    t.run(2)
    with torch.no_grad():
        t.diffusion.ema_model.out_conv.weight.mul_(1.5)
    y = torch.arange(10).repeat_interleave(8)
    x = t.diffusion.sample(80, "cpu", y, num_steps=3, seed=1)
    sheet = np.array(Image.open(t.draw()))
    assert np.array_equal(sheet[2:50:6, 2:50:6], to_uint8(x)[0, 0].numpy())
    assert np.array_equal(sheet[452:500:6, 352:400:6], to_uint8(x)[-1, 0].numpy())
    assert trainer(tmp_path, config=replace(TINY, num_timesteps=300)).sample_steps == 100
    with pytest.raises(ValueError, match=r"sample_steps \(--sample-steps\) must be an integer in \[1, 20\], got 21"):
        trainer(tmp_path, sample_steps=21)


def test_a_grid_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "samples-0000002.png").mkdir()
    t = trainer(tmp_path, sample_every=2)
    with pytest.warns(UserWarning, match=r"no sample grid at step 2: .*samples-0000002\.png can't be written"):
        t.step += 1  # so that nothing is cleared away
        t.run(3)
    assert t.step == 3


def test_a_new_run_clears_the_old_one_away_once_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path, sample_every=2).run(4)
    (tmp_path / "samples-mine.png").write_bytes(b"")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="divisible by 2"):
        trainer(tmp_path, digits()._replace(pixels=digits().pixels[..., :7]), replace(TINY, img_size=(8, 7)))
    failing = trainer(tmp_path)
    monkeypatch.setattr(failing.optimizer, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.run(2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    fresh = trainer(tmp_path)
    monkeypatch.setattr(fresh, "save", lambda: None)
    fresh.run(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "samples-mine.png"]
    assert read_log(tmp_path / "log.jsonl") == []


def test_a_torn_log_does_not_stop_a_resumed_run(tmp_path: Path) -> None:
    trainer(tmp_path, log_every=1).run(3)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'null\n[1]\n{"step": 4, "lo\xff')
    Trainer.resume(digits(), tmp_path, progress=False, log_every=1).run(4)
    assert [line["step"] for line in read_log(log)] == [1, 2, 3, 4]
    assert len(log.read_text().splitlines()) == 4


@pytest.mark.parametrize("change", [{"recipe": {"pace": 1}}, {"recipe": 3}, {"step": "x"}, {"position": None}])
def test_a_damaged_position_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    t = trainer(tmp_path)
    t.run(1)
    saved = read_checkpoint(tmp_path / "model.safetensors")
    saved = saved._replace(training=saved.training | change)
    monkeypatch.setattr(trainer_module, "read_checkpoint", lambda path: saved)
    with pytest.raises(ValueError, match=r"model\.safetensors can't be used"):
        Trainer.resume(digits(), tmp_path)


def test_ctrl_c_stops_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t, steps = trainer(tmp_path, sample_every=2), []
    sample = t.diffusion.sample

    def interrupting(*args, callback, **options):
        def on_step(k: int, x: torch.Tensor) -> None:
            steps.append(k)
            if k == 4:
                os.kill(os.getpid(), signal.SIGINT)
            callback(k, x)

        return sample(*args, callback=on_step, **options)

    monkeypatch.setattr(t.diffusion, "sample", interrupting)
    t.run(50)
    assert t.interrupted and t.step == 2 and steps == [0, 1, 2, 3, 4]
    assert read_checkpoint(tmp_path / "model.safetensors").training["step"] == 2
    assert not list(tmp_path.glob("samples-*"))


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    handler, t = signal.getsignal(signal.SIGINT), trainer(tmp_path)
    save = t.save

    def interrupting() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save()  # the first one lets it finish, also when it is the last thing a run does
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("not interrupted")

    t.save = interrupting
    with pytest.raises(KeyboardInterrupt):
        t.run(2)
    assert signal.getsignal(signal.SIGINT) is handler
    assert read_checkpoint(tmp_path / "model.safetensors").training["step"] == 2


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
        (lambda i: i._replace(labels=i.labels[:-1]), r"images.labels must have shape \[1198\]"),
        (lambda i: i._replace(labels=i.labels - 1), "label -1 is negative"),
        (lambda i: i._replace(pixels=i.pixels[:0], labels=i.labels[:0]), "holds no images"),
        (lambda i: i._replace(pixels=i.pixels / 255), "images.pixels must have dtype torch.uint8"),
        (lambda i: i._replace(labels=i.labels + 1), "label 10 is too large"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path: Path, change, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(tmp_path, change(digits()))


@pytest.mark.parametrize(
    "bad",
    [
        *({"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": 5.0}, {"warmup": -1}, {"clip": -1.0}, {"seed": -1}),
        *({"clip": float("nan")}, {"clip": float("inf")}, {"lr": float("nan")}, {"steps": 2.5}, {"flip": "no"}),
        *({"seed": 2**64}, {"lr": "fast"}, {"recompute": "all"}),
    ],
)
def test_bad_recipes_are_refused(bad: dict) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        Recipe(**bad)


def test_first_batch_is_the_documented_one(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    x, y = t.batches.take(0, 16)
    expected = Batches(digits(), seed=1, flip=True).take(0, 16)
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
