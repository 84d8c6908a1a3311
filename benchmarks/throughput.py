"""The command line that ``sample_throughput.py`` and ``train_throughput.py`` share."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import ceilings, memory, peers
from benchmarks.harness import (
    DTYPES,
    OURS,
    Row,
    header,
    markdown,
    markdown_header,
    progress,
    write_json,
)
from benchmarks.options import Parser, count, device, output_file
from benchmarks.peers import expected
from benchmarks.problem import Builder, Check, Problem, flops_per_image, measure
from ddpm_fast.models.presets import preset
from ddpm_fast.models.weights import onednn_takes_bf16

MODELS = ("cifar10", "digits")
NUM_TIMESTEPS = 1000  # of the schedule in training


def parser(description: str, unit: str) -> Parser:
    """Return the argument parser; ``unit`` is what one step is called in the help."""
    p = Parser(description)
    p.add_argument("--device", type=device, default="auto", help="cpu, cuda, cuda:1...; auto: a GPU where there is one")
    p.add_argument("--model", choices=MODELS, default="cifar10", help="network preset")
    p.add_argument("--batch", type=count, nargs="+", help="batch sizes (default: by device)")
    p.add_argument("--steps", type=count, help=f"{unit} per timed run (default: by device and model)")
    p.add_argument(
        "--precision",
        nargs="+",
        choices=list(DTYPES),
        help="bf16 is autocast (default: both, but for CPUs without bf16, where PyTorch takes many times as long)",
    )
    p.add_argument("--repetitions", type=count, help="timed runs of each contender (default: 5 if --quick, else 15)")
    p.add_argument("--json", type=output_file, metavar="FILE", help="also write the header and the rows there")
    p.add_argument("--quick", action="store_true", help="one small batch, few runs, no torch.compile: minutes on a CPU")
    p.add_argument("--compile", action="store_true", help="time torch.compile too (always so without --quick)")
    p.add_argument(
        "--memory",
        action="store_true",
        help="of training: most held, and kept for the backward (always without --quick)",
    )
    p.add_argument("--only", nargs="+", metavar="TEXT", help="contenders whose name has one of these, as ddpm_fast")
    p.add_argument(
        "--peers",
        nargs="+",
        choices=("all", "none", *peers.FAMILIES),
        help="packages of others to time; one that isn't installed says so on its row (default: none if --quick, "
        "else all)",
    )
    return p


def families(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the families of peers that the options ask for."""
    asked = args.peers or (["none"] if args.quick else ["all"])
    return tuple(family for family in peers.FAMILIES if "all" in asked or family in asked)


def with_peers(
    contenders: Callable[[bool], dict[str, Builder]], training: bool, compile: bool, families: Sequence[str]
) -> dict[str, Builder]:
    """Return PyTorch's contenders and those of the peers."""
    return contenders(compile) | peers.contenders(training, compile, families)


def named(make: Callable[[], dict[str, Builder]], texts: Sequence[str] | None) -> dict[str, Builder]:
    """Return the contenders whose name has one of the texts; all where there are none."""
    found = {name: build for name, build in make().items() if not texts or any(text in name for text in texts)}
    if not found:
        raise SystemExit(f"--only {' '.join(texts or ())}: no contender's name has any of these: {', '.join(make())}")
    return found


def usual_steps(model: str, training: bool, on_gpu: bool) -> int:
    """Return the steps of a timed run: what a call costs once must not show beside the steps, for nobody."""
    if training:
        return 20 if model == "digits" else 5 if on_gpu else 1
    return 50 if model == "digits" or on_gpu else 10


def usual_precisions(on_gpu: bool) -> list[str]:
    """Return those in which PyTorch computes in no more time than in float32."""
    return [name for name, dtype in DTYPES.items() if on_gpu or dtype is torch.float32 or onednn_takes_bf16()]


def run(args: argparse.Namespace, case: str, contenders: Callable[[bool], dict[str, Builder]], check: Check) -> int:
    """Measure every precision and batch, print the tables, write the JSON; return 1 where ours failed, else 0."""
    on_gpu = args.device.type == "cuda"
    training = case == "train"
    usual = ([64, 256] if on_gpu else [4, 16]) if training else ([64, 1, 256] if on_gpu else [4, 1, 16])
    batches = args.batch or (usual[:1] if args.quick else usual)
    steps = args.steps or usual_steps(args.model, training, on_gpu)
    repetitions = args.repetitions or (5 if args.quick else 15)
    config = preset(args.model)
    flops = flops_per_image(config, training)
    wanted = partial(with_peers, contenders, training, args.compile or not args.quick, families(args))
    make = partial(named, wanted, args.only)
    head = header(args.device)
    print(f"{markdown_header(head)}\n- {flops * 1e-9:.3f} GFLOP per image and step, {steps} steps per timed run\n")
    rows: list[Row] = []
    for precision in args.precision or usual_precisions(on_gpu):
        progress(f"matrix-product ceiling, {precision}")
        ceiling = ceilings.matmul(args.device, DTYPES[precision])["tflops"]
        for batch in batches:
            num_timesteps = NUM_TIMESTEPS if training else steps
            problem = Problem(config, args.device, batch, steps, precision, num_timesteps=num_timesteps)
            group = measure(f"{case} {args.model}", problem, make(), check, repetitions, flops, ceiling * 1e12)
            if training and (args.memory or not args.quick):
                memory.measure(make, problem, group)
            # Again, as the first one may have met a busy moment: the best of all is the ceiling.
            ceiling = max(ceiling, ceilings.matmul(args.device, DTYPES[precision])["tflops"])
            head[f"matrix product {precision} TFLOP/s"] = ceiling
            for row in group:
                if "tflops" in row:
                    row["share"] = row["tflops"] / ceiling
            expected.annotate(group, rows + group)
            print(f"- matrix product, {precision}: {ceiling:.3g} TFLOP/s\n\n{markdown(group)}\n", flush=True)
            rows += group
            if args.json:
                write_json(args.json, head, rows)
    return int(any("error" in row for row in rows if row["name"] == OURS))
