"""Exponential moving average of a network's weights."""

import torch
from torch import Tensor, nn

from ..ops import _checks as checks
from ..ops.ema_update import OP as EMA_UPDATE


class EMA:
    """Keeps an average: average = decay * average + (1 - decay) * new.

    Args:
        decay: weight of the old value, in [0, 1].

    Raises:
        ValueError, TypeError: decay is no number in [0, 1].
    """

    def __init__(self, decay: float):
        self.decay = checks.number("decay", decay, 0, 1)

    def update_average(self, old: Tensor | None, new: Tensor) -> Tensor:
        """The new average of two tensors; `new` itself where there is no old one."""
        checks.tensor("new", new)
        if old is not None:
            checks.tensor("old", old, shape=new.shape, device=new.device)
        return new if old is None else old * self.decay + (1 - self.decay) * new

    @torch.no_grad()
    def update_model_average(self, ema_model: nn.Module, current_model: nn.Module) -> None:
        """Average the parameters of `ema_model` towards `current_model`'s, in place; buffers are copied.

        The average keeps its own dtype, so that a float32 average of a bfloat16 network works.
        """
        for name, model in (("ema_model", ema_model), ("current_model", current_model)):
            if not isinstance(model, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {checks.text(model)}")
        averages = [p.data for p in ema_model.parameters()]
        new = [p.data for p in current_model.parameters()]
        if len(new) != len(averages) or any(a.shape != b.shape for a, b in zip(averages, new, strict=True)):
            raise ValueError("current_model must have the parameters of ema_model: their number or shapes differ")
        new = [b if a.dtype == b.dtype else b.to(a.dtype) for a, b in zip(averages, new, strict=True)]
        EMA_UPDATE.unchecked(averages, new, self.decay)
        copy_buffers(ema_model, current_model)


@torch.no_grad()
def copy_buffers(to: nn.Module, source: nn.Module) -> None:
    """Copy every buffer (batch-norm statistics) in place."""
    for a, b in zip(to.buffers(), source.buffers(), strict=True):
        a.copy_(b)


@torch.no_grad()
def copy_weights(to: nn.Module, source: nn.Module) -> None:
    """Copy every parameter and buffer in place, so that storages (and captured graphs) stay valid."""
    targets = [p.data for p in to.parameters()]
    if targets:
        torch._foreach_copy_(targets, [p.data for p in source.parameters()])
    copy_buffers(to, source)
