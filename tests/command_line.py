"""The command line as tests call it, on tiny settings."""

from pathlib import Path

from ddpm_fast.cli import main

TINY = "--base-channels 8 --num-timesteps 20 --schedule cosine --channel-mults 1,2 --num-res-blocks 1"
TRAIN = f"train {TINY} --batch 8 --log-every 2 --sample-every 0 --device cpu"
DRAW = "sample {c} --device cpu --out {out}"


def run(command: str, **where: Path) -> int:
    return main([word.format(**where) for word in command.split()])
