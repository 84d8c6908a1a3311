"""What a diffusion checkpoint carries beside its networks: the schedule's tables, and the counters."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops import NoiseState
from ..ops import _checks as checks
from ..ops._library import opaque
from ..schedules import Array, check_betas, tables


def fresh_seed() -> int:
    """A seed from torch's generator, so that torch.manual_seed makes a script repeatable."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def _known_seed(seed: Tensor) -> Tensor:
    """The seed of [known, seed], drawn first where it is unknown."""
    if not seed[0]:
        seed.copy_(torch.tensor([1, fresh_seed()], device="cpu"))
    return seed[1].clone()


# For a compiled graph: the seed is looked up when the graph runs, so that two instances may share one.
_SEED = opaque("known_seed(Tensor(a!) seed) -> Tensor", _known_seed, lambda seed: seed.new_empty(()))
_COUNTING = threading.Lock()  # nn.DataParallel calls its replicas in threads


class DiffusionState(nn.Module):
    """The eight buffers of the original code, and step, calls and seed, which ride in the state_dict's metadata:
    strict loading of old files here, and of new files there, works.

    Args:
        betas: [T] noise schedule.
        prediction: what the network predicts.
        seed: of training's random numbers; drawn from torch's generator when first needed if None.
    """

    betas: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sigma: Tensor

    def __init__(self, betas: Any, prediction: str, seed: int | None):
        super().__init__()
        self.prediction = prediction
        # One object also for the shallow copies that nn.DataParallel makes of a module, so that they count on.
        # Calls and [known, seed] are tensors on the CPU, which a compiled graph reads, and counts in, when it runs.
        with torch.inference_mode(False):
            calls, known_seed = (torch.zeros(size, dtype=torch.int64, device="cpu") for size in ((), (2,)))
        self._counts: dict[str, Any] = {"step": 0, "calls": calls, "seed": known_seed}
        self.seed = seed
        self.loaded = False
        self._betas = check_betas(betas, prediction)
        for name, table in tables(self._betas).items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32))

    @property
    def step(self) -> int:
        """How often update_ema was called."""
        return self._counts["step"]

    @step.setter
    def step(self, value: int) -> None:
        self._counts["step"] = checks.integer("step", value, 0)

    @property
    def calls(self) -> int:
        """How often forward was called: the draw of training's random numbers."""
        return int(self._counts["calls"])

    @calls.setter
    def calls(self, value: int) -> None:
        self._counts["calls"].fill_(checks.integer("calls", value, 0))

    def count_call(self) -> int | Tensor:
        """Forward was called: the number of this call, for a compiler in a tensor."""
        if torch.compiler.is_compiling():
            return self._counts["calls"].add_(1).clone()
        with _COUNTING:
            return int(self._counts["calls"].add_(1))

    @property
    def seed(self) -> int | None:
        """Of training's random numbers; None until they are needed. 2^64 - k reads as -k: they are the same key."""
        known, seed = self._counts["seed"].tolist()
        return seed if known else None

    @seed.setter
    def seed(self, value: int | None) -> None:
        seed = 0 if value is None else checks.integer("seed", value, -(2**63), 2**64 - 1)
        self._counts["seed"].copy_(torch.tensor([value is not None, (seed + 2**63) % 2**64 - 2**63], device="cpu"))

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self._betas)

    def exact_alphas_cumprod(self) -> Array:
        """[T] in float64, for plans."""
        return np.cumprod(1 - self._betas, dtype=np.float64)

    def noise_state(self, draw: int | Tensor, device: torch.device) -> NoiseState:
        """Where training's random numbers stand at forward call `draw`; each process has its own range of samples."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        first_sample = (torch.distributed.get_rank() if distributed else 0) << 32
        if isinstance(draw, Tensor):
            return NoiseState(_SEED(self._counts["seed"]).to(device), draw.to(device), first_sample)
        seed = self.seed
        if seed is None:
            seed = int(_known_seed(self._counts["seed"]))
        return NoiseState.at(seed, draw, first_sample, device)

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint must carry beside the tensors: EMA step, forward calls, seed."""
        return {"step": self.step, "calls": self.calls, "seed": self.seed}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `extra_state` gave; what is absent stays as it is."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dictionary, got {checks.text(state)}")
        for name, value in state.items():
            if name in self._counts and value is not None:
                setattr(self, name, value)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False, *, step: int | None = None
    ) -> Any:
        """As torch.nn.Module.load_state_dict.

        Args:
            step: calls of `update_ema` so far, for files of the original code, which did not save it.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dictionary, got {checks.text(state_dict)}")
        for name in state_dict:
            if not isinstance(name, str):
                raise TypeError(f"state_dict must have names as its keys, got {checks.text(name)}")
        if step is not None:
            step = checks.integer("step", step, 0)
            metadata = dict(getattr(state_dict, "_metadata", {}))
            own = metadata.get("", {})
            metadata[""] = {**own, "ddpm_fast": {**own.get("ddpm_fast", {}), "step": step}}
            state_dict = OrderedDict(state_dict)
            setattr(state_dict, "_metadata", metadata)  # noqa: B010 - not in the type
        before, extra = (self.step, self.calls, self.seed), self.extra_state()
        try:
            keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        except BaseException:
            self.load_extra_state(extra)
            self.step, self.calls, self.seed = before
            raise
        self.loaded = True
        if "ddpm_fast" not in getattr(state_dict, "_metadata", {}).get("", {}):
            self._warn_of_counting(stacklevel=3)
        return keys

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["ddpm_fast"] = self.extra_state()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self.loaded = self.loaded or bool(prefix)  # part of another module, whose load_state_dict isn't ours
        betas = self.betas.double().cpu().numpy()
        if not np.array_equal(betas.astype(np.float32), self._betas.astype(np.float32)):
            self._betas = check_betas(betas, self.prediction)
        self._rebuild_tables()
        if "ddpm_fast" in local_metadata:
            self.load_extra_state(local_metadata["ddpm_fast"])
        elif prefix:
            self._warn_of_counting(stacklevel=6)

    def _warn_of_counting(self, stacklevel: int) -> None:
        warnings.warn(
            "this state_dict does not say how often update_ema() was called, so counting goes on from "
            f"{self.step}: until ema_start, ema_model is overwritten by model. "
            "Pass load_state_dict(..., step=N) to go on averaging.",
            stacklevel=stacklevel,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiffusionState":
        super()._apply(fn, recurse)
        self._rebuild_tables()
        return self

    def _rebuild_tables(self) -> None:
        """The tables never drop below float32, whatever the network's dtype; in float64 they are exact again."""
        if self.betas.dtype != torch.float32:
            dtype = torch.float64 if self.betas.dtype == torch.float64 else torch.float32
            device = self.betas.device
            for name, table in tables(self._betas).items():
                setattr(self, name, torch.tensor(table, dtype=dtype, device=device))
