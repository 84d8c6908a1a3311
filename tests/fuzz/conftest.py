"""Says at the end how many cases ran, and how many of the calls were accepted and refused."""

from collections.abc import Iterator
from typing import Any

import pytest

from .harness import CASES, SCALE, TALLIES


@pytest.fixture(autouse=True)
def saw_both(request: pytest.FixtureRequest) -> Iterator[None]:
    """A property that accepts everything, or nothing, tests less than it seems to."""
    yield
    tally = TALLIES.get(f"{request.node.module.__name__}.{request.node.name}")
    missing = tally and tally.suspicious()
    assert not missing, missing


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ran = {name: tally for name, tally in TALLIES.items() if tally.accepted + tally.refused}
    if not ran:
        return
    terminalreporter.section("fuzz: calls accepted and refused")
    for name, tally in ran.items():
        total = tally.accepted + tally.refused
        terminalreporter.write_line(
            f"{total:8} {tally.accepted:8} {tally.refused:8}  {name.removeprefix('fuzz.test_')}"
        )
    accepted, refused = sum(t.accepted for t in ran.values()), sum(t.refused for t in ran.values())
    terminalreporter.write_line(f"{accepted + refused:8} {accepted:8} {refused:8}  of {round(CASES * SCALE)} in all")
