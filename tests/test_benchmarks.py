"""The benchmarks measure what they say: fair turns, honest checks, one JSON form, and they run."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import ceilings, gpu_peers, gpu_suite, harness, original, problem, sampling, throughput, training
from benchmarks.checks import check_sampling, check_training
from benchmarks.harness import OURS, Disagreement
from benchmarks.ops import OPS
from benchmarks.ops.__main__ import main as ops_main
from benchmarks.problem import Contender, Problem
from ddpm_fast import engine, ops, preset
from ddpm_fast.models.weights import onednn_takes_bf16

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = replace(preset("digits"), base_channels=16, num_res_blocks=1, dropout=0.0)


@pytest.fixture(autouse=True)
def one_thread(repeatable, monkeypatch):
    """The networks here are too small for more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def make_problem(precision: str = "float32", **changes) -> Problem:
    return Problem(TINY, CPU, batch=4, steps=3, precision=precision, **changes)


def check_form(path: Path, names: set[str]) -> None:
    """The JSON form that all benchmarks share; every contender was timed, further backends of ours too."""
    document = json.loads(path.read_text())
    assert set(document) == {"header", "rows"}
    assert {"machine", "versions", "commit", "command", "threads", "date"} <= set(document["header"])
    assert {row["name"] for row in document["rows"] if not row["name"].startswith(f"{OURS} ")} == names
    for row in document["rows"]:
        assert {"case", "precision", "batch", "name", "ms"} <= set(row), row
        assert "error" not in row and row["ms"] > 0
        assert row["name"] != OURS or row["ratio"] == 1


def test_flop_of_the_cifar10_network():
    assert problem.flops_per_image(preset("cifar10")) == pytest.approx(12.444e9, abs=0.001e9)
    # Two products of the backward for one of the forward, but none for the image's own gradient.
    assert problem.flops_per_image(preset("cifar10"), training=True) == pytest.approx(3 * 12.444e9, rel=1e-3)


def test_contenders_take_turns():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ABC"}
    times = harness.time_interleaved(runs, CPU, repetitions=3, warmup=1)
    assert "".join(calls) == "ABC" * 4
    assert [len(times[name]) for name in "ABC"] == [3, 3, 3]


def test_a_failing_contender_leaves_the_others():
    def fail() -> None:
        raise RuntimeError("out of memory")

    errors = {}
    times = harness.time_interleaved({"bad": fail, "good": lambda: None}, CPU, repetitions=2, errors=errors)
    assert errors == {"bad": "RuntimeError: out of memory"}
    assert list(times) == ["good"] and len(times["good"]) == 2


def test_median_range_and_ratio():
    row = harness.summarise([5.0, 1.0, 2.0, 3.0, 4.0], per=2)
    assert row == {"ms": 1.5, "iqr_ms": 1.0, "repetitions": 5}
    rows = [{"name": OURS, "ms": 2.0}, {"name": "peer", "ms": 3.0}, {"name": "broken", "error": "no"}]
    harness.add_ratios(rows)
    assert [row.get("ratio") for row in rows] == [1.0, 1.5, None]
    table = harness.markdown(rows).splitlines()
    assert table[0] == "| contender | ms | over ours | error |"
    assert table[3] == "| peer | 3 | 1.50 |  |"


def test_agreement_is_measured_in_plains_own_error():
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    plain = [truth.float(), (truth + 1e-4).float()]

    def check(got: torch.Tensor) -> float:
        return harness.check_agreement("peer", got, plain, truth, torch.float32)

    assert check((truth + 1.9e-4).float()) > 1e-4
    for wrong in (truth + 2.2e-4, truth * float("nan"), truth[:50]):
        with pytest.raises(Disagreement, match="peer"):
            check(wrong.float())


