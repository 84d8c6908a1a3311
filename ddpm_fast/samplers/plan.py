"""A sampler is a table: the plan, one row a step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..ops import _checks as checks
from ..predictions import PREDICTIONS, x0_coefficients
from ..schedules import Array

COLUMNS = ("t", "c_in", "p_x", "p_m", "c_x", "c_0", "c_h", "c_z")


@dataclass(frozen=True, eq=False)
class Plan:
    """What each step of a sampler does, as numbers: row k takes x to

        x' = c_x x + c_0 x0_hat + c_h hist + c_z z,   x0_hat = clip(p_x x + p_m model(c_in x, t)),   hist' = x0_hat.

    Args:
        rows: [S, 8], columns as in COLUMNS; kept in float64 on the CPU.
        clip: bound of |x0_hat|, None for no clipping.

    Raises:
        ValueError, TypeError: the rows are no finite [S, 8] table with S >= 1, or clip is not positive.
    """

    rows: Tensor
    clip: float | None = None

    def __post_init__(self) -> None:
        try:  # a copy: the caller's table may change
            if "complex" in str(getattr(self.rows, "dtype", "")):
                raise TypeError  # what torch would make real, with a warning
            rows = torch.as_tensor(self.rows, dtype=torch.float64, device="cpu").detach().clone()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"rows must be a table of numbers, got {checks.text(self.rows)}") from error
        if rows.ndim != 2 or rows.shape[1] != len(COLUMNS) or rows.shape[0] == 0:
            raise ValueError(f"rows must have shape [S, {len(COLUMNS)}] with S >= 1, got {list(rows.shape)}")
        if not rows.isfinite().all():
            k, column = (~rows.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"rows must be finite: row {k} has {COLUMNS[column]} = {rows[k, column].item()}")
        if self.clip is not None and not checks.number("clip", self.clip) > 0:
            raise ValueError(f"clip must be positive or None, got {self.clip}")
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def column(self, name: str) -> Tensor:
        """One column by its name in COLUMNS, [S] float64."""
        checks.choice("name", name, COLUMNS)
        return self.rows[:, COLUMNS.index(name)]

    def timesteps(self, device: torch.device | str) -> Tensor:
        """What the model is told, [S]: int64 where every t is an integer (and fits it), else float32."""
        t = self.column("t")
        whole = bool((t == t.round()).all() and t.abs().max() < 2**63)
        return t.to(checks.device("device", device), torch.int64 if whole else torch.float32)


def plan_of(
    t: Array, abar: Array, prediction: str, *, c_x: Array, c_0: Array, c_h: Array | float = 0.0,
    c_z: Array | float = 0.0, clip: bool = False,
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
    columns = np.broadcast_arrays(t, 1.0, p_x, p_m, c_x, c_0, c_h, c_z)
    return Plan(torch.from_numpy(np.stack(columns, axis=1).astype(np.float64)), clip=1.0 if clip else None)
