"""A training step recorded as one CUDA graph: what it looks at, and how it is replayed."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion import Diffusion
from ..footprint import Footprint, NotRecorded
from ..graphs import Recorder

if TYPE_CHECKING:
    from .step import TrainStep

# What a subclass may not bring along, as it is Python to be run every time.
RECORDED = (
    *("forward", "at", "get_losses", "perturb_x", "_loss", "_call", "noise_state", "count_call"),
    *("_timesteps", "_levels", "_dropped", "_null", "_bound", "log_variance", "posterior"),
    *("update_ema", "ema_move", "move_ema"),
)


def hooked(diffusion: Diffusion) -> bool:
    """Whether a weight has hooks."""
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in diffusion.model.parameters())


def look(
    diffusion: Diffusion, optimizer: torch.optim.Optimizer, observer: Callable[[Tensor, Tensor], None] | None
) -> Footprint:
    """What a recorded step looks at; `observer` is the one that may be recorded.

    Raises:
        NotRecorded: some of it is Python to be run in every step.
    """
    if diffusion.rng != "philox":
        raise NotRecorded("the noise comes from torch's generator, in the original code's order")
    for name in RECORDED:
        if getattr(type(diffusion), name) is not getattr(Diffusion, name) or name in vars(diffusion):
            raise NotRecorded(f"{type(diffusion).__name__}.{name} must run every time")
    if getattr(diffusion, "_compiled_call_impl", None) is not None:
        raise NotRecorded("diffusion was compiled")
    if diffusion.observer is not None and diffusion.observer != observer:
        raise NotRecorded("diffusion.observer must run every time")
    if hooked(diffusion):
        raise NotRecorded("hooks of parameters must run every time")
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    if any(hooks):
        raise NotRecorded("hooks of the optimizer must run every time")
    scheduled = vars(optimizer).get("step")  # as a learning rate scheduler wraps it
    own_step = scheduled is not None and not hasattr(scheduled, "_wrapped_by_lr_sched")
    if own_step or not type(optimizer).__module__.startswith("torch.optim."):
        raise NotRecorded(f"{type(optimizer).__name__}.step must run every time")
    if not all(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
        raise NotRecorded("the optimizer counts on the host: make it with fused=True or capturable=True")
    whole = vars(optimizer), vars(optimizer).keys() - {"state", "param_groups"}
    groups = [(group, ("lr", "initial_lr")) for group in optimizer.param_groups]
    others = [(table, ()) for table in (vars(diffusion.ema), *hooks, optimizer.state, *optimizer.state.values())]
    return Footprint(diffusion, tables=(*groups, whole, *others))


@contextmanager
def rounded(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """With learning rates in float32, which is what recorded steps, that come after these, read."""
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = float(np.float32(group["lr"])) if isinstance(group["lr"], float) else group["lr"]
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr


class RecordedStep:
    """A step recorded for batches of one shape and one way of moving the average.

    Args:
        recorder: what records.
        step: what is recorded.
        x, given: a batch like those to come, and its y and cond.
        move: of `ema_model`.
    """

    def __init__(self, recorder: Recorder, step: "TrainStep", x: Tensor, given: tuple[Tensor | None, ...], move: str):
        diffusion, groups = step.diffusion, step.optimizer.param_groups
        self.step, self.x = step, torch.empty_like(x)
        self.given = tuple(None if v is None else torch.zeros_like(v) for v in given)
        self.state = diffusion.noise_state(0, x.device)
        self.seed, self.calls = diffusion.seed, 0  # what the state holds, as the host knows
        rates = [torch.zeros((), device=x.device) for _ in groups]
        self.rates: list[tuple[dict[str, Any], Tensor, object]] = [
            (g, r, None) for g, r in zip(groups, rates, strict=True)
        ]
        before, states = [dict(group) for group in groups], len(step.optimizer.state)
        step.optimizer.zero_grad()  # whose memory the capture may need
        torch.clear_autocast_cache()
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
                if "capturable" in group:
                    group["capturable"] = True
            self.recording = recorder.record(lambda: self._work(move))
        finally:
            torch.clear_autocast_cache()  # its tensors lie in the recording's memory
            for group, values in zip(groups, before, strict=True):
                group.update(values)
        if len(step.optimizer.state) != states:
            raise RuntimeError("the optimizer has made new state")  # which each replay would make anew
        self.grads = [(p, p.grad) for p in diffusion.model.parameters() if p.grad is not None]

    def __repr__(self) -> str:
        kind = str(self.x.dtype).removeprefix("torch.")
        return f"training step on {kind} {list(self.x.shape)}: {self.recording.num_bytes / 2**20:.0f} MiB"

    def _work(self, move: str) -> None:
        self.step.work(self.x, self.given, self._forward)
        self.step.diffusion.move_ema(move)

    def _forward(self, x: Tensor, given: tuple[Tensor | None, ...]) -> Tensor:
        self.state.draw.add_(1)
        y, cond = given
        return self.step.diffusion.at(self.state, x, y, cond=cond)

    def run(self, x: Tensor, given: tuple[Tensor | None, ...]) -> None:
        """Do the step on this batch, and count it."""
        diffusion = self.step.diffusion
        self.x.copy_(x)
        for ours, theirs in zip(self.given, given, strict=True):
            if ours is not None and theirs is not None:
                ours.copy_(theirs)
        for i, (group, rate, known) in enumerate(self.rates):
            if group["lr"] is not known:
                rate.fill_(group["lr"])
                self.rates[i] = group, rate, group["lr"] if isinstance(group["lr"], float) else None
        if diffusion.calls != self.calls:
            self.state.draw.fill_(diffusion.calls)
        if diffusion.seed != self.seed:
            self.seed = diffusion.seed
            self.state.seed.copy_(diffusion.noise_state(0, self.x.device).seed)
        self.recording.replay()
        self.calls = diffusion.calls = diffusion.calls + self.step.accumulate
        diffusion.step += 1
        last = self.step.last and self.step.last()
        if last is not self or self.grads[0][0].grad is not self.grads[0][1]:
            self.step.optimizer.zero_grad()
            for p, grad in self.grads:
                p.grad = grad
            self.step.last = weakref.ref(self)
