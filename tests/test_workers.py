"""Worker processes change nothing but the time, and leave with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.training.data import Batches, Images, load_images

PARENT = """
import multiprocessing, signal, sys, torch
from ddpm_fast.training.data import Batches, Images
from ddpm_fast.training.workers import start_pool

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: None)
    batches = Batches(Images(torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1), None), workers=1)
    batches._ahead._pool = start_pool(1, batches._ahead.picker)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()  # Ctrl-C has come, before the worker was ready for it
    print(batches.take(0, 8)[0].sum().item(), flush=True)
    sys.stdin.readline()
"""


def test_decoding_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(40):
        side = 8 + k % 3
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    (tmp_path / "33.png").write_bytes(b"")
    (tmp_path / "5.png").write_bytes(b"no image")
    found = []
    for workers in (0, 2):
        with pytest.warns(UserWarning, match="skipped 2 of the 40"):
            found.append(load_images(tmp_path, size=(6, 9), skip_bad=True, workers=workers))
    assert found[0].fingerprint() == found[1].fingerprint() and found[0].skipped == found[1].skipped


def test_batches_ahead_are_the_same_batches() -> None:
    pixels = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    images = Images(pixels, torch.arange(50))
    plain, ahead = Batches(images, seed=5, flip=True), Batches(images, seed=5, flip=True, workers=2)
    # In sequence over epochs, another size, back, and from the middle of an epoch as a resumed run.
    for position, count in (*((p, 16) for p in range(0, 160, 16)), (160, 7), (167, 7), (30, 16), (1035, 16)):
        (x, y), (expected, labels) = ahead.take(position, count), plain.take(position, count)
        assert torch.equal(x, expected) and torch.equal(y, labels)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_workers_ignore_ctrl_c_and_die_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(command, text=True, start_new_session=True, env=environment, **pipes) as parent:
        (worker,) = map(int, parent.stdout.readline().split())
        for delay in (0, 0.5):
            time.sleep(delay)
            os.killpg(parent.pid, signal.SIGINT)
        parent.stdin.write("\n")
        parent.stdin.flush()
        expected = (torch.arange(8.0) / 127.5 - 1).sum().item()
        assert float(parent.stdout.readline()) == pytest.approx(expected)
        assert alive(worker)
        parent.kill()
        for _ in range(200):
            if not alive(worker):
                break
            time.sleep(0.05)
        assert not alive(worker), "the worker outlived its parent"
        assert "Traceback" not in parent.stderr.read()


def alive(pid: int) -> bool:
    """Not counting what has ended and waits to be collected."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    images = Images(torch.zeros(31, 1, 1, 1, dtype=torch.uint8), torch.arange(31))

    def drawn(seed: int, batch: int) -> list[list[int]]:
        batches = Batches(images, seed=seed)
        labels = torch.cat([batches.take(p, batch)[1] for p in range(0, 4 * 31 + batch, batch)])[: 4 * 31]
        return labels.reshape(4, 31).tolist()

    expected = {seed: drawn(seed, 31) for seed in (0, 1)}
    for batch in (1, 7, 64):
        assert drawn(0, batch) == expected[0]
    epochs = [*expected[0], *expected[1]]
    assert all(sorted(epoch) == list(range(31)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
