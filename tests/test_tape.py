"""Chains on a CPU that run what their second step recorded, beside those that run each step."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from recordings import network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ddpm_fast
from ddpm_fast import Diffusion, UNet, engine, generate_linear_schedule, ops, tape
from ddpm_fast.chain import Predictor
from ddpm_fast.corrections import dynamic_threshold
from ddpm_fast.models.made import Table
from ddpm_fast.tape import MOST, Repeated

BETAS = generate_linear_schedule(20, 1e-2, 0.3)
pytestmark = pytest.mark.filterwarnings("error:no recorded step")


@pytest.fixture
def recordings() -> list[Any]:
    """All that were finished, if `replays` is asked for, too."""
    return []


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch, recordings: list[Any]) -> list[int]:
    """A number for each recording: how often it ran."""
    counts: list[int] = []
    record = tape._Recording.replay

    def counted(self: Any, result: Tensor) -> tuple[Callable[..., Tensor], int]:
        (run, num_bytes), place = record(self, result), len(counts)
        counts.append(0)
        recordings.append(self)

        def again(*given: Tensor) -> Tensor:
            counts[place] += 1
            return run(*given)

        return again, num_bytes

    monkeypatch.setattr(tape._Recording, "replay", counted)
    return counts


def sampled(engine: str, net: nn.Module, callback: Any = None, size: int = 3, **options: Any) -> Tensor:
    torch.manual_seed(0)
    given = "num_classes", "label_dropout", "learned_variance", "cond_channels", "exact"
    made = {k: options.pop(k) for k in given if k in options}
    img_size = options.pop("img_size", (8, 8))
    diffusion = Diffusion(net, img_size, 1, made.pop("num_classes", None), BETAS, engine=engine, **made)
    return diffusion.sample(size, "cpu", use_ema=False, seed=1, callback=callback, **options)


def same(net: nn.Module, make_callback: Callable[[], Any] = lambda: None, **options: Any) -> None:
    expected = sampled("eager", net, make_callback(), **options)
    assert torch.equal(sampled("graph", net, make_callback(), **options), expected)


WIDE = {"base_channels": 64, "num_groups": 32}  # where convolutions are ours
NETWORKS = {
    "small": {},
    "wide": WIDE,
    "on both paths": WIDE | {"fused": True},
    "on the plain path": WIDE | {"fused": False},
    "without a norm": {"norm": None},
    "instance norm": {"norm": "in", "activation": nn.functional.mish},
    "batch norm": {"norm": "bn", "activation": torch.relu},
    "without time": {"time_emb_dim": None},
    "padded": {"initial_pad": 2},
    "attention everywhere": {"attention_resolutions": (0, 1), "base_channels": 40},
}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_the_same_bits(options: dict[str, Any], bf16: bool, replays: list[int]) -> None:
    net = network(**options)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        same(net)
    assert replays == [len(BETAS) - 2]


def test_the_same_bits_by_any_sampler(replays: list[int]) -> None:
    for sampler in ("ddim", "heun", "dpmpp_2m_sde"):
        same(network(), sampler=sampler, num_steps=12)
    assert len(replays) == 3 and min(replays) >= 10


def test_the_same_bits_with_classes_guidance_and_learned_variance(replays: list[int]) -> None:
    y = torch.tensor([0, 2, 1])
    same(network(num_classes=4), num_classes=3, label_dropout=0.1, y=y, guidance=2.0)
    same(network(out_channels=2), learned_variance=True)
    assert replays == [len(BETAS) - 2] * 2


def test_corrections_run_between_the_calls(replays: list[int]) -> None:
    same(network(), corrections=[dynamic_threshold()])
    assert replays == [len(BETAS) - 2]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_on_a_forced_backend(backend: str, replays: list[int]) -> None:
    pytest.importorskip("ddpm_fast._C")
    with ops.use_backend(backend):
        same(network())
    assert replays == [len(BETAS) - 2]


def test_short_chains_and_eager_ones_are_not_recorded(replays: list[int]) -> None:
    sampled("eager", network())
    sampled("auto", network(), sampler="ddim", num_steps=engine.WORTH - 1)
    assert not replays
    sampled("auto", network(), sampler="ddim", num_steps=engine.WORTH)
    assert replays == [engine.WORTH - 2]


def unknown(kind: str) -> nn.Module:
    net = network()
    if kind == "activation":
        return network(activation=lambda x: nn.functional.silu(x))
    if kind == "hook":
        net.mid[0].register_forward_hook(lambda *_: None)
    if kind == "layer":
        net.mid[0].attention = nn.Sequential(nn.Tanh())
    if kind == "subclass":
        net.__class__ = type("Own", (UNet,), {})
    if kind == "forward":
        net.out_conv.forward = lambda x: nn.Conv2d.forward(net.out_conv, x)
    return net


@pytest.mark.parametrize("kind", ["activation", "hook", "layer", "subclass", "forward"])
def test_what_is_not_known_runs_each_time(kind: str, replays: list[int]) -> None:
    net = unknown(kind)
    expected = sampled("eager", net)
    with pytest.warns(UserWarning, match="no recorded step: what this network does in each call is not known"):
        assert torch.equal(sampled("graph", net), expected)
    assert not replays


def test_noise_of_torchs_generator(replays: list[int]) -> None:
    """Is drawn outside of what is recorded; with the original's numbers each step embeds its time, and runs."""
    torch.manual_seed(0)
    net, x = network(), torch.randn(2, 1, 8, 8)
    plan = Diffusion(net, (8, 8), 1, None, BETAS).plan()
    states = []
    for how in ("eager", "graph"):
        torch.manual_seed(1)
        with engine.eval_mode(net):
            states.append(engine.denoise(Predictor(net, lambda x, t: net(x, t)), x.clone(), plan, None, engine=how))
    assert torch.equal(*states) and replays == [len(BETAS) - 2]


