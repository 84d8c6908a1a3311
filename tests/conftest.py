"""What all tests share: repeatable random numbers, one thread, and memory that no one may read before writing it."""

import os

# Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before anyone imports Triton.
os.environ.setdefault(
    "TRITON_INTERPRET", str(int(not (os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd"))))
)

# Where a test asks for two threads, they share a core with another test's: waiting, they must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import TRAIN, run
from tape import Tape
from torch import Tensor
from torch.utils._device import _device_constructors

from ddpm_fast import engine, graphs
from ddpm_fast.training import step

if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton"):
    from triton.runtime.interpreter import interpreter_builder

    # It looks for overflows, a quarter of its time, only to say nothing of them where it isn't debugging.
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)

torch.manual_seed(0)  # the arguments that tests are named after are the same in every process that collects them

# On tensors this small a second thread gains nothing, and on a busy machine the two wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the cache of whoever runs it."""
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Every test starts from the same seeds and one thread, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and its kin return with NaN, so that an element left unwritten shows."""

    def poisoned(allocate: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    _device_constructors()  # remembers the functions that it finds at its first call: let it find the true ones
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a tiny run of `ddpm-fast train` wrote."""
    out = tmp_path_factory.mktemp("run")
    assert run(TRAIN + " --steps 4 --lr 1e-3 --seed 3 --out {out}", out=out) == 0
    return out / "model.safetensors"


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    """What records from now on, on the CPU, too; there is one, whoever asks for it."""
    tape = Tape()
    monkeypatch.setattr(graphs, "Recorder", lambda device: tape.recorders.append(device) or tape)
    for module in (graphs, engine, step):
        monkeypatch.setattr(module, "possible", lambda device: True)
    monkeypatch.setattr("ddpm_fast.functional.STEPS_OF_FIXED_WEIGHTS", 0)  # as on a GPU
    return tape
