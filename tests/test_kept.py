"""What chains on a CPU keep for those to come: weights laid out, and recorded calls; and what they must notice."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from recordings import network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ddpm_fast
from ddpm_fast import Diffusion, UNet, generate_linear_schedule, ops, tape
from ddpm_fast.graphs import Graphs
from ddpm_fast.models import made
from ddpm_fast.models.weights import Prepared

pytest.importorskip("ddpm_fast._C")

STEPS = 16
BETAS = generate_linear_schedule(STEPS, 1e-2, 0.3)
WIDE = {"base_channels": 64, "num_groups": 32}  # where convolutions are ours


class Work:
    """How much was made of weights, and how many calls were recorded, since the last look."""

    def __init__(self) -> None:
        self.prepared = self.recorded = 0

    def done(self) -> tuple[bool, int]:
        """Whether any weight was prepared, and how many recordings were made."""
        seen = self.prepared > 0, self.recorded
        self.prepared = self.recorded = 0
        return seen


NOTHING = (False, 0)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    count, prepare, replay = Work(), Prepared.__init__, tape._Recording.replay

    def counted(self: Any, *args: Any, **more: Any) -> None:
        count.prepared += 1
        prepare(self, *args, **more)

    def recorded(self: Any, result: Tensor) -> Any:
        count.recorded += 1
        return replay(self, result)

    monkeypatch.setattr(Prepared, "__init__", counted)
    monkeypatch.setattr(tape._Recording, "replay", recorded)
    return count


def diffusion_of(net: nn.Module, **options: Any) -> Diffusion:
    torch.manual_seed(0)
    return Diffusion(net, (8, 8), 1, options.pop("num_classes", None), BETAS, **options)


def sampled(diffusion: Diffusion, size: int = 2, seed: int = 1, **options: Any) -> Tensor:
    return diffusion.sample(size, "cpu", use_ema=False, seed=seed, **options)


def as_anew(diffusion: Diffusion, **options: Any) -> Tensor:
    """What a Diffusion draws that has kept nothing."""
    other = diffusion_of(diffusion.model, num_classes=diffusion.num_classes, label_dropout=diffusion.label_dropout)
    other.exact = diffusion.exact
    return sampled(other, **options)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("options", [{}, WIDE, WIDE | {"fused": False}, {"norm": "bn"}], ids=str)
def test_the_next_chain_does_nothing_again(options: dict[str, Any], bf16: bool, work: Work) -> None:
    diffusion = diffusion_of(network(**options))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for seed in (1, 2):
            images = sampled(diffusion, seed=seed)
            assert work.done()[1] == (seed == 1)
            assert torch.equal(images, as_anew(diffusion, seed=seed)) and work.done()[1] == 1
            size = len(diffusion.graphs.made)
        assert sampled(diffusion, sampler="ddim", num_steps=8).shape == (2, 1, 8, 8)
    assert work.done()[1] == 0 and len(diffusion.graphs.made) == size


def test_other_conditions(work: Work) -> None:
    """Which a recording reads, and does not remember."""
    diffusion = diffusion_of(network(num_classes=4, **WIDE), num_classes=3, label_dropout=0.1)
    for y in (torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor(2).expand(2)):
        for guidance in (None, 2.0):
            images = sampled(diffusion, y=y, guidance=guidance)
            done = work.done()
            assert torch.equal(images, as_anew(diffusion, y=y, guidance=guidance))
            work.done()
    assert done == NOTHING and len(diffusion.graphs) > 1


def image_conditions(net: nn.Module) -> Diffusion:
    return diffusion_of(net, cond_channels=2)


def test_other_image_conditions(work: Work) -> None:
    net = network(img_channels=3, out_channels=1, **WIDE)
    diffusion = image_conditions(net)
    for _ in range(3):
        last = torch.randn(2, 2, 8, 8).contiguous(memory_format=torch.channels_last)
        for cond in (torch.randn(2, 2, 8, 8), torch.randn(1, 2, 8, 8).expand(2, -1, -1, -1), last):
            images = sampled(diffusion, cond=cond)
            done = work.done()
            assert torch.equal(images, sampled(image_conditions(net), cond=cond))
            work.done()
    assert done == NOTHING


NAMES = ["time_mlp.1.weight", "init_conv.bias", "downs.0.class_bias.weight", "downs.1.downsample.weight"]
NAMES += [f"mid.0.{name}" for name in ("norm_1.weight", "conv_1.weight", "time_bias.bias", "conv_2.1.bias")]
NAMES += [f"mid.0.attention.{name}" for name in ("norm.bias", "to_qkv.weight", "to_out.bias")]
NAMES += ["ups.2.upsample.1.weight", "ups.4.residual_connection.weight", "out_norm.bias", "out_conv.weight"]


# On the plain path autocast alone keeps anything, and treats all weights alike.
CASTS = [(name, True, False) for name in NAMES[::4]]
CASTS += [pytest.param(name, True, False, marks=pytest.mark.minutes) for name in NAMES if name not in NAMES[::4]]


@pytest.mark.parametrize(
    ("name", "bf16", "fused"), [(name, bf16, None) for name in NAMES for bf16 in (False, True)] + CASTS
)
def test_a_weight_that_is_written_past_torchs_counters(name: str, bf16: bool, fused: bool | None) -> None:
    """Also those that nothing was made of, which autocast casts once for a recording."""
    net, y = network(num_classes=3, fused=fused, **WIDE), torch.tensor([0, 2])
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    diffusion = diffusion_of(net, num_classes=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        before = sampled(diffusion, y=y)
        diffusion.model.get_parameter(name).data.numpy()[:] *= -1.5
        images = sampled(diffusion, y=y)
        assert torch.equal(images, as_anew(diffusion, y=y)) and not torch.equal(images, before)


def test_numbers_that_no_digest_is_taken_of() -> None:
    diffusion = diffusion_of(network(**WIDE).half())
    for _ in range(3):
        assert torch.equal(sampled(diffusion), as_anew(diffusion))
        diffusion.model.mid[0].conv_1.weight.data.mul_(1.5)


def moved(net: UNet) -> None:
    net.out_conv.weight.data = net.out_conv.weight.data.clone()


def swapped(net: UNet) -> None:
    net.out_conv.weight.data = 2 * net.out_conv.weight.data


def replaced(net: UNet) -> None:
    net.mid[0].conv_1 = copy.deepcopy(net.mid[0].conv_1)
    net.mid[0].conv_1.weight.data.mul_(2)


def hooked(net: UNet) -> None:
    net.mid[0].register_forward_hook(lambda module, args, out: 2 * out)


CHANGES: dict[str, Callable[[UNet], Any]] = {
    "loaded": lambda net: net.load_state_dict({k: 1.5 * v for k, v in net.state_dict().items()}),
    "assigned": lambda net: net.load_state_dict({k: 1.5 * v for k, v in net.state_dict().items()}, assign=True),
    "moved": moved,
    "swapped": swapped,
    "replaced": replaced,
    "hooked": hooked,
    "the plain path": lambda net: setattr(net, "fused", False),
    "a parameter of another": lambda net: setattr(net.out_conv, "bias", nn.Parameter(torch.ones(1))),
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "float64": lambda net: net.double(),
    "activation": lambda net: setattr(net, "activation", torch.relu),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_between_chains(change: Callable[[UNet], Any]) -> None:
    diffusion = diffusion_of(network(**WIDE))
    for _ in range(2):
        sampled(diffusion)
    change(diffusion.model)
    for _ in range(2):
        assert torch.equal(sampled(diffusion), as_anew(diffusion))


def threaded() -> Any:
    torch.set_num_threads(1)
    return nullcontext()


SETTINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "exact": ops.exact_convolutions,
    "another backend": lambda: ops.use_backend("reference"),
    "native": lambda: ops.use_backend("native"),
    "another number of threads": threaded,
    "inference mode": torch.inference_mode,
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_other_settings(setting: Callable[[], Any], threads: None) -> None:
    diffusion = diffusion_of(network(**WIDE))
    first = sampled(diffusion)
    with setting():
        for _ in range(2):
            assert torch.equal(sampled(diffusion), as_anew(diffusion))
    torch.set_num_threads(max(2, torch.get_num_threads()))
    assert torch.equal(sampled(diffusion), as_anew(diffusion)) and torch.allclose(sampled(diffusion), first, atol=1e-4)


def test_exact_chains_and_others() -> None:
    diffusion = diffusion_of(network(**WIDE))
    for diffusion.exact in (False, True, False):
        assert torch.equal(sampled(diffusion), as_anew(diffusion))


def test_a_forward_that_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion, plain = diffusion_of(network()), UNet.forward
    before = sampled(diffusion)
    monkeypatch.setattr(UNet, "forward", lambda self, *args: 1.5 * plain(self, *args))
    images = sampled(diffusion)
    assert torch.equal(images, as_anew(diffusion)) and not torch.equal(images, before)


def test_chains_within_a_chain_and_in_threads(work: Work) -> None:
    """They can't share the memory of a recording."""
    diffusion = diffusion_of(network(**WIDE)).eval()
    expected, inner = sampled(diffusion), []
    drawn = lambda k, x: inner.append(sampled(diffusion)) if k % 5 == 0 else None  # noqa: E731
    assert torch.equal(sampled(diffusion, callback=drawn), expected)
    assert len(inner) == 4 and all(torch.equal(images, expected) for images in inner)
    with ThreadPoolExecutor(3) as pool:
        for images in pool.map(lambda _: sampled(diffusion), range(6)):
            assert torch.equal(images, expected)


