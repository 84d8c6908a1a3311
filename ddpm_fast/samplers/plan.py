"""A sampler is a table: the plan, one row a step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import _checks as checks
from ..predictions import PREDICTIONS, x0_coefficients
from ..schedules import Array

COLUMNS = ("t", "c_in", "p_x", "p_m", "c_x", "c_0", "c_h", "c_z")
LEARNED = "c_v"  # a ninth


@dataclass(frozen=True, eq=False)
class Plan:
    """What each step of a sampler does, as numbers: row k takes x to

        x' = c_x x + c_0 x0_hat + c_h hist + c_z z,   x0_hat = clip(p_x x + p_m model(c_in x, t)),   hist' = x0_hat.

    Args:
        rows: [S, 8], columns as in COLUMNS; kept in float64 on the CPU. Or [S, 9], with c_v last, where the network
            has learned the variance, v, too: the noise then is c_z exp(c_v v) z.
        clip: bound of |x0_hat|, None for no clipping.
        guidance: [S], scale w of classifier-free guidance: model = without + w (with - without) the condition (Ho &
            Salimans 2022); None for none.
        abar: [S], the level at which each row starts: x = sqrt(abar) x_0 + sqrt(1 - abar) noise; None if unknown.
        noise_levels: t are noise levels: the network is told them in float32, also where all are whole numbers.
        prediction: what the model predicts, for which p_x and p_m are made; None if unknown.

    Raises:
        ValueError, TypeError: the rows are no finite table of this shape with S >= 1, or another argument doesn't fit.
    """

    rows: Tensor
    clip: float | None = None
    guidance: Tensor | None = None
    abar: Tensor | None = None
    noise_levels: bool = False
    prediction: str | None = None

    def __post_init__(self) -> None:
        rows = _table("rows", self.rows)
        if rows.ndim != 2 or rows.shape[1] not in (len(COLUMNS), len(COLUMNS) + 1) or rows.shape[0] == 0:
            raise ValueError(f"rows must have shape [S, {len(COLUMNS)}] with S >= 1, got {list(rows.shape)}")
        if not rows.isfinite().all():
            k, column = (~rows.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"rows must be finite: row {k} has {(*COLUMNS, LEARNED)[column]} = {rows[k, column]}")
        if self.clip is not None and not checks.number("clip", self.clip) > 0:
            raise ValueError(f"clip must be positive or None, got {self.clip}")
        object.__setattr__(self, "rows", rows)
        for name in ("guidance", "abar"):
            if getattr(self, name) is not None:
                column = _table(name, getattr(self, name))
                if column.shape != rows.shape[:1] or not column.isfinite().all():
                    raise ValueError(
                        f"{name} must be one finite number for each of the plan's {len(rows)} rows, got "
                        f"{checks.text(column)}"
                    )
                object.__setattr__(self, name, column)

    def __repr__(self) -> str:
        t = self.column("t")
        more = [] if self.clip is None else [f"clip={self.clip:g}"]
        more += ["learned variance"] * self.learned + ["guided"] * (self.guidance is not None)
        return ", ".join([f"Plan({len(self)} rows, t {t[0]:g} to {t[-1]:g}", *more]) + ")"

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def learned(self) -> bool:
        """Whether the network's own variance is used."""
        return self.rows.shape[1] > len(COLUMNS)

    def column(self, name: str) -> Tensor:
        """One column by its name in COLUMNS, or "c_v" where there is one, [S] float64."""
        names = (*COLUMNS, LEARNED)[: self.rows.shape[1]]
        checks.choice("name", name, names)
        return self.rows[:, names.index(name)]

    def timesteps(self, device: torch.device | str) -> Tensor:
        """What the model is told, [S]: int64 where every t is a timestep (and fits it), else float32."""
        t = self.column("t")
        whole = not self.noise_levels and bool((t == t.round()).all() and t.abs().max() < 2**63)
        return t.to(checks.device("device", device), torch.int64 if whole else torch.float32)

    def guided(self, scale: float | Sequence[float] | Tensor) -> "Plan":
        """This plan with classifier-free guidance, by one scale or by one a row; 1 everywhere is none.

        Raises:
            ValueError, TypeError: `scale` is no finite number, nor one for each of the rows.
        """
        one: Any = scale
        if isinstance(one, (Tensor, np.ndarray)) and one.ndim == 0:
            one = float(one)
        if isinstance(one, (list, tuple, Tensor, np.ndarray)):
            column = _table("guidance", one)
        else:
            column = torch.full((len(self),), checks.number("guidance", one), dtype=torch.float64)
        plan = replace(self, guidance=column)
        return plan if (column != 1).any() else replace(plan, guidance=None)

    def check_network(self, prediction: str, num_timesteps: int, noise_levels: bool) -> None:
        """Raise ValueError where this is for a network of another prediction, or a row tells one of `num_timesteps`, or
        of noise levels, something else."""
        if self.prediction not in (None, prediction):
            raise ValueError(
                f"sampler: this plan is for prediction {self.prediction!r}, the network's is {prediction!r}"
            )
        t = self.column("t")
        if noise_levels and not self.noise_levels and (t > 1).any():
            raise ValueError("sampler: this plan tells timesteps, the network takes noise levels: .told_noise_levels()")
        wrong = (t < 0) | (t >= num_timesteps)
        if not self.timesteps("cpu").is_floating_point() and wrong.any():  # a noise level is no index
            k = int(wrong.nonzero()[0])
            raise ValueError(f"sampler: row {k} has t = {t[k]:.0f}, expected 0 to {num_timesteps - 1}")

    def told_noise_levels(self) -> "Plan":
        """This plan for a network that is told sqrt(abar) and not the timestep (Chen et al. 2021; SR3)."""
        if self.abar is None:
            raise ValueError("this plan doesn't know its levels: make it with abar")
        rows = torch.cat([self.abar.sqrt()[:, None], self.rows[:, 1:]], dim=1)
        return replace(self, rows=rows, noise_levels=True)


