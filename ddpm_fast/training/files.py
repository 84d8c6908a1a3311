"""Files: written whole or not at all, with errors that name them."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | Path, data: bytes, *, durable: bool = False) -> None:
    """Writes a temporary file in the folder of `path`, then puts it in the place of `path`.

    Args:
        durable: wait until it has reached the disk, so that it outlives a power cut.

    Raises:
        OSError: it can't be written; the text names `path`, and what stood there before still does.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if durable and os.name == "posix":  # elsewhere a folder can't be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise OSError(f"{path} can't be written: {error.strerror or error}") from error


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
