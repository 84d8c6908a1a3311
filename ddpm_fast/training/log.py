"""The log of a run: a file with one JSON object a line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .files import write_atomically


def read_log(path: str | Path) -> list[dict[str, float]]:
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


def write_log(path: str | Path, lines: Iterable[Mapping[str, float]]) -> None:
    """Puts these lines in the place of whatever the file holds."""
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def append_log(path: str | Path, line: Mapping[str, float]) -> None:
    """Adds one line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
