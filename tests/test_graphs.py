"""Recorded chains, on a stand-in for CUDA graphs: what a recording serves, and what is recorded anew."""

import copy
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from recordings import network, pair, same
from tape import Tape
from torch import Tensor, nn
from toys import BETAS, TINY, pixelwise

from ddpm_fast import Diffusion, graphs, ops
from ddpm_fast.engine import fastest_way
from ddpm_fast.footprint import switches
from ddpm_fast.samplers import Plan

pytestmark = pytest.mark.filterwarnings("ignore:sampling from ema_model")


def test_one_recording_serves_every_plan_seed_and_weight(tape: Tape) -> None:
    """Any number of steps, any seed, first image and weights: all that changes is what the recorded tensors hold."""
    graph, eager = pair()
    same(graph, eager, seed=1)
    records, replays = tape.records, tape.replays
    assert records == 2 and replays == len(BETAS)
    same(graph, eager, seed=-(2**63), first_index=2**33 + 5)
    same(graph, eager, seed=3, num_steps=5)
    same(graph, eager, seed=4, noise=torch.ones(2, 1, 8, 8))
    with torch.no_grad():
        for p in graph.ema_model.parameters():
            p.mul_(1.5)
    with ops.use_backend("reference"):
        assert not torch.equal(graph.sample(2, "cpu", seed=1), eager.sample(2, "cpu", seed=1))
    eager.ema_model.load_state_dict(graph.ema_model.state_dict())
    same(graph, eager, seed=1)
    assert tape.records == records and len(graph.graphs) == 1


def test_the_recording_really_runs(tape: Tape) -> None:
    """If a replay did nothing, the test above would be one of the eager engine alone."""
    graph, _ = pair()
    before = graph.sample(2, "cpu", seed=1)
    entry = next(iter(graph.graphs._entries.values())).made
    entry.first = entry.next = graphs.Recording(lambda: None, 0)
    assert torch.equal(graph.sample(2, "cpu", seed=1), entry.chain.x) and not torch.equal(before, entry.chain.x)


@pytest.mark.parametrize(
    "options", [{}, {"sampler_options": {"clip": True}}, {"sampler_options": {"variance": "posterior"}}]
)
def test_samplers(tape: Tape, options) -> None:
    graph, eager = pair()
    same(graph, eager, seed=1, **options)


