"""Sample grids of a run: always the same noise and classes."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion import Diffusion
from ..progress import progress_bar
from .images import grid, save_png, to_uint8, upscale_for

COLUMNS, ROWS = 8, 10  # at most: a row is a class


class _Interrupted(Exception):
    """The run is to stop."""


def draw_grid(
    diffusion: Diffusion,
    path: Path,
    *,
    num_steps: int,
    seed: int,
    device: torch.device,
    stop: Callable[[], object],
    progress: bool,
) -> Path | None:
    """Writes a grid of samples, a row per class (at most ten) where there are classes; None once `stop` says so."""
    classes = diffusion.num_classes
    rows = min(classes or 8, ROWS)
    y = torch.arange(rows, device=device).repeat_interleave(COLUMNS) if classes else None
    # The bar stays hidden where a grid takes less than a second.
    options = {"leave": False, "disable": not progress, "unit": "step", "delay": 1}
    with progress_bar(num_steps, "drawing", **options) as bar:

        def on_step(k: int, x: Tensor) -> None:
            bar.update(k + 1 - bar.n)
            if stop():
                raise _Interrupted

        try:
            x = diffusion.sample(rows * COLUMNS, device, y, num_steps=num_steps, seed=seed, callback=on_step)
        except _Interrupted:
            return None
    save_png(path, grid(to_uint8(x), columns=COLUMNS, upscale=upscale_for(x.shape[2])))
    return path
