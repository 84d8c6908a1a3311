"""The command line that ``sample_throughput.py`` and ``train_throughput.py`` share."""

import argparse
from collections.abc import Callable

from benchmarks import ceilings
from benchmarks.harness import (
    DTYPES,
    OURS,
    Row,
    header,
    markdown,
    markdown_header,
    pick_device,
    progress,
    write_json,
)
from benchmarks.problem import Builder, Check, Problem, flops_per_image, measure
from ddpm_fast.models.presets import preset

MODELS = ("cifar10", "digits")


def parser(description: str, unit: str) -> argparse.ArgumentParser:
    """Return the argument parser; ``unit`` is what one step is called in the help."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1...; auto takes the GPU where torch sees one")
    p.add_argument("--model", choices=MODELS, default="cifar10", help="network preset")
    p.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: by device)")
    p.add_argument("--steps", type=int, help=f"{unit} per timed run (default: by device)")
    p.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="bf16 is autocast")
    p.add_argument("--repetitions", type=int, help="timed runs of each contender (default: 5 if --quick, else 15)")
    p.add_argument("--json", metavar="FILE", help="also write the header and the rows there")
    p.add_argument("--quick", action="store_true", help="one small batch, few runs, no torch.compile: minutes on a CPU")
    p.add_argument("--compile", action="store_true", help="time torch.compile too (always so without --quick)")
    return p


def run(args: argparse.Namespace, case: str, contenders: Callable[[bool], dict[str, Builder]], check: Check) -> int:
    """Measure every precision and batch, print the tables, write the JSON; return 1 where ours failed, else 0."""
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    training = case == "train"
    usual = ([64, 256] if on_gpu else [4, 16]) if training else ([64, 1, 256] if on_gpu else [4, 1, 16])
    batches = args.batch or (usual[:1] if args.quick else usual)
    steps = args.steps or ((5 if on_gpu else 1) if training else (50 if on_gpu else 4))
    repetitions = args.repetitions or (5 if args.quick else 15)
    config = preset(args.model)
    flops = flops_per_image(config, training)
    head = header(device)
    print(f"{markdown_header(head)}\n- {flops * 1e-9:.3f} GFLOP per image and step, {steps} steps per timed run\n")
    rows: list[Row] = []
    for precision in args.precision:
        progress(f"matrix-product ceiling, {precision}")
        ceiling = ceilings.matmul(device, DTYPES[precision])["tflops"]
        head[f"matrix product {precision} TFLOP/s"] = ceiling
        print(f"- matrix product, {precision}: {ceiling:.3g} TFLOP/s\n")
        for batch in batches:
            problem = Problem(config, device, batch, steps, precision)
            builders = contenders(args.compile or not args.quick)
            name, around = f"{case} {args.model}", None if training else problem.autocast()
            group = measure(name, problem, builders, check, repetitions, flops, ceiling * 1e12, around)
            print(markdown(group), end="\n\n", flush=True)
            rows += group
            if args.json:
                write_json(args.json, head, rows)
    return int(any("error" in row for row in rows if row["name"] == OURS))