def test_every_column_of_a_plan(tape: Tape) -> None:
    """c_in, history and a noise level instead of an index; then a shorter plan of the kind, with other numbers."""
    graph, eager = pair()
    for seed, steps in ((0, 7), (1, 4)):
        rows = torch.rand(steps, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        same(graph, eager, seed=seed, sampler=Plan(rows, clip=0.7))
    assert tape.records == 2


def test_classes(tape: Tape) -> None:
    graph, eager = pair(network(num_classes=5), num_classes=5)
    same(graph, eager, seed=1, y=torch.tensor([1, 3]))
    same(graph, eager, seed=1, y=torch.tensor([4, 0]))
    assert tape.records == 2
    with ops.use_backend("reference"):
        a, b = (graph.sample(2, "cpu", seed=1, y=torch.tensor(y)) for y in ([1, 3], [4, 0]))
    assert not torch.equal(a, b)


def test_several_steps_in_one_recording(tape: Tape, monkeypatch) -> None:
    """12 steps by eights: one alone, which may cast weights, eight at once, three alone."""
    monkeypatch.setattr("ddpm_fast.engine.fastest_way", lambda model, x: "graph8")
    graph, eager = pair()
    same(graph, eager, seed=1)
    assert tape.records == 3 and tape.replays == 1 + 1 + 3
    seen: list[int] = []
    same(graph, eager, seed=1, callback=lambda k, x: seen.append(k))
    assert seen == [*range(12)] * 2  # and a callback sees each step


def test_callbacks_may_change_x(tape: Tape) -> None:
    """As inpainting does."""
    graph, eager = pair()
    same(graph, eager, seed=1, callback=lambda k, x: x[:, :, :4].fill_(0.5))
    seen: list[Tensor] = []
    image = graph.sample(2, "cpu", seed=1, callback=lambda k, x: seen.append(x.clone()))
    assert torch.equal(seen[-1], image)
    assert torch.equal(torch.stack(graph.sample_diffusion_sequence(2, "cpu", seed=1)[1:]), torch.stack(seen))


def test_autocast_casts_each_weight_once_a_chain_and_anew_for_the_next(tape: Tape) -> None:
    graph, eager = pair()
    with torch.autocast("cpu", torch.bfloat16):
        same(graph, eager, seed=1)
        assert tape.lengths[0] > tape.lengths[1], "the first step's casts are missing, or every step has them"
        with torch.no_grad():
            for a, b in zip(graph.ema_model.parameters(), eager.ema_model.parameters(), strict=True):
                a.mul_(1.5)
                b.mul_(1.5)
        same(graph, eager, seed=1)
    assert tape.records == 2
    same(graph, eager, seed=1)  # without: another recording
    assert tape.records == 4


CHANGES = {
    "load with assign": lambda d: d.ema_model.load_state_dict(network().state_dict(), assign=True),
    "a new parameter": lambda d: setattr(d.ema_model.out_conv, "weight", nn.Parameter(torch.zeros(1, 8, 3, 3))),
    "new memory": lambda d: setattr(d.ema_model.out_conv.weight, "data", torch.zeros(1, 8, 3, 3)),
    "another module": lambda d: d.ema_model.mid.__setitem__(1, nn.Identity()),
    "another attribute": lambda d: setattr(d.ema_model.downs[0], "activation", torch.tanh),
    "a number": lambda d: setattr(d.ema_model.downs[0].norm_1, "eps", 0.5),
    "moved": lambda d: d.double().float(),
}


class Passes(nn.Module):
    """In a residual block's place."""

    def forward(self, x: Tensor, time_emb: Tensor, y: Tensor) -> Tensor:
        return 2 * x


CHANGES["another module"] = lambda d: d.ema_model.mid.__setitem__(1, Passes())


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_recorded_anew(tape: Tape, change: str) -> None:
    graph, eager = pair()
    same(graph, eager, seed=1)
    for diffusion in (graph, eager):
        CHANGES[change](diffusion)
    same(graph, eager, seed=1)
    assert tape.records == 4 and len(graph.graphs) == 1, "the old one is released"


def test_other_switches_shapes_and_networks_have_recordings_of_their_own(tape: Tape, monkeypatch) -> None:
    graph, eager = pair()
    same(graph, eager, seed=1)
    same(graph, eager, 3, seed=1)
    same(graph, eager, seed=1, use_ema=False)
    for owner, name in (
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    ):
        before = getattr(owner, name)
        setattr(owner, name, not before)
        same(graph, eager, seed=1)
        setattr(owner, name, before)
    assert tape.records == 2 * len(graph.graphs) == 12
    torch.use_deterministic_algorithms(True)
    same(graph, eager, seed=1)
    torch.use_deterministic_algorithms(False)
    same(graph, eager, 4, seed=1)
    recorders = len(tape.recorders)
    assert tape.records == 2 * len(graph.graphs) == 2 * graphs.MOST and recorders == 1
    same(graph, eager, 5, seed=1)
    assert len(graph.graphs) == 1 and len(tape.recorders) == 2, "all are released at once, with their recorder"
    graph.graphs.clear()
    assert len(graph.graphs) == 0 and repr(graph.graphs) == "Graphs: none"
    same(graph, eager, seed=1)
    assert len(tape.recorders) == 3
    graph.to("cpu")
    assert len(graph.graphs) == 0, "a move releases them"


def test_longer_plans_and_other_ways_have_recordings_of_their_own(tape: Tape, monkeypatch) -> None:
    """More rows than there was room for; another number of steps in a recording."""
    monkeypatch.setattr("ddpm_fast.engine.ROOM", 4)
    graph, eager = pair()
    same(graph, eager, seed=1, num_steps=3)
    same(graph, eager, seed=1)
    assert tape.records == 4 and "up to 4 steps" in repr(graph.graphs) and "up to 16 steps" in repr(graph.graphs)
    monkeypatch.setattr("ddpm_fast.engine.fastest_way", lambda model, x: "graph8")
    same(graph, eager, seed=1)
    assert tape.records == 7


def test_another_backend_is_another_recording(tape: Tape) -> None:
    graph, _ = pair()
    with ops.use_backend("reference"):
        first = graph.sample(2, "cpu", seed=1)
    assert torch.allclose(graph.sample(2, "cpu", seed=1), first, atol=1e-3) and len(graph.graphs) == 2


@pytest.mark.parametrize("name", ["matmul", "conv", "all"])
def test_settings_that_forbid_to_read_their_predecessors(name: str, monkeypatch) -> None:
    """torch 2.9 and later raise where the old TF32 flags are read after the new ones were set."""
    backends = torch.backends
    owner = {"matmul": backends.cuda.matmul, "conv": backends.cudnn.conv, "all": backends}[name]
    if not hasattr(owner, "fp32_precision"):
        pytest.skip("this torch has no fp32_precision")
    before = owner.fp32_precision
    owner.fp32_precision = "ieee"
    try:
        assert len(switches(torch.device("cuda"))) > 10
        assert pixelwise().sample(1, "cpu").isfinite().all()
    finally:
        owner.fp32_precision = before


@dataclass
class Settings:
    scale: float = 0.5


class Configured(nn.Module):
    """Reads a dataclass, a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg, self.tables, self.names = Settings(), [torch.tensor(0.1)], {"more": {"shift": 0.01}}

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.cfg.scale * x + self.tables[0] + self.names["more"]["shift"]


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.cfg, "scale", 0.25),
        lambda net: net.tables.__setitem__(0, torch.tensor(0.2)),
        lambda net: net.names["more"].update(shift=0.3),
        lambda net: net.names.update(other=1),
    ],
)
def test_what_lies_in_attributes_is_looked_at(tape: Tape, change) -> None:
    graph, eager = pair(Configured())
    same(graph, eager, seed=1)
    for diffusion in (graph, eager):
        change(diffusion.ema_model)
    same(graph, eager, seed=1)
    assert tape.records == 2 and tape.replays == 2 * len(BETAS)


def test_a_network_that_changes_all_the_time_is_given_up_and_one_that_does_now_and_then_not(
    tape: Tape, monkeypatch
) -> None:
    monkeypatch.setattr(graphs, "MANY_USES", 3)

    def change(k: int) -> None:
        for diffusion in (graph, eager):
            diffusion.ema_model.cfg.scale = 0.01 * k

    graph, eager = pair(Configured())
    for k in range(graphs.MOST_CHANGES + 1):
        change(k)
        for _ in range(graphs.MANY_USES):
            same(graph, eager, seed=1)
    assert tape.records == graphs.MOST_CHANGES + 1
    for k in range(graphs.MOST_CHANGES):
        change(k)
        same(graph, eager, seed=k)
    with pytest.warns(UserWarning, match="what it looks at changes all the time"):
        change(100)
        same(graph, eager, seed=1)


def test_copies_have_no_recordings(tape: Tape) -> None:
    graph, eager = pair()
    same(graph, eager, seed=1)
    other = copy.deepcopy(graph)
    assert len(graph.graphs) == 1 and len(other.graphs) == 0 and len(pickle.loads(pickle.dumps(graph)).graphs) == 0
    same(other, eager, seed=1)


def test_inference_mode(tape: Tape) -> None:
    """A recording made in it is of no other use outside, nor the other way round."""
    graph, eager = pair()
    with torch.inference_mode():
        same(graph, eager, seed=1)
    same(graph, eager, seed=1)
    with torch.inference_mode():
        same(graph, eager, seed=1)


def test_the_list_tells_what_there_is(tape: Tape) -> None:
    graph, eager = pair()
    same(graph, eager, seed=1)
    assert repr(graph.graphs) == "Graphs:\n  UNet on float32 [2, 1, 8, 8], plans of up to 1024 steps: 2 MiB"


def test_a_table_of_the_gpu_decides(monkeypatch) -> None:
    """By the size of network and batch, of this kind of GPU."""
    from ddpm_fast.kernels import lookup

    net = network()
    parameters = sum(p.numel() for p in net.parameters())
    key = f"{1 << (parameters - 1).bit_length()}x128"

    class OnGpu:
        device = torch.device("cuda", 0)

        def numel(self) -> int:
            return 2 * 8 * 8

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert fastest_way(net, OnGpu()) == "graph" == fastest_way(net, torch.zeros(1))
    for name, way in (("graph8", "graph8"), ("eager", "eager"), ("gone", "graph")):
        monkeypatch.setattr(lookup, "committed", lambda gpu, name=name: {"engine": {key: name}})
        assert fastest_way(net, OnGpu()) == way


def test_engine_is_checked() -> None:
    with pytest.raises(ValueError, match="engine must be one of"):
        pixelwise(engine="cuda")


def test_dropout_is_off_in_a_recorded_chain(tape: Tape) -> None:
    torch.manual_seed(0)
    graph = Diffusion.from_config(replace(TINY, num_classes=None), engine="graph").train()
    eager = copy.deepcopy(graph)
    eager.engine = "eager"
    same(graph, eager, seed=1, use_ema=False)
    assert graph.model.training and len(graph.graphs) == 1


@pytest.mark.parametrize("half", [False, True])
def test_a_network_whose_sums_are_made_later(tape: Tape, half: bool) -> None:
    """The first step makes what follows from weights, of those that are there then."""
    net = network(num_classes=5)
    net.fused = True
    graph, eager = pair(net, num_classes=5)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        same(graph, eager, seed=1, y=torch.tensor([1, 3]))
        assert tape.lengths[0] > tape.lengths[1] + 20, "what is made of the weights is missing, or made in every step"
        for p, q in zip(graph.ema_model.parameters(), eager.ema_model.parameters(), strict=True):
            p.data.mul_(1.5)
            q.data.mul_(1.5)
        same(graph, eager, seed=2, y=torch.tensor([4, 0]), num_steps=5)
    assert tape.records == 2