class Changing:
    """A callback that does something to the network after some steps."""

    def __init__(self, net: UNet, steps: tuple[int, ...], change: Callable[[UNet], None]):
        self.net, self.steps, self.change = net, steps, change

    def __call__(self, k: int, x: Tensor) -> None:
        if k in self.steps:
            self.change(self.net)


def double(net: UNet) -> None:
    with torch.no_grad():
        net.mid[1].conv_1.weight.mul_(2)


def replace(net: UNet) -> None:
    net.mid[1].conv_1 = nn.Conv2d(*net.mid[1].conv_1.weight.shape[1::-1], 3, padding=1)


def hook(net: UNet) -> None:
    net.mid[1].norm_1.register_forward_hook(lambda _, args, y: y * 2)


@pytest.mark.parametrize("change", [double, replace, hook])
def test_what_a_callback_changes_counts_from_the_next_step_on(change: Any, replays: list[int]) -> None:
    images = []
    for how in ("eager", "graph"):
        net = network()
        images.append(sampled(how, net, Changing(net, (5,), change)))
    plain = sampled("eager", network())
    assert torch.equal(*images) and not torch.equal(images[0], plain)
    assert replays[0] == 4


def test_a_network_that_changes_all_the_time_is_recorded_a_few_times_only(replays: list[int]) -> None:
    images = []
    for how in ("eager", "graph"):
        net = network()
        images.append(sampled(how, net, Changing(net, tuple(range(0, 20, 3)), double)))
    assert torch.equal(*images) and len(replays) == MOST


def test_who_asks_for_a_number_runs_each_time(monkeypatch: pytest.MonkeyPatch, replays: list[int]) -> None:
    plain = UNet._forward  # a patched forward isn't known

    def forward(self: UNet, x: Tensor, *rest: Any) -> Tensor:
        return plain(self, x, *rest) * (2 if float(x.mean()) > 0 else 1)

    monkeypatch.setattr(UNet, "_forward", forward)
    same(network())
    assert not replays


def repeated(net: UNet) -> Repeated:
    return Repeated(net.eval(), lambda x, t: net(x, t), True, Table(), ())


@torch.no_grad()
def test_results_stay_and_room_is_shared(recordings: list[Any], replays: list[int]) -> None:
    """A result is nobody's room; what else is written takes much less memory than each of it for itself."""
    net, t = network(**WIDE), torch.zeros(2)
    images = [torch.randn(2, 1, 8, 8) for _ in range(5)]
    run = repeated(net)
    results = [run(x, t) for x in images]
    for x, y in zip(images, results, strict=True):
        assert torch.equal(y, net(x, t))
    (recording,) = recordings
    rooms = {line.makes[0]: line.room.num_bytes for line in recording._lines if line.room}
    memory = {v.untyped_storage().data_ptr(): v.untyped_storage() for k, v in recording._space.items() if k in rooms}
    (whole,) = memory.values()
    assert len(rooms) > 30 and whole.nbytes() < sum(rooms.values()) / 4


