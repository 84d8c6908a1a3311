"""When a chain isn't recorded, and what the recorder asks of torch.cuda."""

import inspect
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from recordings import eagerly, network, pair, same
from tape import Tape, tape_is_recording
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import BETAS

from ddpm_fast import Diffusion, graphs, ops
from ddpm_fast.engine import WORTH
from ddpm_fast.footprint import NotRecorded

pytestmark = pytest.mark.filterwarnings("ignore:sampling from ema_model")


class Reads(nn.Module):
    """Looks at t on the host, as the second chain shows."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return x * 0.5 if t[0].item() > 5 else x * 0.25


def test_a_network_that_reads_the_device_runs_eagerly(tape: Tape) -> None:
    graph, eager = pair(Reads())
    images = eagerly(graph, "can't be recorded: it waits for the device")
    assert torch.equal(images, eager.sample(2, "cpu", seed=1))
    assert "can't be recorded" in repr(graph.graphs) and len(graph.graphs) == 0


class Fails(nn.Module):
    """In captures alone."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if tape_is_recording():
            try:
                raise OSError("no such thing")
            finally:
                raise RuntimeError("a capture failed")
        return x * 0.5


def test_the_first_of_the_errors_is_told(tape: Tape) -> None:
    graph, eager = pair(Fails())
    assert torch.equal(eagerly(graph, "OSError: no such thing; running eagerly"), eager.sample(2, "cpu", seed=1))


class Counts(nn.Module):
    """Its own calls, which decide."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        return x * (0.5 if self.calls % 2 else 0.25)


def test_a_network_that_counts_runs_eagerly(tape: Tape) -> None:
    graph, eager = pair(Counts())
    with pytest.warns(UserWarning, match="it changes what it looks at when it runs"):
        graph.sample(2, "cpu", seed=1)
    graph.ema_model.calls = 0
    assert torch.equal(graph.sample(2, "cpu", seed=1), eager.sample(2, "cpu", seed=1)) and tape.replays == 0


class Guided(Diffusion):
    """Calls the network in its own way, with t."""

    weight = 0.5

    def _call(self, model, x, t, y, state=None):
        twice = super()._call(model, torch.cat([x, x]), torch.cat([t, t]), None)
        return twice[: len(x)] * self.weight


def test_a_call_of_ones_own_is_told_t_and_not_recorded(tape: Tape) -> None:
    graph = Guided(network(), (8, 8), 1, None, BETAS, engine="graph")
    images = eagerly(graph, "what this network looks at is not known")
    graph.weight = 0.25
    assert not torch.equal(graph.sample(2, "cpu", seed=1), images)


def test_without_a_gpu_only_a_wish_that_cannot_be_met_is_answered() -> None:
    """A network that nobody vouches for: tests/test_tape.py has the others."""
    graph, eager = pair(network(activation=lambda x: nn.functional.silu(x)))
    why = "what this network does in each call is not known"
    images = eagerly(graph, f"no recorded step: {why}; running eagerly")
    assert repr(graph.graphs).endswith(f"\n  eager: {why}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto = Diffusion(eager.model, (8, 8), 1, None, BETAS)
        assert auto.engine == "auto" and torch.equal(auto.sample(2, "cpu", seed=1), images)


def test_hooks_run_in_every_step(tape: Tape) -> None:
    graph, _ = pair()
    calls: list[int] = []
    graph.ema_model.mid[0].register_forward_hook(lambda *_: calls.append(1))
    eagerly(graph, r"mid\.0 has hooks")
    assert len(calls) == 2 * len(BETAS)


class Passing(TorchDispatchMode):
    """Sees every operator, and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_else_is_eager(tape: Tape, monkeypatch) -> None:
    net = network()
    with pytest.warns(UserWarning, match="torch's generator"):
        Diffusion(net, (8, 8), 1, None, BETAS, rng="torch", engine="graph").sample(1, "cpu")

    class Mean(Diffusion):
        def remove_noise(self, x, t, y, use_ema=True):
            return x * 0.5

    with pytest.warns(UserWarning, match="not known"):
        Mean(net, (8, 8), 1, None, BETAS, engine="graph").sample(1, "cpu")
    graph, _ = pair(net)
    with Passing(), pytest.warns(UserWarning, match="dispatch mode"):
        graph.sample(1, "cpu")
    graph.sample(1, "cpu")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="a hook of all modules"):
        graph.sample(1, "cpu")
    handle.remove()
    inner: list[Tensor] = []
    with pytest.warns(UserWarning, match="another recorded chain is under way"):  # whose memory it would take
        again = lambda k, x: inner or inner.append(graph.sample(1, "cpu", seed=1))  # noqa: E731
        with ops.use_backend("reference"):
            outer = graph.sample(1, "cpu", seed=1, callback=again)
    assert torch.equal(inner[0], outer)
    auto = Diffusion(net, (8, 8), 1, None, BETAS)
    auto.sample(1, "cpu")
    assert len(BETAS) < WORTH and not len(auto.graphs), "a short chain isn't worth it"
    with monkeypatch.context() as patch:
        patch.setattr("ddpm_fast.engine.WORTH", len(BETAS))
        auto.sample(1, "cpu")
        assert len(auto.graphs) == 1
        patch.setattr("ddpm_fast.engine.fastest_way", lambda model, x: "eager")
        auto.graphs.clear()
        auto.sample(1, "cpu")
        assert not len(auto.graphs), "the table says that it doesn't pay"


