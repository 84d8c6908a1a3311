"""The log of a run: a file with one JSON object a line."""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import write_atomically


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; what a crash tore is left out."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def write_log(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Puts these lines in the place of whatever the file holds."""
    write_atomically(path, _text(lines))


class Log:
    """Adds lines to a file; a line that doesn't fit on a full disk waits for the next one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._waiting: list[Mapping[str, Any]] = []

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds one line, after those that wait; where that fails, a warning."""
        self._waiting.append(line)
        try:
            _append(self.path, _text(self._waiting))
        except OSError as error:
            warnings.warn(f"{self.path} can't be written: {error.strerror or error}", stacklevel=3)
        else:
            self._waiting = []


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)  # the part that did fit
            raise


def _text(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
