"""Lazy load of the native module ddpm_fast._C; remembers why it failed."""

import functools
import importlib
from pathlib import Path
from typing import Any

from ._dispatch import Unavailable


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("ddpm_fast._C"), None
    except ImportError as error:
        # Written by setup.py when the build was skipped or failed.
        note = Path(__file__).parent.parent / "_C_unavailable.txt"
        reason = note.read_text().strip() if note.exists() else f"import of ddpm_fast._C failed: {error}"
        return None, reason


def load() -> Any:
    """The module ddpm_fast._C.

    Raises:
        Unavailable: it was not built, or can't be imported.
    """
    module, reason = _load()
    if module is None:
        raise Unavailable(reason)
    return module
