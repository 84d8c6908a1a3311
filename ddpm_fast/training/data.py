"""Image readers without torchvision, and the order in which images are trained on.

Every reader returns `Images`: uint8 pixels in memory, turned into float [-1, 1] one batch at a time.
"""

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .extras import require

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
IDX_NAME = re.compile(r"(.*)images([-.])idx3(.*)")
READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile)


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
            sub-folder per class. `photos.zip/train` reads the folder `train` inside `photos.zip`.
        size: (height, width) to scale to; the shorter side is fitted and the rest cropped around the centre.
        pad: black pixels added on each side, after scaling.

    Raises:
        ValueError: the source is missing, damaged or of an unknown kind; the text names the file.
    """
    path = Path(source)
    if str(source) == "digits":
        images = digits("train")
    elif path.is_dir():
        idx = sorted(path.glob("train-images[-.]idx3-ubyte*"))
        images = read_idx(idx[0]) if idx else _read_files(path, _folder_files(path), size)
    elif path.is_file() and not zipfile.is_zipfile(path):
        images = read_idx(path)
    else:
        images = _read_files(path, _zip_files(path), size)
    return _fit(images, size, pad)


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
    """MNIST's format: an idx3 file of uint8 images, gzipped or not, with the idx1 labels file beside it if there.

    Format: http://yann.lecun.com/exdb/mnist (big-endian: 0, 0, type, rank, sizes, data).
    """
    path = Path(path)
    pixels = torch.from_numpy(_read_idx_array(path, rank=3)).unsqueeze(1)
    labels_path = _idx_labels(path)
    if labels_path is None:
        return Images(pixels, None)
    labels = torch.from_numpy(_read_idx_array(labels_path, rank=1)).long()
    if len(labels) != len(pixels):
        raise ValueError(f"{labels_path} has {len(labels)} labels, {path} has {len(pixels)} images")
    return Images(pixels, labels, tuple(str(i) for i in range(int(labels.max()) + 1)))


def _idx_labels(path: Path) -> Path | None:
    match = IDX_NAME.fullmatch(path.name)
    if match is None:
        return None
    plain = path.with_name(f"{match[1]}labels{match[2]}idx1{match[3]}".removesuffix(".gz"))
    return next((p for p in (plain, plain.with_name(plain.name + ".gz")) if p.is_file()), None)


def _read_idx_array(path: Path, rank: int) -> np.ndarray:
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as file:
            head = file.read(4 + 4 * rank)
            if head[:2] != b"\0\0" or len(head) != 4 + 4 * rank:
                raise ValueError(f"{path} is neither an idx file nor a zip of images")
            if head[2] != 8 or head[3] != rank:
                raise ValueError(
                    f"{path} holds idx type {head[2]:#x} of rank {head[3]}, expected uint8 (0x8), rank {rank}"
                )
            shape = tuple(int(n) for n in np.frombuffer(head, ">u4", offset=4))
            count = int(np.prod(shape, dtype=object))
            data = file.read()
    except READ_ERRORS as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if len(data) != count or count == 0:
        raise ValueError(
            f"{path} should hold {'x'.join(map(str, shape))} bytes, found {len(data)}: truncated or damaged"
        )
    return np.frombuffer(bytearray(data), np.uint8).reshape(shape)


# One entry per image: its name inside the source, and how to get its bytes.
Files = Iterator[tuple[str, Callable[[], bytes]]]


def _folder_files(root: Path) -> Files:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path.read_bytes


def _zip_files(path: Path) -> Files:
    archive = next((p for p in (path, *path.parents) if p.is_file()), None)
    if archive is None:
        raise ValueError(f"{path} doesn't exist: expected 'digits', an idx file, a folder or a zip of images")
    inside = "".join(f"{part}/" for part in path.relative_to(archive).parts)
    try:
        with zipfile.ZipFile(archive) as file:
            for name in sorted(file.namelist()):
                if name.startswith(inside) and not name.endswith("/"):
                    yield name.removeprefix(inside), partial(file.read, name)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} can't be read: {error}") from error


def _read_files(root: Path, files: Files, size: tuple[int, int] | None) -> Images:
    """Decodes every image under `root`; the folder a file lies in is its class."""
    pixels: list[Tensor] = []
    folders: list[PurePosixPath] = []
    channels = None
    for name, read in files:
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
        if hidden or path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        image = _decode(f"{root}/{name}", read, channels)
        if size is not None:
            image = _resize(image.unsqueeze(0), size)[0]
        elif pixels and image.shape != pixels[0].shape:
            raise ValueError(
                f"{root}/{name} is {_size(image)}, the images before it are {_size(pixels[0])}: give a size"
            )
        channels = image.shape[0]
        pixels.append(image)
        folders.append(path.parent)
    if not pixels:
        raise ValueError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    classes = sorted(set(folders))
    if len(classes) == 1:
        return Images(torch.stack(pixels), None)
    parents = sorted({folder.parent if folder.name else None for folder in classes}, key=str)
    if len(parents) > 1:
        found = ", ".join(f"{root}/{folder}" for folder in classes[:3])
        raise ValueError(f"{root}: expected one sub-folder per class, found images in {found}...: name one level")
    number = {folder: i for i, folder in enumerate(classes)}
    labels = torch.tensor([number[folder] for folder in folders])
    return Images(torch.stack(pixels), labels, tuple(folder.name for folder in classes))


def _decode(name: str, read: Callable[[], bytes], channels: int | None) -> Tensor:
    """Bytes of an image file to uint8 [C, H, W]: 1 channel if it is grey, else 3, unless `channels` says which."""
    pil, ops = require("PIL.Image"), require("PIL.ImageOps")
    try:
        image = ops.exif_transpose(pil.open(io.BytesIO(read())))
        image.load()
    except Exception as error:  # a damaged file raises whatever its decoder happens to trip over
        raise ValueError(f"{name} can't be read: {error}") from error
    if image.mode[0] in "IF":
        raise ValueError(f"{name} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
    grey = channels == 1 or (channels is None and image.mode in ("1", "L", "LA"))
    array = np.array(image.convert("L" if grey else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()


def _size(image: Tensor) -> str:
    return "x".join(str(n) for n in image.shape)


def _fit(images: Images, size: tuple[int, int] | None, pad: int) -> Images:
    pixels = images.pixels
    if size is not None and tuple(pixels.shape[2:]) != tuple(size):
        pixels = torch.cat([_resize(part, size) for part in pixels.split(1024)])
    return images._replace(pixels=F.pad(pixels, (pad, pad, pad, pad)))


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [N, C, H, W] scaled to cover `size`, then cropped around the centre."""
    (height, width), (h, w) = size, pixels.shape[2:]
    scale = max(height / h, width / w)
    cover = (max(height, round(h * scale)), max(width, round(w * scale)))
    x = F.interpolate(pixels.float(), cover, mode="bilinear", antialias=True, align_corners=False)
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    return x[:, :, top : top + height, left : left + width].round().clamp(0, 255).to(torch.uint8)


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
