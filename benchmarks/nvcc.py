"""Compile the CUDA kernels for GPUs that need not be here, and report what the compiler made of them.

python -m benchmarks.nvcc --json benchmarks/results/nvcc.json
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.gpu_build import cuda_options, find_nvcc
from benchmarks.harness import ROOT
from benchmarks.options import count

TARGETS = ("sm_80", "sm_90a", "sm_100")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CLUSTERS = 90  # compute capability that has them, times 10
ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) "
)
NAME = re.compile(r"(\w+_kernel)(?:<.*?(Vector|Single)<(?:\w+::)*(\w+)>.*(\d)>)?\(")
PARTS = ("whole", "chunk", "apply")
WIDE_LOAD = re.compile(r"ld\.global(?:\.nc)?\.v4\.[bfu]32|cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 16")
WIDE_STORE = re.compile(r"st\.global\.v4\.[bfu]32")


def compiled(source: Path, target: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each kernel of a file; warnings of the compiler are errors."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(find_nvcc()), *cuda_options(), f"-arch={target}", "--Werror", "all-warnings", "-Xptxas", "-v"]
        command += ["-cubin", "--keep", "--keep-dir", folder, "-o", f"{folder}/out.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} for {target}:\n{done.stdout}{done.stderr}")
        ptx = next(Path(folder).glob("*.ptx")).read_text()
    bodies = {part.split("(", 1)[0].split()[-1]: part for part in ptx.split(".entry")[1:]}
    for mangled, stores, loads, registers in re.findall(ENTRY.pattern, done.stderr + done.stdout, re.DOTALL):
        text = bodies[mangled]
        row = {"kernel": readable(mangled), "target": target, "registers": int(registers)}
        row |= {"spills": int(stores) + int(loads), "shared": _static(mangled, done.stderr + done.stdout)}
        row |= {"wide_loads": len(WIDE_LOAD.findall(text)), "wide_stores": len(WIDE_STORE.findall(text))}
        row["cluster"] = "mapa" in text and "barrier.cluster.arrive" in text and "barrier.cluster.wait" in text
        row["fault"] = fault(row)
        yield row


def _static(mangled: str, text: str) -> int:
    """Bytes of static shared memory of a kernel; what a launch asks for comes on top."""
    used = re.search(r"Used[^\n]*", text[text.index(f"function '{mangled}'") :])
    found = re.search(r"(\d+) bytes smem", used[0] if used else "")
    return int(found[1]) if found else 0


def readable(mangled: str) -> str:
    """Return a kernel's name with its storage and part: "foo_fwd_kernel Vector Bf16 whole"."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    found = NAME.search(text)
    assert found is not None, text
    name, vector, element, part = found.groups()
    return f"{name} {vector} {element} {PARTS[int(part)]}" if vector else name


def fault(row: dict[str, Any]) -> str:
    """Return what a kernel should not have, or lacks; empty if all is well."""
    name, capability = row["kernel"], int(re.sub(r"\D", "", row["target"]))
    if row["spills"] and "_bwd_" not in name:
        return "spills"
    # What sums up alone leaves a few numbers in a table.
    stores = not ("_bwd_" in name and name.endswith("chunk"))
    if "Single" not in name and not (row["wide_loads"] and (row["wide_stores"] or not stores)):
        return "no accesses of 16 bytes"
    if name.endswith("whole") and capability >= CLUSTERS and not row["cluster"]:
        return "no cluster"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Compile and print the table; return 1 where a kernel has a fault, 2 where there is no compiler."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.nvcc", description=__doc__.splitlines()[0])
    p.add_argument("--targets", nargs="+", default=list(TARGETS), help="GPUs, as nvcc names them")
    p.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="compilers at once")
    p.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = p.parse_args(argv)
    if find_nvcc() is None:
        print("no CUDA compiler: nvcc was not found", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(lambda job: list(compiled(*job)), product(SOURCES, args.targets)):
            for row in sorted(found, key=lambda row: row["kernel"]):
                print(*row.values(), sep=" | ", flush=True)
                rows.append(row)
    if args.json:
        version = subprocess.run([str(find_nvcc()), "--version"], capture_output=True, text=True).stdout.split(
            "release "
        )[1]
        Path(args.json).write_text(json.dumps({"nvcc": version.split(",")[0], "rows": rows}, indent=1) + "\n")
    return int(any(row["fault"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
