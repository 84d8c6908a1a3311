"""Data sets in memory, and the order in which images are trained on.

Every reader returns `Images`: uint8 pixels in memory, turned into float [-1, 1] one batch at a time.
"""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _checks as checks
from .extras import require
from .readers import find_idx, image_files, is_zip, read_files, read_idx_files, resize


class Images(NamedTuple):
    """A data set in memory."""

    pixels: Tensor  # uint8 [N, C, H, W]
    labels: Tensor | None  # int64 [N]
    class_names: tuple[str, ...] | None = None

    @property
    def classes(self) -> Tensor:
        """The labels, where there must be some."""
        if self.labels is None:
            raise ValueError("these images have no labels")
        return self.labels

    @property
    def num_classes(self) -> int | None:
        """How many classes there are, also those without an image; None without labels."""
        if self.labels is None:
            return None
        return max(len(self.class_names or ()), int(self.labels.max()) + 1)

    def select(self, index: Tensor) -> "Images":
        """The images at `index` (int64 or bool [N])."""
        return Images(self.pixels[index], None if self.labels is None else self.labels[index], self.class_names)

    def fingerprint(self) -> dict[str, int]:
        """What a resumed run compares to know that it sees the same images in the same order."""
        crc = zlib.crc32(self.pixels.contiguous().numpy().data)
        if self.labels is not None:
            crc = zlib.crc32(self.labels.contiguous().numpy().data, crc)
        return {"images": len(self.pixels), "crc32": crc}


def load_images(source: str | Path, *, size: tuple[int, int] | None = None, pad: int = 0) -> Images:
    """Reads a data set.

    Args:
        source: "digits" (scikit-learn's, the training two thirds), an idx or idx.gz image file (its labels file is
            found by name), a folder that holds `train-images-idx3-ubyte[.gz]`, or a folder or zip of images with one
            sub-folder per class. `photos.zip/train` reads the folder `train` inside `photos.zip`. One image in colour
            makes all of them so; what is transparent becomes white.
        size: (height, width) to scale to; the shorter side is fitted and the rest cropped around the centre.
        pad: black pixels added on each side, after scaling.

    Raises:
        ValueError: the source is missing, damaged or of an unknown kind; the text names the file.
    """
    if size is not None:
        size = _checked_size(size)
    pad = checks.integer("pad", pad, 0)
    path = Path(source)
    if str(source) == "digits":
        images = digits("train")
    elif path.is_file() and not is_zip(path):
        images = read_idx(path)
    elif path.is_dir() and (idx := find_idx(path)):
        images = read_idx(idx)
    else:
        with image_files(path) as files:
            images = Images(*read_files(path, files, size))
    pixels = images.pixels
    if size is not None and tuple(pixels.shape[2:]) != size:
        pixels = torch.cat([resize(part, size) for part in pixels.split(1024)])
    return images._replace(pixels=F.pad(pixels, (pad, pad, pad, pad)))


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    sides = checks.integers("size", size, 1)
    if len(sides) != 2:
        raise ValueError(f"size must be (height, width), got {size}")
    return sides[0], sides[1]


def digits(split: str = "train", *, seed: int = 0) -> Images:
    """scikit-learn's 1,797 handwritten digits, uint8 [N, 1, 8, 8], labels 0-9.

    Args:
        split: "train" (two thirds of each class), "held_out" (the other third) or "all".
        seed: chooses who is held out.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split is {split!r}, expected 'train', 'held_out' or 'all'")
    raw = require("sklearn.datasets").load_digits()
    pixels = torch.from_numpy((raw.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    images = Images(pixels, torch.from_numpy(raw.target.astype(np.int64)), tuple("0123456789"))
    return images if split == "all" else images.select(stratified(images, 2 / 3, seed=seed) == (split == "train"))


def stratified(images: Images, share: float, *, seed: int) -> Tensor:
    """A bool [N] mask that picks `share` of every class at random; ValueError without labels."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(len(images.pixels), dtype=torch.bool)
    for label in images.classes.unique():
        members = (images.classes == label).nonzero().flatten().numpy()
        mask[rng.permutation(members)[: round(share * len(members))]] = True
    return mask


def read_idx(path: str | Path) -> Images:
    """MNIST's format: an idx3 file of uint8 images, gzipped or not, with the idx1 labels file beside it if there."""
    return Images(*read_idx_files(Path(path)))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to float32 [-1, 1]."""
    return pixels.float() / 127.5 - 1


class Batches:
    """Endless shuffled batches, in which what stands at a position depends on (seed, position) alone.

    Position p is the p-th image drawn since the start of training: image `order(p // N)[p % N]`, where the order of an
    epoch (and who is mirrored in it) comes from (seed, epoch). So a resumed run needs only the position.

    Args:
        images: the data; its pixels live on `device` from now on.
        seed: of the order and the flips, >= 0.
        flip: mirror each image left-right with probability 1/2.
    """

    def __init__(
        self, images: Images, *, seed: int = 0, flip: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self.pixels = images.pixels.to(device)
        self.labels = None if images.labels is None else images.labels.to(device)
        self.seed, self.flip = seed, flip
        self._epoch: tuple[int, Any] = (-1, None)

    def take(self, position: int, count: int) -> tuple[Tensor, Tensor | None]:
        """`count` images from `position` on: x float32 [count, C, H, W] in [-1, 1], y int64 [count] or None."""
        size, parts = len(self.pixels), []
        while count > 0:
            order = self._order(position // size)[:, position % size :][:, :count]
            parts.append(order)
            position, count = position + order.shape[1], count - order.shape[1]
        index, mirrored = torch.cat(parts, dim=1)
        x = to_float(self.pixels[index])
        if self.flip:
            x = torch.where(mirrored.bool()[:, None, None, None], x.flip(-1), x)
        return x, None if self.labels is None else self.labels[index]

    def _order(self, epoch: int) -> Tensor:
        """int64 [2, N]: the images of an epoch, and whether each is mirrored."""
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            size = len(self.pixels)
            order = np.stack([rng.permutation(size), rng.integers(0, 2, size)])
            self._epoch = (epoch, torch.from_numpy(order).to(self.pixels.device))
        return self._epoch[1]
