"""Time per sampling step: ours beside the original formulation and PyTorch, eager and compiled.

python benchmarks/sample_throughput.py --quick
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sampling, throughput
from benchmarks.checks import check_sampling


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = throughput.parser(__doc__.splitlines()[0], "reverse steps").parse_args(argv)
    return throughput.run(args, "sample", sampling.contenders, check_sampling)


if __name__ == "__main__":
    sys.exit(main())
