"""Readers without torchvision: MNIST's format, and folders and zips of image files, to uint8 pixels and labels."""

import gzip
import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .extras import require

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
IDX_NAME = re.compile(r"(.*)images([-.])idx3(.*)")
READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile)
MAX_MEMBER = 2**30  # bytes a file in a zip may grow to
CHUNK = 2**24  # bytes read at a time, so that memory is taken for what is there and not for what a header claims

# Pixels uint8 [N, C, H, W], labels int64 [N], the names of the classes.
Read = tuple[Tensor, Tensor | None, tuple[str, ...] | None]
# By name inside the source: how to get a file's bytes, None for a folder.
Files = dict[PurePosixPath, Callable[[], bytes] | None]


def find_idx(folder: Path) -> Path | None:
    """MNIST's training images in a folder, or in a folder of their name inside it, as some archives unpack; or None.

    Raises:
        ValueError: there are only the test images.
    """
    train, test = (
        [p for pattern in (name, f"{name}/{name}") for p in sorted(folder.glob(pattern)) if p.is_file()]
        for name in ("train-images[-.]idx3-ubyte*", "t10k-images[-.]idx3-ubyte*")
    )
    if test and not train:
        raise ValueError(
            f"{folder} holds {test[0].name}, the test images, but no train-images-idx3-ubyte[.gz]: "
            f"add it, or name {test[0]} itself"
        )
    return train[0] if train else None


def read_idx_files(path: Path) -> Read:
    """An idx3 file of uint8 images, gzipped or not, with the idx1 labels file beside it if there.

    Format: http://yann.lecun.com/exdb/mnist (big-endian: 0, 0, type, rank, sizes, data).
    """
    pixels = torch.from_numpy(_read_idx_array(path, rank=3)).unsqueeze(1)
    labels_path = _idx_labels(path)
    if labels_path is None:
        return pixels, None, None
    labels = torch.from_numpy(_read_idx_array(labels_path, rank=1)).long()
    if len(labels) != len(pixels):
        raise ValueError(f"{labels_path} has {len(labels)} labels, {path} has {len(pixels)} images")
    return pixels, labels, tuple(str(i) for i in range(int(labels.max()) + 1))


