"""The CUDA kernels without a GPU: a C++ compiler builds them for a machine that csrc/cuda/host stands in for, under
sanitizers; cuda_on_host.py has what is then tested. And nvcc, where it is, compiles them for GPUs that are not here.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import nvcc
from ddpm_fast.ops import _cuda
from ddpm_fast.ops._dispatch import Unavailable

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-DDDPM_HOST"),
)
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")


def answer(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def preload() -> str:
    """The sanitizers, which must be loaded before Python."""
    if sys.platform != "linux" or shutil.which(COMPILER[0]) is None:
        pytest.skip("needs Linux and a C++ compiler")
    found = [answer(*COMPILER, f"-print-file-name={name}").strip() for name in LIBRARIES]
    if not all(map(os.path.isabs, found)):
        pytest.skip("the compiler has no sanitizers here, as GNU's has")
    return " ".join(found)


def built(folder: Path) -> Path:
    """The module of the kernels and their bindings, as it was built last or built anew."""
    pybind11 = pytest.importorskip("pybind11")
    headers = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    sources = [*SOURCES.glob("*.cpp"), *SOURCES.glob("*.cu")]
    files = sorted((*sources, *SOURCES.rglob("*.h"), *SOURCES.parent.glob("*.h"), Path(__file__)))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in files) + shlex.join(COMPILER).encode()).hexdigest()[:16]
    module = folder / f"cuda-on-host-{key}" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    module.parent.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        to = module.parent / f"{source.stem}.o"
        slow = ["-O0"] if source.suffix == ".cpp" else []
        answer(*COMPILER, *FLAGS, *slow, *headers, "-x", "c++", "-c", source, "-o", to)
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    part = module.with_suffix(f".{os.getpid()}")
    answer(*COMPILER, *FLAGS, "-shared", *objects, "-o", part)
    part.replace(module)
    return module


@pytest.mark.minutes
def test_kernels_on_a_cpu_under_sanitizers(preload: str) -> None:
    environment = {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DDPM_TEST_CUDA_HOST": str(built(ROOT / "build")),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "pytest", "--capture=sys", "-q", "-x", "-p", "no:cacheprovider"]
    command.append(str(Path(__file__).with_name("cuda_on_host.py")))
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


FAULTS = {
    "left": "waits for threads that don't come",  # a thread is gone when the others wait for it
    "peer": "use-after-poison",  # a block reads the shared memory of one that has ended
    "arrived": "use-after-poison",  # a block says that it has read before it has
    "bounds": "heap-buffer-overflow",  # past the end of the shared memory
    "cluster": "waits without having arrived",
    "early": "a copy was read before it was there",
    "race": "a number was read before it was there",  # without a barrier: in one of the orders
}


def test_faults_of_kernels_show(preload: str, tmp_path: Path) -> None:
    program = tmp_path / "faults"
    answer(*COMPILER, *FLAGS, f"-I{SOURCES}", Path(__file__).with_name("cuda_faults.cpp"), "-o", program)
    for fault, text in FAULTS.items():
        done = subprocess.run([program, fault], capture_output=True, text=True)
        assert done.returncode and text in done.stderr, (fault, done.stderr[-2000:])
    assert answer(program, "none") == "done\n"


@pytest.mark.parametrize(
    ("gpu", "version", "limits", "reason"),
    [
        (False, "13.0", (9, 132, 1), "no GPU"),
        (True, None, (9, 132, 1), "GPUs of another kind"),
        (True, "13.0", None, "driver version is insufficient"),
        (True, "13.0", (7, 80, 1), "needs compute capability 8.0 or more, this GPU has 7"),
    ],
)
def test_why_they_can_not_run(
    gpu: bool, version: str | None, limits: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(device: int) -> Any:
        if limits is None:
            raise RuntimeError("the GPU: CUDA says: CUDA driver version is insufficient for CUDA runtime version")
        return limits

    module = SimpleNamespace(device_type="cuda", limits=asked)
    monkeypatch.setattr(_cuda._native, "load", lambda name: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", version)
    _cuda.device_type.cache_clear()
    try:
        with pytest.raises(Unavailable, match=reason):
            _cuda.load("sampler_step")
    finally:
        _cuda.device_type.cache_clear()


@pytest.mark.packaging
@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="there is no nvcc here")
def test_nvcc_compiles_them_for_gpus_that_are_not_here() -> None:
    """No forward kernel spills; 16 bytes are loaded and stored at once; one pass is by clusters where there are any."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: list(nvcc.compiled(*job)), product(nvcc.SOURCES, nvcc.TARGETS))
    rows = [row for of_file in found for row in of_file]
    assert {row["target"] for row in rows} == set(nvcc.TARGETS)
    assert all(not row["fault"] and 0 < row["registers"] <= 128 for row in rows)
    assert {row["kernel"] for row in rows if row["cluster"]} == {k for k in (r["kernel"] for r in rows) if "whole" in k}


def test_the_report_of_nvcc_finds_faults() -> None:
    row = {"kernel": "foo_fwd_kernel Vector float whole", "target": "sm_90a", "spills": 0}
    row |= {"wide_loads": 1, "wide_stores": 1, "cluster": True}
    assert nvcc.fault(row) == ""
    assert nvcc.fault(row | {"spills": 4}) == "spills"
    assert nvcc.fault(row | {"wide_stores": 0}) == "no accesses of 16 bytes"
    assert nvcc.fault(row | {"cluster": False}) == "no cluster"
    assert nvcc.fault(row | {"cluster": False, "target": "sm_80"}) == ""
    assert nvcc.fault(row | {"spills": 4, "kernel": "foo_bwd_kernel Vector float whole"}) == ""
