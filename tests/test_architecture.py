"""The house rules of docs/architecture.md that a program can check."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "ddpm_fast").rglob("*.py"))
OPS = [path.stem for path in sorted((ROOT / "ddpm_fast" / "ops").glob("[!_]*.py"))]

# An import points to a lower level, or stays on its own.
LEVELS = (
    "reference",
    "kernels _C _cuda",
    "ops schedules predictions objectives samplers variational",
    "engine chain corrections functional adaptive graphs tape footprint memory models progress",
    "diffusion sampling losses conditions",
    "editing training evaluation interop demo unet ema utils script_utils",
    "__init__ __main__ arguments cli commands info options",
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}


def unit(path: Path) -> str:
    """What has a level: the file or package directly below ddpm_fast."""
    return path.relative_to(ROOT / "ddpm_fast").with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, unit) of every import of our own in a file; "__init__" for a name that the package exports."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = [*(here[: -node.level] if node.level else ()), *([node.module] if node.module else ())]
            names = [".".join([*prefix, alias.name]) for alias in node.names]
        else:
            continue
        for top, *rest in (name.split(".") for name in names):
            if top in ("ddpm_fast", "benchmarks", "tests"):
                yield node.lineno, rest[0] if top == "ddpm_fast" and rest and rest[0] in LEVEL else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path: Path) -> None:
    own = unit(path)
    assert own in LEVEL, f"give {own} a level in {Path(__file__).name}"
    for line, other in imports(path):
        assert LEVEL[other] <= LEVEL[own], f"line {line}: level {LEVEL[own]} imports {other} of level {LEVEL[other]}"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (400 if own == "kernels" else 300), "too long: split it by subject"
    assert own == "graphs" or "torch.cuda.graph" not in text, "only graphs.py captures CUDA graphs"


def test_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(unit(path), set()).update({other for _, other in imports(path)} - {unit(path)})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("place", ["ddpm_fast/reference/{}.py", "tests/ops/test_{}.py", "benchmarks/ops/{}.py"])
def test_op_is_complete(op: str, place: str) -> None:
    assert (ROOT / place.format(op)).is_file(), f"ddpm_fast/ops/{op}.py needs {place.format(op)}"


def test_import_loads_no_kernel_and_no_compiler() -> None:
    """The compiler takes as long to import as all else of torch."""
    code = "import sys, torch; before = set(sys.modules); import ddpm_fast; print(*set(sys.modules) - before)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "ddpm_fast.ops" in loaded
    not_yet = ("ddpm_fast.kernels.", "ddpm_fast._C", "ddpm_fast._cuda", "torch._dynamo", "torch._inductor", "triton")
    assert not [name for name in loaded if name.startswith(not_yet)]
