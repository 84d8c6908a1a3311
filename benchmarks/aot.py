"""Compile the Triton kernels for GPUs that need not be here, and report what the compilers made of them.

python -m benchmarks.aot --json benchmarks/results/aot.json

Each kernel is compiled as a launch on such tensors would compile it: the launchers run, on memory of the CPU, under a
driver that names another GPU and launches nothing.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.configured import configured
from benchmarks.options import count

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SEARCHED = "sm_90"  # here every configuration that a search may pick is compiled, else that of the rule
QUICK_NORMS = ((128, 32, "last", False), (256, 16, "last", True), (384, 32, "last", True), (256, 8, "nchw", False))
STEPS = "noise", "q_sample", "sampler_step", "diffusion_loss", "timestep_embedding", "ema_update"
KERNELS = *STEPS, "group_norm_silu", "residual_sum"
WIDE = re.compile(r"\.v4\.b32|\.v2\.b64|\.v8\.b16|_dwordx4")


@dataclass(frozen=True)
class Case:
    """A call that launches kernels.

    Args:
        kernel: the op.
        label: shape and variant.
        call: runs the op's launcher.
        wide: whether every kernel must have accesses of 16 bytes.
        quick: whether it is among the few that the tests compile.
        config: the name of the configuration; that of the kernel's rule if empty.
    """

    kernel: str
    label: str
    call: Callable[[], Any]
    wide: bool = True
    quick: bool = False
    config: str = ""


def cases() -> Iterator[Case]:
    """Yield the shapes of the CIFAR-10 network, in the layouts and dtypes that a launch specialises on."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from _steps(dtype, quick=dtype is not torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        for channels, size in ((128, 32), (256, 32), (384, 32), (256, 16), (384, 16), (512, 16), (256, 8), (512, 4)):
            for layout in ("last", "nchw"):
                for full in (False, True):
                    quick = (channels, size, layout, full) in QUICK_NORMS and dtype is torch.bfloat16
                    yield from _norms(dtype, channels, size, layout, full, quick)
        yield from _norms(dtype, 512, 1, "last", True, dtype is torch.bfloat16)  # one pixel
        yield from _norms(dtype, 64, 256, "last", False, dtype is torch.bfloat16, images=1)  # many chunks
    for dtype in (torch.bfloat16, torch.float32):
        yield from _sums(dtype)


