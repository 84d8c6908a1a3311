"""What the log tells of a run: summed on the device, and read once an interval."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import _checks as checks

BUCKETS = 10  # equal ranges of timesteps, whose losses are logged apart
SMOOTH = 500  # steps over which the running mean of the loss forgets


class Watch:
    """Sums over the steps of a log interval.

    From the first step on whose loss or gradient isn't finite, `failed` is 1 (on the device, float32): an optimizer
    given it as `found_inf` leaves weights and state as they are, so that they stay those before that step.

    Args:
        num_timesteps: of the diffusion.
        device: where the losses are.
    """

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        self.num_timesteps = num_timesteps
        self.count = 0  # steps since the last log line; counted by whoever makes them
        self.sums = torch.zeros(3 + 2 * BUCKETS, device=device)  # one tensor, and so one wait
        self.loss, self.norm, self.good = self.sums[:3]
        self.by_t, self.images = self.sums[3:].view(2, BUCKETS)
        self.smooth, self.steps = torch.zeros(2, device=device)  # and how many it has seen
        self.failed = torch.zeros((), device=device)
        self.holdout: float | None = None  # measured since the last log line
        self._buckets = torch.arange(BUCKETS, device=device)

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """The losses [N] of images at timesteps t [N]; scattered by comparison, whose order of addition is fixed."""
        hits = (t * BUCKETS // self.num_timesteps)[:, None] == self._buckets
        self.by_t += torch.where(hits, losses[:, None], 0).sum(0)
        self.images += hits.sum(0)

    def add(self, loss: Tensor, norm: Tensor) -> Tensor:
        """The loss and the norm of the gradient of the next step, before the optimizer's: `failed`. Only the device's
        numbers change here, so that a recorded step does it, too."""
        self.loss += loss
        self.norm += norm
        finite = torch.isfinite(self.loss + self.norm)  # a sum stays non-finite once it is
        self.good += finite
        self.failed.copy_(1 - finite.float())
        self.steps += 1
        self.smooth.lerp_(loss, 1 / self.steps.clamp(max=SMOOTH))
        return self.failed

    def first_failure(self, step: int) -> int | None:
        """The first step since the last log line, up to `step`, that wasn't finite; waits for the device."""
        if not float(self.failed):
            return None
        return step - self.count + int(self.good) + 1

    def line(self) -> dict[str, Any]:
        """The interval's means, and a new interval; `loss_by_t` has None where a range had no image."""
        sums = self.sums.tolist()
        by_t = zip(sums[3 : 3 + BUCKETS], sums[3 + BUCKETS :], strict=True)
        line: dict[str, Any] = {
            "loss": sums[0] / self.count,
            "grad_norm": sums[1] / self.count,
            "loss_by_t": [float(f"{total / images:.6g}") if images else None for total, images in by_t],
        }
        if self.holdout is not None:
            line["holdout_loss"] = self.holdout
        self.sums.zero_()
        self.count, self.holdout = 0, None
        return line

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON, exact."""
        values = {"sums": self.sums.tolist(), "smooth": float(self.smooth)}
        return {"count": self.count, "holdout": self.holdout, **values}

    def load(self, state: Mapping[str, Any], step: int) -> None:
        """Takes over what `state` gave after step number `step`."""
        if len(state["sums"]) != len(self.sums):
            raise ValueError(f"{len(state['sums'])} sums, expected {len(self.sums)}")
        self.count = checks.integer("count", state["count"], 0)
        self.holdout = state["holdout"]
        self.sums.copy_(torch.tensor(state["sums"]))
        self.smooth.fill_(checks.number("smooth", state["smooth"]))
        self.steps.fill_(step)
