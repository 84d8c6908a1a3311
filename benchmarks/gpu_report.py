"""What a part of the GPU suite has measured, on disk after every group, so that the next run goes on from there."""

import hashlib
import json
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import OURS, ROOT, Row, header, markdown, markdown_header, progress, write_json

SAME = ("machine", "versions", "sources", "notes")  # of two headers whose rows may stand in one table


class OutOfTime(BaseException):
    """The run's time is spent. No Exception: what catches a contender's failure lets it pass."""


class Clock:
    """The time of a run, `minutes` or without an end."""

    def __init__(self, minutes: float | None) -> None:
        self.start = self.last = time.monotonic()
        self.minutes, self.longest = minutes, 0.0

    def check(self) -> None:
        """Raise OutOfTime where it is spent, or would be after another step as long as the longest one so far."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        if self.minutes is not None and now - self.start + self.longest > 60 * self.minutes:
            raise OutOfTime


def clocks() -> str | None:
    """Return what nvidia-smi says of clocks, power and temperature."""
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def sources() -> str:
    """Return a digest of the code: rows of other code don't belong in one table."""
    digest = hashlib.sha256()
    for folder in ("csrc", "ddpm_fast", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu") or path.parent.name == "tables":
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Report:
    """One part's rows in `<out>/<part>.json` and `.md`.

    Args:
        out: the folder.
        part: of the suite.
        device: what is measured.
        notes: the options that the rows depend on.
        fresh: begin anew, whatever is there.
    """

    def __init__(self, out: Path, part: str, device: torch.device, notes: dict[str, Any], fresh: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.part = out / part, part
        self.head = header(device) | {"sources": sources(), "notes": notes, "clocks before": clocks()}
        self.rows = [] if fresh else self._earlier()
        if self.rows:
            progress(f"{part}: going on after {len(self.rows)} rows of an earlier run")

    def _earlier(self) -> list[Row]:
        """The rows of a run of the same code on the same machine."""
        try:
            found = json.loads(self.path.with_suffix(".json").read_text())
            head, rows = found["header"], found["rows"]
        except (OSError, ValueError, KeyError):
            return []
        if any(_without_load(head.get(key)) != _without_load(self.head[key]) for key in SAME):
            return []
        measured = {_group(row) for row in rows if "error" not in row}
        failed = {_group(row) for row in rows if "error" in row and row["name"].startswith(OURS)}
        return [row for row in rows if _group(row) in measured - failed]  # the others are tried again

    def has(self, case: str, precision: str | None = None, batch: int | None = None) -> bool:
        """Whether this group is measured."""
        return any(_group(row) == (case, precision, batch) for row in self.rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Append a group of rows and write the files."""
        self.rows += rows
        self.head["clocks after"] = clocks()
        self.path.with_suffix(".md").write_text(self.text() + "\n")
        write_json(self.path.with_suffix(".json"), self.head, self.rows)

    def text(self) -> str:
        """The part as Markdown: a table of all checks, else one for each case, of configurations for each op."""

        def table(row: Row) -> tuple[Any, ...]:
            if self.part == "tests":
                return ()
            return (row["case"].split()[0] if self.part == "tune" else row["case"]), row["precision"]

        tables = [markdown([row for row in self.rows if table(row) == t]) for t in dict.fromkeys(map(table, self.rows))]
        return "\n\n".join([f"# {self.part}", markdown_header(self.head), *tables])


def _group(row: Row) -> tuple[Any, ...]:
    return row["case"], row.get("precision"), row.get("batch")


def _without_load(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "load"} if isinstance(value, dict) else value
