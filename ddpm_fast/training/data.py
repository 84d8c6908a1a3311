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
from .cifar import cifar_file, find_cifar, is_tar, read_cifar, tar_files
from .extras import require
from .files import write_atomically
from .folders import read_folder
from .readers import find_idx, image_files, is_zip, read_idx_files, resize
from .workers import Ahead

SKIPPED = "skipped.txt"


class Images(NamedTuple):
    """A data set in memory."""

    pixels: Tensor  # uint8 [N, C, H, W]
    labels: Tensor | None  # int64 [N]
    class_names: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()  # of each image that was left out, which and why

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
        return self._replace(pixels=self.pixels[index], labels=None if self.labels is None else self.labels[index])

    def fingerprint(self) -> dict[str, int]:
        """What a resumed run compares to know that it sees the same images in the same order."""
        crc = zlib.crc32(self.pixels.contiguous().numpy().data)
        if self.labels is not None:
            crc = zlib.crc32(self.labels.contiguous().numpy().data, crc)
        return {"images": len(self.pixels), "crc32": crc}


def load_images(
    source: str | Path,
    *,
    size: tuple[int, int] | None = None,
    pad: int = 0,
    cache: str | Path | None = None,
    workers: int = 0,
    skip_bad: bool = False,
    progress: bool = False,
) -> Images:
    """Reads a data set.

    Args:
        source: "digits" (scikit-learn's, the training two thirds), an idx or idx.gz image file (its labels file is
            found by name), a folder that holds `train-images-idx3-ubyte[.gz]`, a folder, zip or tar of CIFAR-10 or
            CIFAR-100 in Python's or the binary format or one file of these, or a folder or zip of images with one
            sub-folder per class. `photos.zip/train` reads the folder `train` inside `photos.zip`. One image in colour
            makes all of them so; what is transparent becomes white.
        size: (height, width) to scale to; the shorter side is fitted and the rest cropped around the centre.
        pad: black pixels added on each side, after scaling.
        cache: folder that keeps decoded image files, verified by their content; None: nothing is kept.
        workers: processes that decode image files; 0: this one.
        skip_bad: leave out image files that can't be read or have another size than most, with a warning and
            `Images.skipped`; else the first is an error.
        progress: show a bar when decoding takes longer than a second.

    Raises:
        ValueError: the source is missing, damaged or of an unknown kind; the text names the file.
    """
    if size is not None:
        size = _checked_size(size)
    pad, workers = checks.integer("pad", pad, 0), checks.integer("workers", workers, 0)
    path = Path(source)
    options = {"workers": workers, "skip_bad": skip_bad, "progress": progress}
    images = _read(path, size, {"cache_folder": None if cache is None else Path(cache), **options})
    pixels = images.pixels
    if size is not None and tuple(pixels.shape[2:]) != size:
        pixels = torch.cat([resize(part, size) for part in pixels.split(1024)])
    if pad:  # without it the pixels stay where they are, perhaps mapped from the cache
        pixels = F.pad(pixels, (pad, pad, pad, pad))
    return images._replace(pixels=pixels)


def _read(path: Path, size: tuple[int, int] | None, options: dict[str, Any]) -> Images:
    """The reader that fits what lies at `path`."""
    if str(path) == "digits":
        return digits("train")
    if path.is_dir() and (idx := find_idx(path)):
        return read_idx(idx)
    open_files = image_files
    if path.is_file() and not is_zip(path):
        if one := cifar_file(path):
            return Images(*read_cifar(path.parent, *one))
        if not is_tar(path):
            return read_idx(path)
        open_files = tar_files
    with open_files(path) as files:
        if cifar := find_cifar(path, files):
            return Images(*read_cifar(path, files, cifar))
        read, skipped = read_folder(path, files, size, **options)
        return Images(*read, skipped)


def write_skipped(out: Path, images: Images) -> None:
    """Lists in `out`/skipped.txt which images were left out and why; removes the list of an earlier run."""
    path = out / SKIPPED
    if images.skipped:
        write_atomically(path, "".join(f"{reason}\n" for reason in images.skipped).encode("utf-8", "surrogateescape"))
    else:
        path.unlink(missing_ok=True)


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
        workers: processes that pick batches ahead of time, from pixels in shared memory; the batches stay the same.
    """

    def __init__(
        self,
        images: Images,
        *,
        seed: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.pixels = images.pixels.to("cpu" if workers else device)
        self.labels = None if images.labels is None else images.labels.to(self.pixels.device)
        self.seed, self.flip = seed, flip
        self._epoch: tuple[int, Any] = (-1, None)
        self._ahead = None
        if checks.integer("workers", workers, 0):
            self._ahead = Ahead(Batches(images, seed=seed, flip=flip), workers)

    def take(self, position: int, count: int) -> tuple[Tensor, Tensor | None]:
        """`count` images from `position` on: x float32 [count, C, H, W] in [-1, 1], y int64 [count] or None."""
        pixels, labels = (self._ahead or self).pick(position, count)
        return to_float(pixels.to(self.device)), None if labels is None else labels.to(self.device)

    def pick(self, position: int, count: int) -> tuple[Tensor, Tensor | None]:
        """The same as uint8."""
        size, parts = len(self.pixels), []
        while count > 0:
            order = self._order(position // size)[:, position % size :][:, :count]
            parts.append(order)
            position, count = position + order.shape[1], count - order.shape[1]
        index, mirrored = torch.cat(parts, dim=1)
        pixels = self.pixels[index]
        if self.flip:
            pixels = torch.where(mirrored.bool()[:, None, None, None], pixels.flip(-1), pixels)
        return pixels, None if self.labels is None else self.labels[index]

    def _order(self, epoch: int) -> Tensor:
        """int64 [2, N]: the images of an epoch, and whether each is mirrored."""
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            size = len(self.pixels)
            order = np.stack([rng.permutation(size), rng.integers(0, 2, size)])
            self._epoch = (epoch, torch.from_numpy(order).to(self.pixels.device))
        return self._epoch[1]
