"""The measurements of a GPU: checks, configurations, ops, sampling, training and a profile, beside PyTorch's strongest.

python benchmarks/gpu_suite.py --part tests --out results
python benchmarks/gpu_suite.py --dry-run

A run ends after --minutes, whatever it has measured by then, and the same command goes on from there. Networks are
timed as they run: weights and activations of a step are larger than the L2, so nothing stays warm; the inputs of ops
rotate beyond it.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# In a dry run Triton's interpreter stands in for a GPU; it must be asked for before anyone imports Triton.
os.environ.setdefault("TRITON_INTERPRET", str(int("--dry-run" in sys.argv)))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import ceilings, gpu_build, gpu_checks, gpu_peers, gpu_profile, gpu_tune
from benchmarks import ops as op_benchmarks
from benchmarks.checks import check_sampling, check_training
from benchmarks.gpu_report import Clock, OutOfTime, Report
from benchmarks.harness import DTYPES, NAMES, OURS, ROOT, Row, describe, pick_device, progress
from benchmarks.options import Parser, count, output_folder
from benchmarks.problem import Builder, Check, Problem, flops_per_image, measure
from benchmarks.throughput import MODELS, NUM_TIMESTEPS
from ddpm_fast.kernels import lookup
from ddpm_fast.models.presets import preset

STEPS = ("q_sample", "sampler_step", "diffusion_loss", "noise", "timestep_embedding", "ema_update")
OPS = ("group_norm_silu", "residual_sum", *STEPS)
BATCHES = {"ops": [512], "sample": [1, 8, 64, 256, 512], "train": [64, 128, 256], "profile": [1, 64, 256]}
UNROLL = 25


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line, with small sizes on the CPU filled in for a dry run."""
    p = Parser(__doc__.splitlines()[0])
    listed = f"{', '.join(PARTS)} (default: all)"
    p.add_argument("--part", nargs="+", choices=(*PARTS, "all"), metavar="PART", help=listed)
    p.add_argument(
        "--minutes", type=float, help="a run ends after so many; 0: when all is measured (default: 7.5, dry 0)"
    )
    p.add_argument("--fresh", action="store_true", help="measure anew what an earlier run left in --out")
    p.add_argument("--model", choices=MODELS, default="cifar10")
    sizes = ", ".join(f"{part} {' '.join(map(str, batches))}" for part, batches in BATCHES.items())
    p.add_argument("--batch", type=count, nargs="+", help=f"batch sizes (default: {sizes})")
    p.add_argument("--steps", type=count, default=UNROLL, help=f"sampling steps per run, a multiple of {UNROLL}")
    p.add_argument("--iterations", type=count, default=5, help="training iterations per run")
    p.add_argument("--precision", nargs="+", choices=list(DTYPES), help="of networks (default: bf16 float32)")
    p.add_argument("--repetitions", type=count, default=20)
    p.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="of networks: contenders whose name has one")
    p.add_argument("--out", type=output_folder, help="folder of the tables and JSON (default: gpu_results)")
    p.add_argument(
        "--dry-run", action="store_true", help="walk through everything, tiny, on the CPU, compiling nothing"
    )
    args = p.parse_args(argv)
    args.parts = [part for part in PARTS if part in (args.part or PARTS) or "all" in args.part]
    args.precision = args.precision or ["bf16", "float32"]
    if args.minutes is not None and args.minutes < 0:
        p.error(f"argument --minutes: expected 0 or more, got {args.minutes}")
    if args.steps % UNROLL:
        p.error(f"argument --steps: expected a multiple of {UNROLL}, got {args.steps}")
    args.out = args.out or Path(tempfile.mkdtemp(prefix="dry_run_") if args.dry_run else "gpu_results")
    args.unroll = 2 if args.dry_run else UNROLL
    if args.dry_run:
        args.batch, args.steps, args.iterations, args.repetitions, args.model = [2], 4, 1, 2, "digits"
    elif not torch.cuda.is_available():
        p.error("torch sees no GPU here: --dry-run walks through the suite on a CPU")
    if args.only and not any(contenders(args, part) for part in ("sample", "train")):
        p.error(f"argument --only: no contender's name has any of {args.only}")
    return args


