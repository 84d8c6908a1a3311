"""The committed tables of what is fastest on a GPU, `tables/<gpu>.json`: {op: {key: name}}. No Triton here."""

import functools
import json
import re
from pathlib import Path
from typing import Any

Names = dict[str, dict[str, str]]  # op -> key -> name

TABLES = Path(__file__).parent / "tables"


def slug(gpu: str) -> str:
    """A GPU's name as that of a file: "NVIDIA H200" is nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


@functools.cache
def committed(gpu: str) -> Names:
    """The table of a GPU; empty where there is none."""
    return read(TABLES / f"{slug(gpu)}.json")


def read(path: Path) -> dict[str, Any]:
    """A file of tables; empty where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
