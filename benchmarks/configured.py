"""Run Triton kernels in a configuration of choice: to compile it, or to time it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def configured(name: str) -> Iterator[None]:
    """Within the block every kernel that has a configuration of this name runs in it."""
    from ddpm_fast.kernels import configs

    chosen = configs.chosen

    def named(op: str, key: str, listed: Mapping[str, Any], *rest: Any) -> Any:
        return listed[name] if name in listed else chosen(op, key, listed, *rest)

    with mock.patch.object(configs, "chosen", named):
        yield
