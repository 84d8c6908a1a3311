"""Samples as pictures: PNG grid, single PNGs, GIF of the denoising, npz."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _checks as checks
from .extras import require
from .files import write_atomically

BORDER = 2  # pixels between the images of a grid, after upscaling
MAX_DURATION = 655_350  # milliseconds that GIF can hold a frame
OWN_NAME = re.compile(r"\d{6,}(-class-\d+)?\.png")  # of save_pngs


def to_uint8(x: Tensor) -> Tensor:
    """Float [-1, 1] to uint8 [0, 255], same shape; what lies outside is clipped."""
    checks.tensor("x", x)
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def upscale_for(height: int, shown: int = 48) -> int:
    """The integer factor that shows an image of `height` pixels with at least `shown`."""
    return max(1, -(-shown // height))


def grid(pixels: Tensor, *, columns: int, upscale: int = 1) -> np.ndarray:
    """Lays uint8 [N, C, H, W] out in rows of `columns` on a mid-grey ground.

    Args:
        upscale: each pixel becomes a square of this side.

    Returns:
        uint8 [height, width, C].

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
    """
    _check_pixels(pixels)
    columns, upscale = checks.integer("columns", columns, 1), checks.integer("upscale", upscale, 1)
    count, channels = pixels.shape[:2]
    rows = -(-count // columns)
    cells = pixels.repeat_interleave(upscale, 2).repeat_interleave(upscale, 3)
    cells = F.pad(cells, (0, BORDER, 0, BORDER), value=128)
    blank = cells.new_full((rows * columns - count, *cells.shape[1:]), 128)
    height, width = cells.shape[2:]
    cells = torch.cat([cells, blank]).reshape(rows, columns, channels, height, width)
    sheet = cells.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    return F.pad(sheet, (0, 0, BORDER, 0, BORDER, 0), value=128).numpy()


def _check_pixels(pixels: Tensor, labels: Tensor | None = None) -> None:
    """Raise unless pixels are uint8 [N, C, H, W] on the CPU, and labels int64 [N]."""
    cpu = torch.device("cpu")
    checks.tensor("pixels", pixels, ndim=4, dtype=torch.uint8, device=cpu)
    if labels is not None:
        checks.tensor("labels", labels, shape=pixels.shape[:1], dtype=torch.int64, device=cpu)


def save_png(path: str | Path, array: np.ndarray) -> None:
    """Writes uint8 [H, W, C], C in {1, 3}, as PNG."""
    data = io.BytesIO()
    _picture("array", array).save(data, format="PNG")
    write_atomically(path, data.getvalue())


def save_pngs(folder: str | Path, pixels: Tensor, labels: Tensor | None = None, *, first_index: int = 0) -> None:
    """Writes uint8 [N, C, H, W] as `folder/000000.png`..., or `000000-class-7.png` with labels."""
    _check_pixels(pixels, labels)
    first_index = checks.integer("first_index", first_index, 0)
    if 0 in pixels.shape[1:]:
        raise ValueError(f"pixels must hold images of at least 1x1, got {checks.text(pixels)}")
    for i, image in enumerate(pixels):
        suffix = "" if labels is None else f"-class-{int(labels[i])}"
        save_png(Path(folder) / f"{first_index + i:06d}{suffix}.png", image.permute(1, 2, 0).numpy())


def saved_pngs(folder: str | Path) -> list[Path]:
    """What `save_pngs` wrote into a folder, which may be yet to be made."""
    return sorted(path for path in Path(folder).glob("*.png") if OWN_NAME.fullmatch(path.name))


def save_gif(path: str | Path, frames: Sequence[np.ndarray], *, milliseconds: int = 80, hold: int = 2000) -> None:
    """Writes uint8 [H, W, C] frames as an endless GIF whose last frame stays for `hold` milliseconds."""
    if not isinstance(frames, Sequence):
        raise TypeError(f"frames must be a list of arrays, got {checks.text(frames)}")
    if len(frames) == 0:
        raise ValueError("frames is empty: a GIF needs at least one")
    milliseconds, hold = checks.integer("milliseconds", milliseconds, 0), checks.integer("hold", hold, 0)
    if max(milliseconds, hold) > MAX_DURATION:
        raise ValueError(f"milliseconds and hold must be at most {MAX_DURATION}, got {milliseconds} and {hold}")
    pictures = [_picture(f"frames[{i}]", frame) for i, frame in enumerate(frames)]
    durations = [milliseconds] * (len(pictures) - 1) + [hold]
    data = io.BytesIO()
    pictures[0].save(data, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_atomically(path, data.getvalue())


def save_npz(path: str | Path, pixels: Tensor, labels: Tensor | None = None) -> None:
    """Writes `images` uint8 [N, H, W, C] and, if given, `labels` int64 [N]."""
    _check_pixels(pixels, labels)
    arrays: dict[str, Any] = {"images": pixels.permute(0, 2, 3, 1).numpy()}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    write_atomically(path, data.getvalue())


class Frames:
    """A sampling callback that keeps about `count` evenly spaced steps of the denoising.

    Args:
        steps: rows of the plan; the last of them leaves the finished images.
    """

    def __init__(self, steps: int, *, count: int = 50) -> None:
        kept = np.linspace(0, steps - 1, min(count, steps)).round().astype(int)
        self._last = steps - 1
        self._kept: dict[int, list[Tensor]] = {k: [] for k in kept.tolist()}
        self._chain: dict[int, Tensor] = {}

    def __call__(self, k: int, x: Tensor) -> None:
        if k in self._kept:
            self._chain[k] = to_uint8(x).cpu()
        # Only now: a batch that ran out of memory starts again in parts, which overwrite what it left.
        if k == self._last:
            for step, pixels in self._chain.items():
                self._kept[step].append(pixels)

    def grids(self, *, columns: int, upscale: int = 1) -> list[np.ndarray]:
        """The steps in order, each with the images of all batches as one grid."""
        return [grid(torch.cat(parts), columns=columns, upscale=upscale) for parts in self._kept.values()]


def _picture(name: str, array: np.ndarray) -> Any:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 3 or 0 in array.shape[:2]:
        raise TypeError(f"{name} must be a uint8 array [H, W, C], got {checks.text(array)}")
    if array.shape[-1] not in (1, 3):
        raise ValueError(f"images have {array.shape[-1]} channels: PNG and GIF take 1 or 3, npz any number")
    return require("PIL.Image").fromarray(array[..., 0] if array.shape[-1] == 1 else array)
