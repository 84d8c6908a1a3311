"""What a diffusion checkpoint carries beside its networks: the schedule's tables, and the counters."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops import NoiseState
from ..ops import _checks as checks
from ..schedules import Array, check_betas, tables


@torch.compiler.assume_constant_result
def fresh_seed() -> int:
    """A seed from torch's generator, so that torch.manual_seed makes a script repeatable."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


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
        # The calls in a tensor, which a compiled graph can count in, and read when it runs.
        self._counts: dict[str, Any] = {"step": 0, "calls": torch.zeros((), dtype=torch.int64), "seed": None}
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

    def draw(self, ahead: int = 0) -> int | Tensor:
        """The number of the last forward call, or of one to come; a compiler is given the tensor that it stands in."""
        return self._counts["calls"] + ahead if torch.compiler.is_compiling() else self.calls + ahead

    def count_call(self) -> None:
        """Forward was called."""
        self._counts["calls"].add_(1)

    @property
    def seed(self) -> int | None:
        """Of training's random numbers; None until they are needed."""
        return self._counts["seed"]

    @seed.setter
    def seed(self, value: int | None) -> None:
        self._counts["seed"] = None if value is None else checks.integer("seed", value, -(2**63), 2**64 - 1)

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self._betas)

    def exact_alphas_cumprod(self) -> Array:
        """[T] in float64, for plans."""
        return np.cumprod(1 - self._betas, dtype=np.float64)

    def noise_state(self, draw: int | Tensor, device: torch.device) -> NoiseState:
        """Where training's random numbers stand at forward call `draw`; each process has its own range of samples."""
        seed = self.seed
        if seed is None:
            self._counts["seed"] = seed = fresh_seed()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        if isinstance(draw, Tensor):
            return NoiseState.at(seed, 0, rank << 32, device)._replace(draw=draw.to(device))
        return NoiseState.at(seed, draw, rank << 32, device)

    def extra_state(self) -> dict[str, int | None]:
        """What a checkpoint must carry beside the tensors: EMA step, forward calls, seed."""
        return {"step": self.step, "calls": self.calls, "seed": self.seed}

    def load_extra_state(self, state: Mapping[str, int | None]) -> None:
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
        if step is not None:
            step = checks.integer("step", step, 0)
            metadata = dict(getattr(state_dict, "_metadata", {}))
            own = metadata.get("", {})
            metadata[""] = {**own, "ddpm_fast": {**own.get("ddpm_fast", {}), "step": step}}
            state_dict = OrderedDict(state_dict)
            setattr(state_dict, "_metadata", metadata)  # noqa: B010 - not in the type
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
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
        self.loaded = True
        betas = self.betas.double().cpu().numpy()
        if not np.array_equal(betas.astype(np.float32), self._betas.astype(np.float32)):
            self._betas = check_betas(betas, self.prediction)
        self._rebuild_tables()
        if "ddpm_fast" in local_metadata:
            self.load_extra_state(local_metadata["ddpm_fast"])
        elif prefix:  # part of another module, whose load_state_dict isn't ours
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
