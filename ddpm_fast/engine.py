"""The denoising loop: runs any plan, eagerly or by a recorded step, and never waits for the device by itself."""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .chain import Chain, CorrectedChain, Correction, Network, OnStep, Predictor, RecordedChain, told_by
from .footprint import Footprint, NotRecorded, switches
from .graphs import Graphs, possible
from .models.made import in_use
from .ops import X_T, NoiseState
from .ops import _checks as checks
from .ops import noise as draw_noise
from .samplers import Plan
from .tape import Repeated

# How a chain may run, by the name that a table has for it: steps in a recording, 0 without. The first is the rule.
WAYS = {"graph": 1, "graph8": 8, "graph32": 32, "eager": 0}
ROOM = 1024  # rows that a recorded step has room for, at least: one recording for a thousand steps and for fifty
WORTH = 16  # steps from which on a recording pays, which itself takes about eight

# For a part of the batch: its x_T, and where the noise of its steps comes from (None: torch's generator).
Start = Callable[[slice], tuple[Tensor, NoiseState | None]]


def _given(noise: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if noise is not None:
        checks.tensor("noise", noise, shape=shape)
        if noise.is_meta and device.type != "meta":
            raise ValueError(f"noise must hold numbers, got {checks.text(noise)}")
        noise = noise.detach().to(device, dtype)
    return noise


def philox_start(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    first_index: int = 0,
    noise: Tensor | None = None,
) -> Start:
    """Chains whose image i depends on `seed` and `first_index` + i alone; x_T is `noise` where that is given."""
    noise = _given(noise, shape, dtype, device)
    seed = checks.integer("seed", seed, -(2**63), 2**64 - 1)
    first_index = checks.integer("first_index", first_index, 0, 2**56 - shape[0])

    def start(part: slice) -> tuple[Tensor, NoiseState]:
        state = NoiseState.at(seed, 0, first_index + part.start, device)
        if noise is not None:
            return noise[part].clone(), state
        return draw_noise((part.stop - part.start, *shape[1:]), state, X_T, dtype=dtype), state

    return start


def torch_start(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, noise: Tensor | None = None) -> Start:
    """A chain that draws from torch's generator: x_T first, for the whole batch."""
    noise = _given(noise, shape, dtype, device)
    x = torch.randn(shape, dtype=dtype, device=device) if noise is None else noise
    return lambda part: (x[part].clone(), None)


class _Users:
    """Who has a model in eval mode: threads, each as often as it entered; and the modules that the last one to leave
    puts back into training mode."""

    def __init__(self) -> None:
        self.threads: Counter[int] = Counter()
        self.training: list[nn.Module] = []


_USERS: WeakKeyDictionary[nn.Module, _Users] = WeakKeyDictionary()
_ENTERING = Lock()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode and without gradients; afterwards every module is in the mode it was in, once no other
    thread needs it in eval mode."""
    with _ENTERING:
        users, me = _USERS.setdefault(model, _Users()), get_ident()
        users.threads[me] += 1
        training = [m for m in model.modules() if m.training]
    try:
        if training:
            model.eval()
        with torch.no_grad(), _cast_once(model):
            yield model
    finally:
        with _ENTERING:
            users.threads -= Counter([me])
            if users.threads and me not in users.threads:
                users.training += training
                training = []
            elif not users.threads:
                training += users.training
                users.training = []
            for module in training:
                module.training = True


@contextmanager
def _cast_once(model: nn.Module) -> Iterator[None]:
    """Under autocast, cast each weight once for the whole chain and not in every step.

    Autocast keeps only casts of what requires gradients, which the weights of an average do not.
    """
    first = next(model.parameters(), None)
    if first is None or not torch.is_autocast_enabled(first.device.type):
        yield
        return
    frozen = [p for p in model.parameters() if p.is_floating_point() and not (p.requires_grad or p.is_inference())]
    torch.clear_autocast_cache()  # the weights may have changed since the caller's autocast began
    for p in frozen:
        p.requires_grad = True
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad = False
        torch.clear_autocast_cache()  # the weights may change before the caller's autocast ends


@torch.no_grad()
def denoise(
    network: Network,
    x: Tensor,
    plan: Plan,
    noise: NoiseState | None = None,
    on_step: OnStep | None = None,
    *,
    graphs: Graphs | None = None,
    engine: str = "eager",
    corrections: Sequence[Correction] = (),
) -> Tensor:
    """Take x through every row of a plan; x, plan and noise as in Chain.

    Args:
        network: what predicts; told t as `plan.timesteps` gives it, one per image.
        on_step: called with (k, x) after row k; x is the loop's own tensor, to be read and not kept.
        graphs: where recorded steps are kept.
        engine: "eager", "graph" to replay a recorded step wherever one can be made, or "auto": where it also pays.
        corrections: functions of (x0_hat, now) that change x0_hat in each step, one after the other; then no step is
            recorded as a graph.

    Returns:
        x after the last row.
    """
    if corrections:
        chain: Chain = CorrectedChain(x, plan, noise, corrections)
    else:
        chain = Chain(x, plan, noise, told_by(network, plan.timesteps(x.device)))
    by_graph = possible(x.device) or engine == "graph" and not x.is_cpu
    if graphs is not None and engine != "eager" and by_graph:
        try:
            if corrections:
                raise NotRecorded("what corrects x0_hat is Python, which must run in every step")
            recorded = _recorded(network, chain, graphs, engine)
            if recorded is not None:
                with graphs.alone():
                    return recorded.run(chain, cast(Predictor, network), on_step)
        except NotRecorded as why:
            graphs.tell(why, engine == "graph")
    # Rows whose noise torch's generator draws; a plan lies on the host.
    drawn = (plan.column("c_z") != 0).tolist() if noise is None else [False] * len(plan)
    if not by_graph and (engine == "graph" or engine == "auto" and len(plan) >= WORTH):
        try:
            network = repeated(network, chain, alone=on_step is None and not corrections)
        except NotRecorded as why:
            if graphs is not None:
                graphs.tell(why, engine == "graph")
    for k, draws in enumerate(drawn):
        z = torch.randn(x.shape, dtype=x.dtype, device=x.device) if draws else None
        chain.step(network, z)
        if on_step is not None:
            on_step(k, x)
    return x


def repeated(network: Network, chain: Chain, alone: bool) -> Predictor:
    """The network, whose second call in such a chain on a CPU is recorded, if none was before.

    Raises:
        NotRecorded: it may do something else in each call.
    """
    by = copy.copy(known(network))
    strides = [None if i is None else i.stride() for i in by.inputs]
    key = *_kind(by, chain), *strides
    by.call = Repeated(cast(nn.Module, by.model), by.call, alone, in_use(), key)
    return by


def _kind(network: Predictor, chain: Chain) -> tuple[Hashable, ...]:
    """What tells apart calls of a network in chains: what kind of tensors it is given."""
    x, told = chain.x, chain.told
    given = *(None if i is None else (tuple(i.shape), i.dtype) for i in network.inputs), network.guided
    return tuple(x.shape), x.stride(), x.dtype, tuple(told.shape[1:]), told.dtype, given


def known(network: Network) -> Predictor:
    """The network, if it is known what it looks at.

    Raises:
        NotRecorded: it isn't.
    """
    if not isinstance(network, Predictor) or network.model is None:
        raise NotRecorded("what this network looks at is not known")
    return network


def fastest_way(model: nn.Module, x: Tensor) -> str:
    """The name in WAYS that the committed table of this GPU has for a network's size and a batch's; else the rule."""
    rule = next(iter(WAYS))
    if x.device.type != "cuda":
        return rule
    from .kernels.lookup import committed  # no kernel is loaded before it is used

    parameters = sum(p.numel() for p in model.parameters())
    found = committed(torch.cuda.get_device_name(x.device)).get("engine", {}).get(key_of(parameters, x.numel()), rule)
    return found if found in WAYS else rule


def key_of(parameters: int, numbers: int) -> str:
    """Under which a table has the way for a network of so many parameters and a batch of so many numbers."""
    return "x".join(str(1 << max(0, size - 1).bit_length()) for size in (parameters, numbers))


def _recorded(network: Network, chain: Chain, graphs: Graphs, engine: str) -> RecordedChain | None:
    """The recorded step for such a chain, recorded now where there is none; None where that isn't worth it.

    Raises:
        NotRecorded: and why.
    """
    x, steps = chain.x, len(chain.rows)
    if chain.kind.noisy and chain.noise is None:
        raise NotRecorded("the noise comes from torch's generator, in the original code's order")
    network = known(network)
    model = cast(nn.Module, network.model)
    unroll = WAYS[fastest_way(model, x)]
    if engine == "auto" and not unroll:
        raise NotRecorded("it would be slower here")
    unroll = max(1, unroll)
    room = max(ROOM, 1 << (steps - 1).bit_length())
    key = (id(model), chain.kind, *_kind(network, chain), room, unroll, *switches(x.device))
    due = engine == "graph" or steps >= WORTH
    made: RecordedChain | None = graphs.get(
        key,
        lambda: Footprint(model),
        x.device,
        lambda recorder: RecordedChain(recorder, network, chain, room, unroll),
        lambda _: due,
    )
    return made