def _steps(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    from ddpm_fast.kernels import diffusion_loss, ema_update, noise, q_sample, sampler_step, timestep_embedding
    from ddpm_fast.reference.philox import REVERSE, TIMESTEPS, NoiseState

    state, shape, name, wide = NoiseState.at(1, 2, 3), (64, 3, 32, 32), _name(dtype), dtype.itemsize == 4
    x = torch.zeros(shape, dtype=dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    table, t, rows, k = torch.ones(1000), torch.zeros(64, dtype=torch.int64), torch.zeros(1000, 8), torch.tensor(3)
    if dtype is torch.float32:
        embedding = partial(timestep_embedding.timestep_embedding, t, 128, 1.0)
        yield Case("timestep_embedding", "[64] -> 128", embedding, False, True)
        yield Case("noise", "timesteps", partial(noise.timesteps, 64, 1000, state, TIMESTEPS), False, True)
        yield Case("noise", "dropout_mask", partial(noise.dropout_mask, (64, 128, 32, 32), 0.1, state, 33), True, True)
    averages, values = [torch.zeros(128, 128, 3, 3)], [torch.zeros(128, 128, 3, 3, dtype=dtype)]
    yield Case("ema_update", f"of {name}", partial(ema_update.ema_update, averages, values, 0.999), True, quick)
    yield Case("noise", name, partial(noise.noise, shape, state, REVERSE, dtype), wide, quick)
    yield Case("q_sample", name, partial(q_sample.q_sample, x, t, table, table, state), wide, quick)
    step, room = sampler_step.sampler_step, sampler_step.room(x, x, [])
    yield Case("sampler_step", name, partial(step, room, None, x, x, rows, k, state, None, None, 1.0), wide, quick)
    recorded = NoiseState(state.seed, k, torch.tensor(3))
    replayed = partial(step, room, None, x, x, rows, k, recorded, None, None, 1.0)
    yield Case("sampler_step", f"{name}, recorded", replayed, wide, quick)
    other = partial(step, room, sampler_step.room(x, None, []), x, last, rows, k, x, x, None, None)
    yield Case("sampler_step", f"{name}, hist, channels_last", other, wide, quick)
    predicted, variance = torch.zeros(64, 6, 32, 32, dtype=dtype).chunk(2, dim=1)
    learned = partial(step, room, None, x, predicted, torch.zeros(1000, 9), k, state, None, variance, 1.0)
    yield Case("sampler_step", f"{name}, variance", learned, wide, quick)
    for loss_type, of_loss in (("l2", ()), ("huber", (64,))):
        of = diffusion_loss.Target(state, None, None, None, loss_type)
        label = f"{name}, {loss_type}{' of images' if of_loss else ''}"
        forward = partial(diffusion_loss.forward, of_loss, x, of)
        yield Case("diffusion_loss", f"{label} forward", forward, wide, quick)
        backward = partial(diffusion_loss.backward, torch.ones(of_loss), x, of)
        yield Case("diffusion_loss", f"{label} backward", backward, wide, quick)


def _norms(
    dtype: torch.dtype, channels: int, size: int, layout: str, full: bool, quick: bool, images: int = 16
) -> Iterator[Case]:
    from ddpm_fast.kernels import group_norm_silu as norm
    from ddpm_fast.kernels.norm_cut import candidates
    from ddpm_fast.reference.philox import NoiseState

    form = torch.channels_last if layout == "last" else torch.contiguous_format

    def image(channels: int) -> Tensor:
        return torch.zeros(images, channels, size, size, dtype=dtype).contiguous(memory_format=form)

    second = min(128, channels // 2) if full else 0
    x, x2, y = image(channels - second), image(second) if full else None, image(channels)
    row, both = torch.zeros(channels), torch.zeros(images, channels)
    scale, residual = (both, x) if full else (None, None)
    dropout = (*NoiseState.at(1, 2, 3), 33, 6554, 1.1) if full else None
    of = norm.Operands(x, x2, row, row, both, scale, scale, 32, "silu", dropout)
    statistics = torch.zeros(images, 32, 2, dtype=torch.float64)
    wide = layout == "last" and size > 1  # a single pixel has fewer channels than a program has threads
    label = f"{_name(dtype)} [{images}, {channels}, {size}, {size}] {layout}{' everything' if full else ''}"
    calls = {
        "forward": partial(norm.forward, of, residual, y, residual, statistics, 1e-5),
        "backward": partial(norm.backward, of, y, residual, x, x2, statistics),
    }
    for direction, call in calls.items():
        for i, name in enumerate(candidates(direction, *of.sizes)):
            few = quick and (i == 0 or i < 4 and full and (channels, size) == (256, 16))
            yield Case("group_norm_silu", f"{label} {direction}", call, wide and i == 0, few, name if i else "")


def _sums(dtype: torch.dtype) -> Iterator[Case]:
    from ddpm_fast.kernels.residual_sum import residual_sum

    for layout, form in (("last", torch.channels_last), ("nchw", torch.contiguous_format)):
        for channels, size in ((128, 32), (384, 16), (512, 4)):
            x = torch.zeros(16, channels, size, size, dtype=dtype).contiguous(memory_format=form)
            label = f"{_name(dtype)} [16, {channels}, {size}, {size}] {layout}"
            bias = torch.zeros(channels, dtype=dtype)
            yield Case("residual_sum", label, partial(residual_sum, x, x, bias), True, size == 32)
            if size == 32:
                yield Case("residual_sum", f"{label}, no bias", partial(residual_sum, x, x, None))
                yield Case("residual_sum", f"{label}, no residual", partial(residual_sum, x, None, bias))
                if dtype is not torch.float32:
                    yield Case("residual_sum", f"{label}, float32 bias", partial(residual_sum, x, x, bias.float()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Elsewhere:
    """A driver for a GPU that is not here."""

    def __init__(self, target: Any, device: int) -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(case: Case, name: str) -> list[Any]:
    """Return what each kernel that the case launches was compiled to for the target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    found: list[Any] = []
    run = triton.runtime.JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        found.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return found[-1]

    driver.set_active(_Elsewhere(GPUTarget(*TARGETS[name]), list(TARGETS).index(name)))
    triton.runtime.JITFunction.run = warm
    try:
        with configured(case.config):
            case.call()
    finally:
        triton.runtime.JITFunction.run = run
    return found


def report(kernel: Any, name: str) -> dict[str, Any]:
    """Return registers, spills, shared memory and wide accesses of a compiled kernel."""
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    row: dict[str, Any] = {"function": kernel.metadata.name, "warps": kernel.metadata.num_warps}
    row |= {"shared": kernel.metadata.shared, "wide": len(WIDE.findall(text))}
    if name.startswith("sm_"):
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
            sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
        row["registers"] = int(re.findall(r"REG:(\d+)", usage)[-1])
        row["spills"] = len(re.findall(r"\b(?:LDL|STL)", sass))
    else:
        row["registers"] = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[-1])
        row["spills"] = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[-1])
    return row


def _share(args: argparse.Namespace, share: int) -> list[tuple[int, list[dict[str, Any]]]]:
    """One process's share of the cases: their numbers and rows."""
    torch.set_num_threads(1)
    found = []
    for i, case in enumerate(cases()):
        if i % args.jobs != share or case.kernel not in args.kernels or (args.quick and not case.quick):
            continue
        rows = []
        for name in args.targets:
            if case.config and name != SEARCHED and not args.quick:
                continue
            for kernel in compiled(case, name):
                row = {"op": case.kernel, "case": case.label, "config": case.config or "rule", "target": name}
                rows.append(row | report(kernel, name))
                rows[-1]["fault"] = _fault(rows[-1], case)
                print(*rows[-1].values(), sep=" | ", flush=True)
        found.append((i, rows))
    return found


def main(argv: list[str] | None = None) -> int:
    """Compile and print the table; return 1 where a forward kernel spills, or one lacks 16-byte accesses."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    p.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="GPUs")
    p.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="ops")
    p.add_argument("--quick", action="store_true", help="a few shapes, those that the tests compile")
    p.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="processes")
    p.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = p.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        p.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        shares = pool.map(partial(_share, args), range(args.jobs))
        rows = [row for _, rows in sorted(chain.from_iterable(shares), key=itemgetter(0)) for row in rows]
    if args.json:
        import triton

        Path(args.json).write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    return int(any(row["fault"] for row in rows))


def _fault(row: dict[str, Any], case: Case) -> str:
    if row["spills"] and "bwd" not in row["function"]:
        return "spills"
    return "no accesses of 16 bytes" if case.wide and not row["wide"] and not row["target"].startswith("gfx") else ""


if __name__ == "__main__":
    sys.exit(main())
