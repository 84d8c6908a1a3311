"""The native module built without CMake and without pybind11, in a copy of the package that has none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_build

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GPU machines run Linux")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, gpu_build.COMPILERS)), reason="needs a C++ compiler")

# Python runs it at every start: an editable install would find its own module for the copy, too.
SITECUSTOMIZE = """
import sys
sys.modules["pybind11"] = None
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in str(getattr(f, "__module__", ""))]
"""
# Without optimisation, which takes a minute; test_the_commands_are_those_of_cmake sees to the options.
BUILD = """
from pathlib import Path
from benchmarks import gpu_build
commands = gpu_build.commands
def hastily(compiler):
    return [(path, [word.replace("-O3", "-O0") for word in words]) for path, words in commands(compiler)]
gpu_build.commands = hastily
print(gpu_build.build(Path("objects")))
"""
# As where torch finds an H200.
BUILD_CUDA = """
import torch
from pathlib import Path
from benchmarks import gpu_build
torch.cuda.is_available, torch.cuda.get_device_capability = (lambda: True), (lambda: (9, 0))
print(gpu_build.build_cuda(Path("objects")))
"""
SAME_NOISE = """
from ddpm_fast import _C, ops
draw = lambda: ops.noise((3, 5, 7), ops.NoiseState.at(1, 2), ops.REVERSE)
with ops.use_backend("native"):
    native = draw()
with ops.use_backend("reference"):
    assert draw().equal(native)
print(_C.__file__, _C.isas())
"""


def run(copy: Path, code: str) -> str:
    """What Python prints in the copy, which comes first on its path."""
    env = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's sources."""
    for name in ("csrc", "ddpm_fast", "benchmarks"):
        without = shutil.ignore_patterns("_C*", "_cuda*.so", "__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    for name in ("setup.py", "CMakeLists.txt"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return tmp_path


@pytest.mark.packaging  # takes most of a minute
@needs_compiler
def test_a_compiler_is_enough(copy: Path) -> None:
    """One test of all that follows from the build."""
    assert run(copy, BUILD) == "None"
    where, sets = run(copy, SAME_NOISE).split(maxsplit=1)
    assert Path(where).parent == copy / "ddpm_fast" and "baseline" in sets

    objects = sorted((copy / "objects").glob("*.o"))
    before = [path.stat().st_mtime_ns for path in objects]
    Path(where).unlink()
    (copy / "csrc" / "dispatch.cpp").touch()
    assert run(copy, BUILD) == "None"
    changed = [path.stem for path, t in zip(objects, before, strict=True) if path.stat().st_mtime_ns != t]
    assert [name.split("-")[0] for name in changed] == ["dispatch"], "only what is older than its source"

    (copy / "csrc" / "dispatch.cpp").unlink()
    Path(where).unlink()
    reason = run(copy, BUILD)
    assert "undefined symbol" in reason and "\n" not in reason
    assert not Path(where).exists(), "no module is left that can't be imported"


@pytest.mark.packaging
@pytest.mark.skipif(gpu_build.find_nvcc() is None, reason="there is no nvcc here")
def test_nvcc_is_enough_for_the_cuda_kernels(copy: Path) -> None:
    assert run(copy, BUILD_CUDA) == "None"
    assert run(copy, "from ddpm_fast import _cuda; print(_cuda.device_type)") == "cuda"


@needs_compiler
def test_what_does_not_compile_is_the_reason(copy: Path) -> None:
    (copy / "csrc" / "bindings.cpp").write_text("#error no such luck\n")
    reason = run(copy, BUILD)
    assert "no such luck" in reason and "\n" not in reason


def test_what_can_be_imported_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_build, "_import_error", lambda: None)
    assert gpu_build.build(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("no-such-compiler -m64", "no C++ compiler: $CXX names no-such-compiler, which was not found"),
        ("", "no C++ compiler: none of c++, g++, clang++ is on the path"),
    ],
)
def test_without_a_compiler(named: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_build, "_import_error", lambda: "there is none")
    monkeypatch.setenv("CXX", named)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_build.build(tmp_path) == reason


def told(words: list[str]) -> set[str]:
    """What a compiler is told but for where headers lie, and what is CMake's own."""
    return {word for word in words if word.startswith("-") and word not in ("-isystem", "-c", "-o", "-D_C_EXPORTS")}


@needs_compiler
def test_the_commands_are_those_of_cmake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CMakeLists.txt comes to say in a form that is not understood here shows."""
    pybind11 = pytest.importorskip("pybind11")
    folder = Path(sys.executable).parent
    cmake, ninja = (shutil.which(name) or shutil.which(name, path=folder) for name in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        pytest.skip("needs CMake and ninja")
    for name in ("CXX", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    command = [cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += ["-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(command, check=True, capture_output=True)
    lines = subprocess.run([ninja, "-C", tmp_path, "-t", "commands"], check=True, capture_output=True, text=True)
    *compiled, linked = [line.split() for line in lines.stdout.splitlines() if ".cpp.o" in line]
    expected = {(words[-1], frozenset(told(words[: words.index("-MD")]))) for words in compiled}
    ours = {(str(path), frozenset(told(words))) for path, words in gpu_build.commands(gpu_build.find_compiler())}
    assert ours == expected
    assert set(gpu_build.LINK) <= set(linked)
