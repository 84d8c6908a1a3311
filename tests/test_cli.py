"""Every command, end to end on tiny settings."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import DRAW, TRAIN, run
from PIL import Image, ImageSequence

from ddpm_fast import __version__, demo, dynamic_threshold, ops
from ddpm_fast.commands.train import _ema
from ddpm_fast.evaluation.classifier import judge
from ddpm_fast.models.presets import PRESETS
from ddpm_fast.samplers import SAMPLERS
from ddpm_fast.training.checkpoint import load_diffusion, read_checkpoint, save_checkpoint
from ddpm_fast.training.data import digits, to_float
from ddpm_fast.training.images import to_uint8
from ddpm_fast.training.log import read_log


@pytest.fixture(scope="module")
def distinct(checkpoint: Path) -> Path:
    """A checkpoint whose averaged weights differ from the raw ones."""
    diffusion, config = load_diffusion(checkpoint)
    with torch.no_grad():
        diffusion.ema_model.out_conv.weight.mul_(1.5)
    save_checkpoint(checkpoint.with_name("distinct.safetensors"), diffusion, config)
    return checkpoint.with_name("distinct.safetensors")


def test_train_writes_what_was_asked(checkpoint: Path) -> None:
    saved = read_checkpoint(checkpoint)
    assert (saved.config.base_channels, saved.config.num_timesteps, saved.config.channel_mults) == (8, 20, (1, 2))
    assert saved.config.num_classes == 10 and saved.config.num_groups == PRESETS["digits"].num_groups
    recipe = saved.training["recipe"]
    assert (recipe["batch_size"], recipe["lr"], recipe["seed"], saved.training["step"]) == (8, 1e-3, 3, 4)
    assert [line["step"] for line in read_log(checkpoint.parent / "log.jsonl")] == [2, 4]


def test_train_on_a_folder_resumes_and_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (20, 18), (10, 200, 30)).save(tmp_path / "photos" / name / "1.png")
    where = {"data": tmp_path / "photos", "out": tmp_path / "run"}
    command = TRAIN + " --preset digits --flip --data {data} --size 14x12 --pad 1 --out {out}"
    assert run(command + " --steps 2", **where) == 0
    saved = read_checkpoint(tmp_path / "run" / "model.safetensors")
    assert (saved.config.img_size, saved.config.img_channels, saved.config.num_classes) == ((16, 14), 3, 2)
    assert run(command + " --steps 3", **where) == 2
    assert "model.safetensors exists: --resume goes on from it" in capsys.readouterr().err
    again = "train --data {data} --size 14x12 --pad 1 --out {out} --resume --device cpu --sample-every 0"
    assert run(again + " --steps 4 --lr 5e-4 --sample-every 2 --sample-steps 2", **where) == 0
    resumed = read_checkpoint(tmp_path / "run" / "model.safetensors").training
    assert (resumed["step"], resumed["position"], resumed["recipe"]["lr"]) == (4, 32, 5e-4)
    assert resumed["recipe"]["flip"] is True
    assert (tmp_path / "run" / "samples-0000004.png").exists()
    assert run(again + " --steps 5 --base-channels 16", **where) == 2
    assert "--base-channels 16: the checkpoint has 8, and --resume goes on with its model" in capsys.readouterr().err
    assert run(command + " --steps 5 --resume", **where) == 0  # the same command
    assert run(command + " --steps 6 --resume --unconditional", **where) == 2
    assert "--unconditional: the checkpoint has 2, and --resume" in capsys.readouterr().err
    assert run(command + " --steps 1 --overwrite --unconditional", **where) == 0
    assert read_checkpoint(tmp_path / "run" / "model.safetensors").config.num_classes is None


def expected(checkpoint: Path, y: list[int], **options) -> torch.Tensor:
    diffusion, _ = load_diffusion(checkpoint)
    return to_uint8(diffusion.sample(len(y), "cpu", torch.tensor(y), **options))


def test_sample_grid_npz_and_folder_hold_the_same_images(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("x.npz", "x.png", "x"):
        command = DRAW + " --classes 7,2-3 --num 6 --seed 5 --batch 4"
        assert run(command, c=checkpoint, out=tmp_path / name) == 0
    pixels = expected(checkpoint, [7, 7, 2, 2, 3, 3], seed=5)
    with np.load(tmp_path / "x.npz") as file:
        assert file["labels"].tolist() == [7, 7, 2, 2, 3, 3]
        images = file["images"]
    assert np.abs(images[..., 0].astype(int) - pixels[:, 0].numpy()).max() <= 1  # another batch rounds otherwise
    sheet = np.array(Image.open(tmp_path / "x.png"))
    assert sheet.shape == (2 + 3 * 50, 2 + 2 * 50)
    assert np.array_equal(sheet[2 : 2 + 48 : 6, 52 : 52 + 48 : 6], images[1, ..., 0])
    names = sorted(p.name for p in (tmp_path / "x").iterdir())
    assert names[0] == "000000-class-7.png" and names[5] == "000005-class-3.png" and len(names) == 6
    assert np.array_equal(np.array(Image.open(tmp_path / "x" / names[5])), images[5, ..., 0])


def test_sample_takes_the_folder_of_a_run_and_says_what_it_drew(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "x.npz"
    every = "classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    for options, classes in (("--class 3", "class 3"), ("--class 7,2-3 --num 2", "classes 7, 2"), ("--num 12", every)):
        assert run(f"{DRAW} --overwrite --steps 1 {options}", c=checkpoint.parent, out=out) == 0
        with np.load(out) as file:
            drawn = len(file["labels"])
        assert capsys.readouterr().out == f"{drawn} images of {classes}: {out}\n"


def test_sample_options_reach_the_sampler(distinct: Path, tmp_path: Path) -> None:
    seen = []
    heun = " --sampler heun --steps 4 --option spacing=linspace --option s_churn=2 --option clip=true"
    for i, option in enumerate(("", " --steps 5", " --no-ema", " --seed 1", heun, " --option spacing=2,3")):
        assert run(DRAW + " --class 4 --num 2" + option, c=distinct, out=tmp_path / f"{i}.npz") == 0
        with np.load(tmp_path / f"{i}.npz") as file:
            seen.append(file["images"].tobytes())
    assert len(set(seen)) == 6
    wanted = [{"seed": 0}, {"seed": 0, "num_steps": 5}, {"seed": 0, "use_ema": False}, {"seed": 1}]
    options = {"spacing": "linspace", "s_churn": 2.0, "clip": True}
    wanted += [{"seed": 0, "sampler": "heun", "num_steps": 4, "sampler_options": options}]
    wanted += [{"seed": 0, "sampler_options": {"spacing": (2, 3)}}]
    for image, options in zip(seen, wanted, strict=True):
        assert image == expected(distinct, [4, 4], **options).permute(0, 2, 3, 1).numpy().tobytes()


def test_a_guided_model_of_its_own_objective(tmp_path: Path) -> None:
    """Every option of the objective reaches the model, and those of guidance the sampler."""
    objective = "--loss huber --loss-weighting min_snr --timestep-sampling loss_second_moment --learned-variance"
    command = f"{TRAIN} --data digits --preset digits --steps 2 --label-dropout 0.5 {objective} --out {{out}}"
    assert run(command, out=tmp_path) == 0
    config = read_checkpoint(tmp_path / "model.safetensors").config
    assert (config.loss_type, config.loss_weighting, config.timestep_sampling) == (
        "huber", "min_snr", "loss_second_moment"
    )  # fmt: skip
    assert config.learned_variance and config.label_dropout == 0.5
    diffusion, _ = load_diffusion(tmp_path / "model.safetensors")
    assert diffusion.model.num_classes == 11 and diffusion.model.out_channels == 2
    few = {"seed": 0, "num_steps": 5}
    cases = {
        " --steps 5": few,
        " --steps 5 --guidance 3": few | {"guidance": 3.0},
        " --steps 5 --guidance 3 --dynamic-threshold 0.9": {
            **few, "guidance": 3.0, "corrections": [dynamic_threshold(0.9)],
        },
        " --steps 5 --option variance=beta": few | {"sampler_options": {"variance": "beta"}},
        " --sampler adaptive --guidance 2 --option rtol=0.3 --option max_calls=300": {
            "seed": 0, "sampler": "adaptive", "guidance": 2.0, "sampler_options": {"rtol": 0.3, "max_calls": 300},
        },
    }  # fmt: skip
    seen = set()
    for i, (option, options) in enumerate(cases.items()):
        assert run(DRAW + " --class 4 --num 2" + option, c=tmp_path, out=tmp_path / f"{i}.npz") == 0
        with np.load(tmp_path / f"{i}.npz") as file:
            image = file["images"].tobytes()
        assert (
            image == expected(tmp_path / "model.safetensors", [4, 4], **options).permute(0, 2, 3, 1).numpy().tobytes()
        )
        seen.add(image)
    assert len(seen) == 5


def test_samplers_are_listed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run("sample --list-samplers")
    shown = capsys.readouterr().out
    assert not end.value.code and all(f"{name}: " in shown for name in (*SAMPLERS, "adaptive"))
    assert "    eta=0.0 spacing=linspace final=clean clip=false" in shown


def test_sample_gif_ends_with_the_grid(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("x.gif", "x.png"):
        command = DRAW + " --num 10 --batch 6 --upscale 2 --columns 5"
        assert run(command, c=checkpoint, out=tmp_path / name) == 0
    with Image.open(tmp_path / "x.gif") as gif:
        total = 0
        for frame in ImageSequence.Iterator(gif):
            total += frame.info["duration"]
        assert total == 19 * 80 + 2000
        assert np.array_equal(np.array(frame.convert("L")), np.array(Image.open(tmp_path / "x.png")))


def test_demo_writes_pictures_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import dataclasses

    tiny = dataclasses.replace(
        PRESETS["digits"], base_channels=8, num_res_blocks=1, num_timesteps=10, schedule="cosine"
    )
    monkeypatch.setitem(PRESETS, "digits", tiny)
    train, trainer, frechet = demo.train_classifier, demo.Trainer, demo.frechet_distance
    seen = []

    def spied_train(x: torch.Tensor, labels: torch.Tensor, **options):
        seen.append(x)
        seen.append(train(x, labels, **options, epochs=4))
        return seen[-1]

    def spied_trainer(config, images, *args, **options):
        seen.append(images.pixels)
        return trainer(config, images, *args, **options)

    def spied_frechet(a: torch.Tensor, b: torch.Tensor) -> float:
        seen.append(b)
        return frechet(a, b)

    monkeypatch.setattr(demo, "train_classifier", spied_train)
    monkeypatch.setattr(demo, "Trainer", spied_trainer)
    monkeypatch.setattr(demo, "frechet_distance", spied_frechet)
    assert run("demo --steps 50 --device cpu --out {out}", out=tmp_path) == 0
    # What is held out is seen by nobody who learns, and it is what the drawn ones are compared with.
    assert torch.equal(seen[0], digits("train").pixels) and torch.equal(seen[1], to_float(digits("train").pixels))
    assert torch.equal(seen[3], judge(seen[2], to_float(digits("held_out").pixels))[0])
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert f"{metrics['frechet']:.3f}" in printed and "images/s" in printed
    # A net this small draws no digits, and the figures must say so; the ones of real digits stand beside them.
    assert metrics["class_share"] < 0.6 < 0.8 < metrics["class_share_held_out"]
    assert metrics["frechet"] > 3 * metrics["frechet_real_halves"]
    assert metrics["nearest_median"] > 1.2 * metrics["nearest_median_held_out"] > 0
    assert np.array(Image.open(tmp_path / "samples.png")).shape == (502, 502)
    with Image.open(tmp_path / "denoising.gif") as gif:
        assert gif.n_frames == 10
    assert np.array(Image.open(tmp_path / "loss.png").convert("L")).std() > 1
    saved = read_checkpoint(tmp_path / "model.safetensors").training
    assert (saved["step"], saved["origin"]) == (50, "demo")
    assert run("demo --steps 1 --device cpu --out {out}", out=tmp_path) == 0  # again, into the same folder


def test_info_lists_every_op_and_backend(capsys: pytest.CaptureFixture) -> None:
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and f"{torch.get_num_threads()} threads" in printed
    assert str(Path(ops.__file__).parents[1]) in printed and "native" in printed
    for op, backend, reason in ops.availability():
        line = next(line for line in printed.splitlines() if line.split()[:2] == [op, backend])
        assert (reason or "available").split()[0] in line


def test_classes_have_names_and_keep_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for k, name in enumerate(("1", "2", "10", "semi-truck")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 60 * k).save(tmp_path / "data" / name / "x.png")
    (tmp_path / "data" / "7").mkdir()
    where = {"data": tmp_path / "data", "out": tmp_path / "run", "c": tmp_path / "run" / "model.safetensors"}
    assert run(TRAIN + " --preset digits --data {data} --steps 1 --out {out}", **where) == 0
    printed = capsys.readouterr()
    assert "classes 0 = 1, 1 = 2, 2 = 7, 3 = 10, 4 = semi-truck" in printed.out
    assert "ddpm-fast: warning: " in printed.err and "data/7 holds no images: class 2 stays empty" in printed.err
    assert read_checkpoint(where["c"]).class_names == ("1", "2", "7", "10", "semi-truck")
    for asked, labels in (("10", [3]), ("semi-truck,1", [4, 0]), ("1-7", [0, 1, 2]), ("0", [0]), ("2-10", [1, 2, 3])):
        command = DRAW + f" --overwrite --class {asked} --num {len(labels)} --steps 1"
        assert run(command, c=where["c"], out=tmp_path / "x.npz") == 0
        with np.load(tmp_path / "x.npz") as file:
            assert file["labels"].tolist() == labels, asked


def test_short_runs_average_too(tmp_path: Path) -> None:
    for options, expected in (("", (1, 0.0)), (" --ema-start 3 --ema-decay 0.7", (3, 0.7))):
        assert run(TRAIN + " --overwrite --steps 5" + options + " --out {out}", out=tmp_path) == 0
        config = read_checkpoint(tmp_path / "model.safetensors").config
        assert (config.ema_start, config.ema_decay) == expected
    assert _ema(PRESETS["cifar10"], 20_000) == _ema(PRESETS["digits"], 1800) == {}
    assert _ema(PRESETS["cifar10"], 1000) == {"ema_start": 200, "ema_decay": 0.99}


def test_the_run_is_named_after_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "cats").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "work" / "cats" / "x.png")
    monkeypatch.chdir(tmp_path / "work")
    assert run(TRAIN + " --preset digits --data cats/../cats/. --steps 1") == 0
    assert (tmp_path / "work" / "runs" / "cats" / "model.safetensors").exists()


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        run("--version")
    assert exit.value.code == 0 and capsys.readouterr().out == f"ddpm-fast {__version__}\n"


@pytest.mark.parametrize("command", ["", "train", "sample", "demo", "info"])
def test_help(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        run(f"{command} --help")
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: ddpm-fast" in printed
    if command == "train":
        for text in (
            "(0.0002; preset digits 0.001)",
            "(128; preset digits 64)",
            "(500; preset digits 100)",
            "none (1)",
        ):
            assert text in " ".join(printed.split())


def test_ctrl_c_ends_with_130_and_a_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddpm_fast", *TRAIN.split(), "--steps", "100000", "--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    while not (log := tmp_path / "log.jsonl").exists() or not log.read_text():
        assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "--resume goes on" in errors
    assert f"step {read_checkpoint(tmp_path / 'model.safetensors').training['step']}: saved" in printed
