"""What a run says of itself: losses by timestep, gradient norm, events, pictures; saying it changes nothing."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import TINY

from ddpm_fast import Diffusion
from ddpm_fast.cli import main
from ddpm_fast.models.presets import Config
from ddpm_fast.ops import NoiseState
from ddpm_fast.training import plot
from ddpm_fast.training.data import Images
from ddpm_fast.training.log import read_log
from ddpm_fast.training.recipe import Recipe
from ddpm_fast.training.trainer import Trainer
from ddpm_fast.training.watch import BUCKETS, Watch


def trainer(out: Path, config: Config = TINY, **options) -> Trainer:
    pixels = torch.randint(0, 256, (70, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    recipe = Recipe(batch_size=16, lr=2e-3, warmup=4, seed=1)
    options = {"recipe": recipe, "progress": False, "log_every": 3, "save_every": 0} | options
    return Trainer(config, Images(pixels, torch.arange(70) % 5), out, **options)


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_observer_is_told_each_image_s_loss(loss_type: str, prediction: str) -> None:
    config = replace(TINY, loss_type=loss_type, prediction=prediction, dropout=0.0)
    torch.manual_seed(0)
    diffusion = Diffusion.from_config(config, seed=3)
    x, y, t = torch.randn(6, 1, 8, 8), torch.arange(6) % 5, torch.tensor([0, 3, 19, 7, 7, 12])
    plain = diffusion.get_losses(x, t, y)
    seen = []
    diffusion.observer, diffusion.calls = lambda t, losses: seen.append((t, losses)), 0
    observed = diffusion.get_losses(x, t, y)
    assert torch.equal(observed, plain)  # to look changes nothing
    ((at, losses),) = seen
    assert torch.equal(at, t) and losses.shape == (6,) and not losses.requires_grad
    assert float(losses.mean()) == pytest.approx(plain.item(), rel=1e-5)
    for i in range(6):  # image i alone, with its own noise
        one = slice(i, i + 1)
        value = diffusion.loss_of(diffusion.model, x[one], t[one], y[one], NoiseState.at(3, 1, i, "cpu"))
        assert float(losses[i]) == pytest.approx(value.item(), rel=1e-4)


def test_the_trainer_takes_plain_steps(tmp_path: Path) -> None:
    t, plain = trainer(tmp_path), trainer(tmp_path)
    diffusion, parameters = plain.diffusion, list(plain.diffusion.model.parameters())
    diffusion.observer = None
    adam = torch.optim.Adam(parameters, fused=True)
    for step in range(6):
        t.train_step()
        adam.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 4)
        adam.zero_grad()
        diffusion(*plain.batches.take(16 * step, 16)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        diffusion.update_ema()
    expected = diffusion.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in t.diffusion.state_dict().items())


def test_the_log_has_losses_by_timestep_and_the_gradient_s_norm(tmp_path: Path) -> None:
    t, seen, norms = trainer(tmp_path), [], []
    observer = t.diffusion.observer
    t.diffusion.observer = lambda at, losses: (seen.append((at, losses)), observer(at, losses))
    t._step.check = lambda loss, norm: (norms.append(float(norm)), t.watch.add(loss, norm))[1]
    t.run(6)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [3, 6]
    for line, part, values in zip(lines, (seen[:3], seen[3:]), (norms[:3], norms[3:]), strict=True):
        at, losses = (torch.cat(x) for x in zip(*part, strict=True))
        for k in range(BUCKETS):
            inside = losses[(at >= 2 * k) & (at < 2 * k + 2)]
            expected = pytest.approx(float(inside.mean()), rel=1e-5) if len(inside) else None
            assert line["loss_by_t"][k] == expected
        assert line["grad_norm"] == pytest.approx(np.mean(values), rel=1e-5)
        assert line["peak_memory_mb"] > 50 and line["images_per_s"] > 0
    norm = torch.stack([p.grad.norm() for p in t.diffusion.model.parameters() if p.grad is not None]).norm()
    assert norm <= 1.0001  # clipped; the log has it from before that


def test_few_timesteps_and_empty_ranges() -> None:
    watch = Watch(3, torch.device("cpu"))
    watch.observe(torch.tensor([0, 2, 2]), torch.tensor([1.0, 2.0, 4.0]))
    watch.add(torch.tensor(1.0), torch.tensor(2.0))
    watch.count += 1
    by_t = watch.line()["loss_by_t"]
    assert by_t == [1, None, None, None, None, None, 3, None, None, None]
    watch.observe(torch.tensor([0]), torch.tensor([torch.nan]))  # stays in its own range
    watch.observe(torch.tensor([1]), torch.tensor([5.0]))
    assert watch.by_t[3] == 5 and watch.by_t[0].isnan()


def test_nothing_waits_for_the_device_between_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t, waits = trainer(tmp_path), []
    t.train_step()
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, *a, own=own, name=name: (waits.append(name), own(x, *a))[1])
    watch, loss = t.watch, torch.tensor(1.0)
    watch.observe(torch.tensor([3]), torch.tensor([1.0]))
    watch.add(loss, loss)
    watch.count += 1
    assert waits == []
    watch.line()
    assert waits == ["tolist"]


def test_two_grids_show_the_same_noise_and_classes(tmp_path: Path) -> None:
    t = trainer(tmp_path, sample_every=2)
    t.run(2)
    weights = {name: value.clone() for name, value in t.diffusion.ema_model.state_dict().items()}
    t.run(4)
    first, second = (tmp_path / f"samples-000000{step}.png" for step in (2, 4))
    assert first.read_bytes() != second.read_bytes()  # other weights
    t.diffusion.ema_model.load_state_dict(weights)
    second.unlink()
    assert t.draw() == second and second.read_bytes() == first.read_bytes()  # and nothing else


def test_tensorboard_events_are_the_log(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    t = trainer(tmp_path, tensorboard=True, log_every=1)
    t.run(3)
    t.save = lambda: None  # what comes now is lost
    t.run(5)
    t = Trainer.resume(t.images, tmp_path, progress=False, log_every=3, tensorboard=True)
    t.run(6)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = read_log(tmp_path / "log.jsonl")
    assert [e.step for e in events.Scalars("loss")] == [line["step"] for line in lines] == [1, 2, 3, 6]
    for name in ("loss", "grad_norm", "images_per_s", "lr"):
        assert [e.value for e in events.Scalars(name)] == pytest.approx([line[name] for line in lines], rel=1e-6)
    assert [e.value for e in events.Scalars("loss_by_t/4")] == pytest.approx(
        [line["loss_by_t"][4] for line in lines if line["loss_by_t"][4] is not None]
    )
    trainer(tmp_path).run(1)  # a new run
    assert not list((tmp_path / "tensorboard").iterdir())


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r'tensorboard is needed here: pip install "ddpm_fast\[tensorboard\]"'):
        trainer(tmp_path, tensorboard=True)
    assert not list(tmp_path.iterdir())


def fake_log(folder: Path, scale: float, count: int = 60) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "log.jsonl", "w") as file:
        for k in range(1, count + 1):
            loss = scale * (0.05 + 1 / k) * float(rng.uniform(0.9, 1.1))
            line = {"step": 50 * k, "loss": loss, "grad_norm": 3 * loss, "images_per_s": 200 + k}
            line["loss_by_t"] = [None if j == k % 10 else loss * 2.0 ** (4 - j) for j in range(10)]
            if k % 10 == 0:
                line["holdout_loss"] = 1.1 * loss
            file.write(json.dumps(line) + "\n")
    return folder


def test_plot_draws_the_log(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = fake_log(tmp_path / "a", 1.0), fake_log(tmp_path / "b", 2.0)
    drawn = []
    require = plot.require

    def keeping(module: str):
        if module != "matplotlib.figure":
            return require(module)

        class Kept(require(module).Figure):
            def __init__(self, **options) -> None:
                super().__init__(**options)
                drawn.append(self)

        return type("module", (), {"Figure": Kept})

    monkeypatch.setattr(plot, "require", keeping)
    assert main(["plot", str(a), "--out", str(tmp_path / "one.png")]) == 0
    assert main(["plot", str(a), str(b / "log.jsonl"), "--out", str(tmp_path / "two.png")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "one.png"), str(tmp_path / "two.png")]
    assert all(np.array(Image.open(tmp_path / name)).std() > 10 for name in ("one.png", "two.png"))
    (loss, by_t, norm, speed), (loss2, by_t2, *_) = (figure.axes for figure in drawn)
    lines = read_log(a / "log.jsonl")
    assert np.allclose(loss.lines[0].get_xydata(), [(line["step"], line["loss"]) for line in lines])
    assert np.allclose(loss.lines[2].get_xydata()[:, 1], [line["holdout_loss"] for line in lines[9::10]])
    assert np.allclose(norm.lines[0].get_ydata(), [line["grad_norm"] for line in lines])
    assert np.allclose(speed.lines[0].get_ydata(), [line["images_per_s"] for line in lines])
    assert len(by_t.lines) == 10 and "90-100 %" in [text.get_text() for text in by_t.get_legend().texts]
    names = [text.get_text() for text in loss2.get_legend().texts]
    assert names == ["a", "b", "a, held out", "b, held out"] and len(by_t2.lines) == 2
    ends = [line["loss_by_t"][0] for line in lines[-6:]]
    assert by_t2.lines[0].get_ydata()[0] == pytest.approx(np.mean([x for x in ends if x is not None]))


def test_plot_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = fake_log(tmp_path / "a", 1.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text("")
    for words, text in (
        ([str(tmp_path / "nowhere")], "nowhere doesn't exist"),
        ([str(tmp_path)], "log.jsonl doesn't exist"),
        ([str(tmp_path / "empty")], "has no log lines yet"),
        ([str(a), str(a)], "the same run twice"),
    ):
        assert main(["plot", *words, "--out", str(tmp_path / "x.png")]) == 2
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plot", str(a), "--out", "x.jpg"])
    assert "doesn't end in .png" in capsys.readouterr().err
    old = fake_log(tmp_path / "old", 1.0)  # a log of an earlier version
    lines = [{k: line[k] for k in ("step", "loss", "images_per_s")} for line in read_log(old / "log.jsonl")]
    (old / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["plot", str(old), "--out", str(tmp_path / "old.png")]) == 0
    assert main(["plot", str(old), str(a), "--out", str(tmp_path / "both.png")]) == 0
