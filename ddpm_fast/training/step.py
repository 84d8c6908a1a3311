"""One step of training as one call, and on a GPU as one CUDA graph."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..diffusion import Diffusion
from ..footprint import Footprint, NotRecorded, switches
from ..graphs import ENGINES, WARM_UPS, Graphs, possible
from ..ops import _checks as checks
from .recorded import RecordedStep, hooked, look, rounded

FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000  # of the loss in float16, as torch.amp has them
PATIENCE = 100  # steps after which what can't be recorded is tried again
DTYPES = (None, torch.bfloat16, torch.float16)

Given = tuple[Tensor | None, ...]  # y and cond
Forward = Callable[[Tensor, Given], Tensor]
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
        clip: largest norm of the gradient; None or 0 for no clipping.
        accumulate: parts in which a batch is gone through, one after the other.
        dtype: of autocast, torch.bfloat16 or torch.float16; None for that of the caller, or none. In float16 the loss
            is scaled, and a step whose gradient overflows changes no weights: the optimizer must be fused.
        engine: "auto" and "graph" record on a GPU ("graph" says so where there is none), "eager" doesn't.
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
        own = {id(p) for p in diffusion.model.parameters()}
        if own.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer must be one of diffusion.model.parameters(): it holds none of them")
        self.diffusion, self.optimizer, self.engine = diffusion, optimizer, engine
        self.clip = None if clip is None else checks.number("clip", clip, 0) or None
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
        self.last: weakref.ref[RecordedStep] | None = None  # whose gradients are in p.grad
        self._eager: Counter[Hashable] = Counter()  # steps of a kind that ran so, before a recording
        self._refused: Counter[Hashable] = Counter()  # steps of a kind to come in which none is tried

    def __call__(self, x: Tensor, y: Tensor | None = None, *, cond: Tensor | None = None) -> Tensor:
        """Train on one batch.

        Args:
            x: [N, C, H, W], clean images in [-1, 1]; N divisible by `accumulate`.
            y: [N] int64, the classes of a conditional network.
            cond: [N, cond_channels, H, W], the image condition of a network that takes one.

        Returns:
            The loss [], on the device; nothing here waits for it.

        Raises:
            ValueError, TypeError: x, y or cond does not fit.
        """
        checks.tensor("x", x)
        if x.ndim == 0 or x.shape[0] % self.accumulate:
            raise ValueError(f"x must have a batch that {self.accumulate} divides (accumulate), got {checks.text(x)}")
        for name, value, more, what in (("y", y, "", "a class per image"), ("cond", cond, ", ...", "as many as x")):
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {checks.text(value)}: torch.as_tensor({name}) makes one")
            if value.ndim == 0 or value.shape[0] != x.shape[0]:
                raise ValueError(f"{name} must have shape [{x.shape[0]}{more}], {what}; got {checks.text(value)}")
        device = self.loss.device
        if self.diffusion.betas.device != device:
            raise ValueError(f"diffusion was moved from {device}: make a new optimizer and TrainStep")
        x = x.to(device, non_blocking=True)
        given = tuple(None if v is None else v.to(device, non_blocking=True) for v in (y, cond))
        wanted = self.engine == "graph" or self.engine == "auto" and possible(device)
        recorded, following = self._recorded(x, given) if wanted else (None, None)
        if recorded is not None:
            recorded.run(x, given)
        else:
            self._eagerly(x, given, following)
        return self.loss.clone()

    def _eagerly(self, x: Tensor, given: Given, following: Hashable) -> None:
        """The step as it is; where a recording is `following`, with rates in float32, and the last such one watched."""
        self.last = None
        with nullcontext() if following is None else rounded(self.optimizer):
            work = partial(self.work, x, given, self._forward)
            try:
                if following is not None and self._eager[following] == WARM_UPS:
                    self.graphs.recorder(x.device).watched(work)
                else:
                    work()
            except NotRecorded as why:  # the work is done
                self._refuse(following, why)
        self.diffusion.update_ema()

    def _refuse(self, kind: Hashable, why: NotRecorded) -> None:
        self.graphs.tell(why, wanted=True)
        self._refused[kind] = PATIENCE
        del self._eager[kind]  # then it is warm, and watched, again

    def state_dict(self) -> dict[str, float]:
        """What a run in float16 needs beside its diffusion and optimizer to go on: the scale, and its steps so far."""
        return {} if self.scale is None else {"scale": float(self.scale), "growth": int(self._growth)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over what `state_dict` gave."""
        if self.scale is not None:
            if "scale" not in state or "growth" not in state:
                raise ValueError("state has no scale: it comes from a step without dtype=torch.float16")
            self.scale.fill_(checks.number("scale", state["scale"]))
            self._growth.fill_(checks.integer("growth", state["growth"], 0))

    def _forward(self, x: Tensor, given: Given) -> Tensor:
        y, cond = given
        return self.diffusion(x, y) if cond is None else self.diffusion(x, y, cond=cond)

    def losses(self, x: Tensor, given: Given, forward: Forward | None = None) -> Iterator[Tensor]:
        """The loss of each part of a batch, as a share of the batch's; `forward` is the diffusion's, or its like."""
        parts, forward = self.accumulate, forward or self._forward
        each = ([None] * parts if v is None else v.chunk(parts) for v in given)
        for x_part, *given_part in zip(x.chunk(parts), *each, strict=True):
            kind = x.device.type
            with torch.autocast(kind, self.dtype, enabled=self.dtype is not None or torch.is_autocast_enabled(kind)):
                loss = forward(x_part, tuple(given_part))
            yield loss if parts == 1 else loss / parts

    def work(self, x: Tensor, given: Given, forward: Forward) -> None:
        """All of a step but the average: nothing here depends on a number of the host that changes."""
        self.optimizer.zero_grad()
        torch.clear_autocast_cache()  # in the caller's autocast, the casts of weights before the last step
        total = torch.zeros_like(self.loss)
        for loss in self.losses(x, given, forward):
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
        if bad:
            del self.optimizer.found_inf  # type: ignore[attr-defined] # for whoever steps without asking
        self.loss.copy_(total)

    def _recorded(self, x: Tensor, given: Given) -> tuple[RecordedStep | None, Hashable]:
        """The recorded step for such a batch; else the kind of step of which a recording follows, or neither."""
        diffusion = self.diffusion
        move = diffusion.ema_move(diffusion.step + 1)
        own = id(self.optimizer), *map(id, self.optimizer.param_groups), self.clip, self.accumulate, self.dtype
        arrays = tuple(x.shape), x.stride(), x.dtype, *(None if v is None else (tuple(v.shape), v.dtype) for v in given)
        others = id(self.check), id(self.scale), id(self._growth), id(self.loss)
        kind = (id(diffusion), own, others, arrays, move, *switches(x.device))
        if self._refused[kind]:
            self._refused[kind] -= 1
            return None, None

        def due(released: bool) -> bool:
            if released:  # what was replaced has to be warm, and whatever the optimizer makes at first must be there
                self._eager.clear()
            return self._eager[kind] >= WARM_UPS

        try:
            if not self._eager[kind] or hooked(diffusion):
                self._look()
            made: RecordedStep | None = self.graphs.get(
                kind, self._look, x.device, lambda recorder: RecordedStep(recorder, self, x, given, move), due
            )
        except NotRecorded as why:
            self._refuse(kind, why)
            return None, None
        self._eager[kind] += made is None
        return made, kind

    def _look(self) -> Footprint:
        return look(self.diffusion, self.optimizer, self.observer)
