"""What a user of the command line sees when something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import DRAW, TRAIN, run

from ddpm_fast import commands, ops


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --data {tmp}/nowhere", "nowhere doesn't exist"),
        ("train --data {tmp}", "holds no images"),
        ("train --preset huge --out {tmp}/o", "huge"),
        ("train --lr 0 --out {tmp}/o", "lr must lie between 0 and 1"),
        ("train --size 9 --out {tmp}/o --device cpu", "divisible by 2; use --size 10x10"),
        ("train --size 9x8 --pad 1 --out {tmp}/o --device cpu", "use --size 12x10 --pad 0"),
        ("train --size 14 --channel-mults 1,1,1 --out {tmp}/o --device cpu", "use --pad 1 or --size 16x16"),
        ("train --num-timesteps 10 --schedule linear --out {tmp}/o", "use more timesteps, lower ends or the cosine"),
        ("train --attention-resolutions 2 --out {tmp}/o", "--attention-resolutions 2: this model has levels 0 to 1"),
        ("train --sample-steps 101 --out {tmp}/o", "--sample-steps) must be an integer in [1, 100], got 101"),
        ("train --resume --out {tmp}/o", "nothing to resume in {tmp}/o: drop --resume"),
        ("train --resume --steps 3 --out {run} --device cpu", "has made 4"),
        ("train --device tpu --out {tmp}/o", "--device tpu can't be used here"),
        ("train --device gpu --out {tmp}/o", "--device gpu can't be used here: expected cpu, cuda, cuda:1..."),
        ("train --device meta --out {tmp}/o", "--device meta can't be used here"),
        ("train --out {tmp}/junk.safetensors/o", "junk.safetensors is a file, expected a folder"),
        ("train --data {tmp} --out {tmp}/o", "lies inside --data"),
        ("sample {tmp}/nowhere.safetensors", "nowhere.safetensors doesn't exist"),
        ("sample {tmp}/junk.safetensors", "junk.safetensors is not a safetensors file"),
        ("sample {tmp}", "{tmp} is a folder without model.safetensors"),
        ("sample {c} --out {tmp}", "{tmp} holds other files: name a new folder"),
        ("sample {c} --out {tmp} --overwrite", "{tmp} holds other files: name a new folder"),
        ("sample {c} --out /proc/x.png", "/proc can't be written to"),
        ("sample {c} --class 10", "there is no class '10', this model has 0 to 9"),
        ("sample {c} --class 0-99999999999", "there is no class '99999999999'"),
        ("sample {c} --class -1", "there is no class ''"),
        ("sample {c} --class=", "there is no class ''"),
        ("sample {c} --class 4-2", "this range holds no class"),
        ("sample {c} --out a.jpeg", "--out a.jpeg: expected .png, .gif, .npz or a folder"),
        ("sample {c} --out {tmp}/junk.safetensors/x.png", "junk.safetensors is a file, expected a folder"),
        ("sample {c} --steps 21", "--steps must be an integer in [1, 20], got 21"),
        ("sample {c} --sampler eulerian", "--sampler eulerian: expected one of ddpm"),
        ("sample {c} --option eta=1", "sampler_options: 'ddpm' has no option 'eta'; it has variance"),
        ("sample {c} --sampler ddim --option eta=2", "eta must be a finite number in [0, 1], got 2 (int)"),
        ("sample {c} --guidance 2", "--guidance: this model was trained without --label-dropout"),
        ("sample {c} --sampler adaptive --steps 5", "--sampler adaptive takes as many steps as it needs"),
        ("sample {c} --sampler adaptive --out {tmp}/x.gif", "--sampler adaptive draws no .gif"),
        ("sample {c} --sampler adaptive --option eta=1", "--option: sampler_options: 'adaptive' has no option 'eta'"),
        ("sample {c} --option variance=learned", "this plan has a learned variance: the network must be one with"),
        (
            "train --label-dropout 0.1 --unconditional --out {tmp}/o",
            "--label-dropout needs classes: drop it or --unc",
        ),
        ("demo --out {run}", "model.safetensors exists, and no demo wrote it"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str, message: str
) -> None:
    (tmp_path / "junk.safetensors").write_text("junk")
    before = checkpoint.read_bytes()
    assert run(command.replace("--class -1", "--class=-1"), tmp=tmp_path, c=checkpoint, run=checkpoint.parent) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ddpm-fast: error: ") and message.replace("{tmp}", str(tmp_path)) in error
    assert checkpoint.read_bytes() == before and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "command",
    [
        *("", "paint", "sample", "train --steps many", "train --channel-mults 1,x", "train --steps 0"),
        *("train --size 0", "train --size -5", "train --size 99999999", "train --size 8x", "train --pad -1"),
        *("train --pad 100000", "train --log-every -1", "train --save-every -1", "train --sample-every -1"),
        *("train --seed -1", f"train --seed {2**64}", "train --lr 7", "train --lr nan", "train --clip nan"),
        *("train --clip -1", "train --clip inf", "train --dropout 2", "train --ema-decay 1.5", "train --ema-start -1"),
        *("train --resume --overwrite", "train --sample-steps 0", "train --attention-resolutions=-1", "demo --steps 0"),
        *("train --label-dropout 2", "train --loss l3", "sample x --guidance -1", "sample x --dynamic-threshold 2"),
        *("sample x --num 0", "sample x --batch 0", "sample x --columns 0", "sample x --columns -1"),
        *("sample x --upscale 0", "sample x --upscale -1", "sample x --steps 0", f"sample x --seed {2**64}"),
    ],
)
def test_bad_usage_exits_with_2(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        run(command)
    assert exit.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: smaller values of --batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines (DDPM_FAST_DEBUG=1 shows where)"),
    ],
)
def test_no_traceback_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception, message: str
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setitem(commands.COMMANDS, "info", fail)
    assert run("info") == 2
    assert message in capsys.readouterr().err
    monkeypatch.setenv("DDPM_FAST_DEBUG", "1")
    with pytest.raises(type(error)):
        run("info")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --size 32x", "'32x' is no size: expected N or HxW, each from 1 to 8192"),
        ("train --lr 7", "'7' is no number between 0 and 1"),
        ("sample x --option eta=1,spacing=logsnr", "'eta=1,spacing=logsnr' holds several: one --option each"),
        ("sample x --option eta", "'eta' is no NAME=VALUE"),
        ("train photos", "unrecognized arguments: photos; for the images, --data photos"),
        ("train --photos x", "unrecognized arguments: --photos x"),
    ],
)
def test_bad_usage_says_what_would_do(command: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(command)
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_a_folder_with_other_files_is_left_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    where, command = {"c": checkpoint, "out": tmp_path / "x"}, DRAW + " --steps 1 --class 3 --num "
    assert run(command + "3", **where) == 0
    assert run(command + "1", **where) == 2
    assert "holds images of an earlier call: --overwrite replaces them" in capsys.readouterr().err
    assert run(command + "1 --overwrite", **where) == 0
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["000000-class-3.png"]
    (tmp_path / "x" / "mine.png").write_bytes(b"")
    for options in ("1", "1 --overwrite"):
        assert run(command + options, **where) == 2
        assert "x holds other files: name a new folder" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["000000-class-3.png", "mine.png"]


@pytest.mark.parametrize("name", ["x.png", "x.gif", "x.npz"])
def test_a_file_is_replaced_only_when_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    where, command = {"c": checkpoint, "out": tmp_path / name}, DRAW + " --steps 1 --class 3 --num 1"
    where["out"].write_text("mine")
    assert run(command, **where) == 2
    assert f"{name} exists: --overwrite replaces it" in capsys.readouterr().err
    assert where["out"].read_text() == "mine"
    assert run(command + " --overwrite", **where) == 0
    assert where["out"].read_bytes() != b"mine"


def test_a_busy_machine_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    calls = (TRAIN + " --overwrite --steps 1 --out {out}/run", DRAW + "/{c.stem}.png --overwrite --steps 1 --num 1")
    cases = (5.21, 2, "active", True), (5.21, 1, "", False), (2.5, 2, "", False), (5.21, 2, "PASSIVE", False)
    for load, threads, waiting, said in cases:
        monkeypatch.setenv("OMP_WAIT_POLICY", waiting)
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0), raising=False)
        torch.set_num_threads(threads)
        for command in calls:
            assert run(command, c=checkpoint, out=tmp_path) == 0
            lines = [line for line in capsys.readouterr().err.splitlines() if "OMP_NUM_THREADS" in line]
            advice = "OMP_WAIT_POLICY=passive or OMP_NUM_THREADS=1 may be many times faster"
            text = f"ddpm-fast: warning: the load is 5.2 on 2 cores: {advice}"
            assert lines == [text] * said, (load, threads, command)


def test_ctrl_c_while_pytorch_loads_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    (tmp_path / "ddpm-fast").write_text(
        "import sys; from ddpm_fast.cli import main; sys.exit(main())"
    )  # as pip makes it
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(ops.__file__).parents[2])])}
    for arguments in (["-m", "ddpm_fast", "info"], [str(tmp_path / "ddpm-fast"), "info"]):
        ended = subprocess.run([sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
    imported = subprocess.run([sys.executable, "-c", "import ddpm_fast"], env=env, cwd=tmp_path, capture_output=True)
    assert imported.returncode != 130 and b"KeyboardInterrupt" in imported.stderr, "a script sees it"
