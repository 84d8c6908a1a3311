"""Batches cut to what fits the memory."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .chain import Network


def in_parts(run: Callable[[slice], Tensor], total: int, limit: int) -> Tensor:
    """Concatenate run(part) over the images 0..total-1, at most `limit` at once and fewer where memory runs out."""
    parts: list[Tensor] = []
    done = 0
    while done < total:
        part = slice(done, min(done + limit, total))
        try:
            parts.append(run(part))
            done = part.stop
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or part.stop - part.start == 1:
                raise
            limit = (part.stop - part.start + 1) // 2
        # Outside the handler, which holds on to the failed run's tensors.
        if done < part.stop and torch.cuda.is_available():
            torch.cuda.empty_cache()
    return torch.cat(parts)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class _Allocations(TorchDispatchMode):
    """Adds up the bytes of every tensor that the operations inside return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        tensors = (t for t in tree_leaves(out) if isinstance(t, Tensor))
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


@torch.no_grad()
def batch_that_fits(network: Network, x: Tensor, t: Tensor) -> int:
    """How many images like `x` [1, ...] the network can take at once on the CPU, where running out means being killed.

    Half of the available memory over all that one evaluation allocates: cautious, as most of that is freed on the way.
    """
    meminfo = Path("/proc/meminfo")
    if x.device.type != "cpu" or not meminfo.exists():
        return 2**31
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields.get("MemAvailable", fields["MemFree"]).split()[0]) * 1024
    with _Allocations() as seen:
        network(x, t)
    return max(1, available // 2 // max(1, seen.bytes))