@pytest.mark.parametrize(
    ("bf16", "fused"), [(False, None), (True, None), pytest.param(True, False, marks=pytest.mark.minutes)]
)
def test_a_callback_that_trains(bf16: bool, fused: bool | None, work: Work) -> None:
    """What it changes counts from its step on, or where torch counts no change from the next chain on."""

    def smaller(net: nn.Module, by_data: bool, at: int) -> Any:
        def callback(k: int, x: Tensor) -> None:
            if k == at:
                for weight in net.parameters():
                    (weight.data if by_data else weight.detach()).mul_(0.9)

        return callback

    for by_data, at, before in ((False, 7, False), (False, 0, True), (True, 0, False), (True, 7, True)):
        diffusion = diffusion_of(network(fused=fused, **WIDE))
        other = Diffusion(copy.deepcopy(diffusion.model), (8, 8), 1, None, BETAS, engine="eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if before:
                sampled(diffusion)
            images = [sampled(d, callback=smaller(d.model, by_data, at)) for d in (diffusion, other)]
            assert by_data or bf16 or torch.equal(*images)
            work.done()
            for _ in range(2):
                images = [sampled(diffusion)]
                assert by_data or work.done() == NOTHING
                assert torch.equal(images[0], as_anew(diffusion))
                work.done()


def test_an_error_in_a_chain() -> None:
    diffusion = diffusion_of(network(**WIDE))
    expected = sampled(diffusion)
    with pytest.raises(KeyError):
        sampled(diffusion, callback=lambda k, x: {}[k])
    assert torch.equal(sampled(diffusion), expected)


def test_whose_memory_it_is(work: Work) -> None:
    diffusion = diffusion_of(network(**WIDE))
    kept = lambda: len(diffusion.graphs.made) + len(diffusion.graphs)  # noqa: E731
    sampled(diffusion)
    shown = repr(diffusion.graphs)
    assert "\n  UNet on float32 [2, 1, 8, 8]: " in shown and "\n  made of weights: " in shown and "MiB" in shown
    weights = sum(p.nbytes for p in diffusion.model.parameters())
    assert 0.5 * weights < diffusion.graphs.made.num_bytes() < 5 * weights
    for other in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert not len(other.graphs.made) + len(other.graphs)
    for release in (diffusion.graphs.clear, diffusion.float, lambda: diffusion(torch.randn(2, 1, 8, 8))):
        work.done()
        sampled(diffusion)
        assert kept() and work.done()[1] <= 1
        release()
        assert not kept(), "a move, and training, release it"
    diffusion.eval()
    sampled(diffusion)
    diffusion(torch.randn(2, 1, 8, 8))
    assert kept(), "a loss that is only looked at doesn't"


def test_it_is_of_one_network(work: Work) -> None:
    diffusion = diffusion_of(network(**WIDE))
    diffusion.update_ema()
    sampled(diffusion)
    gc.collect()
    held = weakref.ref(next(iter(diffusion.graphs.made.values())).value)
    assert work.done()[1] == 1 and held() is not None
    diffusion.sample(2, "cpu", seed=1)
    assert work.done()[1] == 1 and held() is None


def test_nothing_is_kept_of_weights_that_are_gone() -> None:
    diffusion = diffusion_of(network(**WIDE))
    sizes = []
    for _ in range(3):
        sampled(diffusion)
        sizes.append((len(diffusion.graphs.made), diffusion.graphs.made.num_bytes()))
        diffusion.model.load_state_dict({k: v.clone() for k, v in diffusion.model.state_dict().items()}, assign=True)
    assert len(set(sizes)) == 1
    graphs, net = Graphs(), network()
    plan, held = diffusion.plan(), weakref.ref(net)
    ddpm_fast.sample(net, (2, 1, 8, 8), plan, seed=0, graphs=graphs)
    graphs.clear()
    del net
    gc.collect()
    assert held() is None


def test_casts_count_as_memory() -> None:
    diffusion = diffusion_of(network(fused=False, **WIDE))
    weights = sum(p.nbytes for p in diffusion.model.parameters() if p.ndim == 4)
    with torch.autocast("cpu", torch.bfloat16):
        sampled(diffusion)
    assert diffusion.graphs.made.num_bytes() > weights / 2


def test_who_wants_to_see_operators(work: Work) -> None:
    """Sees all of them, and leaves nothing of that behind."""
    diffusion, first = diffusion_of(network(**WIDE)), FlopCounterMode(display=False)
    with first:
        sampled(diffusion)
    assert not len(diffusion.graphs.made)
    expected = sampled(diffusion)
    with FlopCounterMode(display=False) as second:
        sampled(diffusion)
    assert first.get_total_flops() == second.get_total_flops() > 0
    work.done()
    assert torch.equal(sampled(diffusion), expected) and work.done() == NOTHING


def test_its_limits(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = diffusion_of(network())
    for size in range(1, made.MOST_RECORDED + 2):
        sampled(diffusion, size)
    assert len(diffusion.graphs) == 1 and len(diffusion.graphs.made) > 0
    monkeypatch.setattr(made, "MOST_KEPT", 1000)
    for callback, error in ((None, nullcontext()), (lambda k, x: {}[k], pytest.raises(KeyError))):
        with error:
            sampled(diffusion, made.MOST_RECORDED + 1, callback=callback)
        assert len(diffusion.graphs.made) == len(diffusion.graphs) == 0


def test_short_chains_are_as_before(work: Work) -> None:
    """The same call gives the same bits, whatever came before it."""
    diffusion = diffusion_of(network(**WIDE))
    short = sampled(diffusion, sampler="ddim", num_steps=4)
    sampled(diffusion)
    assert torch.equal(sampled(diffusion, sampler="ddim", num_steps=4), short)


def test_what_is_kept_for_any_callable(work: Work) -> None:
    net, graphs = network(**WIDE).eval(), Graphs()
    plan = diffusion_of(net).plan()
    draw = lambda call, graphs=None: ddpm_fast.sample(call, (2, 1, 8, 8), plan, seed=0, graphs=graphs)  # noqa: E731
    for call, recorded in ((net, 1), (net.forward, 0)):
        expected = draw(call)
        work.done()
        assert torch.equal(draw(call, graphs), expected) and work.done() == (True, recorded)
        assert torch.equal(draw(call, graphs), expected) and work.done() == NOTHING