def test_a_wrong_sampler_is_not_timed():
    p = make_problem()
    right = sampling.eager(sampling.NCHW)(p)
    check_sampling(p, "right", right)
    bad_network = p.network()
    bad_network.downs[0].conv_1.weight.data.mul_(1.01)
    quiet = make_problem()
    quiet.rows[:, 3] = 0  # a loop that forgets its noise
    wrong = {
        "network": sampling.loop(p, sampling.ReverseStep(bad_network)),
        "noise": Contender(sampling.eager(sampling.NCHW)(quiet).run, right.predict),
    }
    for name, contender in wrong.items():
        with pytest.raises(Disagreement, match=name):
            check_sampling(p, name, contender)
    builders = {OURS: lambda p: right, "wrong": lambda p: wrong["network"]}
    rows = problem.measure("sample", p, builders, check_sampling, 1, flops=1, ceiling=1.0)
    assert "ms" in rows[0] and "ms" not in rows[1] and "Disagreement" in rows[1]["error"]


def test_a_wrong_trainer_is_not_timed():
    p = make_problem()
    right = training.plain(training.NCHW)(p)
    check_training(p, "right", right)
    right = training.plain(training.NCHW)(p)
    scaled = Contender(right.run, lambda: right.predict() * 1.001)
    with pytest.raises(Disagreement, match="scaled"):
        check_training(p, "scaled", scaled)
    diverged = Contender(lambda: torch.tensor(float("nan")), right.predict)
    with pytest.raises(Disagreement, match="finite"):
        check_training(p, "diverged", diverged)


SAMPLERS = {
    OURS: sampling.ours,
    "original": sampling.original_loop,
    "peer": sampling.eager(sampling.CHANNELS_LAST),
    "graph": gpu_peers.in_graph(sampling.CHANNELS_LAST, 3),
}
TRAINERS = {OURS: training.ours(), "original": training.original_loop, "peer": training.plain(training.CHANNELS_LAST)}


def without_network(monkeypatch) -> None:
    """Sabotage the loop of every contender in sampling: the network never runs."""
    step = engine.Chain.step
    monkeypatch.setattr(engine.Chain, "step", lambda self, network, *z: step(self, lambda x, t: x * 0, *z))
    monkeypatch.setattr(original.Diffusion, "_reverse_step", lambda self, x, *step: x)
    forward = sampling.ReverseStep.forward

    def skip(self, x, *args):
        self.net = Zero()
        return forward(self, x, *args)

    monkeypatch.setattr(sampling.ReverseStep, "forward", skip)


class Zero(nn.Module):
    def forward(self, x, t, y):
        return x * 0


def with_a_small_loss(monkeypatch) -> None:
    """Sabotage the loss of every contender in training: it is 100 times too small."""
    for owner, name in ((ops, "diffusion_loss"), (original.Diffusion, "get_losses"), (training.Loss, "forward")):
        loss = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, loss=loss, **options: loss(*args, **options) / 100)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_timed_chain_is_what_is_checked(name, precision, monkeypatch):
    p = make_problem(precision, checked=3)
    check_sampling(p, name, SAMPLERS[name](p))
    without_network(monkeypatch)
    with pytest.raises(Disagreement, match="from the float64 reference"):
        check_sampling(p, name, SAMPLERS[name](p))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_timed_iteration_is_what_is_checked(name, precision, monkeypatch):
    p = make_problem(precision, num_timesteps=1000)
    check_training(p, name, TRAINERS[name](p))
    with_a_small_loss(monkeypatch)
    with pytest.raises(Disagreement, match="from the float64 reference"):
        check_training(p, name, TRAINERS[name](p))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_many_steps_are_no_disagreement(precision, monkeypatch):
    monkeypatch.setattr(Problem, "plain_run", lambda self: torch.randn(8192))
    p = Problem(TINY, CPU, batch=4, steps=1000, precision=precision)
    got = sampling.ours(p).predict()
    check_sampling(p, OURS, Contender(p.plain_run, lambda: got))
    with pytest.raises(Disagreement):  # by a tenth of what the network did, which is small beside x
        start = p.inputs[0] * p.exact_rows[: p.checked, 2].prod()
        check_sampling(p, OURS, Contender(p.plain_run, lambda: got + 0.1 * (got - start)))