def _table(name: str, values: object) -> Tensor:
    """A copy, as the caller's table may change, in float64 on the CPU."""
    try:
        if "complex" in str(getattr(values, "dtype", "")):
            raise TypeError  # what torch would make real, with a warning
        return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be a table of numbers, got {checks.text(values)}") from error


def mean_plan(sigma: Tensor) -> Plan:
    """For whoever predicts the mean of x_{t-1} itself: x' = mean + sigma z, noise [T] of each timestep but the last."""
    rows = torch.zeros(len(sigma), len(COLUMNS), dtype=torch.float64)
    rows[:, 0] = torch.arange(len(sigma))
    rows[:, [1, 3, 5]] = 1.0
    rows[1:, 7] = sigma[1:].double().cpu()
    return Plan(rows.flip(0))


def plan_of(
    t: Array, abar: Array, prediction: str, *, c_x: Array, c_0: Array, c_h: Array | float = 0.0,
    c_z: Array | float = 0.0, c_v: Array | None = None, clip: bool = False,
) -> Plan:  # fmt: skip
    """A plan from its columns [S], whose state at row k is sqrt(abar_k) x_0 + sqrt(1 - abar_k) noise.

    Raises:
        ValueError, TypeError: an unknown prediction, or one that says nothing of x_0 at the level of a row.
    """
    checks.flag("clip", clip)
    checks.choice("prediction", prediction, PREDICTIONS)
    if prediction == "eps" and (abar == 0).any():
        raise ValueError("prediction 'eps' says nothing of the image where nothing is left of it: train 'x0' or 'v'")
    p_x, p_m = x0_coefficients(prediction, np.sqrt(abar), np.sqrt(1 - abar))
    columns = np.broadcast_arrays(t, 1.0, p_x, p_m, c_x, c_0, c_h, c_z, *([] if c_v is None else [c_v]))
    rows = torch.from_numpy(np.stack(columns, axis=1).astype(np.float64))
    levels = torch.from_numpy(np.array(abar, dtype=np.float64))
    return Plan(rows, clip=1.0 if clip else None, abar=levels, prediction=prediction)
