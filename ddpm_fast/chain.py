"""A plan under way: its tensors, one step of it, and that step recorded once for all plans of its kind."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .graphs import Recorder
from .models.made import fixed_weights
from .ops import NoiseState
from .ops import _checks as checks
from .ops.sampler_step import OP as SAMPLER_STEP
from .samplers import COLUMNS, Plan

Network = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, ...], t [N]) -> model_out [N, C, ...], or [N, 2 C, ...]
OnStep = Callable[[int, Tensor], None]


class Predictor:
    """A network and the conditions of a chain's images.

    Args:
        model: what must not change while a recording of it is in use. Where its class has `embed_steps`, and that
            returns rows [S, E] for t [S] and not None, the network is told its row [1, E] in place of t [N]. None for
            Python that must run in every step, and is told t itself.
        call: (x, t or row, *inputs) -> model_out.
        inputs: a condition each, [N, ...]; None where there is none.
        without: what stands for `inputs` in images without their condition, likewise. With it the network is called
            once for both: its result is [2 N, ...], those with the condition first.
    """

    def __init__(
        self,
        model: nn.Module | None,
        call: Callable[..., Tensor],
        inputs: Sequence[Tensor | None] = (),
        without: Sequence[Tensor | None] | None = None,
    ):
        self.model, self.call, self.inputs, self.guided = model, call, tuple(inputs), without is not None
        if without is not None:
            pairs = zip(self.inputs, without, strict=True)
            self.inputs = tuple(None if i is None or w is None else torch.cat([i, w]) for i, w in pairs)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.guided:
            x, t = torch.cat([x, x]), t if t.ndim == 2 else torch.cat([t, t])
        return self.call(x, t, *self.inputs)

    def of(self, images: Tensor) -> "Predictor":
        """The same for some of the images, by their places [M]."""
        some = copy.copy(self)
        if self.guided:
            whole = next(i.shape[0] for i in self.inputs if i is not None) // 2
            images = torch.cat([images, images + whole])
        some.inputs = tuple(None if i is None else i[images] for i in self.inputs)
        return some


class Now(NamedTuple):
    """Where a chain stands, for whoever corrects its x0_hat."""

    x: Tensor  # [N, ...] the state
    t: Tensor  # [N] what the network is told
    inputs: tuple[Tensor | None, ...]  # the conditions, as the network is given them
    a: Tensor | None  # [] x = a x_0 + s noise; None where the plan doesn't say
    s: Tensor | None  # []


Correction = Callable[[Tensor, Now], Tensor]  # (x0_hat [N, ...], now) -> x0_hat


def told_by(network: Network, t: Tensor) -> Tensor:
    """What the network is told of each step, [S] or [S, E]."""
    model = network.model if isinstance(network, Predictor) else None
    embed = getattr(type(model), "embed_steps", None)
    rows: Tensor | None = None if embed is None else embed(model, t)
    return t if rows is None else rows


def guided(prediction: Tensor, scale: Tensor, images: int) -> Tensor:
    """Of predictions with the condition and then without it, [2 N, ...]: those at `scale`, in its dtype.

    Raises:
        ValueError: there are not twice as many as `images`.
    """
    if prediction.shape[0] != 2 * images:
        raise ValueError("guidance needs a network that is called with the condition and without it")
    given, without = prediction.to(scale.dtype).chunk(2)
    return torch.lerp(without, given, scale)


def halves(model_out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """What is predicted, [N, C, ...], and the learned variance where the network returns that, too."""
    if model_out.ndim < 2 or model_out.shape[1] != 2 * channels:
        return model_out, None
    return model_out[:, :channels], model_out[:, channels:]


class Kind(NamedTuple):
    """What the steps of a plan consist of. What no row uses is left out of every step."""

    scaled: bool  # c_in
    history: bool  # c_h
    noisy: bool  # c_z
    clip: float | None
    learned: bool  # c_v
    guided: bool

    @classmethod
    def of(cls, plan: Plan) -> "Kind":
        """Read on the host, once."""

        def used(name: str, absent: float) -> bool:
            return bool((plan.column(name) != absent).any())

        noisy, guided = used("c_z", 0), plan.guidance is not None
        return cls(used("c_in", 1), used("c_h", 0), noisy, plan.clip, plan.learned and noisy, guided)


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
        columns = plan.rows if self.kind.learned else plan.rows[:, : len(COLUMNS)]
        self.rows = columns.to(x.device, x.dtype).contiguous()
        self.guidance = None if plan.guidance is None else plan.guidance.to(x.device, x.dtype)
        self.told = plan.timesteps(x.device) if told is None else told
        self.k = torch.zeros((), dtype=torch.int64, device=x.device)
        self.hist = torch.zeros_like(x) if self.kind.history else None
        self.noise = noise._replace(draw=self.k) if noise is not None and self.kind.noisy else None
        self.plain = not (self.kind.learned or self.kind.guided)  # a prediction is what the network returns

    def step(self, network: Network, z: Tensor | None = None) -> None:
        """Row k, then k + 1. Nothing here depends on the host's idea of k: one recorded step serves all rows."""
        x, row = self.x, self.k.reshape(1)
        model_in = x * self.rows[:, 1].index_select(0, row) if self.kind.scaled else x
        told = self.told.index_select(0, row)
        prediction = network(model_in, told.repeat(x.shape[0]) if told.ndim == 1 else told)
        variance = None
        if not self.plain or prediction.shape != x.shape:
            prediction, variance = self.predicted(prediction)
        noise, keeps = self.noise if z is None else z, self.hist is not None
        more = noise, self.hist, variance, self.kind.clip, keeps, x, self.hist
        SAMPLER_STEP.unchecked(x, prediction, self.rows, self.k, *more)  # right by construction
        self.k += 1

    def predicted(self, model_out: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction of row k, guided where the plan says so, and the variance where that is used."""
        images = self.x.shape[0]
        prediction, variance = halves(model_out, self.x.shape[1] if self.x.ndim > 1 else 0)
        if self.guidance is not None:
            prediction = guided(prediction, self.guidance.index_select(0, self.k.reshape(1)), images)
        if not self.kind.learned:
            return prediction, None
        if variance is None:
            raise ValueError(
                f"this plan has a learned variance, but the network returns {list(model_out.shape)} for an x of "
                f"{list(self.x.shape)}: it must return twice the channels"
            )
        # As far as the bounds: where steps skip timesteps they lie far apart, and far beyond them there is only noise.
        return prediction, variance[:images].clamp(-1, 1)


class CorrectedChain(Chain):
    """A chain whose x0_hat goes through Python functions in each step, before it is clipped."""

    def __init__(self, x: Tensor, plan: Plan, noise: NoiseState | None, corrections: Sequence[Correction]):
        super().__init__(x, plan, noise)
        self.corrections, self.plain = corrections, False
        self.rows = self.rows.clone()  # which may be the plan's
        self.p_x, self.p_m = self.rows[:, 2].clone(), self.rows[:, 3].clone()
        self.rows[:, 2], self.rows[:, 3] = 0.0, 1.0  # the step is given x0_hat itself
        abar = plan.abar
        self.levels = None if abar is None else torch.stack([abar.sqrt(), (1 - abar).sqrt()], 1).to(x.device, x.dtype)
        self.inputs: tuple[Tensor | None, ...] = ()

    def step(self, network: Network, z: Tensor | None = None) -> None:
        images = self.x.shape[0]
        given = network.inputs if isinstance(network, Predictor) else ()
        self.inputs = tuple(None if i is None else i[:images] for i in given)
        super().step(network, z)

    def predicted(self, model_out: Tensor) -> tuple[Tensor, Tensor | None]:
        prediction, variance = super().predicted(model_out)
        x, row = self.x, self.k.reshape(1)
        x0_hat = self.p_x.index_select(0, row) * x + self.p_m.index_select(0, row) * prediction.to(x.dtype)
        a, s = (None, None) if self.levels is None else self.levels.index_select(0, row)[0].unbind()
        now = Now(x, self.told.index_select(0, row).repeat(x.shape[0]), self.inputs, a, s)
        for correct in self.corrections:
            x0_hat = correct(x0_hat, now)
            checks.tensor("the result of a correction", x0_hat, shape=x.shape, device=x.device)
        return x0_hat, variance


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
        self.network = copy.copy(network)
        self.network.inputs = tuple(None if i is None else i.clone() for i in network.inputs)
        self.chain = chain = copy.copy(chain)
        chain.x, chain.k = torch.zeros_like(x), torch.zeros_like(chain.k)
        chain.hist = None if chain.hist is None else torch.zeros_like(x)
        chain.rows, chain.told = (v.new_zeros((room, *v.shape[1:])) for v in (chain.rows, chain.told))
        chain.guidance = None if chain.guidance is None else chain.guidance.new_zeros(room)
        if chain.noise is not None:
            chain.noise = NoiseState(chain.noise.seed.clone(), chain.k, torch.zeros_like(chain.k))
        with fixed_weights():
            recorder.warm_up(self._one)
        torch.clear_autocast_cache()
        try:
            # The first step casts weights and makes what follows from them, for all to come; both lie in the
            # recordings' memory, which is used again.
            with fixed_weights() as made:
                self.first = self.next = recorder.record(self._one)
                if made or torch.is_autocast_enabled(x.device.type):
                    self.next = recorder.record(self._one)
                self.several = recorder.record(self._several) if unroll > 1 else None
        finally:
            torch.clear_autocast_cache()

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
        if chain.guidance is not None and start.guidance is not None:
            chain.guidance[:steps].copy_(start.guidance)
        for ours, theirs in zip(self.network.inputs, network.inputs, strict=True):
            if ours is not None and theirs is not None:
                ours.copy_(theirs)
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
