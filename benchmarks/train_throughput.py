"""Time per training iteration: ours beside the original formulation and PyTorch, eager and compiled.

python benchmarks/train_throughput.py --quick
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import throughput, training
from benchmarks.checks import check_training


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = throughput.parser(__doc__.splitlines()[0], "iterations").parse_args(argv)
    return throughput.run(args, "train", training.contenders, check_training)


if __name__ == "__main__":
    sys.exit(main())
