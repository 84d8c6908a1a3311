"""A plan under way: its tensors, one step of it, and that step recorded once for all plans of its kind."""

import copy
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .graphs import Recorder
from .ops import NoiseState
from .ops.sampler_step import OP as SAMPLER_STEP
from .samplers import Plan

Network = Callable[[Tensor, Tensor], Tensor]  # (x [N, ...], t [N]) -> model_out [N, ...]
OnStep = Callable[[int, Tensor], None]


class Predictor:
    """A module as a network that the engine may record, and tell more of a step than t.

    Args:
        model: what must not change while a recording of it is in use. Where its class has `embed_steps`, and that
            returns rows [S, E] for t [S] and not None, the network is told its row [1, E] in place of t [N].
        call: (x, t or row, y) -> model_out.
        y: the labels of the chain's images, [N].
    """

    def __init__(
        self, model: nn.Module, call: Callable[[Tensor, Tensor, Tensor | None], Tensor], y: Tensor | None = None
    ):
        self.model, self.call, self.y = model, call, y

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.call(x, t, self.y)


def told_by(network: Network, t: Tensor) -> Tensor:
    """What the network is told of each step, [S] or [S, E]."""
    embed = getattr(type(network.model), "embed_steps", None) if isinstance(network, Predictor) else None
    rows: Tensor | None = None if embed is None else embed(network.model, t)  # type: ignore[attr-defined]
    return t if rows is None else rows


class Kind(NamedTuple):
    """What the steps of a plan consist of. What no row uses is left out of every step."""

    scaled: bool  # c_in
    history: bool  # c_h
    noisy: bool  # c_z
    clip: float | None

    @classmethod
    def of(cls, plan: Plan) -> "Kind":
        """Read on the host, once."""

        def used(name: str, absent: float) -> bool:
            return bool((plan.column(name) != absent).any())

        return cls(used("c_in", 1), used("c_h", 0), used("c_z", 0), plan.clip)


class Chain:
    """A plan under way: all that a step reads and writes, on the device of x.

    Args:
        x: [N, ...], where the chain starts; overwritten by each step.
        plan: the sampler.
        noise: seed and first sample of the steps' noise, which row k draws at draw k; without it, torch's generator.
        told: what the network is told of each step: t [S], or rows [S, E]; by default the plan's t.
    """

    def __init__(self, x: Tensor, plan: Plan, noise: NoiseState | None = None, told: Tensor | None = None):
        self.x, self.kind = x, Kind.of(plan)
        self.rows = plan.rows.to(x.device, x.dtype)
        self.told = plan.timesteps(x.device) if told is None else told
        self.k = torch.zeros((), dtype=torch.int64, device=x.device)
        self.hist = torch.zeros_like(x) if self.kind.history else None
        self.noise = noise._replace(draw=self.k) if noise is not None and self.kind.noisy else None

    def step(self, network: Network, z: Tensor | None = None) -> None:
        """Row k, then k + 1. Nothing here depends on the host's idea of k: one recorded step serves all rows."""
        x, row = self.x, self.k.reshape(1)
        model_in = x * self.rows[:, 1].index_select(0, row) if self.kind.scaled else x
        told = self.told.index_select(0, row)
        model_out = network(model_in, told.repeat(x.shape[0]) if told.ndim == 1 else told)
        noise, keeps = self.noise if z is None else z, self.hist is not None
        # Unchecked: a chain's arguments are right by construction.
        SAMPLER_STEP.unchecked(
            x, model_out, self.rows, self.k, noise, self.hist, None, self.kind.clip, keeps, x, self.hist
        )
        self.k += 1


class RecordedChain:
    """A chain whose step was recorded, for any plan of its kind with at most as many rows as there is room for.

    Args:
        recorder: what records.
        network: what predicts.
        chain: one like those to come; only its shapes matter.
        room: rows of a plan.
        unroll: steps in a recording; what is left of a chain takes one at a time.
    """

    def __init__(self, recorder: Recorder, network: Predictor, chain: Chain, room: int, unroll: int = 1):
        self.unroll, x = unroll, chain.x
        self.network = Predictor(network.model, network.call, None if network.y is None else network.y.clone())
        self.chain = chain = copy.copy(chain)
        chain.x, chain.k = torch.zeros_like(x), torch.zeros_like(chain.k)
        chain.hist = None if chain.hist is None else torch.zeros_like(x)
        chain.rows, chain.told = (v.new_zeros((room, *v.shape[1:])) for v in (chain.rows, chain.told))
        if chain.noise is not None:
            chain.noise = NoiseState(chain.noise.seed.clone(), chain.k, torch.zeros_like(chain.k))
        recorder.warm_up(self._one)
        torch.clear_autocast_cache()
        try:
            self.first = self.next = recorder.record(self._one)
            if torch.is_autocast_enabled(x.device.type):  # then the first step casts the weights, for all to come
                self.next = recorder.record(self._one)
            self.several = recorder.record(self._several) if unroll > 1 else None
        finally:
            torch.clear_autocast_cache()  # its tensors lie in the recordings' memory, which is used again

    def __repr__(self) -> str:
        size = sum(part.num_bytes for part in {self.first, self.next, self.several} if part is not None) / 2**20
        x = self.chain.x
        name = type(self.network.model).__name__
        kind = str(x.dtype).removeprefix("torch.")
        return f"{name} on {kind} {list(x.shape)}, plans of up to {len(self.chain.rows)} steps: {size:.0f} MiB"

    def _one(self) -> None:
        self.chain.step(self.network)

    def _several(self) -> None:
        for _ in range(self.unroll):
            self._one()

    def run(self, start: Chain, network: Predictor, on_step: OnStep | None) -> Tensor:
        """Take the chain `start` through its rows; returns x after the last one."""
        chain, steps = self.chain, len(start.rows)
        chain.x.copy_(start.x)
        chain.rows[:steps].copy_(start.rows)
        chain.told[:steps].copy_(start.told)
        chain.k.zero_()
        if chain.hist is not None:
            chain.hist.zero_()
        if self.network.y is not None and network.y is not None:
            self.network.y.copy_(network.y)
        if chain.noise is not None and start.noise is not None:
            chain.noise.seed.copy_(start.noise.seed)
            cast(Tensor, chain.noise.first_sample).fill_(start.noise.first_sample)
        k = 0
        while k < steps:
            several = self.several if k and on_step is None and steps - k >= self.unroll else None
            (several or (self.next if k else self.first)).replay()
            k += self.unroll if several else 1
            if on_step is not None:
                on_step(k - 1, chain.x)
        return start.x.copy_(chain.x)
