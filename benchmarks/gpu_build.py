"""Build ddpm_fast._C and ddpm_fast._cuda on a Linux machine that has compilers, and maybe neither CMake nor pip.

Sources and options are read from CMakeLists.txt: the two can't drift apart.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from benchmarks.harness import ROOT, progress

COMPILERS = ("c++", "g++", "clang++")
# What CMake makes of a release build and of its properties of a target.
RELEASE = ("-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
LINK = ("-shared", "-Wl,-z,now")


class BuildError(Exception):
    """Why there will be no module, in one line."""


def build(folder: Path) -> str | None:
    """Make sure that ddpm_fast._C can be imported; return None, or the line that says why it can't.

    Args:
        folder: keeps the objects, so that a build that was stopped goes on.
    """
    if _import_error() is None:
        return None
    try:
        compiler = find_compiler()
        return _linked("_C", folder, [*compiler, *LINK], commands(compiler))
    except BuildError as error:
        return str(error)


def build_cuda(folder: Path) -> str | None:
    """Make sure that ddpm_fast._cuda can be imported, for this machine's GPU; as `build`."""
    if _import_error("_cuda") is None:
        return None
    try:
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError("no CUDA compiler: nvcc was not found")
        link = [nvcc, "-shared", "-cudart", "static"]
        return _linked("_cuda", folder, link, cuda_commands(nvcc))
    except BuildError as error:
        return str(error)


def _linked(name: str, folder: Path, link: Sequence[str], units: Iterator[tuple[Path, list[str]]]) -> str | None:
    module = ROOT / "ddpm_fast" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = _compile(units, folder)
    _run([*link, *map(str, objects)], folder / module.name)
    shutil.copy2(folder / module.name, module)
    reason = _import_error(name)
    if reason is not None:
        module.unlink()
    return reason


def _import_error(name: str = "_C") -> str | None:
    """Why a new process, which remembers no failure, can't import the module; or None."""
    done = subprocess.run([sys.executable, "-c", f"import ddpm_fast.{name}"], cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip() or "the import ended the process").splitlines()[-1]


def find_compiler() -> list[str]:
    """Return the compiler that $CXX names, or the first one on the path, as the beginning of a command."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"no C++ compiler: $CXX names {named[0]}, which was not found")
        return named
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the path")


def find_nvcc() -> str | None:
    """Return the CUDA compiler's path, or None where there is none."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_options() -> list[str]:
    """Return what nvcc is told of every kernel, but for which GPU it is."""
    return cmake_lists()["cuda_options"]


def cuda_commands(nvcc: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield each translation unit of ddpm_fast._cuda with its command, less the object's name."""
    lists, headers = cmake_lists(), [f"-I{folder}" for folder in _header_folders()]
    host = [nvcc, *cuda_options(), f"-Xcompiler={','.join(RELEASE)}"]
    target = "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "native"
    for source in _sources(lists["cuda_kernels"]):
        yield source, [*host, f"-arch={target}", "-c", str(source)]
    for source in _sources(lists["cuda_module"]):
        yield source, [*host, *headers, "-c", str(source)]


def commands(compiler: Sequence[str]) -> Iterator[tuple[Path, list[str]]]:
    """Yield each translation unit with its command, less the object's name; those that take longest come first."""
    lists = cmake_lists()
    macros = _answer([*compiler, "-dM", "-E", "-x", "c++", os.devnull])
    gnu = "__clang__" not in macros
    options = [_for_compiler(option, gnu) for option in lists["options"]]
    standard = lists["standard"]
    release = [*RELEASE, f"-std=c++{standard[standard.index('CXX_STANDARD') + 1]}"]
    common = [*compiler, *release, *(option for option in options if option)]
    sets: dict[str, list[str]] = {"baseline": []}
    sets |= {name: flags for name, flags in _sets(lists) if _takes(compiler, flags)}
    has = [f"-DDDPM_HAS_{name}" for name in sets]
    headers = [part for folder in _header_folders() for part in ("-isystem", str(folder))]
    for source in _sources(lists["module"]):
        yield source, [*common, *has, *headers, "-c", str(source)]
    threads = ["-fopenmp"] if gnu else []  # as in CMakeLists.txt: with another compiler's OpenMP nothing would link
    for source in _sources(lists["kernels"]):
        for name, flags in sets.items():
            yield source, [*common, *threads, *flags, f"-DDDPM_ISA={name}", "-c", str(source)]


def cmake_lists() -> dict[str, list[str]]:
    """Return the lists that CMakeLists.txt sets for every build: options, flags of instruction sets, file patterns."""
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    lists: dict[str, list[str]] = {}
    for name, rest in re.findall(r"^(?:set\(|file\(GLOB )(\w+)(?: CONFIGURE_DEPENDS)?([^)]*)\)", text, re.MULTILINE):
        lists[name] = []
        for word in rest.split():
            known = re.fullmatch(r"\$\{(\w+)\}", word)
            lists[name] += lists[known[1]] if known else [word]
    return lists


def _for_compiler(option: str, gnu: bool) -> str | None:
    """Resolve the one kind of condition that CMakeLists.txt has: that the compiler is GNU's."""
    condition = re.fullmatch(r"\$<\$<CXX_COMPILER_ID:GNU>:(.*)>", option)
    return option if condition is None else condition[1] if gnu else None


def _sets(lists: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Return the instruction sets above the baseline, the lesser ones first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    return [(name.removeprefix("flags_"), flags) for name, flags in lists.items() if name.startswith("flags_")]


def _takes(compiler: Sequence[str], flags: Sequence[str]) -> bool:
    command = [*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _sources(patterns: Sequence[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def _header_folders() -> list[Path]:
    """Return the folders of Python's and pybind11's headers; torch brings the latter, too."""
    try:
        import pybind11
    except ImportError:
        found = Path(torch.__file__).parent / "include"
    else:
        found = Path(pybind11.get_include())
    return [Path(sysconfig.get_path("include")), found]


def _compile(units: Iterator[tuple[Path, list[str]]], folder: Path) -> list[Path]:
    """Compile what is not compiled yet, or older than what it is made of, and return all objects."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = max(path.stat().st_mtime for path in (ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.h")))
    objects: list[Path] = []
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        jobs = []
        for source, command in units:
            # Named after the command: an object of other flags is another one.
            key = hashlib.sha256(shlex.join(command).encode()).hexdigest()[:12]
            to = folder / f"{source.stem}-{key}.o"
            objects.append(to)
            if not to.exists() or to.stat().st_mtime < max(shared, source.stat().st_mtime):
                jobs.append(pool.submit(_run, command, to))
        progress(f"compiling {len(jobs)} of {len(objects)} files on {cores} cores")
        try:
            for job in as_completed(jobs):
                job.result()
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise
    return objects


def _run(command: Sequence[str], to: Path) -> None:
    """Run a command that writes a file; what it left unfinished is never taken for one."""
    part = to.with_suffix(".part")
    _answer([*command, "-o", str(part)])
    part.replace(to)


def _answer(command: Sequence[str]) -> str:
    """Return what a command prints, or raise with the first line of its output that has an error."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{command[0]} failed without a word"]
        raise BuildError(next((line for line in lines if "error" in line.lower()), lines[-1]).strip())
    return done.stdout
