"""What the benchmarks tell their reader: help, legend, progress."""

import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_suite, harness, sample_throughput, train_throughput
from benchmarks.ops import __main__ as ops_benchmark


@pytest.mark.parametrize("main", [sample_throughput.main, train_throughput.main, ops_benchmark.main, gpu_suite.main])
def test_help_states_each_default_once(main, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in printed and "(default: False)" not in printed
    assert "(default: " in printed and not re.search(r"\(default: [^)]*\) \(default: ", printed)


def test_the_header_ends_with_what_the_columns_mean() -> None:
    lines = harness.markdown_header({"machine": {"cores": 2}, "threads": 1}).splitlines()
    assert lines[:2] == ["- machine: cores 2", "- threads: 1"] and len(lines) == 3
    assert "over ours: " in lines[2] and "of ceiling: " in lines[2]


def test_a_long_timing_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def work(seconds: float) -> None:
        clock[0] += seconds

    harness.time_interleaved({"a": lambda: work(4), "b": lambda: work(3)}, torch.device("cpu"), repetitions=4)
    assert capsys.readouterr().err.splitlines() == ["  round 2 of 5, 14 s", "  round 4 of 5, 28 s"]
    harness.time_interleaved({"a": lambda: work(0.1)}, torch.device("cpu"), repetitions=20)
    assert capsys.readouterr().err == ""
