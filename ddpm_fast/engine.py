"""The denoising loop: runs any plan, and never waits for the device on its own account."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .ops import X_T, NoiseState
from .ops import _checks as checks
from .ops import noise as draw_noise
from .ops.sampler_step import OP as SAMPLER_STEP
from .samplers import Plan

Network = Callable[[Tensor, Tensor], Tensor]  # (x [N, ...], t [N]) -> model_out [N, ...]
OnStep = Callable[[int, Tensor], None]


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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode and without gradients; afterwards every module is in the mode it was in."""
    training = [m for m in model.modules() if m.training]
    try:
        if training:
            model.eval()
        with torch.no_grad(), _cast_once(model):
            yield model
    finally:
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


class Chain:
    """A plan under way: all that a step reads and writes, on the device of x.

    Args:
        x: [N, ...], where the chain starts; overwritten by each step.
        plan: the sampler.
        noise: seed and first sample of the steps' noise, which row k draws at draw k; without it, torch's generator.
    """

    def __init__(self, x: Tensor, plan: Plan, noise: NoiseState | None = None):
        self.x, self.clip = x, plan.clip
        self.rows = plan.rows.to(x.device, x.dtype)
        self.t = plan.timesteps(x.device)
        self.k = torch.zeros((), dtype=torch.int64, device=x.device)
        # What no row uses is left out of every step; what a row uses is read here, once, on the host.
        self.scaled = bool((plan.column("c_in") != 1).any())
        self.hist = torch.zeros_like(x) if bool((plan.column("c_h") != 0).any()) else None
        self.noisy = (plan.column("c_z") != 0).tolist()
        self.noise = noise._replace(draw=self.k) if noise is not None and any(self.noisy) else None

    def step(self, network: Network, z: Tensor | None = None) -> None:
        """Row k, then k + 1. Nothing here depends on the host's idea of k: one captured step can serve all rows."""
        x, row = self.x, self.k.reshape(1)
        model_in = x * self.rows[:, 1].index_select(0, row) if self.scaled else x
        model_out = network(model_in, self.t.index_select(0, row).repeat(x.shape[0]))
        noise, keeps = self.noise if z is None else z, self.hist is not None
        # Unchecked: a chain's arguments are right by construction.
        SAMPLER_STEP.unchecked(x, model_out, self.rows, self.k, noise, self.hist, self.clip, keeps, x, self.hist)
        self.k += 1


@torch.no_grad()
def denoise(
    network: Network, x: Tensor, plan: Plan, noise: NoiseState | None = None, on_step: OnStep | None = None
) -> Tensor:
    """Take x through every row of a plan; x, plan and noise as in Chain.

    Args:
        network: what predicts; told t as `plan.timesteps` gives it, one per image.
        on_step: called with (k, x) after row k; x is the loop's own tensor, to be read and not kept.

    Returns:
        x after the last row.
    """
    chain = Chain(x, plan, noise)
    for k, noisy in enumerate(chain.noisy):
        z = torch.randn(x.shape, dtype=x.dtype, device=x.device) if noise is None and noisy else None
        chain.step(network, z)
        if on_step is not None:
            on_step(k, x)
    return x


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
            if not _out_of_memory(error) or part.stop - part.start == 1:
                raise
            limit = (part.stop - part.start + 1) // 2
        # Outside the handler, which holds on to the failed run's tensors.
        if done < part.stop and torch.cuda.is_available():
            torch.cuda.empty_cache()
    return torch.cat(parts)


def _out_of_memory(error: BaseException) -> bool:
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
