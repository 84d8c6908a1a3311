"""Run Triton kernels in a configuration of choice: to compile it, or to time it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def configured(name: str) -> Iterator[None]:
    """Within the block all that has a configuration of this name runs in it: kernels, or a chain of reverse steps."""
    from ddpm_fast import engine
    from ddpm_fast.kernels import configs

    chosen, fastest_way = configs.chosen, engine.fastest_way

    def named(op: str, key: str, listed: Mapping[str, Any], *rest: Any) -> Any:
        return listed[name] if name in listed else chosen(op, key, listed, *rest)

    def way(*network_and_batch: Any) -> str:
        return name if name in engine.WAYS else fastest_way(*network_and_batch)

    with mock.patch.object(configs, "chosen", named), mock.patch.object(engine, "fastest_way", way):
        yield
