"""One step of training as one call, and on a GPU as one CUDA graph."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..diffusion import Diffusion
from ..graphs import ENGINES, WARM_UPS, Footprint, Graphs, NotRecorded, Recorder, switches
from ..ops import _checks as checks

FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000  # of the loss in float16, as torch.amp has them
PATIENCE = 100  # steps after which what can't be recorded is tried again
DTYPES = (None, torch.bfloat16, torch.float16)

Observer = Callable[[Tensor, Tensor], None]
Check = Callable[[Tensor, Tensor], Tensor]


class TrainStep:
    """A whole step of training; `step(x, y)` leaves the weights that these lines of a script leave:

        for x_part, y_part in zip(x.chunk(accumulate), y.chunk(accumulate)):
            (diffusion(x_part, y_part) / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        diffusion.update_ema()

    On a GPU it is recorded as one CUDA graph after its first steps of a shape, and again whenever something that it
    looks at is replaced. What can't be recorded runs eagerly, and the reason is said once. The gradients stay in
    `p.grad` until the next step.

    Args:
        diffusion: to be trained, with rng="philox" to be recorded.
        optimizer: of the parameters of `diffusion.model`; recorded if made with `fused=True` or `capturable=True`. Its
            learning rates may be changed between steps; where steps are recorded they are float32.
        clip: largest norm of the gradient; None for no clipping.
        accumulate: parts in which a batch is gone through, one after the other.
        dtype: of autocast, torch.bfloat16 or torch.float16; None for that of the caller, or none. In float16 the loss
            is scaled, and a step whose gradient overflows changes no weights: the optimizer must be fused.
        engine: "auto" and "graph" record on a GPU ("graph" says so where it can't be), "eager" doesn't.
        observer: for `diffusion.observer`; is recorded: a replay repeats what it launches, and runs none of its Python.
        check: recorded as the observer; told the loss and the norm of the gradient before the optimizer's step, returns
            1 as float32 on the device if that must change nothing, else 0. It needs a fused optimizer.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None = None,
        accumulate: int = 1,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        observer: Observer | None = None,
        check: Check | None = None,
    ):
        if not isinstance(diffusion, Diffusion):
            raise TypeError(f"diffusion must be a Diffusion, got {checks.text(diffusion)}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {checks.text(optimizer)}")
        self.diffusion, self.optimizer, self.engine = diffusion, optimizer, engine
        self.clip = None if clip is None else checks.number("clip", clip, 0)
        self.accumulate = checks.integer("accumulate", accumulate, 1)
        self.dtype, self.observer, self.check = dtype, observer, check
        if observer is not None:
            diffusion.observer = observer
        checks.choice("engine", engine, ENGINES)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or None, got {checks.text(dtype)}")
        skips = all(group.get("fused") for group in optimizer.param_groups)
        if not skips and (dtype is torch.float16 or check is not None):
            reason = "dtype=torch.float16" if check is None else "check"
            raise ValueError(f"{reason} needs an optimizer that can leave out a step, such as Adam(..., fused=True)")
        device = diffusion.betas.device
        self.loss = torch.zeros((), device=device)  # of the last step
        self.scale = torch.full((), FIRST_SCALE, device=device) if dtype is torch.float16 else None  # of the loss
        self._growth = torch.zeros((), dtype=torch.int32, device=device)
        self.graphs = Graphs()  # recorded steps: print(graphs) lists them, graphs.clear() releases their memory
        self.last: RecordedStep | None = None  # whose gradients are in p.grad
        self._eager: Counter[Any] = Counter()  # steps of a kind that ran so

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Train on one batch.

        Args:
            x: [N, C, H, W], clean images in [-1, 1]; N divisible by `accumulate`.
            y: [N] int64, the classes of a conditional network.

        Returns:
            The loss [], on the device; nothing here waits for it.

        Raises:
            ValueError, TypeError: x or y does not fit.
        """
        checks.tensor("x", x)
        if x.ndim == 0 or x.shape[0] % self.accumulate:
            raise ValueError(f"x must have a batch that {self.accumulate} divides (accumulate), got {checks.text(x)}")
        device = self.loss.device
        if self.diffusion.betas.device != device:
            raise ValueError(f"diffusion was moved from {device}: make a new optimizer and TrainStep")
        x = x.to(device, non_blocking=True)
        y = y.to(device, non_blocking=True) if isinstance(y, Tensor) else y
        recorded = False if self.engine == "eager" else self._recorded(x, y)
        if isinstance(recorded, RecordedStep):
            recorded.run(x, y)
        else:
            self.last = None
            with rounded(self.optimizer) if recorded is None else nullcontext():
                self.work(x, y, self.diffusion)
            self.diffusion.update_ema()
        return self.loss.clone()

    def losses(self, x: Tensor, y: Tensor | None, forward: Callable[..., Tensor]) -> Iterator[Tensor]:
        """The loss of each part of a batch, as a share of the batch's; `forward` is the diffusion, or its like."""
        parts = self.accumulate
        for x_part, y_part in zip(x.chunk(parts), [None] * parts if y is None else y.chunk(parts), strict=True):
            kind = x.device.type
            with torch.autocast(kind, self.dtype, enabled=self.dtype is not None or torch.is_autocast_enabled(kind)):
                loss = forward(x_part, y_part)
            yield loss if parts == 1 else loss / parts

    def work(self, x: Tensor, y: Tensor | None, forward: Callable[..., Tensor]) -> None:
        """All of a step but the average: nothing here depends on a number of the host that changes."""
        self.optimizer.zero_grad()
        total = torch.zeros_like(self.loss)
        for loss in self.losses(x, y, forward):
            (loss if self.scale is None else loss * self.scale).backward()
            total += loss.detach()
        parameters = [p for p in self.diffusion.model.parameters() if p.grad is not None]
        bad = []  # 1 where the optimizer must change nothing
        if self.scale is not None:
            bad.append(torch.zeros_like(total))
            grads = [cast(Tensor, p.grad) for p in parameters]
            torch._amp_foreach_non_finite_check_and_unscale_(grads, bad[0], 1 / self.scale)
            torch._amp_update_scale_(self.scale, self._growth, bad[0], GROWTH, BACKOFF, GROWTH_INTERVAL)
        if self.check is not None or self.clip is not None:
            norm = clip_grad_norm_(parameters, math.inf if self.clip is None else self.clip)
            if self.check is not None:
                bad.append(self.check(total, norm))
        if bad:  # where torch.amp.GradScaler has it
            self.optimizer.found_inf = bad[0] if len(bad) == 1 else torch.maximum(*bad)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.loss.copy_(total)

    def _recorded(self, x: Tensor, y: Tensor | None) -> "RecordedStep | None | bool":
        """The recorded step for such a batch; None while it is to come; False, and said why, where it can't be."""
        diffusion = self.diffusion
        move = diffusion.ema_move(diffusion.step + 1)
        of_y = None if y is None else (tuple(y.shape), y.dtype)
        kind = (id(diffusion), tuple(x.shape), x.stride(), x.dtype, of_y, move, *switches(x.device))
        try:
            made: RecordedStep | None = self.graphs.get(
                kind,
                self._look,
                x.device,
                lambda recorder: RecordedStep(recorder, self, x, y, move),
                due=self._eager[kind] >= WARM_UPS,
            )
        except NotRecorded as why:
            self.graphs.tell(why, self.engine == "graph")
            self._eager[kind] = WARM_UPS - PATIENCE
            return False
        self._eager[kind] += made is None
        return made

    def _look(self) -> Footprint:
        """What a recorded step looks at.

        Raises:
            NotRecorded: some of it is Python to be run in every step.
        """
        diffusion, optimizer = self.diffusion, self.optimizer
        if diffusion.rng != "philox":
            raise NotRecorded("the noise comes from torch's generator, in the original code's order")
        for name in ("forward", "update_ema"):
            if getattr(type(diffusion), name) is not getattr(Diffusion, name):
                raise NotRecorded(f"{type(diffusion).__name__}.{name} must run every time")
        if diffusion.observer is not None and diffusion.observer != self.observer:
            raise NotRecorded("diffusion.observer must run every time")
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in diffusion.model.parameters()):
            raise NotRecorded("hooks of parameters must run every time")
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise NotRecorded("hooks of the optimizer must run every time")
        if not all(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
            raise NotRecorded("the optimizer counts on the host: make it with fused=True or capturable=True")
        whole = vars(optimizer), vars(optimizer).keys() - {"state", "param_groups"}
        groups = [(group, ("lr", "initial_lr")) for group in optimizer.param_groups]
        states = [(state, ()) for state in (optimizer.state, *optimizer.state.values())]
        return Footprint(diffusion, tables=(whole, *groups, *states))


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
        x, y: a batch like those to come.
        move: of `ema_model`.
    """

    def __init__(self, recorder: Recorder, step: TrainStep, x: Tensor, y: Tensor | None, move: str):
        diffusion, groups = step.diffusion, step.optimizer.param_groups
        self.step, self.x, self.y = step, torch.empty_like(x), None if y is None else torch.zeros_like(y)
        self.state = diffusion.noise_state(0, x.device)
        self.seed, self.calls = diffusion.seed, 0  # what the state holds, as the host knows
        rates = [torch.zeros((), device=x.device) for _ in groups]
        self.rates: list[tuple[dict[str, Any], Tensor, object]] = [
            (g, r, None) for g, r in zip(groups, rates, strict=True)
        ]
        before = [dict(group) for group in groups]
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
        self.grads = [(p, p.grad) for p in diffusion.model.parameters()]
        step.last = self

    def __repr__(self) -> str:
        kind = str(self.x.dtype).removeprefix("torch.")
        return f"training step on {kind} {list(self.x.shape)}: {self.recording.num_bytes / 2**20:.0f} MiB"

    def _work(self, move: str) -> None:
        self.step.work(self.x, self.y, self._forward)
        self.step.diffusion.move_ema(move)

    def _forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        self.state.draw.add_(1)
        return self.step.diffusion.at(self.state, x, y)

    def run(self, x: Tensor, y: Tensor | None) -> None:
        """Do the step on this batch, and count it."""
        diffusion = self.step.diffusion
        self.x.copy_(x)
        if self.y is not None and y is not None:
            self.y.copy_(y)
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
        if self.step.last is not self:
            for p, grad in self.grads:
                p.grad = grad
            self.step.last = self