def test_memory_that_runs_out(tape: Tape, monkeypatch) -> None:
    """In a capture: all is given back, and the chain is eager. In an eager step: given back, and the batch split."""
    graph, eager = pair()
    same(graph, eager, seed=1)

    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(tape, "record", full)
        with pytest.warns(UserWarning, match="can't be recorded: OutOfMemoryError: CUDA out of memory"):
            same(graph, eager, 4, seed=1)
        assert len(graph.graphs) == 0
    same(graph, eager, seed=1)
    forward = graph.ema_model.forward

    def limited(x, *rest):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, *rest)

    monkeypatch.setattr(eager.ema_model, "forward", eager.ema_model.forward)  # patched, too, it is told t
    monkeypatch.setattr(graph.ema_model, "forward", limited)
    assert len(graph.graphs) == 1
    with ops.use_backend("reference"):
        halves = [eager.sample(2, "cpu", seed=1, first_index=k) for k in (0, 2)]
        assert torch.equal(graph.sample(4, "cpu", seed=1), torch.cat(halves))
    assert [entry.made.chain.x.shape[0] for entry in graph.graphs._entries.values()] == [2]


def test_an_error_in_a_callback_leaves_all_usable(tape: Tape) -> None:
    graph, eager = pair()

    def stop(k: int, x: Tensor) -> None:
        raise KeyError(k)

    with pytest.raises(KeyError), ops.use_backend("reference"):
        graph.sample(2, "cpu", seed=1, callback=stop)
    records = tape.records
    same(graph, eager, seed=1)
    assert tape.records == records


class FakeCuda:
    """Of torch.cuda what a Recorder uses; notes the calls, and keeps the current stream as torch does."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[str] = []
        self.current, self.reserved, self.fails, self.debug = "default", 100, False, 0
        outer = self
        true_graph = torch.cuda.graph

        class Stream:
            def __init__(self, device) -> None:
                self.device = device

            def wait_stream(self, other) -> None:
                outer.calls.append("wait")

        class Graph:
            def __init__(self, graph, **options) -> None:
                inspect.signature(true_graph).bind(graph, **options)
                assert options["capture_error_mode"] == "thread_local" and options["pool"] == (0, 7)
                self.stream = options["stream"]

            def __enter__(self) -> None:
                outer.calls.append("capture")
                outer.current = self.stream

            def __exit__(self, *error) -> None:
                if outer.fails:  # torch leaves its stream current then
                    raise RuntimeError("operation failed due to a previous error during capture")
                outer.current = "default"

        class CUDAGraph:
            def replay(self) -> None:
                outer.calls.append("replay")

        @contextmanager
        def on(stream):
            before, outer.current = outer.current, stream
            yield
            outer.current = before

        fakes = {
            "Stream": Stream,
            "graph": Graph,
            "CUDAGraph": CUDAGraph,
            "graph_pool_handle": lambda: (0, 7),
            "current_stream": lambda device=None: Stream("current") if device else self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": on,
            "device": lambda device: nullcontext(),
            "empty_cache": lambda: self.calls.append("empty"),
            "memory_reserved": lambda device: self.reserved,
            "get_sync_debug_mode": lambda: self.debug,
            "set_sync_debug_mode": lambda mode: setattr(self, "debug", mode),
        }
        for name, fake in fakes.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, fake)


def test_the_recorder_captures_as_torch_asks(monkeypatch) -> None:
    """Warm-ups on its own stream, between two waits; memory measured from an empty cache; the stream as before."""
    cuda = FakeCuda(monkeypatch)
    recorder = graphs.Recorder(torch.device("cuda", 0))
    streams: list[object] = []
    recorder.warm_up(lambda: streams.append(cuda.current))
    assert streams == [recorder._stream] * graphs.WARM_UPS and cuda.calls == ["wait", "wait"]

    def run() -> None:
        streams.append(cuda.current)
        cuda.reserved += 64

    recording = recorder.record(run)
    assert streams[-1] is recorder._stream and cuda.current == "default" and recording.num_bytes == 64
    assert cuda.calls[2:] == ["empty", "capture"]
    recording.replay()
    assert cuda.calls[-1] == "replay"
    assert recorder._stream is not graphs.Recorder(torch.device("cuda", 0))._stream

    def waits() -> None:
        assert cuda.debug == "warn"
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)

    with pytest.warns(UserWarning, match="another"), pytest.raises(NotRecorded, match=r"waits for the device, in .*py"):
        recorder.watched(waits)
    assert cuda.debug == 0
    monkeypatch.setattr(graphs.Recorder, "broken", False)
    cuda.fails = True
    with pytest.raises(RuntimeError, match="previous error"):
        recorder.record(run)
    assert cuda.current == "default"
    with pytest.raises(NotRecorded, match="an earlier capture failed"):
        graphs.Recorder(torch.device("cuda", 0))
