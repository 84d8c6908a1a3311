"""The op cases under pytest-benchmark: ``pytest benchmarks``."""

import pytest

pytest.importorskip("pytest_benchmark")

from benchmarks.harness import pick_device
from benchmarks.ops import OPS, cases, check, contenders, inputs_of, prepare

DEVICE = pick_device("auto")
BATCH = 4 if DEVICE.type == "cpu" else 256
PAIRS = [
    pytest.param(case, name, contender, id=f"{case}: {name}")
    for case in cases(list(OPS), BATCH, quick=True)
    for name, contender in contenders(case, DEVICE, compile=False).items()
]


@pytest.mark.parametrize(("case", "name", "contender"), PAIRS)
def test_op(benchmark, case, name, contender):
    check(case, name, contender, DEVICE)
    benchmark.group = str(case)
    run = prepare(case, contender, inputs_of(case, DEVICE, contender.memory_format))
    if DEVICE.type == "cuda":
        import torch

        benchmark(lambda: (run(1), torch.cuda.synchronize(DEVICE)))
    else:
        benchmark(run, 1)
