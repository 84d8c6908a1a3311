"""Kills a training run again and again, and compares what comes out with a run that was left alone.

    python -m tests.kill_test --kills 10 --inside 4

Every kill is a SIGKILL at a random moment; so many of them fall inside the write of a checkpoint, which is slowed down
for that. Each part of the run prints the steps it makes, so the report knows what was lost.
"""

import argparse
import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddpm_fast.training import files
from ddpm_fast.training.checkpoint import CHECKPOINT, read_checkpoint
from ddpm_fast.training.data import Images
from ddpm_fast.training.journal import LOG
from ddpm_fast.training.log import read_log
from ddpm_fast.training.recipe import Recipe
from ddpm_fast.training.trainer import Trainer
from tests.toys import TINY

CONFIG = replace(TINY, ema_start=6)
RECIPE = Recipe(batch_size=16, accumulate=2, lr=2e-3, warmup=9, clip=0.5, flip=True, holdout=0.1, seed=3)
SAVE_EVERY, LOG_EVERY = 5, 3  # checkpoints fall into the middle of log intervals and, with 63 images, of epochs
OPTIONS: dict[str, Any] = {"save_every": SAVE_EVERY, "log_every": LOG_EVERY, "keep": 2, "progress": False}
SLOW = 0.3  # seconds a write takes
CLOCKED = ("images_per_s", "peak_memory_mb")  # what the log says of the machine, not of the run


class Kill(NamedTuple):
    """What a kill did."""

    seconds: float  # since this part of the run made its first step
    inside: bool  # the write of a checkpoint
    reached: int  # the last step made
    saved: int  # the step of the checkpoint; 0: none yet
    resumed: bool  # the next part began right after it


def images() -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (70, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(70) % 5)


class _SlowFile:
    """Writes in twenty parts, with a rest after each."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "_SlowFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        for part in range(0, len(data), -(-len(data) // 20)):
            self.file.write(data[part : part + -(-len(data) // 20)])
            self.file.flush()
            time.sleep(SLOW / 20)


def part(out: Path, steps: int, slow: bool, workers: int) -> None:
    """What is killed: a run from its checkpoint on, that says each step it makes."""
    torch.set_num_threads(1)
    if slow:
        files.open = lambda name, mode: (_SlowFile if CHECKPOINT in str(name) else lambda f: f)(open(name, mode))
    recipe, options = replace(RECIPE, steps=steps), OPTIONS | {"workers": workers}
    resume = (out / CHECKPOINT).exists()
    trainer = (
        Trainer.resume(images(), out, **options) if resume else Trainer(CONFIG, images(), out, recipe=recipe, **options)
    )
    train_step = trainer.train_step

    def telling() -> torch.Tensor:
        loss = train_step()
        os.write(1, b"%d\n" % trainer.step)
        return loss

    trainer.train_step = telling
    trainer.run()


def start(out: Path, steps: int, *, slow: bool, workers: int) -> subprocess.Popen:
    command = [sys.executable, __file__, "--part", str(out), "--steps", str(steps), *(["--slow"] if slow else [])]
    command += ["--workers", str(workers)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def kill_once(out: Path, steps: int, inside: bool, workers: int, chance: random.Random) -> tuple[Kill, int]:
    """Starts a part, kills it, and returns what happened and the first step that part made."""
    process = start(out, steps, slow=inside, workers=workers)
    first = int(process.stdout.readline())
    began, reached = time.perf_counter(), first
    for _ in range(chance.randrange(1, 2 * SAVE_EVERY)):
        reached = int(process.stdout.readline())
    writing = lambda: list(out.glob(f".{CHECKPOINT}.*.tmp"))  # noqa: E731
    if inside:
        while not writing():
            assert process.poll() is None, "the run ended before its write was hit"
            time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.9 * SLOW if inside else 0.1))
    seconds = time.perf_counter() - began
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    saved = read_checkpoint(out / CHECKPOINT).training["step"] if (out / CHECKPOINT).exists() else 0
    return Kill(seconds, bool(writing()), int(rest[-1]) if rest else reached, saved, False), first


def differences(ours: Path, theirs: Path) -> list[str]:
    """What two folders of runs don't have in common, bit for bit; a log's speed and memory aside."""
    names = {path.name for path in ours.iterdir()} ^ {path.name for path in theirs.iterdir()}
    found = [f"{name} is in one of them" for name in sorted(names)]
    for path in sorted(theirs.glob("*.safetensors")):
        if not filecmp.cmp(ours / path.name, path, shallow=False):
            found.append(f"{path.name}: other bytes")
    logs = [
        [{k: v for k, v in line.items() if k not in CLOCKED} for line in read_log(out / LOG)] for out in (ours, theirs)
    ]
    return found + ([f"{LOG}: other lines"] if logs[0] != logs[1] else [])


def torture(folder: Path, kills: int, inside: int, seed: int, workers: int = 0) -> tuple[list[Kill], list[str]]:
    """The kills, and what the run in the end differs by from one that was left alone.

    Args:
        inside: how many of the kills to aim at the write of a checkpoint.
    """
    chance = random.Random(seed)
    aims = [True] * inside + [False] * (kills - inside)
    chance.shuffle(aims)
    steps = 3 * SAVE_EVERY * (kills + 1)
    report: list[Kill] = []
    for aim in aims:
        kill, first = kill_once(folder / "killed", steps, aim, workers, chance)
        if report:
            report[-1] = report[-1]._replace(resumed=first == report[-1].saved + 1)
        report.append(kill)
    last = start(folder / "killed", steps, slow=False, workers=workers)
    first = int(last.stdout.readline())
    report[-1] = report[-1]._replace(resumed=first == report[-1].saved + 1)
    whole = start(folder / "whole", steps, slow=False, workers=0)
    for process in (last, whole):
        process.communicate()
        assert process.returncode == 0
    return report, differences(folder / "killed", folder / "whole")


def table(report: list[Kill], found: list[str]) -> str:
    lines = ["kill  after s  inside write  step reached  checkpoint  steps lost  resumed right after it"]
    for k, kill in enumerate(report, 1):
        cells = (kill.reached, kill.saved, kill.reached - kill.saved)
        yes = ["no", "yes"]
        lines.append(
            f"{k:>4} {kill.seconds:>8.2f} {yes[kill.inside]:>13} "
            + "{:>13} {:>11} {:>11} ".format(*cells)
            + f"{yes[kill.resumed]:>23}"
        )
    return "\n".join([*lines, f"compared with a run left alone: {'; '.join(found) or 'every file the same'}"])


def test_a_run_survives_being_killed(tmp_path: Path) -> None:
    report, found = torture(tmp_path, kills=3, inside=1, seed=0)
    print(table(report, found))
    assert any(kill.inside for kill in report)
    assert all(kill.resumed and kill.reached - kill.saved <= SAVE_EVERY for kill in report)
    assert not found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--inside", type=int, default=4, help="kills inside the write of a checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=0, help="processes that pick the batches of the killed run")
    parser.add_argument("--json", type=Path, help="write the report there too")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--slow", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part(args.part, args.steps, args.slow, args.workers)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report, found = torture(Path(folder), args.kills, args.inside, args.seed, args.workers)
        print(table(report, found))
        if args.json:
            args.json.write_text(json.dumps({"kills": [kill._asdict() for kill in report], "differences": found}))
        sys.exit(bool(found) or not all(kill.resumed for kill in report))
