"""Folders and zips of image files to pixels and labels.

They are decoded once and then come out of the cache; files that can't be read are an error, or skipped and listed.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..progress import progress_bar
from . import cache
from .readers import IMAGE_SUFFIXES, READ_ERRORS, Files, Read, check_depth, classes, decode, hidden, natural, resize
from .workers import ordered

Item = TypeVar("Item")
LISTED = 10  # skipped images that a warning names


class _File(NamedTuple):
    """An image file's contents, or why they can't be had."""

    name: str
    data: bytes | None
    problem: str = ""


class _Image(NamedTuple):
    """What became of a file."""

    pixels: np.ndarray | None  # uint8 [C, H, W]
    problem: str  # with the name of the file
    digest: bytes


def read_folder(
    root: Path,
    files: Files,
    size: tuple[int, int] | None,
    *,
    cache_folder: Path | None = None,
    workers: int = 0,
    skip_bad: bool = False,
    progress: bool = False,
) -> tuple[Read, tuple[str, ...]]:
    """Every image under `root`, and why others were skipped; the folder a file lies in is its class.

    One image in colour makes all so.

    Args:
        cache_folder: where decoded images are kept; None: nowhere.
        workers: processes that decode; 0: this one.
        skip_bad: leave out what can't be read or has another size than most; else it is an error.
        progress: show a bar when it takes longer than a second.
    """
    names = [name for name in sorted(files, key=natural) if files[name] is not None and _is_image(name)]
    if not names:
        raise ValueError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    check_depth(root, names)
    opened = (_open(root, name, files[name]) for name in names)
    place = cache.cache_file(cache_folder, root, size) if cache_folder else None
    found: tuple[Tensor, dict[str, str]] | None = None
    if place is not None and place.exists():
        hashes = _with_bar(map(_digest, opened), len(names), "checking the cache", progress)
        found = cache.load(place, cache.fingerprint(zip(names, hashes, strict=True)))
    if found is None or (found[1] and not skip_bad):
        opened = (_open(root, name, files[name]) for name in names)
        images = ordered(partial(_decode, size=size), opened, workers)
        pixels, skipped, digests = _collect(root, names, _with_bar(images, len(names), "decoding", progress), skip_bad)
        if place is not None:
            cache.save(place, cache.fingerprint(zip(names, digests, strict=True)), pixels, skipped)
    else:
        pixels, skipped = found
    labels, class_names = classes(root, files, names, skipped)
    return (pixels, labels, class_names), _report(root, names, skipped)


def _is_image(name: PurePosixPath) -> bool:
    return not hidden(name) and name.suffix.lower() in IMAGE_SUFFIXES


def _open(root: Path, name: PurePosixPath, read: Callable[[], bytes] | None) -> _File:
    try:
        return _File(f"{root}/{name}", read() if read else None)
    except (*READ_ERRORS, ValueError, RuntimeError) as error:  # also a zip's unknown compression, or its password
        return _File(f"{root}/{name}", None, f"{root}/{name} can't be read: {error}")


def _digest(file: _File) -> bytes:
    return b"" if file.data is None else cache.content_hash(file.data)


def _decode(file: _File, size: tuple[int, int] | None) -> _Image:
    if file.data is None:
        return _Image(None, file.problem, b"")
    try:
        pixels = decode(file.name, file.data)
    except ValueError as error:
        return _Image(None, str(error), _digest(file))
    return _Image((pixels if size is None else resize(pixels[None], size)[0]).numpy(), "", _digest(file))


def _with_bar(items: Iterator[Item], total: int, description: str, show: bool) -> Iterator[Item]:
    with progress_bar(total, description, leave=False, disable=not show, unit="image", delay=1) as bar:
        for item in items:
            yield item
            bar.update()


def _collect(
    root: Path, names: list[PurePosixPath], images: Iterator[_Image], skip_bad: bool
) -> tuple[Tensor, dict[str, str], list[bytes]]:
    """Pixels uint8 [N, C, H, W] of the good images, reasons against the others by name, and all hashes."""
    good: dict[str, np.ndarray] = {}
    skipped, digests = dict[str, str](), list[bytes]()
    for name, image in zip(map(str, names), images, strict=True):
        digests.append(image.digest)
        if image.pixels is None:
            skipped[name] = image.problem
        else:
            good[name] = image.pixels
        if not skip_bad:
            _check(f"{root}/{name}", image, next(iter(good.values()), None))
    if not good:
        raise ValueError(f"none of the {len(names)} images of {root} can be read: {next(iter(skipped.values()))}")
    ((usual, _),) = Counter(_sides(pixels) for pixels in good.values()).most_common(1)
    for name in [name for name, pixels in good.items() if _sides(pixels) != usual]:
        skipped[name] = f"{root}/{name} is {_sides(good.pop(name))}, most images are {usual}"
    return _stack(good), skipped, digests


def _check(name: str, image: _Image, first: np.ndarray | None) -> None:
    if image.pixels is None:
        raise ValueError(f"{image.problem}; --skip-bad leaves such images out")
    if first is not None and _sides(image.pixels) != _sides(first):
        sides = f"{_sides(image.pixels)}, the images before it are {_sides(first)}"
        raise ValueError(f"{name} is {sides}: give a size (--size), or leave such images out (--skip-bad)")


def _stack(images: dict[str, np.ndarray]) -> Tensor:
    """uint8 [N, C, H, W]; empties the dict, so that the images aren't in memory twice."""
    channels, (_, height, width) = max(map(len, images.values())), next(iter(images.values())).shape
    pixels = np.empty((len(images), channels, height, width), np.uint8)
    for k in reversed(range(len(images))):
        pixels[k] = images.popitem()[1]
    return torch.from_numpy(pixels)


def _sides(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[2]}"


def _report(root: Path, names: list[PurePosixPath], skipped: dict[str, str]) -> tuple[str, ...]:
    """The reasons in the order of the images, after a warning that counts them and names the first."""
    reasons = tuple(skipped[str(name)] for name in names if str(name) in skipped)
    if reasons:
        more = f"; and {len(reasons) - LISTED} more" if len(reasons) > LISTED else ""
        listed = "; ".join(reasons[:LISTED]) + more
        warnings.warn(f"skipped {len(reasons)} of the {len(names)} images of {root}: {listed}", stacklevel=3)
    return reasons