def test_a_chain_leaves_nothing(recordings: list[Any], replays: list[int]) -> None:
    """Without waiting for a collection of garbage."""
    gc.collect()
    gc.disable()
    try:
        sampled("graph", network(**WIDE))
        (recording,) = recordings
        rooms = [recording._space.get(line.makes[0]) for line in recording._lines if line.room]
        held = [weakref.ref(room) for room in rooms if room is not None]
        del recording, rooms
        recordings.clear()
        assert len(held) > 30 and not any(ref() is not None for ref in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("inference", [False, True])
def test_with_an_image_condition(inference: bool, replays: list[int]) -> None:
    """In inference mode operators come as they are called, and one that may make a view or a copy says the first."""
    with torch.inference_mode(inference):
        same(network(img_channels=3, out_channels=1), cond_channels=2, cond=torch.randn(3, 2, 8, 8))
    assert replays == [len(BETAS) - 2]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_of_torchs(backend: SDPBackend, replays: list[int]) -> None:
    with sdpa_kernel(backend), ops.use_backend("reference"):
        same(network())
    assert replays == [len(BETAS) - 2]


def test_upsampling_in_phases(replays: list[int]) -> None:
    same(network(base_channels=64, channel_mults=(1, 2), num_groups=32), exact=True, img_size=(16, 16), size=4)
    assert replays == [len(BETAS) - 2]


def test_chains_of_any_callable(replays: list[int]) -> None:
    net, plan = network().eval(), Diffusion(network(), (8, 8), 1, None, BETAS).plan()
    images = [ddpm_fast.sample(call, (2, 1, 8, 8), plan, seed=0) for call in (net, net.forward)]
    assert replays == [len(BETAS) - 2] and (images[0] - images[1]).abs().max() < 1e-4


@torch.no_grad()
def test_what_fails_while_it_is_recorded_fails_for_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, t, plain = network(), torch.randn(2, 1, 8, 8), torch.zeros(2), UNet.forward
    run, calls = repeated(net), []

    def forward(self: UNet, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return plain(self, *args)

    monkeypatch.setattr(UNet, "forward", forward)
    expected = run(x, t)
    with pytest.raises(MemoryError, match="no room"):
        run(x, t)
    assert not torch._C._len_torch_dispatch_stack()
    assert all(torch.equal(run(x, t), expected) for _ in range(3)) and len(calls) == 3


@torch.no_grad()
def test_conditions_are_read_each_time() -> None:
    net, y = network(num_classes=3).eval(), torch.tensor([0, 1])
    run = Repeated(net, lambda x, t, y: net(x, t, y), True, Table(), ())
    x, t = torch.randn(2, 1, 8, 8), torch.zeros(2)
    for label in (0, 0, 0, 1, 2):
        y.fill_(label)
        assert torch.equal(run(x, t, y), net(x, t, y))


@torch.no_grad()
def test_another_threads_work_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, recordings: list[Any], replays: list[int]
) -> None:
    """Whose kernels run while this one records."""
    pytest.importorskip("ddpm_fast._C")
    net, other = network(**WIDE), network(**WIDE)
    x, t, plain = torch.randn(2, 1, 8, 8), torch.zeros(2), UNet._forward
    alone = repeated(net)
    expected = [alone(x, t) for _ in range(3)]
    with ThreadPoolExecutor(1) as pool:

        def forward(self: UNet, *args: Any) -> Tensor:
            if self is net:
                pool.submit(torch.no_grad()(lambda: other(x + 1, t))).result()
            return plain(self, *args)

        monkeypatch.setattr(UNet, "_forward", forward)
        run = repeated(net)
        results = [run(x, t) for _ in range(4)]
    assert all(torch.equal(expected[0], y) for y in results) and replays == [1, 2]
    assert len(recordings[0]._lines) == len(recordings[1]._lines) > 0
