"""Files: written whole or not at all, with errors that name them."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")


def write_atomically(path: str | Path, data: bytes, *, durable: bool = False) -> None:
    """Writes a temporary file in the folder of `path`, then puts it in the place of `path`.

    Args:
        durable: wait until it has reached the disk, so that it outlives a power cut.

    Raises:
        OSError: it can't be written; the text names `path`, and what stood there before still does.
    """
    path = Path(path)
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    if durable:
        _sync_folder(path)


def link_atomically(source: str | Path, path: str | Path) -> None:
    """Gives the file `source` the second name `path`, or copies it where the file system has no hard links.

    Raises:
        OSError: neither can be done; the text names `path`, and what stood there before still does.
    """
    with _replacing(Path(path)) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def remove_leftovers(folder: str | Path, names: str) -> None:
    """Removes what killed writes of files whose names match the expression `names` left in a folder."""
    for path in Path(folder).glob(".*.tmp"):
        if (match := TEMPORARY.fullmatch(path.name)) and re.fullmatch(names, match[1]):
            path.unlink(missing_ok=True)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`; the file written there takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)  # of a killed process with this very number
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _named(error, path) from error


def _sync_folder(path: Path) -> None:
    if os.name != "posix":  # elsewhere a folder can't be opened
        return
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _named(error, path) from error


def _named(error: OSError, path: Path) -> OSError:
    return OSError(f"{path} can't be written: {error.strerror or error}")


def check_writable(folder: str | Path) -> None:
    """Raise OSError unless files could be written into `folder`, which may be yet to be made."""
    folder = Path(folder)
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{folder} can't be written to: {place} is a file, expected a folder")
    try:  # permissions alone don't tell: a system's own folders refuse files even from root
        with tempfile.NamedTemporaryFile(dir=place, prefix=".", suffix=".tmp"):
            pass
    except OSError as error:
        raise OSError(f"{folder} can't be written to: {place.absolute()} takes no file ({error.strerror})") from error
