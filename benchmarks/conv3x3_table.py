"""Time every way of a 3x3 convolution on this CPU and write which is the fastest, for `ddpm_fast/ops/conv3x3_cpu.json`.

python -m benchmarks.conv3x3_table --json benchmarks/results/conv3x3_table_FILE.json --write

Where weights change, a result is timed together with the gradient of x. Each call finds its weights in memory, and its
images where a network's last layer left them. A way whose rounding exceeds the bound isn't taken, however fast: 3 times
the direct convolution's rms error, 5 times its largest; in bf16 the rule of the tests.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, header, progress, write_json
from benchmarks.options import Parser, count, output_file
from ddpm_fast.ops import _conv3x3 as native
from ddpm_fast.ops._conv3x3 import CHANGING, DIRECT, FIXED, KINDS, LEAST_CHANNELS, TABLE, WEIGHT, Way
from ddpm_fast.ops._native import load

CHANNELS = (  # in, out
    *((3, 128), (128, 3), (16, 16), (32, 32), (64, 64), (128, 64), (96, 96), (128, 128), (128, 256), (192, 192)),
    *((256, 128), (256, 256), (384, 128), (384, 256), (512, 256), (512, 512), (1024, 512)),
)
SIDES, BATCHES = (4, 8, 16, 32, 64), (1, 4, 16, 64)
MOST_FLOP, MOST_BYTES = 8e9, 1 << 28
COLD = 1 << 26  # bytes of weights that calls go round
EVEN = 1.03  # so close to the fastest, the one before it is taken: it takes less memory, or rounds less
PREPARED = 1.08  # and so close, the same tiles of weights that aren't transformed beforehand: that takes a chain's time
RMS, LARGEST = 3.0, 5.0  # bound of errors, in those of the direct convolution
USES = (FIXED, CHANGING, WEIGHT)
WAYS = (DIRECT, Way(2), Way(2, True), Way(4), Way(4, True))
Shape = tuple[int, int, int, int]  # images, channels, output channels, side


def shapes() -> Iterator[Shape]:
    """Yield the shapes to measure."""
    for (channels, out_channels), side, images in itertools.product(CHANNELS, SIDES, BATCHES):
        pixels = images * side**2
        if 18 * pixels * channels * out_channels <= MOST_FLOP and 8 * pixels * (channels + out_channels) <= MOST_BYTES:
            yield images, channels, out_channels, side


def problem(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x in channels_last, and a weight."""
    images, channels, out_channels, side = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, side, side, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    return x.to(dtype).contiguous(memory_format=torch.channels_last), weight


def gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """Return the library's gradient of the weight."""
    rest = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, x, weight, [weight.shape[0]], *rest)[1]


def errors(shape: Shape, way: Way, dtype: torch.dtype, what: str) -> tuple[float, float, bool]:
    """Return the rms and the largest error of a way, over those of the direct one, and whether they are in the bound.

    Of two to four images: PyTorch convolves a single small one otherwise.
    """
    x, weight = problem((min(max(shape[0], 2), 4), *shape[1:]), dtype)
    weight = weight.to(dtype)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    if what == WEIGHT:
        dy = exact.to(dtype).contiguous(memory_format=torch.channels_last)
        exact = gradient(x.double(), dy.double(), weight.double())

    def off(y: Tensor) -> tuple[float, float]:
        d = y.double() - exact
        return float(d.square().mean().sqrt()), float(d.abs().max())

    if what == WEIGHT:
        ours, plain = off(native.weight_gradient(x, dy, way)), off(gradient(x, dy, weight))
    else:
        ours = off(native.convolve(x, native.lay_out(weight, way, dtype), way, shape[2]))
        plain = off(F.conv2d(x, weight, padding=1))
    rms, largest = ours[0] / plain[0], ours[1] / plain[1]
    if dtype == torch.float32:
        return rms, largest, rms <= RMS and largest <= LARGEST
    return rms, largest, ours[1] <= 2 * plain[1] + torch.finfo(dtype).eps * float(exact.abs().max())


