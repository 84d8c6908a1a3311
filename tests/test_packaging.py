"""The sdist and wheels, installed where nothing of this checkout can help them, with and without a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"

TRAINS = """
import torch
from ddpm_fast import Diffusion, UNet
from ddpm_fast.schedules import generate_linear_schedule

unet = UNet(1, 8, (1, 2), 1, time_emb_dim=16, num_groups=4)
diffusion = Diffusion(unet, (8, 8), 1, None, generate_linear_schedule(10, 1e-3, 0.1))
loss = diffusion(torch.zeros(2, 1, 8, 8))
loss.backward()
assert torch.isfinite(loss), loss
"""

SAME_NOISE = """
import torch
from ddpm_fast import ops

def draw(backend):
    with ops.use_backend(backend):
        return ops.noise((3, 5, 7), ops.NoiseState.at(1, 2), ops.REVERSE)

assert torch.equal(draw("native"), draw("reference"))
"""

# Neither a GPU nor a driver is needed for it, and a call without says so.
CUDA_IMPORTS = """
from ddpm_fast import _cuda
try:
    _cuda.limits(0)
except RuntimeError as error:
    assert "CUDA says: " in str(error), error
"""

WHY_NO_NATIVE = """
from ddpm_fast import ops
print(*{reason for op, backend, reason in ops.availability() if (op, backend) == ("noise", "native")})
"""


def run(*command: str | Path, **environment: str) -> str:
    """Runs a command outside the checkout, with nothing in the environment that would change a build or an import."""
    drop = ("PYTHONPATH", "DDPM_FAST_NATIVE", "DDPM_FAST_CUDA", "DDPM_FAST_BACKEND", "CXX", "CXXFLAGS")
    env = {k: v for k, v in os.environ.items() if k not in drop} | environment
    result = subprocess.run(
        command, cwd=ROOT.parent, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an sdist, and the wheel made from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, PIP_CONSTRAINT=str(CONSTRAINTS))
    return out


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds torch and nothing else."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", venv)
    run(venv / "bin" / "python", "-m", "pip", "install", "-c", CONSTRAINTS, "torch")
    return venv / "bin" / "python"


def install(python: Path, wheel: Path) -> None:
    run(python, "-m", "pip", "uninstall", "-y", "ddpm_fast")
    run(python, "-m", "pip", "install", "-c", CONSTRAINTS, wheel)


def info(python: Path) -> str:
    return " ".join(run(python, "-I", "-m", "ddpm_fast", "info").split())


def test_wheel_with_compiler(built: Path, python: Path) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler on this machine")
    (wheel,) = built.glob("*.whl")
    assert "-none-any" not in wheel.name
    install(python, wheel)
    run(python, "-I", "-c", TRAINS)
    run(python, "-I", "-c", SAME_NOISE)
    assert run(python, "-I", "-c", WHY_NO_NATIVE).strip() == "None"
    assert "noise native available" in info(python)
    if shutil.which("nvcc"):
        run(python, "-I", "-c", CUDA_IMPORTS)
    else:
        assert "no CUDA compiler was found, nvcc 12.8 or newer" in info(python)


def test_wheel_without_compiler(built: Path, python: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    environment = {"CXX": shutil.which("false") or "", "PIP_CONSTRAINT": str(CONSTRAINTS)}
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, sdist, **environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    install(python, wheel)
    run(python, "-I", "-c", TRAINS)
    reason = "the native build failed: The C++ compiler"
    assert reason in run(python, "-I", "-c", WHY_NO_NATIVE)
    assert f"noise native {reason}" in info(python)


def test_a_second_build_forgets_deleted_modules(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "ddpm_fast").mkdir()
    (tmp_path / "ddpm_fast" / "__init__.py").write_text("__version__ = '0'\n")
    (tmp_path / "ddpm_fast" / "gone.py").write_text("")
    code = f"import os, runpy, sys; os.chdir({str(tmp_path)!r}); sys.argv = ['setup.py', 'build']; "
    for expected in (["__init__.py", "gone.py"], ["__init__.py"]):
        run(sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')", DDPM_FAST_NATIVE="0")
        assert sorted(p.name for p in (tmp_path / "build").glob("lib*/ddpm_fast/*.py")) == expected
        (tmp_path / "ddpm_fast" / "gone.py").unlink(missing_ok=True)