def test_every_timed_chain_has_an_autocast_of_its_own():
    """So nothing that one contender does to the cache of cast weights reaches the next."""
    outside = []

    def spy(build):
        def built(p):
            contender = build(p)
            return Contender(lambda: outside.append(torch.is_autocast_enabled("cpu")) or contender.run(), lambda: None)

        return built

    spied = {name: spy(SAMPLERS[name]) for name in (OURS, "original", "peer")}
    rows = problem.measure("sample", make_problem("bf16"), spied, lambda *args: None, 1, flops=1, ceiling=1.0)
    assert all("ms" in row for row in rows) and outside == [False] * 6  # a warm-up and a repetition of each


def test_peers_sample_as_the_original_under_its_seed():
    p = make_problem()
    samples = []
    for build in (sampling.original_loop, sampling.eager(sampling.NCHW)):
        contender = build(p)
        torch.manual_seed(5)
        samples.append(contender.run())
    assert harness.relative_error(samples[1], samples[0]) < 1e-6
    graph = gpu_peers.graph_loop(replace(p, checked=3), sampling.ReverseStep(p.network()), unroll=3)
    torch.manual_seed(5)
    assert harness.relative_error(graph.run(), samples[0]) < 1e-6


def test_peers_train_as_the_original_under_its_seed(monkeypatch):
    monkeypatch.setattr(training, "EMA_DECAY", 0.9)
    p = make_problem()
    original = training.original.Diffusion(
        p.network(), *sampling.geometry(p), ema_decay=training.EMA_DECAY, ema_start=1
    ).train()
    optimizer = torch.optim.Adam(original.parameters(), lr=training.LEARNING_RATE)
    peer = training.PlainTrainer(p, training.NCHW)
    torch.manual_seed(5)
    for _ in range(p.steps):
        optimizer.zero_grad()
        original(p.inputs[0], p.inputs[1]).backward()
        optimizer.step()
        original.update_ema()
    torch.manual_seed(5)
    peer.run()
    for expected, got in ((original.model, peer.parameters), (original.ema_model, peer.ema)):
        start = torch.cat([w.flatten() for w in p.network().parameters()])
        expected, got = (torch.cat([w.flatten() for w in ws]) - start for ws in (expected.parameters(), got))
        assert harness.relative_error(got, expected) < 1e-2  # of the change, a small difference of weights
        assert expected.norm() > 0


def test_inductor_knows_the_settings():
    for options in (
        gpu_peers.TUNED | gpu_peers.CUDA_GRAPH_TREES,
        {"epilogue_fusion": False, "loop_reindexing_after_fusion": False},
    ):
        sampling.compile_module(nn.Identity(), make_problem(), options)
    with pytest.raises(RuntimeError, match="no_such_setting"):
        sampling.compile_module(nn.Identity(), make_problem(), {"no_such_setting": True})


def test_freezing_makes_the_weights_constants():
    class Tiny(Problem):
        def network(self) -> nn.Module:
            return nets[-1]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, t, y):
            return self.conv(x)

    for freezing in (False, True):
        nets = [Net()]
        contender = sampling.compiled(sampling.NCHW, freezing=freezing, max_autotune=True)(
            Tiny(TINY, CPU, batch=4, steps=3, precision="float32")
        )
        before = contender.predict()
        with torch.no_grad():
            nets[0].conv.weight.zero_()
        assert torch.equal(contender.predict(), before) == freezing


def test_compiled_contenders_trace_without_breaks():
    p = make_problem("bf16", compiler="eager")
    check_sampling(p, "sampling", sampling.compiled(sampling.CHANNELS_LAST)(p))
    check_training(p, "training", training.plain(training.CHANNELS_LAST, {})(p))


