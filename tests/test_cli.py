"""Every command, end to end on tiny settings, and what a user sees when something is wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ddpm_fast import demo, ops
from ddpm_fast.cli import main
from ddpm_fast.models.presets import PRESETS
from ddpm_fast.training.checkpoint import load_diffusion, read_checkpoint, save_checkpoint
from ddpm_fast.training.images import to_uint8
from ddpm_fast.training.trainer import read_log

TINY = "--base-channels 8 --num-timesteps 20 --schedule cosine --channel-mults 1,2 --num-res-blocks 1"
TRAIN = f"train {TINY} --batch 8 --log-every 2 --sample-every 0 --device cpu"
DRAW = "sample {c} --device cpu --out {out}"


def run(command: str, **where: Path) -> int:
    return main([word.format(**where) for word in command.split()])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert run(TRAIN + " --steps 4 --lr 1e-3 --seed 3 --out {out}", out=out) == 0
    return out / "model.safetensors"


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
    assert "drop the model options" in capsys.readouterr().err
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


def test_sample_options_reach_the_sampler(distinct: Path, tmp_path: Path) -> None:
    seen = []
    for i, option in enumerate(("", " --steps 5", " --no-ema", " --seed 1")):
        assert run(DRAW + " --class 4 --num 2" + option, c=distinct, out=tmp_path / f"{i}.npz") == 0
        with np.load(tmp_path / f"{i}.npz") as file:
            seen.append(file["images"].tobytes())
    assert len(set(seen)) == 4
    wanted = [{"seed": 0}, {"seed": 0, "num_steps": 5}, {"seed": 0, "use_ema": False}, {"seed": 1}]
    for image, options in zip(seen, wanted, strict=True):
        assert image == expected(distinct, [4, 4], **options).permute(0, 2, 3, 1).numpy().tobytes()


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
    train = demo.train_classifier
    monkeypatch.setattr(demo, "train_classifier", lambda *args, **kwargs: train(*args, **kwargs, epochs=4))
    assert run("demo --steps 50 --device cpu --out {out}", out=tmp_path) == 0
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
    assert read_checkpoint(tmp_path / "model.safetensors").training["step"] == 50


def test_info_lists_every_op_and_backend(capsys: pytest.CaptureFixture) -> None:
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and f"{torch.get_num_threads()} threads" in printed
    for op, backend, reason in ops.availability():
        line = next(line for line in printed.splitlines() if line.split()[:2] == [op, backend])
        assert (reason or "available").split()[0] in line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --data {tmp}/nowhere", "nowhere doesn't exist"),
        ("train --data {tmp}", "holds no images"),
        ("train --preset huge --out {tmp}/o", "huge"),
        ("train --lr 7 --out {tmp}/o", "lr is 7.0"),
        ("train --size 9 --out {tmp}/o --steps 1 --device cpu", "divisible by 2"),
        ("train --resume --out {tmp}/o", "model.safetensors doesn't exist"),
        ("train --device tpu --out {tmp}/o", "--device tpu can't be used here"),
        ("sample {tmp}/nowhere.safetensors", "nowhere.safetensors doesn't exist"),
        ("sample {tmp}/junk.safetensors", "junk.safetensors is not a safetensors file"),
        ("sample {c} --class 10", "10 is too large, this model has classes 0 to 9"),
        ("sample {c} --out a.jpeg", "--out a.jpeg: expected .png, .gif, .npz or a folder"),
        ("sample {c} --num 0", "--num is 0"),
        ("sample {c} --steps 21", "21"),
        ("sample {c} --sampler euler", "euler"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str, message: str
) -> None:
    (tmp_path / "junk.safetensors").write_text("junk")
    assert run(command, tmp=tmp_path, c=checkpoint) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ddpm-fast: error: ") and message in error


@pytest.mark.parametrize("command", ["", "paint", "sample", "train --steps many", "train --channel-mults 1,x"])
def test_bad_usage_exits_with_2(command: str) -> None:
    with pytest.raises(SystemExit) as exit:
        run(command)
    assert exit.value.code == 2


@pytest.mark.parametrize("command", ["", "train", "sample", "demo", "info"])
def test_help(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        run(f"{command} --help")
    assert exit.value.code == 0
    assert "usage: ddpm-fast" in capsys.readouterr().out


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