def contenders(args: argparse.Namespace, part: str) -> dict[str, Builder]:
    """Return the contenders of sampling or training that ``--only`` leaves."""
    found = gpu_peers.training_contenders() if part == "train" else gpu_peers.sampling_contenders(args.unroll)
    return {name: build for name, build in found.items() if not args.only or any(text in name for text in args.only)}


class Suite:
    """One run of the suite: its parts are methods, each fills its report group by group until the clock stops it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, pick_device("cpu" if args.dry_run else "cuda")
        minutes = 0 if args.dry_run else 7.5
        self.clock = Clock((minutes if args.minutes is None else args.minutes) or None)
        self.config = preset(args.model)
        if args.dry_run:
            self.config = replace(self.config, base_channels=16, num_res_blocks=1)
        self._rates: dict[str, float] = {}

    def report(self, part: str) -> Report:
        """Return the part's report, with the options that its rows depend on."""
        args = self.args
        notes: dict[str, Any] = {}
        if part in ("sample", "train", "profile"):
            notes = {"model": args.model, "only": args.only, "steps": args.steps, "iterations": args.iterations}
        if part not in ("tests", "profile"):
            notes["repetitions"] = args.repetitions
        if self.args.dry_run:
            notes["dry run"] = "nothing was compiled or captured; the times mean nothing"
        return Report(self.args.out, part, self.device, notes, self.args.fresh)

    def ceilings(self) -> dict[str, float]:
        """Measure, once a run, bytes/s of a copy ("copy") and FLOP/s of a matrix product by precision."""
        if not self._rates:
            progress("ceilings")
            sizes = (256,) if self.args.dry_run else ()
            copy = ceilings.copy(self.device, 1 << 24 if self.args.dry_run else None)
            products = {name: ceilings.matmul(self.device, DTYPES[name], sizes) for name in DTYPES}
            report = Report(self.args.out, "ceilings", self.device, {}, fresh=True)
            report.add([copy, *products.values()])
            self._rates = {name: row["tflops"] * 1e12 for name, row in products.items()}
            self._rates["copy"] = copy["gbytes_per_s"] * 1e9
        return self._rates

    def tests(self, report: Report) -> None:
        """Every op against its reference, words, repeated runs and the like: what was seen, or what failed."""
        if not self.args.dry_run:
            progress(f"native module: {gpu_build.build(ROOT / 'build' / 'gpu') or 'there'}")
            progress(f"CUDA kernels: {gpu_build.build_cuda(ROOT / 'build' / 'gpu') or 'there'}")
        for name, check in gpu_checks.checks(self.device, self.args.dry_run).items():
            if report.has(name):
                continue
            self.clock.check()
            progress(name)
            row: Row = {"case": name, "name": OURS}
            try:
                row["note"] = check()
            except gpu_checks.Skipped as skipped:
                row["note"] = f"skipped: {skipped}"
            except Exception as error:
                row["error"] = describe(error)
            report.add([row])

    def tune(self, report: Report) -> None:
        """The kernels' configurations, and the table of what is measured by the end of the run."""
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else "no gpu"
        table = self.args.out / f"{lookup.slug(gpu)}.json"
        try:
            for call in gpu_tune.calls(self.args.dry_run):
                if not report.has(f"{call.op} {call.key}", NAMES[call.dtype], call.images):
                    self.clock.check()
                    most = 2 if self.args.dry_run else None
                    report.add(gpu_tune.measure(call, self.device, self.args.repetitions, most))
        finally:
            gpu_tune.write_table(table, self.device, report.rows)
            progress(f"written: {table}; once copied into {lookup.TABLES}, every call of this GPU reads it")

    def ops(self, report: Report) -> None:
        """The ops beside PyTorch's, in tensors larger than the L2."""
        batch, quick = (self.args.batch or BATCHES["ops"])[0], self.args.dry_run
        if not quick:
            op_benchmarks.keep_freed_memory()
        for case in op_benchmarks.cases(list(OPS), batch, quick):
            if not report.has(f"{case.op} {case.label}", NAMES[case.dtype], case.batch):
                self.clock.check()
                rates = self.ceilings()
                repetitions = self.args.repetitions
                report.add(
                    op_benchmarks.measure(
                        case, self.device, not quick, repetitions, rates["copy"], rates[NAMES[case.dtype]]
                    )
                )

    def sample(self, report: Report) -> None:
        """Reverse steps of the network, ours beside the settings that are fastest elsewhere."""
        self._networks(report, "sample", check_sampling)

    def train(self, report: Report) -> None:
        """Training iterations: loss, backward, Adam, EMA."""
        self._networks(report, "train", check_training)

    def _networks(self, report: Report, part: str, check: Check) -> None:
        flops, case = flops_per_image(self.config, part == "train"), f"{part} {self.args.model}"
        for problem in self._problems(part):
            if not report.has(case, problem.precision, problem.batch):
                self.clock.check()
                rate, builders = self.ceilings()[problem.precision], self._timely(contenders(self.args, part))
                report.add(measure(case, problem, builders, check, self.args.repetitions, flops, rate))
                self._release()

    def profile(self, report: Report) -> None:
        """Where the time of a step and of an iteration goes, by kind of kernel."""
        for part in ("sample", "train"):
            case = f"{part} {self.args.model}"
            for problem in self._problems(part, "profile"):
                if not report.has(case, problem.precision, problem.batch):
                    self.clock.check()
                    report.add(gpu_profile.measure(case, problem, self._timely(contenders(self.args, part))))
                    self._release()

    def _problems(self, part: str, sizes: str | None = None) -> list[Problem]:
        compiler, training = "eager" if self.args.dry_run else "inductor", part == "train"
        steps = self.args.iterations if training else self.args.steps
        return [
            Problem(
                self.config,
                self.device,
                batch,
                steps,
                precision,
                compiler,
                NUM_TIMESTEPS if training else steps,
                checked=self.args.unroll,
            )
            for precision in self.args.precision
            for batch in self.args.batch or BATCHES[sizes or part]
        ]

    def _timely(self, builders: dict[str, Builder]) -> dict[str, Builder]:
        """The builders, each of which looks at the clock first; compilers find in their caches what was compiled."""

        def timely(build: Builder) -> Builder:
            def checked(problem: Problem) -> Any:
                self.clock.check()
                return build(problem)

            return checked

        return {name: timely(build) for name, build in builders.items()}

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


PARTS: dict[str, Callable[[Suite, Report], None]] = {
    "tests": Suite.tests,
    "tune": Suite.tune,
    "ops": Suite.ops,
    "sample": Suite.sample,
    "train": Suite.train,
    "profile": Suite.profile,
}


def main(argv: list[str] | None = None) -> int:
    """Run the suite; 1 where a check or an implementation of ours failed, else 0: a peer's failure is a row."""
    args = parse(argv)
    suite, failed, texts, unfinished = Suite(args), False, [], None
    gpu_peers.set_fast_math()
    for part in args.parts:
        report = suite.report(part)
        try:
            PARTS[part](suite, report)
        except OutOfTime:
            unfinished = part
        failed |= any("error" in row and row["name"].startswith(OURS) for row in report.rows)
        texts.append(report.text())
        if unfinished:
            break
    print("\n\n".join(texts))
    print(f"\nwritten to {args.out}")
    if unfinished:
        print(f"the time is up in {unfinished}: the same command goes on from there")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
