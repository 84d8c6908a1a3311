"""Images held out of training: the loss of the averaged weights on them, always at the same timesteps and noise."""

import numpy as np
import torch

from ..diffusion import Diffusion
from ..engine import eval_mode
from ..ops import NoiseState
from .data import Images, to_float
from .recipe import Recipe


def split(images: Images, share: float, seed: int) -> tuple[Images, Images | None]:
    """(what is trained on, what is held out), chosen by `seed` alone; None for a share of 0.

    Raises:
        ValueError: one of the parts would be empty.
    """
    if share == 0:
        return images, None
    size = len(images.pixels)
    count = round(share * size)
    if not 0 < count < size:
        raise ValueError(f"holdout {share} of {size} images is {count}: expected 1 to {size - 1}")
    order = torch.from_numpy(np.random.default_rng([seed, 0, 0]).permutation(size))  # three words: no epoch's order
    return images.select(order[count:].sort().values), images.select(order[:count])


def holdout_loss(diffusion: Diffusion, images: Images, recipe: Recipe, device: torch.device) -> float:
    """The mean loss of `ema_model`: image i of N at timestep (i + 1/2) T / N, with noise of a call never made."""
    size, step, total = len(images.pixels), recipe.batch_size // recipe.accumulate, torch.zeros((), device=device)
    conditional = diffusion.num_classes is not None
    with eval_mode(diffusion.ema_model) as model, torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
        for first in range(0, size, step):
            index = torch.arange(first, min(first + step, size))
            x, y = to_float(images.pixels[index].to(device)), images.classes[index].to(device) if conditional else None
            t = ((2 * index + 1) * diffusion.num_timesteps // (2 * size)).to(device)
            noise = NoiseState.at(recipe.seed, 0, first, device)  # training's calls count from 1
            total += len(x) * diffusion.loss_of(model, x, t, y, noise)
    return float(total) / size
