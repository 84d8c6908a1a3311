"""The measurements of a GPU in one run: ceilings, sampling and training, ours beside PyTorch's strongest settings.

python benchmarks/gpu_suite.py --part all --out results
python benchmarks/gpu_suite.py --dry-run

Networks are timed as they run: weights and activations of a step are larger than the L2, so nothing stays warm.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import ceilings, gpu_peers
from benchmarks.checks import check_sampling, check_training
from benchmarks.harness import DTYPES, Row, header, markdown, markdown_header, pick_device, progress, write_json
from benchmarks.options import Parser, count, output_folder
from benchmarks.problem import Builder, Check, Problem, flops_per_image, measure
from benchmarks.throughput import MODELS, NUM_TIMESTEPS
from ddpm_fast.models.presets import Config, preset

PARTS = ("ceilings", "sample", "train")
UNROLL = 25


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line, with small sizes on the CPU filled in for a dry run."""
    p = Parser(__doc__.splitlines()[0])
    p.add_argument("--part", choices=(*PARTS, "all"), default="all")
    p.add_argument("--model", choices=MODELS, default="cifar10")
    p.add_argument("--batch", type=count, nargs="+", help="batch sizes (default: sampling 1 8 64 256, train 128 256)")
    p.add_argument("--steps", type=count, default=2 * UNROLL, help=f"sampling steps per run, a multiple of {UNROLL}")
    p.add_argument("--iterations", type=count, default=5, help="training iterations per run")
    p.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["bf16", "float32"])
    p.add_argument("--repetitions", type=count, default=20)
    p.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="only contenders whose name has one of these")
    p.add_argument("--out", type=output_folder, help="folder of the tables and JSON (default: gpu_results)")
    p.add_argument(
        "--dry-run", action="store_true", help="walk through everything, tiny, on the CPU, compiling nothing"
    )
    args = p.parse_args(argv)
    args.out = args.out or Path(tempfile.mkdtemp(prefix="dry_run_") if args.dry_run else "gpu_results")
    args.unroll = 2 if args.dry_run else UNROLL
    if args.dry_run:
        args.batch, args.steps, args.iterations, args.repetitions, args.model = [2], 4, 1, 2, "digits"
    elif not torch.cuda.is_available():
        p.error("torch sees no GPU here: --dry-run walks through the suite on a CPU")
    if args.steps % args.unroll:
        p.error(f"argument --steps: expected a multiple of {args.unroll}, got {args.steps}")
    args.parts = [part for part in PARTS[1:] if args.part in (part, "all") and contenders(args, part)]
    if args.only and not args.parts:
        p.error(f"argument --only: no contender's name has any of {args.only}")
    return args


def contenders(args: argparse.Namespace, part: str) -> dict[str, Builder]:
    """Return the contenders of a part that ``--only`` leaves."""
    found = gpu_peers.training_contenders() if part == "train" else gpu_peers.sampling_contenders(args.unroll)
    return {name: build for name, build in found.items() if not args.only or any(text in name for text in args.only)}


def clocks() -> str | None:
    """Return what nvidia-smi says of clocks, power and temperature."""
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class Report:
    """One part's rows, written to its Markdown and JSON files after every group, so that a broken run leaves them."""

    def __init__(self, args: argparse.Namespace, part: str, device: torch.device) -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        self.path, self.part = args.out / part, part
        self.rows: list[Row] = []
        self.tables: list[str] = []
        notes = {"dry run": "nothing was compiled or captured; the times mean nothing"} if args.dry_run else {}
        self.head: dict[str, Any] = header(device) | notes | {"clocks before": clocks()}

    def add(self, rows: Iterable[Row]) -> None:
        """Append a group of rows, print it and write the files."""
        group = list(rows)
        self.rows += group
        self.tables.append(markdown(group))
        self.head["clocks after"] = clocks()
        print(self.tables[-1], end="\n\n", flush=True)
        text = "\n\n".join([f"# {self.part}", markdown_header(self.head), *self.tables])
        self.path.with_suffix(".md").write_text(text + "\n")
        write_json(self.path.with_suffix(".json"), self.head, self.rows)


def measure_ceilings(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Report the copy and matrix-product ceilings; return TFLOP/s by precision."""
    report = Report(args, "ceilings", device)
    sizes = (256,) if args.dry_run else ()
    products = {name: ceilings.matmul(device, DTYPES[name], sizes) for name in args.precision}
    report.add([ceilings.copy(device, 1 << 24 if args.dry_run else None), *products.values()])
    return {name: row["tflops"] for name, row in products.items()}


def measure_part(
    args: argparse.Namespace,
    part: str,
    device: torch.device,
    config: Config,
    ceiling: dict[str, float],
) -> None:
    """Time the contenders of sampling or training at every precision and batch."""
    training = part == "train"
    builders = contenders(args, part)
    check: Check = check_training if training else check_sampling
    flops = flops_per_image(config, training)
    report = Report(args, part, device)
    for precision in args.precision:
        for batch in args.batch or ([128, 256] if training else [1, 8, 64, 256]):
            compiler = "eager" if args.dry_run else "inductor"
            steps, num_timesteps = (args.iterations, NUM_TIMESTEPS) if training else (args.steps, args.steps)
            problem = Problem(config, device, batch, steps, precision, compiler, num_timesteps, checked=args.unroll)
            case, rate = f"{part} {args.model}", ceiling[precision] * 1e12
            report.add(measure(case, problem, builders, check, args.repetitions, flops, rate))
            if device.type == "cuda":
                torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """Run the suite and return the exit status; a failing contender is a row, not a failure of the run."""
    args = parse(argv)
    device = pick_device("cpu" if args.dry_run else "cuda")
    gpu_peers.set_fast_math()
    config = preset(args.model)
    if args.dry_run:
        config = replace(config, base_channels=16, num_res_blocks=1)
    progress("ceilings")
    ceiling = measure_ceilings(args, device)
    for part in args.parts:
        measure_part(args, part, device, config, ceiling)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