def calls(shape: Shape, way: Way, dtype: torch.dtype, what: str) -> Callable[[], Any]:
    """Return a call of this way, each with another weight."""
    x, weight = problem(shape, dtype)
    fixed = what == FIXED
    if what == WEIGHT:
        dy, weight = F.conv2d(x, weight.to(dtype), padding=1), weight.to(dtype)
        if way.tile:
            return lambda: native.weight_gradient(x, dy, way)
        return lambda: gradient(x, dy, weight)
    num_bytes = native.room(weight, way, dtype) if fixed and way.tile else weight.numel() * dtype.itemsize
    copies = range(max(2, COLD // num_bytes))
    if fixed and way.tile:
        laid = itertools.cycle([native.lay_out(weight, way, dtype) for _ in copies])
        return lambda: native.convolve(x, next(laid), way, shape[2])
    if fixed:
        pack, plain = torch._C._nn.mkldnn_reorder_conv2d_weight, weight.to_mkldnn(dtype)
        packed = itertools.cycle([pack(plain, (1, 1), (1, 1), (1, 1), 1, x.shape) for _ in copies])
        rest = (None, (1, 1), (1, 1), (1, 1), 1, "none", (), "")
        return lambda: torch.ops.mkldnn._convolution_pointwise.default(x, next(packed), *rest)
    return training(x, itertools.cycle([weight.to(dtype) for _ in copies]), way)


def training(x: Tensor, weights: Iterator[Tensor], way: Way) -> Callable[[], Any]:
    """Return a call that computes the result and the gradient of x, each time with the next weight; and that of the
    weight where it is the library's, which computes both in one call."""
    channels, dtype = x.shape[1], x.dtype
    dy, with_weight = F.conv2d(x, next(weights), padding=1), dtype != torch.float32

    def library(weight: Tensor, of_x: bool) -> Any:
        rest = ([weight.shape[0]], (1, 1), (1, 1), (1, 1), False, (0, 0), 1, [of_x, with_weight, False])
        return torch.ops.aten.convolution_backward(dy, x, weight, *rest)

    def run() -> None:
        weight = next(weights)
        if not way.tile:
            F.conv2d(x, weight, padding=1)
            library(weight, True)
            return
        native.convolve(x, native.lay_out(weight, way, dtype), way, weight.shape[0])
        native.convolve(dy, native.lay_out(weight, way, dtype, gradient=True), way, channels)
        if with_weight:
            library(weight, False)

    return run


def measured(shape: Shape, dtype: torch.dtype, what: str, repetitions: int) -> Row:
    """Return the row of a shape: microseconds of each way, and the way to take."""
    ways, row = [], {"dtype": KINDS[dtype], "what": what, "shape": list(shape)}
    for way in WAYS:
        if way.transformed and what != FIXED:
            continue
        if way.tile == 4 and shape[1] < LEAST_CHANNELS:
            continue
        if way.tile:
            rms, largest, within = errors(shape, way, dtype, what)
            row[f"errors {way.text(dtype)}"] = [round(rms, 2), round(largest, 2)]
            if not within:
                continue
        ways.append(way)
    runs = [calls(shape, way, dtype, what) for way in ways]
    times: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions + 1):
        for run, seen in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if repetition:
                seen.append(time.perf_counter() - start)
    us = [statistics.median(seen) * 1e6 for seen in times]
    row["us"] = {way.text(dtype): round(t, 1) for way, t in zip(ways, us, strict=True)}
    row["way"] = list(taken(dict(zip(ways, us, strict=True))))
    return row


def taken(us: dict[Way, float]) -> Way:
    """Return the way to take, of the times of each in the order of preference."""
    best = min(us.values())
    way = next(way for way, t in us.items() if t <= EVEN * best)
    plain = Way(way.tile)
    return plain if us.get(plain, float("inf")) <= PREPARED * best else way


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    p = Parser(__doc__.splitlines()[0])
    p.add_argument("--isa", choices=("avx2", "avx512", "avx512bf16"), help="as on a processor that has no more")
    p.add_argument("--what", nargs="+", choices=USES, default=list(USES), help="which uses of a convolution")
    p.add_argument("--precision", nargs="+", choices=tuple(KINDS.values()), help="which (default: those of the set)")
    p.add_argument("--repetitions", type=count, default=9, help="timed calls of each way (default: 9)")
    p.add_argument("--json", type=output_file, metavar="FILE", help="write the header and the rows there")
    p.add_argument("--write", action="store_true", help="put this instruction set's ways into the table of ddpm_fast")
    args = p.parse_args(argv)
    if args.isa and os.environ.get("DDPM_FAST_ISA") != args.isa:
        most = {"avx2": ("AVX2", "avx2"), "avx512": ("AVX512_CORE", "avx512")}.get(args.isa, ("DEFAULT", "avx512"))
        names = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "DDPM_FAST_ISA")
        again = [sys.executable, "-m", "benchmarks.conv3x3_table", *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, again, os.environ | dict(zip(names, (*most, args.isa), strict=True)))
    isa, rows = load().isa(), []
    dtypes = tuple(KINDS) if isa == "avx512bf16" else (torch.float32,)
    with torch.no_grad():
        for dtype, what, shape in itertools.product(dtypes, args.what, shapes()):
            if args.precision and KINDS[dtype] not in args.precision:
                continue
            if what == WEIGHT and dtype != torch.float32:  # the library's
                continue
            rows.append(measured(shape, dtype, what, args.repetitions))
            progress(f"{isa} {rows[-1]}")
    if args.json:
        write_json(args.json, header(torch.device("cpu")) | {"isa": isa}, rows)
    if args.write:
        write(isa, rows)
    return 0


def write(isa: str, rows: list[Row]) -> None:
    """Put the rows of an instruction set into the table, in the place of those of the same precision and use: a line
    each, [images, channels, outputs, side, way]."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"ways": {}}
    kinds, fresh = table["ways"].setdefault(isa, {}), set()
    for row in rows:
        uses, use = kinds.setdefault(row["dtype"], {}), (row["dtype"], row["what"])
        if use not in fresh:
            fresh.add(use)
            uses[row["what"]] = []
        uses[row["what"]].append([*row["shape"], *row["way"]])
    TABLE.write_text(text(table))


def text(table: Any) -> str:
    """Return the table as JSON, a shape on each line."""
    lines = json.dumps(table, indent=1).replace("\n      ", " ").replace("[\n     ", "[").replace("\n     ]", "]")
    return lines + "\n"


if __name__ == "__main__":
    sys.exit(main())
