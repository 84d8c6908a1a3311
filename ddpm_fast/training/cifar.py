"""CIFAR-10 and CIFAR-100, as their authors distribute them: Python's and the binary format.

Format: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from .readers import READ_ERRORS, Files, Read
from .unpickle import unpickle

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
MAX_FILE = 2**29  # bytes; the largest, CIFAR-100's training images, has 155 MB


class _Layout(NamedTuple):
    """Where a variant keeps what."""

    train: tuple[str, ...]
    test: str
    meta: str  # the names of the classes
    key: str = ""  # Python's format: of the labels in a batch, and with "_names" for "s" of the names in `meta`
    label_bytes: int = 1  # binary format: before the pixels of each image, the last of them the label

    @property
    def names_key(self) -> str:
        return self.key.removesuffix("s") + "_names"


BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
LAYOUTS = (
    _Layout(BATCHES, "test_batch", "batches.meta", key="labels"),
    _Layout(tuple(f"{b}.bin" for b in BATCHES), "test_batch.bin", "batches.meta.txt"),
    _Layout(("train",), "test", "meta", key="fine_labels"),
    _Layout(("train.bin",), "test.bin", "fine_label_names.txt", label_bytes=2),
)


class Cifar(NamedTuple):
    """A CIFAR found in a source."""

    folder: PurePosixPath
    layout: _Layout
    batches: tuple[str, ...]


def find_cifar(root: Path, files: Files) -> Cifar | None:
    """CIFAR's training images among `files`, or in a folder there; None if it isn't there.

    Raises:
        ValueError: some of its files are missing.
    """
    present = {name for name, read in files.items() if read is not None and len(name.parts) <= 2}
    for folder in sorted({name.parent for name in present}):
        for layout in LAYOUTS:
            found = [name for name in (*layout.train, layout.test) if folder / name in present]
            # "train" alone may be anything.
            if not found or (len(layout.train) == 1 and folder / layout.meta not in present):
                continue
            for name in layout.train:
                if folder / name not in present:
                    raise ValueError(f"{root}/{folder / name} is missing: {root} holds only {', '.join(found)}")
            return Cifar(folder, layout, layout.train)
    return None


def cifar_file(path: Path) -> tuple[Files, Cifar] | None:
    """A single file of CIFAR with what lies beside it, if it is one by its name and its company."""
    for layout in LAYOUTS:
        if path.name in (*layout.train, layout.test) and (path.parent / layout.meta).is_file():
            files: Files = {PurePosixPath(p): (path.parent / p).read_bytes for p in (path.name, layout.meta)}
            return files, Cifar(PurePosixPath(), layout, (path.name,))
    return None


def is_tar(path: Path) -> bool:
    """Whether a file is a tar, compressed or not."""
    try:
        return tarfile.is_tarfile(path)
    except READ_ERRORS:
        return False


@contextmanager
def tar_files(path: Path) -> Iterator[Files]:
    """CIFAR's files in a tar, compressed or not; all at once, since a .gz can only be read from its start."""
    wanted = {name for layout in LAYOUTS for name in (*layout.train, layout.meta)}
    files: Files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isfile() or name.name not in wanted or len(name.parts) > 2:
                    continue
                if member.size > MAX_FILE:
                    raise ValueError(f"{path}/{name} has {member.size} bytes: no file of CIFAR is as large")
                file = archive.extractfile(member)
                files[name] = partial(bytes, file.read() if file else b"")
    except (*READ_ERRORS, tarfile.TarError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not files:
        raise ValueError(f"{path} holds no CIFAR, all that is read from a tar: unpack it, or make it a zip")
    yield files


def read_cifar(root: Path, files: Files, found: Cifar) -> Read:
    """Pixels, labels and class names of what `find_cifar` found; ValueError names the file that is damaged."""
    folder, layout, batches = found
    read = _read_pickled if layout.key else _read_binary
    parts = [_named(root, files, folder / name, partial(read, layout=layout)) for name in batches]
    labels = np.concatenate([part[1] for part in parts])
    count = 100 if len(layout.train) == 1 else 10
    names = tuple(str(k) for k in range(count))
    if folder / layout.meta in files:
        names = _named(root, files, folder / layout.meta, partial(_names, layout=layout, count=count))
    for name, part in zip(batches, parts, strict=True):
        if int(part[1].min()) < 0 or int(part[1].max()) >= count:
            raise ValueError(f"{root}/{folder / name} has labels {part[1].min()} to {part[1].max()} of {count} classes")
    pixels = np.concatenate([part[0] for part in parts]).reshape(-1, *SHAPE)
    return torch.from_numpy(pixels), torch.from_numpy(labels), names


def _named(root: Path, files: Files, name: PurePosixPath, parse: Callable[[bytes], Any]) -> Any:
    """What `parse` makes of a file; its errors name the file."""
    read = files[name]
    assert read is not None
    try:
        return parse(read())
    except (*READ_ERRORS, ValueError) as error:
        raise ValueError(f"{root}/{name} can't be read: {error}") from error


def _read_pickled(data: bytes, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    batch = unpickle(data)
    pixels, labels = batch.get("data"), batch.get(layout.key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (len(pixels), PIXELS):
        raise ValueError(f"expected 'data', uint8 [N, {PIXELS}]: truncated or damaged")
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise ValueError(f"expected {layout.key!r}, a list of numbers")
    if len(labels) != len(pixels) or not labels:
        raise ValueError(f"{len(labels)} labels for {len(pixels)} images")
    return pixels, np.array(labels, dtype=np.int64)


def _read_binary(data: bytes, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    record = layout.label_bytes + PIXELS
    if len(data) % record or not data:
        raise ValueError(f"{len(data)} bytes aren't images of {record} each: truncated or damaged")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, layout.label_bytes :], records[:, layout.label_bytes - 1].astype(np.int64)


def _names(data: bytes, layout: _Layout, count: int) -> tuple[str, ...]:
    raw = unpickle(data).get(layout.names_key) if layout.key else data.decode("utf-8").split()
    names = tuple(n.decode("latin1") if isinstance(n, bytes) else str(n) for n in raw) if isinstance(raw, list) else ()
    if len(names) != count:
        raise ValueError(f"{len(names)} names of classes, expected {count}")
    return names