def _idx_labels(path: Path) -> Path | None:
    match = IDX_NAME.fullmatch(path.name)
    if match is None:
        return None
    name = f"{match[1]}labels{match[2]}idx1{match[3]}".removesuffix(".gz")
    folders = (path.parent, path.parent.parent / name, path.parent.parent / f"{name}.gz")
    found = next((p for folder in folders for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if found is None:
        warnings.warn(f"{path} has no classes: {path.parent / name}[.gz] with its labels is missing", stacklevel=2)
    return found


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
            data = bytearray()
            while chunk := file.read(min(CHUNK, count + 1 - len(data))):
                data += chunk
    except READ_ERRORS as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if len(data) != count or count == 0:
        found = "more" if len(data) > count else len(data)
        raise ValueError(f"{path} should hold {'x'.join(map(str, shape))} bytes, found {found}: truncated or damaged")
    return np.frombuffer(data, np.uint8).reshape(shape)


def is_zip(path: Path) -> bool:
    """Whether a file is a zip, or was meant to be one."""
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"PK" or zipfile.is_zipfile(file)
    except OSError:
        return False


def natural(name: PurePosixPath | str) -> tuple[Any, ...]:
    """A sorting key by which "2" comes before "10", folder by folder."""
    parts = PurePosixPath(name).parts
    split = [[int(s) if i % 2 else s for i, s in enumerate(re.split(r"([0-9]+)", part))] for part in parts]
    return split, parts


@contextmanager
def image_files(path: Path) -> Iterator[Files]:
    """What lies below a folder, in a zip, or in the folder `path` names inside a zip."""
    if path.is_dir():
        found = ((p, PurePosixPath(p.relative_to(path).as_posix())) for p in path.rglob("*"))
        yield {name: None if p.is_dir() else p.read_bytes for p, name in found if p.is_dir() or p.is_file()}
        return
    archive = next((p for p in (path, *path.parents) if p.is_file()), None)
    if archive is None:
        raise ValueError(f"{path} doesn't exist: expected 'digits', an idx file, a folder or a zip of images")
    inside = PurePosixPath(path.relative_to(archive).as_posix())
    try:
        opened = zipfile.ZipFile(archive)
    except Exception as error:  # BadZipFile, but also what a damaged directory trips over
        wrong = "is a damaged zip" if is_zip(archive) else "can't be read"
        raise ValueError(f"{archive} {wrong}: {error}") from error
    with opened as file:
        files: Files = {}
        for info in file.infolist():
            name = PurePosixPath(info.filename.replace("\\", "/").lstrip("/"))  # as some programs write them
            folder = info.filename.endswith(("/", "\\"))
            if name != inside and name.is_relative_to(inside):
                files[name.relative_to(inside)] = None if folder else partial(_member, file, info)
        yield files


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_MEMBER:
        raise ValueError(f"it claims to have {info.file_size} bytes")
    return archive.read(info)


def check_depth(root: Path, names: list[PurePosixPath]) -> None:
    """Raise ValueError where images lie in folders that are no neighbours, of which none can be the classes."""
    folders = sorted({name.parent for name in names}, key=natural)
    levels = {folder.parent if folder.name else None for folder in folders}
    if len(levels) > 1:
        found = ", ".join(f"{root}/{folder}" for folder in folders[:3])
        how = "none of them beside sub-folders" if None in levels else f"or --data {root}/{folders[-1].parent}"
        raise ValueError(f"{root}: expected one sub-folder per class, {how}; found images in {found}...")


def classes(
    root: Path, files: Files, names: list[PurePosixPath], skipped: Container[str] = ()
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels int64 [N] of the images called `names` but not `skipped`, and the classes' names; `check_depth` first.

    The folder an image lies in is its class; there are none where all lie in one folder.
    """
    folders = {name.parent for name in names}
    if len(folders) == 1:
        return None, None
    kept = [name.parent for name in names if str(name) not in skipped]
    parent = names[0].parent.parent
    every = folders | {p for p, read in files.items() if read is None and p.parent == parent and not hidden(p)}
    numbers = {folder: number for number, folder in enumerate(sorted(every, key=natural))}
    for folder in sorted(every - set(kept), key=natural):
        warnings.warn(f"{root}/{folder} holds no images: class {numbers[folder]} stays empty", stacklevel=2)
    return torch.tensor([numbers[folder] for folder in kept]), tuple(folder.name for folder in numbers)


def hidden(name: PurePosixPath) -> bool:
    """Whether it is there for a program and not for us."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


def decode(name: str, data: bytes) -> Tensor:
    """Bytes of an image file to uint8 [C, H, W], 1 channel if it is grey, else 3; what is transparent becomes white."""
    pil, ops = require("PIL.Image"), require("PIL.ImageOps")
    try:
        if not data:
            raise ValueError("it is empty")
        opened = pil.open(io.BytesIO(data))
        if opened.format == "PNG":  # Pillow decodes pixels without a look at their checksum
            pil.open(io.BytesIO(data)).verify()
        image = ops.exif_transpose(opened)
        image.load()
        array = _eight_bits(pil, image, opened.format)
    except pil.UnidentifiedImageError as error:
        raise ValueError(f"{name} can't be read: it is no image") from error
    except Exception as error:  # a damaged file raises whatever its decoder happens to trip over
        raise ValueError(f"{name} can't be read: {error}") from error
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()


def _eight_bits(pil: Any, image: Any, file_format: str | None) -> np.ndarray:
    """uint8 [H, W] of a grey image, [H, W, 3] of another."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):  # 0...65535
        return np.array((np.array(image).astype(np.int64) * 255 + 32767) // 65535, dtype=np.uint8)
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode} has no fixed white: convert it to 8 or 16 bits a channel")
    grey, palette = image.mode in ("1", "L", "LA", "La"), image.mode in ("P", "PA")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image)
    array = np.array(image.convert("RGB"))
    grey = grey or (palette and bool((array == array[..., :1]).all()))
    return np.ascontiguousarray(array[..., 0]) if grey else array


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [N, C, H, W] scaled to cover `size`, then cropped around the centre."""
    (height, width), (h, w) = size, pixels.shape[2:]
    scale = max(height / h, width / w)
    cover = (max(height, round(h * scale)), max(width, round(w * scale)))
    x = F.interpolate(pixels.float(), cover, mode="bilinear", antialias=True, align_corners=False)
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    return x[:, :, top : top + height, left : left + width].round().clamp(0, 255).to(torch.uint8)
