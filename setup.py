"""Builds the optional native modules `ddpm_fast._C` and `ddpm_fast._cuda` with CMake and ninja; pyproject.toml holds
everything else.

The package works without them, only slower. When one can't be built, the reason goes into
`ddpm_fast/_C_unavailable.txt` or `_cuda_unavailable.txt`, which `python -m ddpm_fast info` shows.
`DDPM_FAST_NATIVE=0` skips `_C`, `DDPM_FAST_NATIVE=1` makes its failure fatal; so does `DDPM_FAST_CUDA` for `_cuda`.
`DDPM_FAST_SANITIZE=1` is for `make sanitize`.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SWITCHES = {"_C": "DDPM_FAST_NATIVE", "_cuda": "DDPM_FAST_CUDA"}


def requested(module: str) -> str:
    """A module's switch: "0" (skip), "1" (a failure is fatal) or "" (try)."""
    name = SWITCHES[module]
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name}={value}: expected 0 (skip the native build), 1 (require it) or nothing (try)")
    return "0" if module == "_cuda" and sanitized() else value


def sanitized() -> bool:
    return os.environ.get("DDPM_FAST_SANITIZE") == "1"


def tool(name: str) -> str:
    """Path of a build tool: from PATH, where an isolated build puts its own, or from beside this Python."""
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        raise CompileError(f"{name} was not found: pip install {name}")
    return path


def run(*command: str | Path) -> None:
    """Runs a command and shows its output; on failure raises CompileError with the first error in it."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(result.stdout, flush=True)
    if result.returncode:
        lines = result.stdout.replace(f"{ROOT}{os.sep}", "").splitlines()
        first = next((i for i, line in enumerate(lines) if re.search("error|fatal", line.lower())), -1)
        text = " ".join(" ".join(lines[first:][:8]).split())
        text = re.sub(r"^CMake Error at \S+ \(\w+\): ", "", text)[:300]
        raise CompileError(f"the native build failed: {text} ... (all of it: pip install -v)")


@functools.cache
def configure() -> Path:
    """Configures the build, and returns its directory."""
    try:
        import pybind11
    except ImportError:
        raise CompileError("pybind11 was not found: pip install pybind11") from None
    cmake, ninja = tool("cmake"), tool("ninja")
    kind = "sanitized" if sanitized() else "native"
    # CMake keeps these for the life of a build directory, so each combination gets its own.
    names = "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAToolkit_ROOT"
    fixed = [str(ROOT), sys.executable, *(os.environ.get(name, "") for name in names)]
    key = hashlib.sha256("\n".join(fixed).encode()).hexdigest()[:8]
    directory = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}-{key}"
    run(
        *(cmake, "-S", ROOT, "-B", directory, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *("-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DDDPM_SANITIZE={'ON' if kind == 'sanitized' else 'OFF'}"),
    )
    return directory


def compile_native(module: str) -> Path:
    """Builds a module, incrementally, and returns the directory that holds it."""
    if requested(module) == "0":
        why = "under sanitizers" if sanitized() else f"{SWITCHES[module]}=0 was set when ddpm_fast was installed"
        raise CompileError(f"not built: {why}")
    directory = configure()
    run(tool("cmake"), "--build", directory, "--target", module)
    return directory


class BuildAnew(build):
    """Starts from an empty folder, because setuptools leaves modules in it that were deleted since.

    Not the folder of CMake: its builds go on from where they were.
    """

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Puts the modules, or the reasons why there is none, into the package."""

    def run(self) -> None:
        if self.inplace:
            package = Path(self.get_finalized_command("build_py").get_package_dir("ddpm_fast"))
        else:
            package = Path(self.build_lib, "ddpm_fast")
        package.mkdir(parents=True, exist_ok=True)
        built = [extension for extension in self.extensions if self.put(extension.name.rpartition(".")[2], package)]
        self.extensions = self.distribution.ext_modules = built

    def put(self, name: str, package: Path) -> bool:
        """Whether the module could be built."""
        module, reason = package / Path(self.get_ext_filename(name)).name, package / f"{name}_unavailable.txt"
        module.unlink(missing_ok=True)
        reason.unlink(missing_ok=True)
        try:
            shutil.copy2(compile_native(name) / module.name, module)
        except (CompileError, OSError) as error:
            if requested(name) == "1":
                raise
            print(f"ddpm_fast is installed without {name}: {error}", file=sys.stderr)
            reason.write_text(f"{error}\n", encoding="utf-8")
            return False
        return True


class TagWheel(bdist_wheel):
    """Tags a wheel as pure if it holds no native module, which is known only after the build."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=[Extension(f"ddpm_fast.{module}", sources=[]) for module in SWITCHES],
    cmdclass={"build": BuildAnew, "build_ext": BuildNative, "bdist_wheel": TagWheel},
)
