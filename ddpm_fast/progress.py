"""Progress bars for long work."""

import sys
from typing import Any

LOG_INTERVAL = 10  # seconds between the lines of a bar that is written to a file


def progress_bar(total: int, description: str, **options: Any) -> Any:
    """A tqdm bar on stderr, lively on a terminal or in a notebook; `options` are tqdm's."""
    from tqdm.auto import tqdm  # only those who want to see a bar need it

    lively = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(total=total, desc=description, mininterval=0.1 if lively else LOG_INTERVAL, **options)
