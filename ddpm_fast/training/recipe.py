"""How a model is trained: the part of a run that its checkpoint carries beside the model's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..models.recomputing import RECOMPUTE
from ..ops import _checks as checks

SEEDS = 2**64  # below this


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; saved with every checkpoint."""

    steps: int = 20_000  # optimizer steps in all
    batch_size: int = 128  # images per step
    accumulate: int = 1  # parts in which a step goes through its images, one after the other: less memory
    recompute: str = "none"  # what the backward computes again instead of keeping it: "none", "norm" or "block"
    lr: float = 2e-4
    warmup: int = 500  # steps over which lr rises linearly from 0
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    flip: bool = False  # mirror images at random
    bf16: bool = False  # autocast to bfloat16
    seed: int = 0  # of initial weights, data order and noise
    holdout: float = 0.0  # share of the images that isn't trained on, but measures the averaged weights at each save

    def __post_init__(self) -> None:
        for name, least, most in (
            ("steps", 1, None),
            ("batch_size", 1, None),
            ("accumulate", 1, None),
            ("warmup", 0, None),
            ("seed", 0, SEEDS - 1),
        ):
            object.__setattr__(self, name, checks.integer(name, getattr(self, name), least, most))
        for name in ("flip", "bf16"):
            checks.flag(name, getattr(self, name))
        checks.choice("recompute", self.recompute, RECOMPUTE)
        object.__setattr__(self, "clip", checks.number("clip", self.clip, 0))
        object.__setattr__(self, "lr", checks.number("lr", self.lr, 0, 1))
        if self.lr in (0, 1):
            raise ValueError(f"lr must lie between 0 and 1, for example 2e-4; got {self.lr}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} can't be done in {self.accumulate} equal parts (accumulate)"
            )
        object.__setattr__(self, "holdout", checks.number("holdout", self.holdout, 0, 1))
        if self.holdout == 1:
            raise ValueError("holdout must lie in [0, 1): with 1 there is nothing to train on")

    def resumed(self, step: int, changes: Mapping[str, Any]) -> "Recipe":
        """The recipe of a run that goes on at `step`, with `changes` from there on.

        Raises:
            ValueError: a change would make it another run.
        """
        recipe = replace(self, **changes)
        for name in ("seed", "holdout"):
            came, expected = getattr(recipe, name), getattr(self, name)
            if came != expected:
                raise ValueError(f"{name} is {came}, but the run to resume has {expected}")
        if recipe.steps < step:
            raise ValueError(f"steps is {recipe.steps}, but the run to resume has made {step}: ask for more")
        return recipe


RECIPES = {
    "cifar10": Recipe(),
    "digits": Recipe(steps=1800, batch_size=64, lr=1e-3, warmup=100),
}