def test_every_op_has_its_benchmark():
    assert set(OPS) == set(ops.OPS) | {"overhead"}


def test_ops_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ceilings, "copy", partial(ceilings.copy, nbytes=1 << 22))
    monkeypatch.setattr(ceilings, "matmul", partial(ceilings.matmul, sizes=(256,)))
    file = tmp_path / "ops.json"
    argv = ["--quick", "--repetitions", "2", "--device", "cpu", "--json", str(file)]
    names = ["timestep_embedding", "noise"]
    assert ops_main([*argv, "--batch", "2", "--ops", *names]) == 0
    check_form(file, {OURS, "torch eager"})
    cases = {row["case"].split()[0] for row in json.loads(file.read_text())["rows"]}
    assert cases == set(names)
    assert "| contender |" in capsys.readouterr().out


@pytest.mark.minutes
@pytest.mark.parametrize("script", ["sample_throughput.py", "train_throughput.py"])
def test_throughput_scripts_run_from_anywhere(script, tmp_path):
    file = tmp_path / "out.json"
    options = ["--device", "cpu", "--model", "digits", "--batch", "2", "--steps", "2", "--repetitions", "2"]
    command = [sys.executable, ROOT / "benchmarks" / script, "--quick", *options, "--json", file]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peers = {"original", "torch eager NCHW", "torch eager channels_last"}
    check_form(file, {OURS, *peers})
    precisions = {"float32", "bf16"} if onednn_takes_bf16() else {"float32"}
    assert {row["precision"] for row in json.loads(file.read_text())["rows"]} == precisions
    assert "TFLOP/s" in done.stdout and "timing" in done.stderr


BAD_OPTIONS = {
    throughput.parser("", "steps").parse_args: [
        *("--steps 0", "--batch 4 -1", "--repetitions 0", "--device tpu", "--device meta", "--json FILE/out.json"),
    ],
    ops_main: ["--batch 0", "--repetitions x", "--device cuda:99", "--json ."],
    gpu_suite.parse: ["--dry-run --repetitions 0", "--dry-run --only nothing", "--out FILE"],
}


@pytest.mark.parametrize(("entry", "options"), [(entry, bad) for entry, bads in BAD_OPTIONS.items() for bad in bads])
def test_bad_options_are_refused_in_one_line(entry, options, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        entry(options.replace("FILE", str(tmp_path / "file")).split())
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_product_is_larger_than_one_that_takes_long(monkeypatch):
    monkeypatch.setattr(ceilings, "LONG_MS", 0.0)
    impossible = -1
    assert ceilings.matmul(CPU, torch.float32, (16, impossible))["case"] == "matrix product [16, 16]"


def test_the_folder_of_the_results_is_made_first(tmp_path):
    throughput.parser("", "steps").parse_args(["--json", str(tmp_path / "a" / "b" / "out.json")])
    assert (tmp_path / "a" / "b").is_dir()


def test_ops_write_as_they_go(tmp_path, monkeypatch):
    def measure(case, *args):
        if written:
            assert len(json.loads(file.read_text())["rows"]) == len(written)
        written.append(case)
        return [{"case": str(case), "name": OURS, "ms": 1.0}]

    written, file = [], tmp_path / "ops.json"
    monkeypatch.setattr(ceilings, "copy", lambda *args: {"gbytes_per_s": 1.0})
    monkeypatch.setattr(ceilings, "matmul", lambda *args: {"tflops": 1.0})
    monkeypatch.setattr("benchmarks.ops.__main__.measure", measure)
    assert ops_main(["--quick", "--json", str(file), "--ops", "noise"]) == 0
    assert len(written) == 2


def test_full_runs_compile_and_quick_ones_do_not():
    parser = throughput.parser("", "steps")
    assert not parser.parse_args(["--quick"]).compile
    for contenders in (sampling.contenders, training.contenders):
        assert not [name for name in contenders(False) if "compile" in name]
        assert [name for name in contenders(True) if "compile" in name]
