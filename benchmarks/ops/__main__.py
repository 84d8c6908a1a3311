"""Time the ops: ours as dispatched and by backend, beside plain PyTorch.

python -m benchmarks.ops --ops group_norm_silu --quick
"""

import sys

from benchmarks import ceilings
from benchmarks.harness import NAMES, OURS, Row, header, markdown, markdown_header, progress, write_json
from benchmarks.ops import OPS, cases, keep_freed_memory, measure
from benchmarks.options import Parser, count, device, output_file
from ddpm_fast.info import native_isa


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status: 1 where an implementation of ours failed."""
    p = Parser(__doc__.splitlines()[0], prog="python -m benchmarks.ops")
    p.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="NAME", help=f"which: {', '.join(OPS)}")
    p.add_argument("--device", type=device, default="auto", help="cpu, cuda, cuda:1...; auto: a GPU where there is one")
    p.add_argument("--batch", type=count, help="images (default: 16 on a CPU, 256 on a GPU, 4 if --quick)")
    p.add_argument("--repetitions", type=count, help="timed runs of each contender (default: 5 if --quick, else 15)")
    p.add_argument("--json", type=output_file, metavar="FILE", help="also write the header and the rows there")
    p.add_argument("--quick", action="store_true", help="two cases per op, few runs, no torch.compile")
    p.add_argument("--all", action="store_true", help="every case, also with --quick")
    p.add_argument("--compile", action="store_true", help="time torch.compile too (always so without --quick)")
    args = p.parse_args(argv)
    batch = args.batch or (4 if args.quick else 256 if args.device.type == "cuda" else 16)
    keep_freed_memory()
    progress("ceilings")
    copy_rate = ceilings.copy(args.device)["gbytes_per_s"] * 1e9
    matmul_rate = {dtype: ceilings.matmul(args.device, dtype)["tflops"] * 1e12 for dtype in NAMES}
    head = header(args.device) | {"copy GB/s": copy_rate * 1e-9}
    head |= {f"matrix product {NAMES[dtype]} TFLOP/s": rate * 1e-12 for dtype, rate in matmul_rate.items()}
    head["native"] = native_isa()
    print(markdown_header(head), end="\n\n")
    rows: list[Row] = []
    for case in cases(args.ops, batch, args.quick and not args.all):
        compile, repetitions = args.compile or not args.quick, args.repetitions or (5 if args.quick else 15)
        group = measure(case, args.device, compile, repetitions, copy_rate, matmul_rate[case.dtype])
        print(markdown(group), end="\n\n", flush=True)
        rows += group
        if args.json:
            write_json(args.json, head, rows)
    return int(any("error" in row for row in rows if row["name"].startswith(OURS)))


if __name__ == "__main__":
    sys.exit(main())
