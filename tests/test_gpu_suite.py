"""The GPU suite as it walks on a CPU, and how it goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks import check_form

from benchmarks import gpu_report, gpu_suite
from benchmarks.gpu_report import Clock, OutOfTime, Report
from benchmarks.harness import OURS, Row, time_interleaved
from ddpm_fast.models.weights import onednn_takes_bf16

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def row(case: str, name: str = OURS, **rest: object) -> Row:
    return {"case": case, "precision": "bf16", "batch": 2, "name": name, "ms": 1.0} | rest


def test_a_report_goes_on_where_the_last_run_stopped(tmp_path: Path) -> None:
    first = Report(tmp_path, "part", CPU, {"model": "a"})
    first.add([row("one"), row("one", "peer", error="peers may fail")])
    first.add([row("two", error="ours may not")])
    again = Report(tmp_path, "part", CPU, {"model": "a"})
    assert again.has("one", "bf16", 2) and not again.has("two", "bf16", 2) and not again.has("one", "bf16", 4)
    assert not again.has("one")
    again.add([row("two")])
    text = (tmp_path / "part.md").read_text()
    assert text.startswith("# part") and text.count("| contender |") == 2 and "peers may fail" in text
    assert len(json.loads((tmp_path / "part.json").read_text())["rows"]) == 3
    assert not Report(tmp_path, "part", CPU, {"model": "b"}).rows  # other rows than these
    assert not Report(tmp_path, "part", CPU, {"model": "a"}, fresh=True).rows
    (tmp_path / "part.json").write_text("{")
    assert not Report(tmp_path, "part", CPU, {"model": "a"}).rows


def test_the_clock_stops_a_run_though_failures_are_rows() -> None:
    Clock(None).check()
    Clock(1).check()
    clock = Clock(1e-9)
    errors: dict[str, str] = {}
    with pytest.raises(OutOfTime):
        time_interleaved({"a": clock.check}, CPU, 1, errors=errors)
    assert not errors


def test_the_clock_leaves_room_for_a_step_like_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.0, 60.0, 240.0, 270.0, 271.0])  # the longest step: 3 of 7.5 minutes
    monkeypatch.setattr(gpu_report.time, "monotonic", lambda: next(times))
    clock = Clock(7.5)
    for _ in range(4):
        clock.check()
    with pytest.raises(OutOfTime):
        clock.check()


@pytest.mark.minutes
def test_the_parts_walk_through_on_a_cpu(tmp_path: Path) -> None:
    """In a process of its own, from anywhere, then again with nothing left to do: train is as sample."""
    parts, kind = ["tune", "ops", "sample", "profile"], "bf16" if onednn_takes_bf16() else "float32"
    command = [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", "--dry-run", "--precision", kind]
    command += ["--part", *parts]
    command += ["--out", tmp_path / "out", "--only", OURS, "original", "CUDA graph of 2 steps NCHW"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {part: json.loads((tmp_path / "out" / f"{part}.json").read_text())["rows"] for part in parts}
    assert all("error" not in row for part in rows.values() for row in part if row["name"] == OURS)
    assert {row["case"].split()[0] for row in rows["ops"]} == set(gpu_suite.OPS)
    graphs = {f"{kind} CUDA graph of 2 steps NCHW" for kind in ("torch eager", "torch.compile")}
    assert {row["name"] for row in rows["sample"]} == {OURS, f"{OURS} eager", f"{OURS} plain path", "original"} | graphs
    assert {row["case"] for row in rows["profile"]} == {"sample digits", "train digits"}
    assert {"convolution", "idle"} <= {row["kernels"] for row in rows["profile"]}
    table = json.loads((tmp_path / "out" / "no_gpu.json").read_text())
    assert set(table) >= {"header", "noise", "q_sample", "group_norm_silu", "engine"}
    assert done.stdout.index("# tune") < done.stdout.index("# profile") < done.stdout.index("written to")
    for part in ("ops", "sample"):
        peers = {row["name"] for row in rows[part] if not row["name"].startswith(f"{OURS} ")}
        check_form(tmp_path / "out" / f"{part}.json", peers)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count("going on after") == len(parts)
    for part in parts:  # nothing is measured twice
        assert json.loads((tmp_path / "out" / f"{part}.json").read_text())["rows"] == rows[part]


def test_a_run_whose_time_is_up_says_how_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dry-run", "--part", "sample", "--minutes", "1e-9", "--out", str(tmp_path)]
    assert gpu_suite.main(options) == 0
    assert "the time is up in sample: the same command goes on from there" in capsys.readouterr().out


def test_what_fails_of_ours_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise AssertionError("wrong words")

    monkeypatch.setattr(gpu_suite.gpu_checks, "checks", lambda device, dry: {"words": broken})
    monkeypatch.setattr(gpu_suite.gpu_build, "build", lambda folder: None)
    assert gpu_suite.main(["--dry-run", "--part", "tests", "--out", str(tmp_path)]) == 1
    assert "wrong words" in (tmp_path / "tests.md").read_text()
